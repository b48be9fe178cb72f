"""Meta-train a root finder on the fixed-point problems of a trained family, and measure it on held-out ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from experiments.bench.runner import read_rows
from experiments.legacy import equilibria, meta_report, meta_rows, texts
from experiments.legacy.provenance import (
    command_line,
    config_hash,
    plain,
    provenance,
    results_folder,
    write_results,
)
from metabroyden import Anderson, Broyden, load_solver, save_solver
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.learned.safeguard import BY_PROGRESS
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet, distributed
from metabroyden.meta.defaults import RATES, best_damping, dilations, gated_steps, tasks_layout
from metabroyden.meta.fit import make_learned
from metabroyden.meta.objectives import OBJECTIVES
from metabroyden.meta.progress import progress_bar, tensorboard
from metabroyden.solvers.classical import grids
from metabroyden.storage import atomic_write
from metabroyden.zoo.models import load_model
from metabroyden.zoo.models.criteria import NextToken
from metabroyden.zoo.models.families import get_family, trained_model
from metabroyden.zoo.tasks import family_tasks

CLASSICAL = "classical"
CLOCKED = (1e-2, 1e-3)
FREE = ("family", "solver", "seed", "models", "device", "results", "runs", "fresh", "progress")
"""Options that do not make a trial of a run."""
BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40)


@dataclass(frozen=True)
class Recipe:
    """How a solver is meta-trained, see `MetaConfig` and the solver's own config; `kind` where it is not named by that."""

    kind: str = ""
    steps: int = 600
    unroll: int | tuple[int, int] = 14
    segments: int = 2
    batch: int = 32
    objective: str = "residual"
    training: dict[str, Any] = field(default_factory=dict)  # more of MetaConfig
    learning_rate: float = 2e-3
    orthogonal_rate: float = 0.0
    pool: int = 1024  # training contexts of a text, made beforehand
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Solver steps of a segment, at most."""
        return self.unroll if isinstance(self.unroll, int) else self.unroll[1]


_SAME: dict[str, Any] = {"initializer_width": 32, "safeguard": BY_PROGRESS}
RECIPES: dict[str, Recipe] = {
    "meta-broyden": Recipe(**RATES, options=_SAME),
    "grouped": Recipe(steps=300, learning_rate=4e-3, options={**_SAME, "rank": 32}),
    "coordinatewise": Recipe(steps=400, segments=1, options=_SAME),
    "hyper-anderson": Recipe(
        steps=1100, unroll=10, segments=1, learning_rate=1e-3, options={**_SAME, "memory": 8, "gram": True}
    ),
    "neural-fixed-point": Recipe(options=_SAME),
    "gated-secant": Recipe(kind="neural-fixed-point", options={**_SAME, "form": "secant"}),
    "meta-learner": Recipe(steps=400, segments=1, options=_SAME),
    "started-broyden": Recipe(kind="started", segments=1, options={**_SAME, "classical": Broyden(60)}),
    "started-anderson": Recipe(kind="started", segments=1, options={**_SAME, "classical": Anderson()}),
}
"""All with the same safeguard and, but for `OWN`, the same width of the start. HyperAnderson is in the best of the
configurations tried (results/meta/hyper-anderson-tuning.md), and has about as much CPU time or more."""
TEXT: dict[str, dict[str, Any]] = {
    "meta-broyden": {"batch": 16, "steps": 200, "segments": 1},
    "hyper-anderson": {"batch": 16},
    "": {"batch": 16, "steps": 250},
}
"""What is different where f is a language model's, ten times as costly: by solver, and of all others."""
_DATA = ("digits", "fashion")
_WIDE: dict[str, Any] = {**_SAME, "initializer_width": 128}
_QUICK: dict[str, Any] = {"steps": 1500, "unroll": 7, "segments": 1, "options": _WIDE}
_LAYERS: dict[str, Any] = {"steps": 3000, "unroll": 6, "segments": 1, "options": {**_WIDE, "rank": 48}}
_SPLIT: dict[str, Any] = {"kind": "meta-splitting", "segments": 1}
_SHORT: dict[str, Any] = {"steps": 150, "unroll": 4, "segments": 6, "learning_rate": 2e-3}
_SEEING: dict[str, Any] = {**_SAME, "learned_steps": 12, "coefficients": "lstm", "dilations": (1, 1)}
OWN: dict[tuple[str, str], dict[str, Any]] = {
    **{(f"dense-{data}", "meta-broyden"): {**_QUICK, "unroll": 8} for data in _DATA},
    **{(f"monotone-dense-{data}", "meta-broyden"): {**_SPLIT, **_QUICK} for data in _DATA},
    ("mlp-digits", "meta-broyden"): _LAYERS,
    ("mlp-fashion", "meta-broyden"): {
        **_LAYERS,
        "steps": 6000,
        "options": {**_LAYERS["options"], "coefficients": "lstm"},
    },
    ("monotone-conv-digits", "meta-broyden"): {**_SPLIT, "steps": 450},
    ("monotone-conv-fashion", "meta-broyden"): {**_SPLIT, "steps": 450, "options": {**_SAME, "alpha": 0.4}},
    ("monotone-multitier-digits", "meta-broyden"): {**_SPLIT, "options": {**_SAME, "rank": 48}},
    ("monotone-multitier-fashion", "meta-broyden"): {**_SPLIT, "steps": 450, "options": {**_SAME, "rank": 48}},
    ("transformer-shakespeare", "meta-broyden"): {**_SHORT, "orthogonal_rate": 0.0, "options": _SEEING},
    ("transformer-shakespeare", "grouped"): _SHORT,
    ("multiscale-fashion", "meta-broyden"): {"steps": 1200, "unroll": 12, "segments": 1},
    ("multiscale-fashion", "grouped"): {"steps": 150},
    ("trellisnet-words", "meta-broyden"): {"steps": 300, "unroll": 12},
}
"""What is different for a solver on one family. Where states are vectors starts cost little, and unrolls of as many steps as
1e-3 takes do best; converted networks are solved exactly in six, and longer unrolls teach nothing (43). On monotone
networks MetaBroyden steps on Peaceman–Rachford's map, see `MetaSplitting`: one segment is enough, and on monotone-conv-
fashion twice the rival's α does better (results/RESEARCH.md, 42). On multiscale-fashion and words MetaBroyden does
better in shorter unrolls (45), and GroupedLSTM's steps are dear on the former. Gradients through the Transformer explode
in longer ones: many short segments, and small steps (41). An LSTM that sees the solve is better than a table there (47) and
on mlp-fashion, where a table learns nothing (48)."""
HELD = 128
"""Validation problems of a text on which weights are chosen."""


@dataclass(frozen=True)
class Meta:
    """Meta-train a solver on a family, compare it with the tuned classical ones on held-out problems, write the report."""

    family: str = "conv-fashion"
    """A family of metabroyden.zoo.models.FAMILIES."""
    solver: str = "meta-broyden"
    """A learned solver, or "classical" for the rows of the classical ones."""
    seed: int = 0
    """Seed of the solver's weights and of the batches."""
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
    budget: int = 60
    """Evaluations each sample may cost in the comparison."""
    samples: int = 256
    """Held-out problems used."""
    repeats: int = 5
    """Interleaved timing repeats."""
    backend: str = "higher"
    """Unroll by "higher", or by plain autograd ("native"): the same gradients."""
    models: Path = Path("results/models")
    """Where the frozen models are."""
    device: str = "auto"
    """Where to train and measure: auto (a GPU where there is one), cpu, cuda, cuda:N."""
    results: Path = Path("results/meta")
    """Where results go; those of a run with other settings than these to a trial- folder in it, with a report of its own."""
    runs: Path = Path("runs/meta")
    """Where unfinished work is kept, to go on from."""
    fresh: bool = False
    """Throw away all work of this configuration, and the family's tuned classical solvers, and start anew."""
    progress: bool = True
    """Show progress bars."""


def run(config: Meta) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it writes the report again.

    Under torchrun all processes train, each on its share of every batch, and the first measures and writes.
    """
    if config.solver != CLASSICAL and config.solver not in RECIPES:
        raise ValueError(f"unknown solver {config.solver!r}: known are {', '.join([*RECIPES, CLASSICAL])}")
    for name in ("steps", "budget", "samples", "repeats"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if config.objective is not None and config.objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {config.objective!r}: known are {', '.join(OBJECTIVES)}")
    device = distributed.resolve(config.device)
    with distributed.processes(device):
        job = Job(config, device=device)
        job.run()
        if distributed.rank() > 0:
            return
    console = Console()
    console.print(f"{config.family}, {config.solver}, seed {config.seed}: {job.folder}")
    console.print(Markdown(meta_report.write(job.results).read_text()))


class Job:
    """One solver on one family, trained by a recipe: that of its name, unless another is given.

    Attributes:
        model, criterion: the frozen family. results: folder of reports. work: folder of what is unfinished. common: what all
            solvers of the family are held against, found once.
    """

    def __init__(self, config: Meta, recipe: Recipe | None = None, device: torch.device | None = None) -> None:
        self.config, self.first = config, distributed.rank() == 0
        self.device = distributed.resolve(config.device) if device is None else device
        identity = replace(
            config, models=Path(), results=Path(), runs=Path(), fresh=False, progress=True, device=self.device.type
        )
        self.path, family = trained_model(config.models, config.family), get_family(config.family)
        self.family, self.criterion = family, family.criterion()
        self.model = self._model()
        self.texts = isinstance(self.criterion, NextToken)
        self.recipe = self.usual() if recipe is None else recipe
        name = config.solver if config.solver == CLASSICAL else f"{config.solver}-seed{config.seed}"
        self.results = results_folder(config.results, config, FREE)
        self.folder = self.results / config.family / name
        settings = (self.recipe, BUDGETS, CLOCKED, HELD, meta_rows.TOLERANCES, grids(config.budget))
        digest = hashlib.sha256(repr(settings).encode() + self.path.read_bytes()).hexdigest()[:8]
        self.work = config.runs / config.family / f"{name}-{config_hash(identity)}-{digest}"
        measured = (config.budget, config.samples, meta_rows.TOLERANCES, grids(config.budget))
        digest = hashlib.sha256(repr(measured).encode() + self.path.read_bytes()).hexdigest()[:8]
        self.common = config.runs / config.family / f"common-{digest}"
        if self.first:
            for folder in (self.work, self.common) if config.fresh else ():
                shutil.rmtree(folder, ignore_errors=True)
            self.work.mkdir(parents=True, exist_ok=True)
            if not (self.work / "began.json").exists():
                atomic_write(self.work / "began.json", json.dumps(provenance(), indent=2) + "\n")
        distributed.wait()

    def _model(self, **options: Any) -> Any:
        return load_model(self.path, **options, warn=False).requires_grad_(False).to(self.device)

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
        if not (self.work / "rows.jsonl.gz").exists():
            write_results(self.work, self._measured(solver), self._described(solver))
        rows = read_rows(self.work / "rows.jsonl")
        write_results(self.folder, rows, json.loads((self.work / "config.json").read_text()))
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
            budget_seconds=None if config.cpu_minutes is None else 60 * config.cpu_minutes,
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

    def _measured(self, solver: Any) -> list[dict[str, Any]]:
        config = self.config
        held = equilibria.held_out(self.model, self.criterion, "test", config.samples)
        classical = self._rivals()
        contestants = (
            {config.solver: solver} if solver is not None else {**classical, "Broyden": Broyden(config.budget)}
        )
        sure = (classical["Peaceman-Rachford"],) if self.family.splitting else ()
        # once for all solvers of the family
        star, known = meta_rows.kept_equilibria(self.common / "equilibria.safetensors", self.model.cell, held, sure)
        index = torch.arange(len(held), device=held.device)
        at_star = float(held.judge(meta_rows.states_at(star, held), index).mean())
        rows: list[dict[str, Any]] = [
            {"row": "star", "known": float(known.float().mean()), "score": at_star, "samples": len(held)}
        ]
        with progress_bar(f"{config.family}, measuring", len(contestants) + 1, show=config.progress) as bar:
            for number, (name, one) in enumerate(contestants.items(), 1):
                rows += meta_rows.solve_rows(name, one, held, star, known, budget=config.budget)
                depths = [k for k in BUDGETS if k <= config.budget]
                rows += [
                    {**row, "row": "score", "solver": name}
                    for row in equilibria.depth_rows(config.family, held, solver=one, depths=depths)
                ]
                if isinstance(self.criterion, NextToken):
                    leaks = texts.leak_rows(name, self._model(solver=one), self.criterion, tolerances=CLOCKED)
                    rows += [{**row, "solver": name} for row in leaks]
                if bar is not None:
                    bar(number, name)
            if solver is not None:
                steps = 4 * self.recipe.longest * self.recipe.segments
                rows += meta_rows.horizon_rows(config.solver, solver, held, steps=steps)
                batch = 64 if self.texts else 256
                both = {config.solver: solver, **classical}
                rows += meta_rows.clock_rows(
                    both, held, tolerances=CLOCKED, budget=config.budget, batch=batch, repeats=config.repeats
                )
        return rows

    def _rivals(self) -> dict[str, Any]:
        """The classical solvers, tuned on validation problems: once for all solvers of the family."""
        files = sorted(self.common.glob("*.solver")) if (self.common / "tuned").exists() else []
        if files:
            return {path.stem: load_solver(path) for path in files}
        validation = equilibria.held_out(self.model, self.criterion, "validation", 64)
        found = equilibria.tuned_solvers(validation, self.config.budget)
        if self.family.splitting:
            found |= equilibria.splitting_solvers(validation, self.config.budget)
        for name, solver in found.items():
            save_solver(solver, self.common / f"{name}.solver")
        atomic_write(self.common / "tuned", "")
        return dict(sorted(found.items()))

    def _described(self, solver: Any) -> dict[str, Any]:
        config = self.config
        always = f"meta --family {config.family} --solver {config.solver} --seed {config.seed}"
        described = {
            "command": command_line(always, config, FREE),
            "config": plain(config),
            "device": _name(self.device),
            "model_sha256": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "began": json.loads((self.work / "began.json").read_text()),
            "provenance": provenance(),
        }
        if solver is not None:
            described |= {
                "recipe": asdict(self.recipe),
                "parameters": sum(p.numel() for p in solver.parameters()),
                "model_parameters": sum(p.numel() for p in self.model.parameters()),
                "summary": solver.summary,
            }
        return described


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
