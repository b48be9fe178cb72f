"""Meta-train a root finder on the fixed-point problems of a family, or of one's own DEQ, and measure it on held-out ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.bench import runner
from experiments.bench.options import Compared, OnDevice, OnFamily, Seeded, Unrolled
from experiments.bench.runner import at_least_one, known, sha256
from experiments.configs.recipes import RECIPES
from experiments.meta.job import CLASSICAL, Job
from experiments.meta.report import write
from metabroyden.meta import distributed
from metabroyden.meta.objectives import OBJECTIVES
from metabroyden.storage import atomic_write

__all__ = ["CLASSICAL", "Job", "Meta", "run", "write"]


@dataclass(frozen=True)
class Meta(Seeded, Unrolled, Compared, OnFamily, OnDevice, command="meta"):
    """Meta-train a solver on a family, measure it on held-out problems, write the report."""

    family: str = "conv-fashion"
    """A family of metabroyden.zoo.models.FAMILIES; or MODULE:FUNCTION, which returns your own f and contexts: see
    `python -m metabroyden --help`."""
    solver: str = "meta-broyden"
    """A learned solver, or "classical" for the rows of the classical ones."""
    recipe: bool = True
    """Whether the family's recipe takes the place of some of the plan's choices; without it the plan is fit_solver's."""
    steps: int | None = None
    """Outer steps, instead of the plan's or the recipe's."""
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
    publish(job, solver)
    if job.family.own and solver is not None:  # nobody else measures what it is to be held against
        publish(Job(replace(config, solver=CLASSICAL, overwrite=False)), None)
    runner.show(write(job.run.folder))


def publish(job: Job, solver: Any) -> None:
    """The rows of a solver, or of the classical ones, how they were made, and its file."""
    rows = job.run.unit("rows", lambda: job.measured(solver))
    device = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu"
    more = {"device": device, "model_sha256": sha256(job.family.path)}
    if solver is not None:
        more |= {"parameters": sum(p.numel() for p in solver.parameters()), "summary": solver.summary}
    way = "" if job.config.recipe else "-plan"
    name = CLASSICAL if solver is None else f"{job.config.solver}{way}-seed{job.config.seed}"
    folder = runner.publish(job.run.folder / job.family.folder / name, rows, job.run.described(**more))
    if solver is not None:
        atomic_write(folder / "solver.safetensors", job.path.read_bytes())
