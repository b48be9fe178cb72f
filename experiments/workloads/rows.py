"""What `fit_solver` makes of a workload.

Rows say what they are under the key "row":
  model   what it is: the metric at its equilibrium, milliseconds of one evaluation of f on all test problems
  fit     one call of fit_solver: what it returned and why, its seconds; what renumbering the places changes
  cost    one solver to one tolerance on test problems that no fit saw, as `Comparison.numbers` has it
  depth   the mean metric after so many evaluations of one solver
  equal   of one solver, or of another library's loop, the fewest evaluations after which the mean metric is that at the
          equilibrium, but for the workload's slack, and the seconds of so many on all test problems; none: null
  picture the first test problem's picture after so many evaluations, in grey levels, and its metric; without a number of
          evaluations, what there is to be seen beside it
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import metabroyden as mb
from experiments.bench.runner import Row
from experiments.workloads.brought import Brought
from experiments.workloads.suite import WORKLOADS, facts_of
from metabroyden.comparison.clock import laps
from metabroyden.comparison.tables import chosen, grouped, short
from metabroyden.deq import initial_state

TOLERANCES = (1e-2, 1e-3)
ROUNDS = 3
SHOWN = (2, 4, 8)
"""Evaluations after which pictures are shown."""
OURS = "learned"


def measured(config: Any, name: str, model: Any, seed: int) -> list[Row]:
    """The rows of one workload and seed of the fit."""
    brought, stamp = WORKLOADS[name].bring(model, config.samples), {"name": name, "seed": seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a refusal is in the row
        began = time.perf_counter()
        returned, verdict = mb.fit_solver(
            brought.f, brought.x_train, rtol=TOLERANCES[-1], seed=seed, steps=config.steps,
            seconds=WORKLOADS[name].seconds, progress=False, return_report=True,
        )  # fmt: skip
        seconds = time.perf_counter() - began
    solver = verdict.fitted
    found = mb.compare(
        brought.f, brought.x_test, solvers={OURS: solver}, tune_on=brought.x_train, rtol=TOLERANCES,
        max_nfe=config.budget, metric=brought.metric, rounds=ROUNDS, progress=False,
    )  # fmt: skip
    fit = {
        "row": "fit", "returned": returned is solver, "reasons": verdict.failed_criteria, "seconds": seconds,
        **_renumbered(config, brought, solver),
    }  # fmt: skip
    rows = [_model(config, name, brought), fit]
    rows += [{"row": "cost", **row} for row in found.numbers()]
    rows += chosen(found.rows, "depth")
    loops = _loops(brought, found)
    rows += _equal(brought, found, loops, rows[0]["equilibrium"])
    rows += pictures(brought, loops)
    return short([{**row, **stamp} for row in rows])


def _loops(brought: Brought, found: Any) -> dict[str, Callable[[int], Any]]:
    """By solver, and other library's loop, evaluations ↦ states of the test problems."""
    f, x = brought.f, brought.x_test
    z0 = initial_state(f, x)

    def loop(solver: Any) -> Callable[[int], Any]:
        return lambda count: mb.solve(f, z0, x, solver=solver, rtol=0.0, max_nfe=count, throw=False).z

    names = [of[0]["solver"] for of in grouped(chosen(found.rows, "depth"), "solver")]
    return {name: loop(found.solvers[name]) for name in names} | brought.peers


@torch.no_grad()
def _equal(brought: Brought, found: Any, loops: dict[str, Callable[[int], Any]], equilibrium: float) -> list[Row]:
    """Evaluations and time of everybody at equal worth."""
    wanted = equilibrium - brought.slack
    worth: dict[str, dict[int, float]] = {}
    for row in chosen(found.rows, "depth"):
        worth.setdefault(row["solver"], {})[row["evaluations"]] = row["score"]
    depths = list(worth[OURS])
    worth |= {name: {count: _mean(brought, own(count)) for count in depths} for name, own in brought.peers.items()}
    fewest = {name: min((k for k, score in at.items() if score >= wanted), default=None) for name, at in worth.items()}
    seconds = laps({name: partial(loops[name], count) for name, count in fewest.items() if count}, ROUNDS)
    return [
        {"row": "equal", "solver": name, "evaluations": count, "seconds": seconds[name].tolist() if count else None}
        for name, count in fewest.items()
    ]


@torch.no_grad()
def pictures(brought: Brought, loops: dict[str, Callable[[int], Any]]) -> list[Row]:
    """Rows of pictures by name of what is seen, and by solver after equal evaluations."""
    if not brought.pictures:
        return []

    def row(what: str, evaluations: int | None, z: torch.Tensor) -> Row:
        pixels = (255 * z[0].squeeze(0).clamp(0, 1)).round().int().tolist()
        score = float(brought.metric(z, brought.x_test)[0])
        stamp = {"row": "picture", "solver": what, "evaluations": evaluations}
        return {**stamp, "score": score if math.isfinite(score) else None, "pixels": pixels}

    beside = [row(what, None, z) for what, z in brought.pictures.items()]
    return beside + [row(name, count, loop(count)) for name, loop in loops.items() for count in SHOWN]


def _mean(brought: Brought, z: Any) -> float:
    return float(brought.metric(z, brought.x_test).mean())


@torch.no_grad()
def _model(config: Any, name: str, brought: Brought) -> Row:
    f, x = brought.f, brought.x_test
    z0 = initial_state(f, x)
    solver, budget = brought.exact
    exact = mb.solve(f, z0, x, solver=solver, rtol=1e-6, max_nfe=budget, throw=False)
    spent = float(np.median(laps({"f": lambda: [f(z0, x)]}, 15)["f"]))
    return {
        "row": "model", "equilibrium": _mean(brought, exact.z), "f_milliseconds": 1e3 * spent,
        "exact": float(exact.converged.double().mean()), "samples": len(exact.nfe), **facts_of(name, config.models),
    }  # fmt: skip


@torch.no_grad()
def _renumbered(config: Any, brought: Brought, solver: Any) -> Row:
    """Mean evaluations as the places are numbered, and after renumbering them."""
    if brought.again is None:
        return {}
    options: dict[str, Any] = {"solver": solver, "rtol": TOLERANCES[-1], "max_nfe": config.budget, "throw": False}
    spent = [
        float(mb.solve(brought.f, initial_state(brought.f, x), x, **options).nfe.double().mean())
        for x in (brought.x_test, brought.again)
    ]
    return {"numbered": spent[0], "renumbered": spent[1]}
