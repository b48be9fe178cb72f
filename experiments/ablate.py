"""What each part of a fit buys, on strangers: segments, hard problems, the anchor, the envelope, the trusted inverse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import metabroyden as mb
from experiments.bench import report
from experiments.bench.options import Budgeted
from experiments.bench.runner import Row, Run, at_least_one, known
from experiments.bench.solvers import shuffled
from experiments.strangers.frozen import Stranger, load
from experiments.strangers.suite import DEV, names
from experiments.strangers.train import path_of
from metabroyden.comparison.tables import Table, grouped, listed
from metabroyden.learned.safeguard import BY_PROGRESS
from metabroyden.meta import MetaTrainer, TaskSet
from metabroyden.meta.calibrate import calibrate
from metabroyden.meta.plan import measure_classical, plan
from metabroyden.meta.tasks import count, rows
from metabroyden.progress import ticks

TRAININGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one segment": {"segments": 1},
    "segments of all samples": {"drop_below": 0.0},
    "no anchor": {"anchor": 0.0},
}
"""Overrides of the plan, by name."""
WITHOUT = ("no envelope", "learned inverse unjudged", "no learned inverse")
"""What is taken from the hand-over of the solver that was trained as it is."""
WORDS = """\
`fit_solver`'s plan with one part changed at a time, on strangers of the half that was developed on; medians over seeds of
figures on test samples. A sample that is not solved counts as the budget. "Wrong weights": the same solver with the
weights of each tensor in another order."""


@dataclass(frozen=True)
class Ablate(Budgeted, command="ablate"):
    """Fit root finders to strangers with parts of the plan or of the hand-over left out."""

    only: tuple[str, ...] = ("mixer-digits-24", "graph-blocks-16", "gated-latch-24", "spectral-fashion-10-conv")
    """Strangers of the half to develop on, by name."""
    rtol: tuple[float, ...] = (1e-2,)
    """Tolerances, each with fits of its own."""
    seeds: int = 3
    """Fits of a kind, stranger and tolerance."""
    steps: int | None = None
    """Outer steps of a fit, at most; None: the plan's own number."""
    samples: int = 256
    """Test samples."""


def run(config: Ablate) -> None:
    """Some five minutes a stranger, tolerance and seed. Interrupted, it goes on with the next one."""
    at_least_one(config, "samples", "budget", "steps", "seeds")
    known("stranger", config.only, names(DEV))
    job, found = Run(config, inputs=[path_of(name) for name in config.only], shared=("only", "rtol", "seeds")), []
    cases = list(product(config.only, config.rtol, range(config.seeds)))
    with ticks("fitting without a part", len(cases), show=config.progress) as done:
        for name, rtol, seed in cases:
            key = f"{name}-{rtol:g}-seed{seed}"
            found += job.unit(key, lambda: list(_measured(config, load(name), rtol, seed)))  # noqa: B023 (called at once)
            done(key)
    job.finish(found, write)


def _measured(config: Ablate, stranger: Stranger, rtol: float, seed: int) -> Iterator[Row]:
    held = stranger.held(config.samples)
    trained = {name: _fitted(config, stranger, rtol, seed, changed) for name, changed in TRAININGS.items()}
    solvers = {name: (solver, shuffled(solver, seed)) for name, solver in trained.items()}
    solvers |= {name: tuple(_without(one, name) for one in solvers["as it is"]) for name in WITHOUT}
    for name, both in {"Broyden": (mb.Broyden(),), **solvers}.items():
        stamp = {"row": "ablation", "name": stranger.spec.name, "rtol": rtol, "seed": seed, "variant": name}
        for case, one in zip(("as fitted", "wrong weights"), both, strict=False):
            options: dict[str, Any] = {"rtol": rtol, "max_nfe": config.budget, "throw": False}
            solution = mb.solve(held.f, held.z0, held.x, solver=one, **options)
            cost = np.where(solution.converged.numpy(), solution.nfe.numpy(), config.budget)
            yield {
                **stamp, "case": case, "median": float(np.median(cost)), "mean": float(cost.mean()),
                "p90": float(np.quantile(cost, 0.9)), "solved": float(solution.converged.double().mean()),
            }  # fmt: skip


def _fitted(config: Ablate, stranger: Stranger, rtol: float, seed: int, changed: dict[str, Any]) -> Any:
    """A solver by `fit_solver`'s plan, but for what is changed."""
    x = stranger.x_train
    order = torch.randperm(count(x), generator=torch.Generator().manual_seed(seed))
    part = count(x) // 5
    tasks = TaskSet(stranger.f, rows(x, order[part:]), rows(x, order[:part]), z0=stranger.starts)
    classical = measure_classical(tasks, rtol=rtol, max_nfe=config.budget)
    training = {"seed": seed, "validation_rtol": rtol, "validation_nfe": config.budget, "patience": 4}
    made = plan(tasks, classical, steps=config.steps, training=training, overrides=changed)
    if made.training.anchor:
        tasks.equilibria = classical.equilibria(tasks)
    solver = MetaTrainer(made.build(tasks.problems("validation")[0]), tasks, made.training).run()
    calibrate(solver, tasks, rtol=rtol, max_nfe=config.budget, most=128)
    return solver


def _without(solver: Any, name: str) -> Any:
    """The solver, its hand-over changed."""
    other = copy.deepcopy(solver)
    if name == "no envelope":
        other.config = replace(solver.config, safeguard=BY_PROGRESS)
        return other
    learned, resumed, last = other.phases()
    initial = resumed.solver.initial.learned if name == "learned inverse unjudged" else None
    resumed = replace(resumed, solver=replace(resumed.solver, initial=initial))
    other.phases = lambda: [learned, resumed, last]
    return other


@report.of_rows("Ablations of a fit")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """A table for each stranger and tolerance, a row for each variant."""
    return [WORDS, *(_table(of) for of in grouped(rows, "name", "rtol"))]


def _table(rows: list[Row]) -> Table:
    def middle(key: str, case: str) -> Callable[[list[Row]], str]:
        def shown(of: list[Row]) -> str:
            values = [row[key] for row in of if row["case"] == case]
            return "" if not values else f"{np.median(values):.1%}" if key == "solved" else f"{np.median(values):.1f}"

        return shown

    return listed(f"{rows[0]['name']}, to {rows[0]['rtol']:g}", grouped(rows, "variant"), [
        ("", lambda of: of[0]["variant"]),
        *((key, middle(key, "as fitted")) for key in ("median", "mean", "p90", "solved")),
        ("wrong weights: mean", middle("mean", "wrong weights")),
        ("wrong weights: solved", middle("solved", "wrong weights")),
    ])  # fmt: skip
