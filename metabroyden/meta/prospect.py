"""Whether a learned solver can be faster at all: decided from an untrained one, in a few solves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from metabroyden.compare import able, standard_error
from metabroyden.solution import Cell, State
from metabroyden.solvers.clock import timed

FEWEST, SHARE = 4, 0.5
"""Evaluations that a learned solver needs in the best case: at least so many, and this share of the best classical one's."""
_ROUNDS, _CLEAR = 3, 0.5  # times each is taken, unless the learned one takes less than this share of the other's


class Prospect(NamedTuple):
    """The fastest classical solver on some problems, and a learned one in the best case."""

    name: str  # of the classical one
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
    f: Cell, z0: State, x: Any, learned: Any, classical: Mapping[str, Any], *, rtol: float, max_nfe: int
) -> Prospect:
    """Time classical solvers, and as many evaluations by the untrained solver as a trained one needs in the best case.

    That is half the evaluations of the best classical solver, `FEWEST` at least: what a step costs does not depend on the
    weights. Only classical solvers that solve most problems count. Times are the shortest of several.

    Args:
        f: as for `solve`, as are z0, x, rtol and max_nfe.
        z0: start.
        x: context.
        learned: the untrained solver.
        classical: solvers by name.
    """
    found: dict[str, _Standing] = {}
    for name, solver in classical.items():
        solution, seconds = timed(f, z0, x, solver=solver, rtol=rtol, max_nfe=max_nfe)
        solved = solution.converged.cpu().numpy()
        mean = float(np.where(solved, solution.nfe.numpy(), max_nfe).mean())
        success = float(solved.mean())
        found[name] = _Standing(success, standard_error(success, len(solved)), mean, seconds)
    rivals = able(found)
    least = max(float(FEWEST), SHARE * min(one.evaluations for one in rivals.values()))
    steps = min(math.ceil(least), max_nfe)
    name = min(rivals, key=lambda name: rivals[name].seconds)
    ours, theirs = [math.inf], [rivals[name].seconds]
    for _ in range(_ROUNDS):
        solution, seconds = timed(f, z0, x, solver=learned.eval(), rtol=0.0, max_nfe=steps)
        ours.append(seconds * least / max(1, int(solution.nfe.max())))
        if min(ours) < _CLEAR * min(theirs):
            break
        theirs.append(timed(f, z0, x, solver=classical[name], rtol=rtol, max_nfe=max_nfe)[1])
    return Prospect(name, rivals[name].evaluations, min(theirs), least, min(ours))
