"""Whether a learned solver can be faster at all: decided from an untrained one, in a few solves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from metabroyden.comparison.clock import timed
from metabroyden.comparison.statistics import able, standard_error
from metabroyden.solution import Cell, Solution, State
from metabroyden.solvers.picard import Picard

FEWEST, SHARE = 3, 0.35
"""Evaluations that a learned solver needs in the best case: at least so many, and this share of the best classical one's."""
_ROUNDS = 2  # times that each is taken
_CALLS = 1, 5  # calls of f in two solves whose times tell what one costs


class Prospect(NamedTuple):
    """The fastest classical solver on some problems, and a learned one in the best case."""

    name: str  # of the classical one; "f" where the calls of f alone take longer than the learned one
    evaluations: float  # its mean
    seconds: float  # of its solve
    least: float  # evaluations of the learned one in the best case
    learned_seconds: float  # of that many of its steps

    @property
    def hopeless(self) -> bool:
        """Whether the learned solver would be no faster even then."""
        return self.learned_seconds >= self.seconds

    def __str__(self) -> str:
        return (
            f"{self.name} takes {1e3 * self.seconds:.3g} ms ({self.evaluations:.1f} evaluations in the mean), and a learned "
            f"solver would take {1e3 * self.learned_seconds:.3g} ms even if it needed only {self.least:.1f}"
        )


class _Standing(NamedTuple):
    """What `able` looks at."""

    success: float
    error: float
    evaluations: float
    seconds: float


def prospect(
    f: Cell, z0: State, x: Any, learned: Any, classical: Mapping[str, Any], *, fewest: float, rtol: float, max_nfe: int
) -> Prospect:
    """Time classical solvers, and as many evaluations by the untrained solver as a trained one needs in the best case.

    That is a share of the evaluations of the best classical solver, `SHARE`, and `FEWEST` at least: what a step costs does
    not depend on the weights. Only classical solvers that solve most problems count. Times are the shortest of several.
    Where the calls of f alone, as many as the best classical solver makes, take longer than that, no classical one is run.

    Args:
        f: as for `solve`, as are z0, x, rtol and max_nfe.
        z0: start.
        x: context.
        learned: the untrained solver.
        classical: solvers by name.
        fewest: evaluations of the best of them, where they were tuned.
    """

    def ours(least: float) -> float:
        """Seconds of the untrained solver for so many evaluations."""
        solution, seconds = timed(f, z0, x, solver=learned.eval(), rtol=0.0, max_nfe=min(math.ceil(least), max_nfe))
        return seconds * least / max(1, int(solution.nfe.max()))

    def picard(calls: int) -> float:
        """Seconds of a solve by Picard's method with so many calls of f."""
        return min(timed(f, z0, x, solver=Picard(), rtol=0.0, max_nfe=calls)[1] for _ in range(_ROUNDS))

    least = max(float(FEWEST), SHARE * fewest)
    few, more = _CALLS
    alone = fewest * (picard(more) - picard(few)) / (more - few)  # without what a solve costs beside them
    seconds = min(ours(least) for _ in range(_ROUNDS))
    if seconds < alone:
        return Prospect("f", fewest, alone, least, seconds)
    rivals = able({name: _standing(timed(f, z0, x, solver=solver, rtol=rtol, max_nfe=max_nfe), max_nfe)
                   for name, solver in classical.items()})  # fmt: skip
    least = max(float(FEWEST), SHARE * min(one.evaluations for one in rivals.values()))
    name = min(rivals, key=lambda name: rivals[name].seconds)
    theirs = [timed(f, z0, x, solver=classical[name], rtol=rtol, max_nfe=max_nfe)[1] for _ in range(_ROUNDS)]
    return Prospect(
        name,
        rivals[name].evaluations,
        min(rivals[name].seconds, *theirs),
        least,
        min(ours(least) for _ in range(_ROUNDS)),
    )


def _standing(lap: tuple[Solution, float], max_nfe: int) -> _Standing:
    solution, seconds = lap
    solved = solution.converged.cpu().numpy()
    success, mean = float(solved.mean()), float(np.where(solved, solution.nfe.numpy(), max_nfe).mean())
    return _Standing(success, standard_error(success, len(solved)), mean, seconds)
