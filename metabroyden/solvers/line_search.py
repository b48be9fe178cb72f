"""Per-sample backtracking; every evaluation goes through the counter."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metabroyden.ledger import to_host
from metabroyden.problem import Problem

_DECREASE = 1e-4  # share of the full decrease that a step must bring


def backtrack(
    z: Tensor, g: Tensor, step: Tensor, problem: Problem, *, trials: int, slack: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Shorten `step` (R, n) where it does not bring ‖g‖ down: (z + λ·step, g there, failed (R,) bool).

    Non-monotone, after Li & Fukushima, Optim. Methods Softw. 13 (2000): λ = 1 is taken where ‖g⁺‖ ≤ (1 + slack − 1e-4 λ)‖g‖,
    else λ is cut to the minimiser of a quadratic through what is known, within [λ/10, λ/2], at most `trials` times and
    as the budget allows. Failed rows get the best point tried. Only the rows that are still searching are evaluated;
    each trial is one wait for the device.
    """
    best_z = z + step
    best_g = problem.residual(best_z)
    start, found = to_host([torch.linalg.vector_norm(g, dim=1), torch.linalg.vector_norm(best_g, dim=1)]).reshape(2, -1)
    length, reached = np.ones(len(z)), found.copy()
    active = (
        problem.budget >= 0 if problem.live_index is None else np.isin(np.arange(len(z)), to_host([problem.live_index]))
    )
    enough = lambda: reached <= (1 + slack - _DECREASE * length) * start  # noqa: E731
    searching = active & ~enough()
    for _ in range(trials):
        trying = searching & (problem.budget > 0)
        if not trying.any():
            break
        curvature = reached**2 - start**2 + 2 * start**2 * length
        model = np.where(np.isfinite(curvature) & (curvature > 0), start**2 * length**2 / curvature, 0.1 * length)
        length = np.where(trying, np.clip(model, 0.1 * length, 0.5 * length), length)
        trial_z = z + torch.from_numpy(length).to(z)[:, None] * step
        trial_g = problem.residual(trial_z, among=trying)
        reached = np.where(trying, to_host([torch.linalg.vector_norm(trial_g, dim=1)]), reached)
        gained = trying & ~(reached >= found)
        mask = torch.from_numpy(gained).to(z.device)[:, None]
        best_z, best_g = torch.where(mask, trial_z, best_z), torch.where(mask, trial_g, best_g)
        found = np.where(gained, reached, found)
        searching = searching & ~(trying & enough())
    return best_z, best_g, torch.from_numpy(searching).to(z.device)
