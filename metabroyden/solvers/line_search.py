"""Per-sample backtracking; every evaluation goes through the counter."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metabroyden.evaluator import to_device, to_host
from metabroyden.problem import Problem

_DECREASE = 1e-4  # share of the full decrease that a step must bring


def backtrack(
    z: Tensor, g: Tensor, step: Tensor, problem: Problem, *, ceiling: Tensor, trials: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Shorten `step` (R, n) where it makes the residual too large: (z + λ·step, g there, failed (R,) bool).

    λ = 1 is taken where ‖g⁺‖ ≤ max(ceiling, (1 − 1e-4 λ)‖g‖), else λ is cut to the minimiser of a quadratic through what
    is known (Dennis & Schnabel 1983, section 6.3), within [λ/10, λ/2], at most `trials` times and as the budget allows.
    A ceiling (R,) makes the search non-monotone. Rows that find no such λ get the best point tried. Only rows that are
    still searching are evaluated and counted; each trial is one more wait for the device.
    """
    best_z = z + step
    best_g = problem.residual(best_z)
    size = torch.linalg.vector_norm
    start, found, allowed = to_host([size(g, dim=1), size(best_g, dim=1), ceiling])
    length, reached = np.ones(len(z)), found.copy()
    searching = problem.alive & ~(reached <= np.maximum(allowed, (1 - _DECREASE) * start))
    for _ in range(trials):
        trying = searching & (problem.budget > 0)
        if not trying.any():
            break
        curvature = reached**2 - start**2 + 2 * start**2 * length
        model = np.where(np.isfinite(curvature) & (curvature > 0), start**2 * length**2 / curvature, 0.1 * length)
        length = np.where(trying, np.clip(model, 0.1 * length, 0.5 * length), length)
        trial_z = z + to_device(length, z.device).to(z.dtype)[:, None] * step
        trial_g = problem.residual(trial_z, among=trying)
        reached = np.where(trying, to_host([size(trial_g, dim=1)])[0], reached)
        gained = trying & np.isfinite(reached) & ~(reached >= found)
        mask = to_device(gained, z.device)[:, None]
        best_z, best_g = torch.where(mask, trial_z, best_z), torch.where(mask, trial_g, best_g)
        found = np.where(gained, reached, found)
        searching &= ~(trying & (reached <= np.maximum(allowed, (1 - _DECREASE * length) * start)))
    return best_z, best_g, to_device(searching, z.device)
