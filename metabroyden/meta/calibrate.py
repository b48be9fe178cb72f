"""What to expect of a trained solver, measured on validation problems: when to give a sample up, when a start is warm."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree

from metabroyden.learned.base import apart
from metabroyden.learned.meta_broyden import MetaBroydenConfig
from metabroyden.learned.safeguard import Safeguard
from metabroyden.meta import distributed
from metabroyden.meta.plan import as_solved
from metabroyden.meta.tasks import TaskSet, count, rows
from metabroyden.solution import Solution
from metabroyden.solve import solve
from metabroyden.solvers.tuning import score
from metabroyden.state import Packing

PATIENCES = (15, 8, 5, 3)
"""Evaluations without progress after which a sample may be handed over."""
SLACK = 2.0
"""How far a sample may be above what the slowest of the validation samples reach at a step."""
RESUMED = 5
"""Evaluations in which Broyden's method on top of the learned inverse has to halve the residual, at least."""
MOST = 128
"""Validation problems, at most."""


def calibrate(solver: Any, tasks: TaskSet, **options: Any) -> None:
    """Put into a trained solver's config, in all processes, what the first one finds; as `calibrated` takes them."""
    solver.config = replace(solver.config, **distributed.by_first(lambda: calibrated(solver, tasks, **options)))


def calibrated(solver: Any, tasks: TaskSet, *, rtol: float, max_nfe: int, most: int) -> dict[str, Any]:
    """The fields of a trained solver's config that say what to expect of a solve: safeguard and reach.

    The learned steps alone, without a safeguard, tell it on validation problems.

    - safeguard: the largest over samples of the smallest relative residual until a step, times `SLACK`, is the envelope, for
      as many steps as some sample takes to `rtol`. The resumed phase, where there is one, has to halve the residual in half
      the evaluations that a restart costs: the 95th percentile of the fallback's own, to `rtol`; in `RESUMED` at least, and
      at most in as many as it had. Of `PATIENCES` the one with which the solver needs fewest evaluations (see `score`) is
      taken. A solver without a safeguard, or with a horizon, keeps its own. A MetaBroyden ends with its learned steps: its
      secant steps cost more than Broyden's and save no evaluations.
    - reach: see `LearnedSolver.warm_start`; where solves start at zero. Not of solvers that step on another map than f.

    Args:
        solver: a `LearnedSolver`.
        tasks: with a validation split.
        rtol: as for `solve`; so is max_nfe.
        max_nfe: evaluations a sample.
        most: validation problems, at most.
    """
    config, safeguard = solver.config, solver.config.safeguard
    raw = rows(tasks.split("validation"), slice(min(most, MOST, count(tasks.split("validation")))))
    f, z0, x = as_solved(tasks.f, *tasks.prepare(raw))

    def solved(by: Any, **options: Any) -> Solution:
        return solve(f, z0, x, solver=by, rtol=rtol, max_nfe=max_nfe, throw=False, **options)

    def guarded(tried: Safeguard | None, **options: Any) -> Solution:
        solver.config = replace(config, safeguard=tried)
        try:
            return solved(solver, **options)
        finally:
            solver.config = config

    first = 1 + (config.conditioning == "initial_value")  # evaluations until the learned start has its own
    alone = guarded(None, snapshots=(first,))
    lowest = _lowest(alone)[first - 1 :]
    if safeguard is not None and safeguard.horizon is None:
        expected = lowest[: 1 + int((lowest > rtol).any(axis=1).sum())]
        envelope = tuple(np.maximum(SLACK * expected.max(axis=1), rtol).tolist())
        fallback, phase = solver.fallback()
        if phase > 1:
            resumed = _resumed_patience(safeguard, solved(fallback), rtol, max_nfe)
            safeguard = replace(safeguard, resumed_patience=resumed)
        found = [replace(safeguard, patience=patience, envelope=envelope) for patience in PATIENCES]
        safeguard = min(found, key=lambda tried: score(guarded(tried).trace, (rtol,), max_nfe))
        if isinstance(config, MetaBroydenConfig) and not solver.required_methods:
            safeguard = replace(safeguard, horizon=config.learned_steps)
    cold = not solver.required_methods and not any(bool(part.any()) for part in pytree.tree_leaves(z0))
    return {"safeguard": safeguard, "reach": _reach(alone, lowest, rtol) if cold and solver.initializer else None}


def _resumed_patience(safeguard: Safeguard, restarted: Solution, rtol: float, max_nfe: int) -> int:
    """Half of what a restart costs on the hard problems, see `calibrated`."""
    spent, _ = restarted.trace.evaluations_to(rtol, max_nfe)
    return min(max(math.ceil(np.quantile(spent, 0.95) / 2), RESUMED), safeguard.resumed_patience)


def _lowest(solution: Solution) -> np.ndarray:
    """(K, B) the smallest relative residual after 1, 2, … evaluations; one where there is none."""
    residual = solution.trace.residual.double().cpu().numpy()
    lowest = np.fmin.accumulate(np.where(np.isnan(residual), np.inf, residual), axis=0)
    return np.where(np.isfinite(lowest), lowest, 1.0)


def _reach(solution: Solution, lowest: np.ndarray, rtol: float) -> tuple[float, float, float] | None:
    """Median residuals after a half and a quarter of the steps; the largest distance of learned starts from solutions."""
    solved = solution.converged.cpu()
    if not solved.any():
        return None
    medians = np.maximum(np.median(lowest, axis=1), rtol / 2)
    steps = int((medians > rtol).sum())
    packing = Packing.of(solution.z)
    z, start = packing.pack(solution.z).cpu()[solved], packing.pack(solution.snapshots[0]).cpu()[solved]
    far = float(apart(start, z).nan_to_num(0.0).max())
    return (
        float(medians[min(steps // 2, len(medians) - 1)]),
        float(medians[steps // 4]),
        min(max(1.05 * far, 1e-6), 1e6),
    )
