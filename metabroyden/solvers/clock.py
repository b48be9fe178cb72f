"""Solvers on the clock: whole solves of the same problems, in turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

from metabroyden.solution import Cell, Solution, State
from metabroyden.solve import solve

LEAST, MOST = 3, 15  # rounds of `race` at least and at most

T = TypeVar("T")


def turns(names: Sequence[T], rounds: int) -> Iterator[T]:
    """Every name once a round, another one first each round."""
    for number in range(rounds):
        first = number % len(names)
        yield from (*names[first:], *names[:first])


def timed(f: Cell, z0: State, context: Any, **options: Any) -> tuple[Solution, float]:
    """(solution, seconds) of one solve; arguments as for `solve`."""
    began = time.perf_counter()
    solution = solve(f, z0, context, throw=False, **options)
    if solution.residual.is_cuda:
        torch.cuda.synchronize(solution.residual.device)
    return solution, time.perf_counter() - began


def race(
    f: Cell, z0: State, context: Any, solvers: dict[str, Any], *, rtol: float, max_nfe: int, seconds: float = 3.0
) -> tuple[dict[str, Solution], dict[str, list[float]]]:
    """(solutions, seconds by round) of solvers that take turns on one batch; entries of a round belong together.

    The first round warms up, gives the solutions, and says how many rounds there is time for: about `seconds` of them, but
    `LEAST` at least and `MOST` at most. f, z0, context, rtol and max_nfe as for `solve`.
    """
    names, found = list(solvers), {}
    taken: dict[str, list[float]] = {name: [] for name in names}

    def lap(name: str) -> tuple[Solution, float]:
        return timed(f, z0, context, solver=solvers[name], rtol=rtol, max_nfe=max_nfe)

    spent = 0.0
    for name in names:
        found[name], lasted = lap(name)
        spent += lasted
    rounds = LEAST if spent <= 0 else int(min(MOST, max(LEAST, seconds / spent)))
    for name in turns(names, rounds):
        taken[name].append(lap(name)[1])
    return found, taken
