"""A learned inverse Jacobian that is used as far as a sample's own secant pairs bear it out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metabroyden.learned.preconditioner import LearnedInverse
from metabroyden.solver import Trail
from metabroyden.solvers.broyden import apply_to_all

JUDGED_ON = 5
"""Secant pairs, the last ones, by which it is judged."""


class TrustedInverse:
    """θQ as the `InverseJacobian` of Broyden's method, θ in [0, 1] for each sample, where −(I + Q) is a learned B₀.

    An inverse Jacobian takes every Δg to its Δz. θ is the share of Q with which −(I + θQ) does so best for the pairs between
    the last iterates, in the least squares over an orthonormal basis of the span of ΔG:

        θ = −tr(G⁻¹(ΔZ + ΔG)ᵀQΔG) / tr(G⁻¹(QΔG)ᵀQΔG),   G = ΔGᵀΔG.

    For a solver that fits its problem θ is near 1; for another problem near 0, where B₀ = −I. Without pairs it is 1.

    `learned` is Q.
    """

    def __init__(self, learned: LearnedInverse) -> None:
        self.learned = learned

    def init(self, z: Tensor, g: Tensor, problem: Any) -> tuple[Any, Tensor]:
        """(what Q was given, θ (R, 1))."""
        return self.learned.init(z, g, problem), z.new_ones(len(z), 1)

    def resume(self, z: Tensor, g: Tensor, trail: Trail, problem: Any) -> tuple[Any, Tensor]:
        """As `init`, with θ by the pairs of the trail."""
        frozen = self.learned.init(z, g, problem)
        return frozen, self._share(trail[-JUDGED_ON - 1 :], frozen)

    def _share(self, trail: Trail, frozen: Any) -> Tensor:
        points, residuals = (torch.stack(part, dim=1) for part in zip(*trail, strict=True))
        moves, changes = points.diff(dim=1), residuals.diff(dim=1)
        if moves.shape[1] == 0:
            return points.new_ones(len(points), 1)
        learned = apply_to_all(self.learned, changes, frozen)
        gram = (changes @ changes.mT).double()
        ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2) + torch.finfo(points.dtype).tiny
        products = torch.cat([(moves + changes) @ learned.mT, learned @ learned.mT], dim=2).double()
        found = torch.linalg.solve_ex(gram + torch.diag_embed(ridge), products)[0]
        ahead, size = (part.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) for part in found.chunk(2, dim=2))
        return torch.nan_to_num(-ahead / size, 1.0, 0.0, 0.0).clamp(0, 1).to(points)

    def apply(self, r: Tensor, frozen: tuple[Any, Tensor]) -> Tensor:
        """θQr for r (R, n)."""
        return self.learned.apply(r, frozen[0]) * frozen[1]

    def rmatvec(self, w: Tensor, frozen: tuple[Any, Tensor]) -> Tensor:
        """θQᵀw for w (R, n)."""
        return self.learned.rmatvec(w, frozen[0]) * frozen[1]

    def __repr__(self) -> str:
        return f"TrustedInverse({self.learned!r})"
