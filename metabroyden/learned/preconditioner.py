"""A learned part of the inverse Jacobian: linear in the residual, gated by the context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.learned.layout import Layout, Mixer


class Preconditioner(nn.Module):
    """P(r) = B(A(r) · sigmoid(C(z, c))): I + P stands for (I − J)⁻¹. A, B without bias, B zero-initialised.

    Linear in r, so that −(I + P) may serve as the initial inverse Jacobian of a secant method; a bias would put a floor
    under the residual. A looks at neighbours, and B too unless `kernel`, its width, is 1. The gate is taken once, where the
    solve starts (or is handed over), and frozen.
    """

    def __init__(self, layout: Layout, context_channels: int, rank: int, *, kernel: int = 3) -> None:
        super().__init__()
        self.inward = Mixer(layout, layout.channels, rank, bias=False)
        self.outward = Mixer(layout, rank, layout.channels, kernel=kernel, bias=False, zero=True)
        self.gate = Mixer(layout, layout.channels + context_channels, rank)

    def gates(self, z: Tensor, context: Tensor) -> Tensor:
        """The gate at z (R, C, *S) with the context feature (R, C', *S); (R, rank, *S)."""
        return torch.sigmoid(self.gate.apply_to(z, context))

    def forward(self, r: Tensor, gates: Tensor) -> Tensor:
        """P(r), shaped like r (R, C, *S)."""
        return self.outward(self.inward(r) * gates)

    def transpose(self, w: Tensor, gates: Tensor) -> Tensor:
        """Pᵀ(w), shaped like w (R, C, *S)."""
        return self.inward.transpose(self.outward.transpose(w) * gates)


class LearnedInverse:
    """A trained `Preconditioner` as the `InverseJacobian` of Broyden's method."""

    def __init__(self, solver: Any) -> None:
        self.solver = solver

    def init(self, z: Tensor, g: Tensor, problem: Any) -> Tensor:
        """The gate, frozen at z."""
        return self.solver.gates(z, problem)

    def apply(self, r: Tensor, frozen: Tensor) -> Tensor:
        """P r for r (R, n)."""
        layout = self.solver.layout
        shape = layout.shape_like(frozen.shape[2:])
        return layout.flat(self.solver.preconditioner(layout.canonical(r, shape), frozen))

    def transpose(self, w: Tensor, frozen: Tensor) -> Tensor:
        """Pᵀw for w (R, n)."""
        layout = self.solver.layout
        shape = layout.shape_like(frozen.shape[2:])
        return layout.flat(self.solver.preconditioner.transpose(layout.canonical(w, shape), frozen))

    def __repr__(self) -> str:
        return f"LearnedInverse({type(self.solver).__name__})"
