"""Choosing a solver's options on validation problems."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

from metabroyden.solution import Cell, State, Trace
from metabroyden.solve import solve

S = TypeVar("S")


def tune(
    candidates: Iterable[S],
    f: Cell,
    z0: State,
    context: Any = None,
    *,
    tolerances: tuple[float, ...] = (1e-2, 1e-3),
    max_nfe: int = 50,
) -> list[tuple[S, float]]:
    """Solvers with their scores on some problems, best first; f, z0 and context as for `solve`.

    The score is that of `score`.
    """
    scored = []
    for solver in candidates:
        trace = solve(f, z0, context, solver=solver, rtol=min(tolerances), max_nfe=max_nfe, throw=False).trace  # type: ignore[arg-type]
        scored.append((solver, score(trace, tolerances, max_nfe)))
    return sorted(scored, key=lambda pair: pair[1])


def score(trace: Trace, tolerances: tuple[float, ...], max_nfe: int) -> float:
    """The mean over samples and tolerances of log(evaluations), a failure counting as twice the budget."""
    logs = []
    for tolerance in tolerances:
        evaluations, reached = trace.evaluations_to(tolerance, max_nfe)
        logs.append(np.log(np.where(reached, evaluations, 2 * max_nfe)))
    return float(np.mean(logs))
