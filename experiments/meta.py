"""Meta-train a root finder on the fixed-point problems of a trained family, and measure it on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench import measure, report, runner, solvers
from experiments.bench.measure import Rules, stamp_of
from experiments.bench.options import Compared, OnDevice, OnFamily, Seeded, Unrolled
from experiments.bench.problems import Family
from experiments.bench.runner import Row, Run, at_least_one, known, sha256
from experiments.configs.recipes import HELD, POOL, RECIPES, recipe
from metabroyden import Broyden, load_solver, save_solver
from metabroyden.comparison.statistics import BEST, Field, against
from metabroyden.comparison.tables import chosen, grouped, listed, middle
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.meta import MetaTrainer, Plan, TaskSet, distributed, plan
from metabroyden.meta.objectives import OBJECTIVES
from metabroyden.meta.plan import measure_classical
from metabroyden.progress import progress_bar, tensorboard
from metabroyden.storage import atomic_write

CLASSICAL = "classical"
TOLERANCES, SHOWN = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5), (1e-2, 1e-3)
FREE = ("family", "solver", "seed", "models", "device")
"""Options that do not make a trial of a run."""


@dataclass(frozen=True)
class Meta(Seeded, Unrolled, Compared, OnFamily, OnDevice, command="meta"):
    """Meta-train a solver on a family, measure it on held-out problems, write the report."""

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
    objective: str = "residual"
    """What is minimised: a name of metabroyden.meta.objectives.OBJECTIVES."""
    conditioning: str = "auto"
    """What the solver sees of x: its injection ("input"), the first evaluation ("initial_value"), or the former where it
    can ("auto")."""


def run(config: Meta) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it writes the report again.

    Under torchrun all processes train, each on its share of every batch, and the first measures and writes.
    """
    known("solver", [config.solver], [*RECIPES, CLASSICAL])
    known("objective", [config.objective], OBJECTIVES)
    at_least_one(config, "steps", "budget", "samples")
    with distributed.processes(distributed.resolve(config.device)):
        job = Job(config)
        solver = None if config.solver == CLASSICAL else job.trained()
        if distributed.rank() > 0:
            return
    rows = job.run.unit("rows", lambda: job.measured(solver))
    name = CLASSICAL if solver is None else f"{config.solver}-seed{config.seed}"
    folder = runner.publish(job.run.folder / config.family / name, rows, job.described(solver))
    if solver is not None:
        atomic_write(folder / "solver.safetensors", job.path.read_bytes())
    runner.show(write(job.run.folder))


class Job:
    """One solver on one family, trained by its recipe.

    Args:
        config: the options.
        overrides: what takes the place of the recipe's choices, by flat name, see `metabroyden.meta.plan.plan`.
        prepare: what is done to the untrained solver.
    """

    def __init__(
        self,
        config: Meta,
        overrides: Mapping[str, Any] | None = None,
        prepare: Callable[[Any], Any] = lambda solver: solver,
    ) -> None:
        self.config, self.prepare = config, prepare
        self.device = distributed.resolve(config.device)
        self.family = Family(config.family, config.models, self.device)
        usual = recipe(config.family, config.solver, texts=self.family.texts)
        self.overrides = {**usual, **({"steps": config.steps} if config.steps else {}), **(overrides or {})}
        if "steps" in self.overrides:
            self.overrides.setdefault("validate_every", max(1, self.overrides["steps"] // 8))
        always = f"--family {config.family} --solver {config.solver} --seed {config.seed}"
        inputs = (self.overrides, TOLERANCES, self.device.type, self.family.path)
        # only one of several processes throws work away
        once = replace(config, overwrite=config.overwrite and distributed.rank() == 0)
        self.run = Run(once, free=FREE, shared=("models", "device"), inputs=inputs, always=always)
        self.path = self.run.work / "solver.safetensors"
        distributed.wait()

    def plan(self, tasks: TaskSet) -> tuple[Plan, Any]:
        """How the solver is made and trained, and its untrained self: as by `fit_solver`, but for the recipe."""
        config = self.config
        classical = replace(measure_classical(tasks, rtol=1e-3, max_nfe=config.budget), tuned=self.rivals)
        training = {
            "seed": config.seed,
            "validation_size": HELD if self.family.texts else 256,
            "estimator": config.estimator,
            "objective": OBJECTIVES[config.objective](),
            "backend": config.backend,
            "patience": config.patience,
            "budget_clock": "cpu",
            "validation_nfe": config.budget,
        }
        made = plan(
            tasks, classical, solver=config.solver, conditioning=config.conditioning, training=training,
            seconds=None if config.cpu_minutes is None else 60 * config.cpu_minutes, overrides=self.overrides,
        )  # fmt: skip
        names = [name for name in ("alpha", "damping") if name in made.options]
        measured = distributed.from_first([made.options[name] for name in names])
        made = replace(made, options=made.options | dict(zip(names, measured, strict=True)))
        return made, self.prepare(made.build(classical.problems[1]))

    def rivals(self) -> dict[str, Any]:
        """The classical solvers, tuned on validation problems."""
        held = self.family.problems("validation", 64)
        return solvers.tuned(held, self.config.budget, splitting=self.family.splitting)

    def trained(self) -> Any:
        """The solver: that of an earlier sitting where it was finished there."""
        if self.path.exists():
            return load_solver(self.path).to(self.device)
        config, first = self.config, distributed.rank() == 0
        tasks = self.family.tasks(config.seed, pool=POOL, held=HELD)
        made, solver = self.plan(tasks)
        trainer = MetaTrainer(solver, tasks, made.training, checkpoint=self.run.work / "training.safetensors")
        title, log = f"{config.family}, {config.solver}", self.run.work / "tensorboard"
        with (
            progress_bar(title, made.training.steps, show=config.progress and first) as bar,
            tensorboard(log, trainer.step) if first else nullcontext() as trainer.curves,
        ):
            trainer.run(bar)
        solver.fingerprint = fingerprint(tasks.f)
        if first:
            save_solver(solver, self.path)
        return solver

    def measured(self, solver: Any) -> list[Row]:
        """Rows of a solver and how it fares far beyond its unrolls; without one, of the classical solvers, tuned."""
        config, family = self.config, self.family
        held, rules = family.problems("test", config.samples), Rules(TOLERANCES, config.budget)
        if solver is None:
            everyone = solvers.contestants(**self.rivals(), Broyden=Broyden(config.budget))
            return measure.measure(held, everyone, rules, progress=config.progress)
        one, told = solvers.contestant(config.solver, solver, config.seed), solver.summary["meta_training"]
        rows = measure.measure(held, [one], rules, progress=config.progress)
        steps = 4 * told["segments"] * int(np.max(told["unroll"]))
        return rows + measure.horizon_rows(held, one, stamp_of(held), steps=steps)

    def described(self, solver: Any) -> Row:
        """What stands beside the rows."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        more = {"device": device, "model_sha256": sha256(self.family.path)}
        if solver is not None:
            more |= {"parameters": sum(p.numel() for p in solver.parameters()), "summary": solver.summary}
        return self.run.described(**more)


def write(folder: Path) -> Path:
    """report.md over all solvers of all families in a folder, from rows alone."""
    rows: list[Row] = []
    trained: dict[tuple[str, str], list[Row]] = {}
    for described, found in report.runs_below(folder, "*/*/rows.jsonl"):
        config = described.get("config", {})
        if "solver" not in config:  # other experiments publish here, too
            continue
        # older rows leave these to their folder
        stamp = {"family": config["family"], "seed": config["seed"]}
        stamp["kind"] = "classical" if config["solver"] == CLASSICAL else "learned"
        rows += [{**row, **stamp} for row in found if row["row"] in ("solve", "horizon")]
        if "summary" in described:
            trained.setdefault((config["family"], config["solver"]), []).append(described)
    field = Field(rows)
    words = (
        "Median evaluations over held-out samples and seeds (share solved), a failure counting the whole budget, and "
        "the ratio to the best classical solver. Times, scores and other comparisons: [the race](../race/report.md)."
    )
    learned = field.solvers(None, "learned")
    tables = [against(field, f"To {at:g}", learned, BEST, at, BEST) for at in SHOWN]
    horizon = listed(
        "Four times past the trained horizon, to 0.001, all seeds: samples that the fallback solves, and those lost",
        [_summed(found) for found in grouped(chosen(rows, "horizon", tolerance=1e-3), "family", "solver")],
        [("family", "{family}"), ("solver", "{solver}"), ("evaluations", "{steps}"), ("samples", "{samples}"),
         ("fallback solves", "{fallback}"), ("lost", "{lost}"), ("with what was spent before", "{broken}"),
         ("handed over", "{triggered}")],
    )  # fmt: skip
    training = listed(
        "Training (CPU time: median over seeds)",
        [_training(*place, found) for place, found in trained.items()],
        [("family", "{family}"), ("solver", "{solver}"), ("seeds", "{seeds}"),
         ("steps", "{steps} × {unroll}, {segments} segments of {batch}"), ("parameters", "{parameters:,}"),
         ("CPU", "{cpu:.0f} s")],
    )  # fmt: skip
    return report.write(folder, "Meta-trained solvers", [words, *tables, horizon, training])


def _summed(found: list[Row]) -> Row:
    counts = ("samples", "fallback", "lost", "broken", "triggered")
    return {**found[0], **{key: sum(row[key] for row in found) for key in counts}}


def _training(family: str, solver: str, found: list[Row]) -> Row:
    seeds = " ".join(str(one["config"]["seed"]) for one in found)
    cpu = middle(one["summary"].get("cpu_seconds") for one in found)
    told, parameters = found[0]["summary"]["meta_training"], found[0]["parameters"]
    return {**told, "family": family, "solver": solver, "seeds": seeds, "parameters": parameters, "cpu": cpu}
