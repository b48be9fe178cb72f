"""What `fit_solver` makes of a stranger.

Rows say what they are under the key "row":
  model   what it is: its score, evaluations of classical solvers when it was frozen, milliseconds of one evaluation of f
  fit     one call of fit_solver: what it returned and why; its solver and the classical ones on test samples it never saw
  robust  the fitted solver beside its own fallback where it does not fit: wrong weights, shifted inputs, another f
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

import metabroyden as mb
from experiments.bench.runner import Row
from experiments.bench.solvers import shuffled
from experiments.strangers.frozen import Stranger
from metabroyden.comparison.clock import laps
from metabroyden.comparison.comparison import Comparison
from metabroyden.comparison.measure import Rules, measure
from metabroyden.comparison.problems import HeldOut
from metabroyden.comparison.statistics import standard_error
from metabroyden.comparison.tables import short
from metabroyden.comparison.verdict import UNTUNED, Verdict, contestant

SHIFT = 1.5
"""Factor of the injection, of shifted inputs."""


def measured(config: Any, stranger: Stranger, rtol: float) -> list[Row]:
    """The rows of one stranger and tolerance."""
    spec = stranger.spec
    stamp = {"name": spec.name, "part": stranger.part, "rtol": rtol, "seed": config.seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a refusal is in the row
        began = time.perf_counter()
        returned, verdict = mb.fit_solver(
            stranger.f, stranger.x_train, z0=stranger.z0, rtol=rtol, seed=config.seed, steps=config.steps,
            progress=False, return_report=True,
        )  # fmt: skip
        seconds = time.perf_counter() - began
    held = stranger.held(config.samples)
    everyone = [contestant(name, solver) for name, solver in verdict.solvers.items()]
    found = Comparison(measure(held, everyone, Rules((rtol,), config.budget, len(held), None, elsewhere=True)))
    trained = verdict.name != UNTUNED
    f_seconds = np.median(laps({"f": lambda: [held.f(held.z0, held.x)]}, 15)["f"])
    about = {"cell": spec.cell, "data": spec.data, "width": spec.width, "penalty": spec.penalty, **stranger.facts}
    rows: list[Row] = [
        {"row": "model", **stamp, **about, "samples": len(held), "f_milliseconds": 1e3 * float(f_seconds)}
    ]
    rows += [{"row": "fit", **stamp, **_fit_row(verdict, found, returned, seconds, trained)}]
    if trained:
        rows += [{"row": "robust", **stamp, **row} for row in robust_rows(config, stranger, verdict.fitted, rtol)]
    return short(rows)


def _fit_row(verdict: Verdict, found: Comparison, returned: Any, seconds: float, trained: bool) -> Row:
    """What was returned, and figures on test samples."""
    numbers = {row["solver"]: _figures(row) for row in found.numbers(found.tolerances[-1])}
    rivals = {name: row for name, row in numbers.items() if name != verdict.name or not trained}
    best, fastest = found.best_classical(), found.fastest_classical()
    summary = verdict.fitted.summary if trained else {}
    return {
        "returned": "fitted" if trained and returned is verdict.fitted else verdict.best, "trained": trained,
        "reasons": verdict.failed_criteria if trained else ["there is nothing to gain"], "samples": found.samples,
        "ours": numbers[verdict.name] if trained else None, "best": {"name": best, **rivals[best]},
        "fastest": {"name": fastest, **rivals[fastest]}, "surest": max(row["solved"] for row in rivals.values()),
        "seconds": seconds, "training_seconds": summary.get("seconds", 0.0),
    }  # fmt: skip


def _figures(row: Row) -> Row:
    keys = ("median", "mean", "p90", "solved", "milliseconds", "time_over_fastest", "elsewhere")
    return {key: row[key] for key in keys}


def robust_rows(config: Any, stranger: Stranger, fitted: Any, rtol: float) -> Iterator[Row]:
    """Share solved of a fitted solver and of its fallback, sample by sample, where it does not fit."""
    count = config.samples
    cases: dict[str, tuple[Any, HeldOut]] = {
        "as fitted": (fitted, stranger.held(count)),
        "wrong weights": (shuffled(fitted, config.seed), stranger.held(count)),
        "shifted inputs": (fitted, stranger.held(count, x=stranger.scaled(SHIFT))),
        "another f": (fitted, stranger.held(count, stranger.other())),
    }
    for case, (solver, held) in cases.items():
        ours, theirs = (
            mb.solve(held.f, held.z0, held.x, solver=one, rtol=rtol, max_nfe=config.budget, throw=False).converged
            for one in (solver, solver.fallback()[0])
        )
        shares = {"learned": float(ours.double().mean()), "fallback": float(theirs.double().mean())}
        lost, gained = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
        error = standard_error(shares["fallback"], len(ours))
        yield {"case": case, "samples": len(ours), **shares, "error": error, "lost": lost, "gained": gained}
