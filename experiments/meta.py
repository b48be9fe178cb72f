"""Meta-train a root finder on the fixed-point problems of a trained family, and measure it on held-out ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from experiments.bench import measure, problems, report, runner, solvers
from experiments.bench.measure import Rules, stamp_of
from experiments.bench.options import Compared, OnDevice, OnFamily, Options, Seeded, Timed, Unrolled
from experiments.bench.problems import Family
from experiments.bench.runner import Row, at_least_one, known, read_rows, row_files, write_rows
from experiments.bench.statistics import Field
from experiments.bench.tables import Table, by_name, middle
from experiments.configs.recipes import HELD, OWN, RECIPES, TEXT, Recipe
from metabroyden import Broyden, load_solver, save_solver
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet, distributed
from metabroyden.meta.defaults import best_damping, dilations, gated_steps, tasks_layout
from metabroyden.meta.fit import make_learned
from metabroyden.meta.objectives import OBJECTIVES
from metabroyden.meta.progress import progress_bar, tensorboard
from metabroyden.solvers.classical import grids
from metabroyden.storage import atomic_write
from metabroyden.zoo.tasks import family_tasks

CLASSICAL = "classical"
TOLERANCES, CLOCKED = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5), (1e-2, 1e-3)
FREE = ("family", "solver", "seed", "models", "device")
"""Options that do not make a trial of a run."""
BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40)


@dataclass(frozen=True)
class Meta(Seeded, Unrolled, Compared, Timed, OnFamily, OnDevice, command="meta"):
    """Meta-train a solver on a family, compare it with the tuned classical ones on held-out problems, write the report."""

    solver: str = "meta-broyden"
    """A learned solver, or "classical" for the rows of the classical ones."""
    steps: int | None = None
    """Outer steps, instead of the recipe's."""
    patience: int | None = None
    """Looks at validation (eight in all) without improvement after which training stops; None: never."""
    cpu_minutes: float | None = None
    """CPU time after which training stops; None: no limit."""
    estimator: str = "backprop"
    """Of the gradient: "backprop" or "pes", see metabroyden.meta.MetaConfig."""
    objective: str | None = None
    """What is minimised, instead of the recipe's: a name of metabroyden.meta.objectives.OBJECTIVES."""
    conditioning: str = "input"
    """What the solver knows of x: its injection ("input") or the first evaluation ("initial_value")."""


def run(config: Meta) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it writes the report again.

    Under torchrun all processes train, each on its share of every batch, and the first measures and writes.
    """
    known("solver", [config.solver], [*RECIPES, CLASSICAL])
    at_least_one(config, "steps", "budget", "samples", "repeats")
    known("objective", [config.objective] if config.objective is not None else [], OBJECTIVES)
    device = distributed.resolve(config.device)
    with distributed.processes(device):
        job = Job(config, device=device)
        job.run()
        if distributed.rank() > 0:
            return
    console = Console()
    console.print(f"{config.family}, {config.solver}, seed {config.seed}: {job.folder}")
    console.print(Markdown(write(job.results).read_text()))


class Job:
    """One solver on one family, trained by a recipe: that of its name, unless another is given.

    Attributes:
        model, criterion: the frozen family. results: folder of reports. work: folder of what is unfinished. common: what all
            solvers of the family are held against, found once.
    """

    def __init__(self, config: Meta, recipe: Recipe | None = None, device: torch.device | None = None) -> None:
        self.config, self.first = config, distributed.rank() == 0
        self.device = distributed.resolve(config.device) if device is None else device
        self.family = Family(config.family, config.models, self.device)
        self.criterion, self.texts, self.model = self.family.criterion, self.family.texts, self.family.model()
        self.recipe = self.usual() if recipe is None else recipe
        name = config.solver if config.solver == CLASSICAL else f"{config.solver}-seed{config.seed}"
        self.results = runner.results_folder(config.results, config, (*FREE, *Options.__dataclass_fields__))
        self.folder = self.results / config.family / name
        places = {key: getattr(Meta, key) for key in ("models", *Options.__dataclass_fields__)}
        identity = runner.config_hash(replace(config, **places, device=self.device.type))
        measured = (config.budget, config.samples, TOLERANCES, grids(config.budget), self.family.path)
        self.common = config.runs / config.family / f"common-{runner.digest(*measured)}"
        digest = runner.digest(self.recipe, BUDGETS, CLOCKED, HELD, *measured)
        self.work = config.runs / config.family / f"{name}-{identity}-{digest}"
        if self.first:
            for folder in (self.work, self.common) if config.overwrite else ():
                shutil.rmtree(folder, ignore_errors=True)
            self.work.mkdir(parents=True, exist_ok=True)
            if not (self.work / "began.json").exists():
                atomic_write(self.work / "began.json", json.dumps(runner.provenance(), indent=2) + "\n")
        distributed.wait()

    def usual(self) -> Recipe:
        """The recipe of the solver's name, as the family and the settings want it."""
        config, recipe = self.config, RECIPES.get(self.config.solver, Recipe())
        if self.texts:
            recipe = replace(recipe, **TEXT.get(config.solver, TEXT[""]))
        recipe = replace(recipe, **OWN.get((config.family, config.solver), {}))
        if config.solver == "meta-broyden":
            cell, given = self.model.cell, {**recipe.options, **self.altered_options()}
            layout = getattr(cell, "layout", "vector")  # of a converted network, whose states go as one vector
            usual: dict[str, Any] = {"dilations": dilations(cell, layout)}
            if "learned_steps" not in given:
                trained, coefficients = recipe.segments * recipe.longest, given.get("coefficients", "schedule")
                usual |= gated_steps(trained, layout, coefficients)
            recipe = replace(recipe, options={**usual, **given})
        return replace(recipe, steps=config.steps or recipe.steps, objective=config.objective or recipe.objective)

    def run(self) -> None:
        """Train, measure, publish."""
        solver = None if self.config.solver == CLASSICAL else self.trained()
        if not self.first:
            return
        rows = self.work / "rows.jsonl"
        if not rows.exists():
            atomic_write(self.work / "config.json", json.dumps(self._described(solver), indent=2) + "\n")
            write_rows(rows, self._measured(solver))
        runner.publish(self.folder, read_rows(rows), report.read_config(self.work))
        if solver is not None:
            atomic_write(self.folder / "solver.safetensors", (self.work / "solver.safetensors").read_bytes())

    def _tasks(self) -> TaskSet:
        tasks = family_tasks(self.model, self.criterion)
        if not self.texts:
            return tasks
        return tasks.prepared(self.recipe.pool, torch.Generator().manual_seed(self.config.seed), HELD)

    def trained(self) -> Any:
        """The solver: that of an earlier sitting where it was finished there."""
        path = self.work / "solver.safetensors"
        if path.exists():
            return load_solver(path).to(self.device)
        config, recipe = self.config, self.recipe
        tasks = self._tasks()
        layout, channels = tasks_layout(tasks)
        conditioning = config.conditioning if channels else "initial_value"

        def make(**options: Any) -> Any:
            return make_learned(
                recipe.kind or config.solver,
                layout,
                seed=config.seed,
                conditioning=conditioning,
                context_channels=channels if conditioning == "input" else 0,
                **{**recipe.options, **options},
            ).to(self.device)

        solver = self.altered(make(**self._base_step(make, tasks)))
        meta = MetaConfig(
            steps=recipe.steps,
            unroll=recipe.unroll,
            segments=recipe.segments,
            batch=recipe.batch,
            learning_rate=recipe.learning_rate,
            orthogonal_rate=recipe.orthogonal_rate,
            objective=OBJECTIVES[recipe.objective](),
            backend=config.backend,
            seed=config.seed,
            validate_every=max(1, recipe.steps // 8),
            validation_nfe=config.budget,
            validation_size=HELD if self.texts else 256,
            estimator=config.estimator,
            patience=config.patience,
            seconds=None if config.cpu_minutes is None else 60 * config.cpu_minutes,
            budget_clock="cpu",
            **recipe.training,
        )
        trainer = MetaTrainer(solver, tasks, meta, checkpoint=self.work / "training.safetensors")
        title, log = f"{config.family}, {config.solver}", self.work / "tensorboard"
        with (
            progress_bar(title, recipe.steps, show=config.progress and self.first) as bar,
            tensorboard(log, trainer.step) if self.first else nullcontext() as trainer.curves,
        ):
            trainer.run(bar)
        solver.fingerprint = fingerprint(self.model.cell)
        if self.first:
            save_solver(solver, path)
        return solver

    def altered_options(self) -> dict[str, Any]:
        """Options of a MetaBroyden that are not its recipe's: none, unless a subclass says otherwise."""
        return {}

    def altered(self, solver: Any) -> Any:
        """What an ablation does to the untrained solver; here nothing."""
        return solver

    def _base_step(self, make: Callable[..., Any], tasks: TaskSet) -> dict[str, float]:
        """The option `damping` of a MetaBroyden, as the untrained solver does best on a few validation problems; on operator
        splitting the tuned `alpha` of the classical rival, which it is before training."""
        if self.config.solver != "meta-broyden" or {"damping", "alpha"} & set(self.recipe.options):
            return {}
        if self.recipe.kind == "meta-splitting":
            alpha = self._rivals()["Peaceman-Rachford"].alpha if self.first else 0.0
            return {"alpha": distributed.from_first([alpha])[0]}
        z0, x = tasks.prepare(tasks.split("validation")[:32])
        found = best_damping(make, tasks.f, z0, x, max_nfe=self.config.budget)
        return {"damping": distributed.from_first([found])[0]}

    def _measured(self, solver: Any) -> list[Row]:
        """A solver beside the tuned classical ones, or these and untuned Broyden alone."""
        config, classical = self.config, self._rivals()
        held = self.family.problems("test", config.samples)
        sure = (classical["Peaceman-Rachford"],) if self.family.splitting else ()
        # once for all solvers of the family
        held = problems.with_equilibria(self.common / "equilibria.safetensors", self.model.cell, held, sure)
        if solver is None:
            everyone = [
                solvers.contestant(name, one) for name, one in {**classical, "Broyden": Broyden(config.budget)}.items()
            ]
        else:
            everyone = [replace(solvers.contestant(config.solver, solver), seed=config.seed)]
        rules = Rules(TOLERANCES, config.budget, rounds=config.repeats, clocked=CLOCKED)
        rows, stamp = measure.measure(held, everyone, rules, progress=config.progress), stamp_of(held)
        depths = [k for k in BUDGETS if k <= config.budget]
        for one in everyone:
            rows += [{**row, **stamp(one)} for row in measure.depth_rows(held, one.solver, depths)]
            if self.texts:
                model = self.family.model(solver=one.solver)
                rows += measure.leak_rows(model, self.criterion, stamp(one), tolerances=CLOCKED)  # type: ignore[arg-type]
            if solver is not None:
                rows += measure.horizon_rows(held, one, stamp, steps=4 * self.recipe.longest * self.recipe.segments)
        return rows

    def _rivals(self) -> dict[str, Any]:
        """The classical solvers, tuned on validation problems: once for all solvers of the family."""
        files = sorted(self.common.glob("*.solver")) if (self.common / "tuned").exists() else []
        if files:
            return {path.stem: load_solver(path) for path in files}
        validation = self.family.problems("validation", 64)
        found = solvers.tuned(validation, self.config.budget, splitting=self.family.splitting)
        for name, solver in found.items():
            save_solver(solver, self.common / f"{name}.solver")
        atomic_write(self.common / "tuned", "")
        return dict(sorted(found.items()))

    def _described(self, solver: Any) -> Row:
        config = self.config
        always = f"meta --family {config.family} --solver {config.solver} --seed {config.seed}"
        described = {
            "command": runner.command_line(always, config, (*FREE, *Options.__dataclass_fields__)),
            "config": runner.plain(config),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "model_sha256": runner.sha256(self.family.path),
            "began": json.loads((self.work / "began.json").read_text()),
            "provenance": runner.provenance(),
        }
        if solver is None:
            return described
        parameters = {"parameters": sum(p.numel() for p in solver.parameters())}
        parameters["model_parameters"] = sum(p.numel() for p in self.model.parameters())
        return {**described, "recipe": asdict(self.recipe), **parameters, "summary": solver.summary}


def write(folder: Path) -> Path:
    """report.md over all solvers of all families in a folder, from rows alone."""
    rows, described = [], []
    for path in row_files(folder, "*/*/rows.jsonl"):
        config = report.read_config(path.parent)
        if "solver" in config.get("config", {}):  # other experiments publish here, too
            described.append(config)
            rows += [_named(row, config["config"]) for row in read_rows(path)]
    field = Field(rows)
    learned = field.solvers(None, "learned")
    words = (
        "Median evaluations over held-out samples and seeds (share solved), a failure counting the whole budget, and "
        "the ratio to the best classical solver. Times, scores and other comparisons: [the race](../race/report.md)."
    )
    tables = [_evaluations(field, tolerance, learned) for tolerance in CLOCKED]
    return report.write(
        folder, "Meta-trained solvers", [words, *tables, _horizon(field, learned), _training(described)]
    )


def _named(row: Row, config: Row) -> Row:
    """A row with its family, kind and seed, which older ones leave to their folder."""
    classical = config["solver"] == CLASSICAL or row.get("solver") not in (None, config["solver"])
    who = {"kind": "classical", "seed": None} if classical else {"kind": "learned", "seed": config["seed"]}
    return {**row, **who, "family": config["family"]}


def _evaluations(field: Field, tolerance: float, learned: list[str]) -> Table:
    def rival(family: str) -> str:
        return field.best(family, tolerance)

    def cell(name: str, family: str) -> str:
        if field.outcome(family, name, tolerance) is None:
            return ""
        return f"{field.must(family, name, tolerance)}, {field.ratio(family, name, rival(family), tolerance)}"

    families = [family for family in field.families if field.solvers(family, "classical")]
    columns = [(name, lambda family, name=name: cell(name, family)) for name in learned]
    best = ("best classical", lambda family: f"{field.must(family, rival(family), tolerance)} {rival(family)}")
    table = by_name(f"To {tolerance:g}", families, [("family", str), *columns, best])
    means = [f"{field.mean_ratio(families, name, rival, tolerance)}" for name in learned]
    return table._replace(body=[*table.body, ["geometric mean", *means, ""]])


def _horizon(field: Field, learned: list[str]) -> Table:
    body = []
    for family in field.families:
        for name in learned:
            rows = field.of("horizon", family, name, tolerance=1e-3)
            if rows:
                counts = [
                    str(sum(row[key] for row in rows)) for key in ("samples", "fallback", "lost", "broken", "triggered")
                ]
                body.append([family, name, str(rows[0]["steps"]), *counts])
    head = [
        "family",
        "solver",
        "evaluations",
        "samples",
        "fallback solves",
        "lost",
        "with what was spent before",
    ]
    words = "Four times past the trained horizon, to 0.001, all seeds: samples that the fallback solves, and those lost"
    return Table(words, [*head, "handed over"], body)


def _training(described: list[Row]) -> Table:
    runs: dict[tuple[str, str], list[Row]] = {}
    for one in described:
        if "summary" in one:
            runs.setdefault((one["config"]["family"], one["config"]["solver"]), []).append(one)
    body = []
    for (family, name), found in runs.items():
        recipe, cpu = found[0]["recipe"], middle(one["summary"].get("cpu_seconds") for one in found)
        steps = f"{recipe['steps']} × {recipe['unroll']}, {recipe['segments']} segments of {recipe['batch']}"
        seeds = " ".join(str(one["config"]["seed"]) for one in found)
        body.append([family, name, seeds, steps, f"{found[0]['parameters']:,}", f"{cpu:.0f} s"])
    return Table(
        "Training (CPU time: median over seeds)", ["family", "solver", "seeds", "steps", "parameters", "CPU"], body
    )
