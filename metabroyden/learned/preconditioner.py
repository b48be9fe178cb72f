"""A learned part of the inverse Jacobian: linear in the residual, gated by the context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.learned.layout import Layout
from metabroyden.learned.mixer import Mixer
from metabroyden.learned.wiring import Wiring
from metabroyden.solver import Trail

SHUT = -30.0
"""Below this a gate is no longer closed further: subnormal numbers would take a CPU several times as long."""


class Preconditioner(nn.Module):
    """P(r) = B(A(r) · sigmoid(C(z, c))): I + P stands for (I − J)⁻¹. A, B without bias, B zero-initialised.

    Linear in r, so that −(I + P) may serve as the initial inverse Jacobian of a secant method; a bias would put a floor
    under the residual. A looks at neighbours, and B too unless `kernel`, its width, is 1. The gate is taken once, where the
    solve starts (or is handed over), and frozen.

    The maps of sequences and images may be dilated, at no cost: the first by the distance that f carries news in one
    evaluation, say, and the second by three times as much, so that P reaches eight times as far without a gap.

    It has `rank` inner channels; `dilations` are of A and B.
    """

    def __init__(
        self, layout: Layout, context_channels: int, rank: int, *, kernel: int = 3, dilations: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        self.inward = Mixer(layout, layout.channels, rank, bias=False, dilation=dilations[0])
        self.outward = Mixer(layout, rank, layout.channels, kernel=kernel, bias=False, zero=True, dilation=dilations[1])
        self.gate = Mixer(layout, layout.channels + context_channels, rank)

    def gates(self, z: Tensor, context: Tensor, wiring: Wiring | None = None) -> Tensor:
        """The gate at z (R, C, *S) with the context feature (R, C', *S); (R, rank, *S)."""
        return torch.sigmoid(self.gate(z, context, wiring=wiring).clamp(min=SHUT))

    def forward(self, r: Tensor, gates: Tensor, wiring: Wiring | None = None) -> Tensor:
        """P(r), shaped like r (R, C, *S)."""
        return self.outward(self.inward(r, wiring=wiring) * gates, wiring=wiring)

    def transpose(self, w: Tensor, gates: Tensor, wiring: Wiring | None = None) -> Tensor:
        """Pᵀ(w), shaped like w (R, C, *S)."""
        return self.inward.transpose(self.outward.transpose(w, wiring) * gates, wiring)


Frozen = tuple[Tensor, Wiring | None]
"""A `Preconditioner`'s gates (R, rank, *S) and the wiring of the problem."""


class LearnedInverse:
    """A trained `Preconditioner` as the `InverseJacobian` of Broyden's method: −(I + P), or −(I + D + P).

    Args:
        solver: with a `preconditioner`, what that sees, `frozen`, and a `layout`.
        diagonal: (r (R, n), per-sample shape) ↦ Dr.
    """

    def __init__(self, solver: Any, diagonal: Callable[[Tensor, Any], Tensor] | None = None) -> None:
        self.solver, self.diagonal = solver, diagonal

    def init(self, z: Tensor, g: Tensor, problem: Any) -> Frozen:
        """The gate, frozen at z, and the problem's wiring."""
        return self.solver.frozen(z, problem)

    def resume(self, z: Tensor, g: Tensor, trail: Trail, problem: Any) -> Frozen:
        """As `init`."""
        return self.init(z, g, problem)

    def apply(self, r: Tensor, frozen: Frozen) -> Tensor:
        """(D + P)r for r (R, n)."""
        return self._with_diagonal(self.solver.preconditioner, r, frozen)

    def rmatvec(self, w: Tensor, frozen: Frozen) -> Tensor:
        """(D + P)ᵀw for w (R, n)."""
        return self._with_diagonal(self.solver.preconditioner.transpose, w, frozen)

    def _with_diagonal(self, p: Callable[..., Tensor], r: Tensor, frozen: Frozen) -> Tensor:
        layout = self.solver.layout
        shape = layout.shape_like(frozen[0].shape[2:])
        found = layout.flat(p(layout.canonical(r, shape), *frozen))
        return found if self.diagonal is None else found + self.diagonal(r, shape)

    def __repr__(self) -> str:
        return f"LearnedInverse({type(self.solver).__name__})"
