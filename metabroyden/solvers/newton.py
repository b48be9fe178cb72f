"""Damped Newton with the linear system solved by GMRES: exact where the state is small, inexact where it is large."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metabroyden.problem import Problem
from metabroyden.solvers.base import ClassicalSolver, Step, check_number
from metabroyden.solvers.registry import register


@register("newton")
@dataclass(frozen=True)
class Newton(ClassicalSolver):
    """z⁺ = z + damping·s with (I − J)s = g, J the Jacobian of f at z, solved by at most `krylov` GMRES directions.

    Saad & Schultz (1986), per sample, modified Gram–Schmidt. Each direction is one Jacobian–vector product and counts as
    one evaluation of f; where the budget leaves fewer, fewer are used. With n ≤ krylov the step is Newton's own.

    Attributes:
        damping: step length in (0, 2].
        krylov: directions a step.
    """

    damping: float = 1.0
    krylov: int = 20
    min_nfe = 3

    def __post_init__(self) -> None:
        check_number("Newton", "damping", self.damping, 0, 2)
        check_number("Newton", "krylov", self.krylov, 0, 10_000, whole=True)

    def init(self, z: Tensor, g: Tensor, problem: Problem) -> tuple[()]:
        """No state."""
        return ()

    def step(self, z: Tensor, g: Tensor, state: tuple[()], problem: Problem) -> Step:
        """One damped (inexact) Newton step, (R, n)."""
        rows, n = z.shape
        directions = min(self.krylov, n, problem.affordable_jvps - 1)
        size = torch.linalg.vector_norm(g, dim=1, keepdim=True)
        basis = z.new_zeros(rows, directions + 1, n)
        hessenberg = z.new_zeros(rows, directions + 1, directions)
        basis[:, 0] = _over(g, size)
        for k in range(directions):
            v = basis[:, k]
            w = v - problem.jvp(z, v, z + g)
            length = torch.linalg.vector_norm(w, dim=1, keepdim=True)
            for _ in range(2):  # orthogonalise twice: enough in float32
                overlap = torch.bmm(basis[:, : k + 1], w.unsqueeze(2))
                hessenberg[:, : k + 1, k] += overlap.squeeze(2)
                w = w - torch.bmm(overlap.transpose(1, 2), basis[:, : k + 1]).squeeze(1)
            rest = torch.linalg.vector_norm(w, dim=1, keepdim=True)
            rest = torch.where(rest > 10 * torch.finfo(z.dtype).eps * length, rest, 0.0)  # a happy breakdown
            hessenberg[:, k + 1, k] = rest.squeeze(1)
            basis[:, k + 1] = _over(w, rest)
        right = z.new_zeros(rows, directions + 1, 1)
        right[:, 0] = size
        finite = torch.isfinite(hessenberg).flatten(1).all(dim=1) & torch.isfinite(size.squeeze(1))
        weights = torch.linalg.pinv(torch.where(finite[:, None, None], hessenberg, 0.0)) @ right
        s = torch.bmm(weights.transpose(1, 2), basis[:, :directions]).squeeze(1)
        s = torch.where(finite[:, None], s, g)
        return Step(z + self.damping * s, state)


def _over(vector: Tensor, size: Tensor) -> Tensor:
    """vector / size, zero where size is zero."""
    return torch.where(size > 0, vector / torch.where(size > 0, size, 1.0), 0.0)
