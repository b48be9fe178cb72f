"""Damped Newton: the Jacobian itself where the state is small, GMRES where it is large."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metabroyden.evaluator import to_device, to_host
from metabroyden.problem import Problem
from metabroyden.solver import SolverBase, Step
from metabroyden.solvers.base import check_number
from metabroyden.solvers.registry import register


@register("newton")
@dataclass(frozen=True)
class Newton(SolverBase):
    """z⁺ = z + damping·s with (I − J)s = g, J the Jacobian of f at z. Every product with J counts as one evaluation of f.

    States of n ≤ `krylov` coordinates: J column by column, n products, and an LU factorisation; exact. Larger ones, and
    where the budget does not reach that far: GMRES (Saad & Schultz 1986) from zero, orthogonalised twice, of at most
    `krylov` directions; a sample stops at ‖g − (I − J)s‖ ≤ forcing·‖g‖ (inexact Newton: Dembo, Eisenstat & Steihaug 1982),
    which is looked at after every direction.

    Attributes:
        damping: step length in (0, 2].
        krylov: directions a step.
        forcing: relative linear residual at which GMRES stops, in (0, 1).
    """

    damping: float = 1.0
    krylov: int = 20
    forcing: float = 1e-2
    min_nfe = 3
    fixed_cost = False

    def __post_init__(self) -> None:
        check_number("Newton", "damping", self.damping, 0, 2)
        check_number("Newton", "krylov", self.krylov, 0, 10_000, whole=True)
        check_number("Newton", "forcing", self.forcing, 0, 1)

    def step(self, z: Tensor, g: Tensor, state: tuple[()], problem: Problem) -> Step:
        """One damped (inexact) Newton step, (R, n)."""
        directions = np.minimum(problem.affordable_jvps - 1, min(self.krylov, z.shape[1]))
        exact = problem.alive & (directions == z.shape[1])
        s = g
        if exact.any():
            eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            columns = [problem.jvp(z, direction.expand_as(z), z + g, exact) for direction in eye]
            s = torch.linalg.solve_ex(eye - torch.stack(columns, dim=2), g)[0]
        if (problem.alive & ~exact).any():
            inexact = self._gmres(z, g, problem, np.where(exact, 0, directions))
            s = torch.where(to_device(exact, z.device)[:, None], s, inexact)
        finite = torch.isfinite(s).all(dim=1, keepdim=True)
        return Step(torch.add(z, torch.where(finite, s, g), alpha=self.damping), state)

    def _gmres(self, z: Tensor, g: Tensor, problem: Problem, allowed: np.ndarray) -> Tensor:
        """s by GMRES, (R, n), of the rows that are allowed directions."""
        rows, n = z.shape
        directions = int(allowed.max())
        size = torch.linalg.vector_norm(g, dim=1, keepdim=True)
        basis = z.new_zeros(rows, directions + 1, n)
        hessenberg = z.new_zeros(rows, directions + 1, directions)
        right = z.new_zeros(rows, directions + 1, 1)
        right[:, 0] = size
        basis[:, 0] = _over(g, size)
        working = problem.alive & (allowed > 0)
        weights = z.new_zeros(rows, 0, 1)
        for k in range(directions):
            v = basis[:, k]
            w = v - problem.jvp(z, v, z + g, among=working)
            length = torch.linalg.vector_norm(w, dim=1, keepdim=True)
            known = basis[:, : k + 1]
            for _ in range(2):
                overlap = torch.bmm(w.unsqueeze(1), known.transpose(1, 2))
                hessenberg[:, : k + 1, k] += overlap.squeeze(1)
                w = w - torch.bmm(overlap, known).squeeze(1)
            rest = torch.linalg.vector_norm(w, dim=1, keepdim=True)
            rest = torch.where(rest > 10 * torch.finfo(z.dtype).eps * length, rest, 0.0)  # a happy breakdown
            hessenberg[:, k + 1, k] = rest.squeeze(1)
            basis[:, k + 1] = _over(w, rest)
            small, target = hessenberg[:, : k + 2, : k + 1], right[:, : k + 2]
            finite = torch.isfinite(small).all(dim=2).all(dim=1) & torch.isfinite(size.squeeze(1))
            fresh = torch.linalg.pinv(torch.where(finite[:, None, None], small, 0.0)) @ target
            # a sample that has stopped keeps its weights: what comes after is not of its making
            keeps = to_device(~working, z.device)[:, None, None]
            weights = torch.where(keeps, torch.nn.functional.pad(weights, (0, 0, 0, 1)), fresh)
            left = torch.linalg.vector_norm(target - small @ weights, dim=1)
            working &= (to_host([(left > self.forcing * size).squeeze(1) & finite])[0] > 0) & (allowed > k + 1)
            if not working.any():
                break
        used = weights.shape[1]
        return torch.bmm(weights.transpose(1, 2), basis[:, :used]).squeeze(1)


def _over(vector: Tensor, size: Tensor) -> Tensor:
    """vector / size, zero where size is zero."""
    return torch.where(size > 0, vector / torch.where(size > 0, size, 1.0), 0.0)
