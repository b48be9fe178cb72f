"""Secant pairs of a solve and what they say of a residual; for sequences without looking ahead."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metabroyden.learned.layout import Layout
from metabroyden.solver import Trail


class SecantState(NamedTuple):
    """Ring buffers of the last m pairs. R rows, n coordinates, T tokens (1 where the layout has no time)."""

    residuals: Tensor  # (R, m, n) Δg
    moves: Tensor  # (R, m, n) Δz
    gram: Tensor  # (R, T, m, m) inner products of `residuals`, the diagonal times 1 + ridge, in float64
    z: Tensor  # (R, n) the last iterate
    g: Tensor  # (R, n) its residual
    steps: int  # iterates seen


class Secants:
    """γ = argmin ‖g − ΔGγ‖² + ridge·Σ(‖Δgᵢ‖γᵢ)²: how the last pairs (Δz, Δg) explain a residual.

    The generalised Broyden update (Fang & Saad, Numer. Linear Algebra Appl. 16, 2009) in two parts: −B_k g = −ΔZγ −
    B₀(g − ΔGγ), for any B₀, which may change from step to step. The ridge is relative to each pair. For sequences each
    token has a γ of its own, of the residuals up to it, so that nothing crosses time backwards.

    Where gradients are recorded the coefficients γ are constants: backpropagated through, they explode.
    """

    def __init__(self, layout: Layout, memory: int, ridge: float) -> None:
        self.layout, self.memory, self.ridge = layout, memory, ridge

    def init(self, z: Tensor, g: Tensor, shape: tuple[int, ...]) -> SecantState:
        """The first iterate, no pairs."""
        memory = min(self.memory, z.shape[1])  # more pairs than coordinates say nothing
        tokens = self.layout.extents(shape)[0] if self.layout.causal else 1
        buffer = z.new_zeros(z.shape[0], memory, z.shape[1])
        gram = torch.zeros(z.shape[0], tokens, memory, memory, dtype=torch.float64, device=z.device)
        return SecantState(buffer, buffer.clone(), gram, z, g, 1)

    def update(self, z: Tensor, g: Tensor, state: SecantState, shape: tuple[int, ...]) -> SecantState:
        """Take the pair between the last iterate and this one; in place, unless gradients are recorded."""
        memory = state.residuals.shape[1]
        slot, used = (state.steps - 1) % memory, min(state.steps, memory)
        residuals, moves = put(state.residuals, g - state.g, slot), put(state.moves, z - state.z, slot)
        gram = state.gram.clone() if torch.is_grad_enabled() else state.gram
        ridge = max(self.ridge, 100 * torch.finfo(z.dtype).eps)  # products are rounded in that dtype
        with torch.no_grad():
            row = self._inner(residuals[:, :used], residuals[:, slot], shape).double()
            gram[:, :, slot, :used] = row
            gram[:, :, :used, slot] = row
            size = row[..., slot]
            gram[:, :, slot, slot] = torch.where(size > 0, size * (1 + ridge), 1.0)  # a zero pair: none
        return SecantState(residuals, moves, gram, z, g, state.steps + 1)

    def of(self, trail: Trail, shape: tuple[int, ...]) -> SecantState | None:
        """The pairs between the iterates of a trail, oldest first; None where there is none."""
        found = None
        for z, g in trail:
            found = self.init(z, g, shape) if found is None else self.update(z, g, found, shape)
        return found

    def pairs(self, state: SecantState) -> tuple[Tensor, ...] | None:
        """(ΔG, ΔZ, Gram), as `transposed` takes them; None where there is no pair."""
        used = min(state.steps - 1, state.residuals.shape[1])
        return (state.residuals[:, :used], state.moves[:, :used], state.gram[:, :, :used, :used]) if used else None

    def project(self, g: Tensor, state: SecantState, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(ΔZγ, g − ΔGγ), both (R, n)."""
        used = min(state.steps - 1, state.residuals.shape[1])
        if used == 0:
            return torch.zeros_like(g), g
        residuals, moves = state.residuals[:, :used], state.moves[:, :used]
        with torch.no_grad():
            right = self._inner(residuals, g, shape).double()
            gamma, _ = torch.linalg.solve_ex(state.gram[:, :, :used, :used], right)
            gamma = torch.nan_to_num(gamma, 0.0, 0.0, 0.0).to(g.dtype)
        return self._combine(gamma, moves, shape), g - self._combine(gamma, residuals, shape)

    def transposed(self, w: Tensor, back: Tensor, pairs: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
        """What the pairs (ΔG, ΔZ, Gram) add to B₀ᵀw (R, n), `back`, to make Bᵀw of it: ΔG⁺ᵀ(ΔZᵀw − ΔGᵀB₀ᵀw)."""
        residuals, moves, gram = pairs
        right = self._inner(moves, w, shape, local=True) - self._inner(residuals, back, shape, local=True)
        found, _ = torch.linalg.solve_ex(gram, right.double())
        found = torch.nan_to_num(found, 0.0, 0.0, 0.0).to(w.dtype)
        if self.layout.causal:  # a token's coefficients are of the residuals up to it
            found = found.flip(1).cumsum(1).flip(1)
        return self._combine(found, residuals, shape)

    def _inner(self, buffer: Tensor, g: Tensor, shape: tuple[int, ...], *, local: bool = False) -> Tensor:
        """(R, T, k) inner products of (R, k, n) with (R, n), of the tokens up to each, or of each alone."""
        if not self.layout.causal:
            return torch.bmm(g.unsqueeze(1), buffer.transpose(1, 2))
        products = buffer.unflatten(2, shape) * g.unflatten(1, shape).unsqueeze(1)
        by_token = products.sum(2 + self.layout.channel_axis)
        return (by_token if local else by_token.cumsum(2)).transpose(1, 2)

    def _combine(self, weights: Tensor, buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(R, n) sums of (R, k, n) with weights (R, T, k)."""
        if not self.layout.causal:
            return torch.bmm(weights, buffer).squeeze(1)
        by_token = weights.transpose(1, 2).unsqueeze(2 + self.layout.channel_axis)
        return (buffer.unflatten(2, shape) * by_token).sum(1).flatten(1)


def put(buffer: Tensor, new: Tensor, slot: int) -> Tensor:
    """The buffer (R, m, n) with `new` (R, n) in a slot: in place, unless gradients are recorded."""
    if torch.is_grad_enabled():
        return torch.select_scatter(buffer, new, 1, slot)
    buffer.select(1, slot).copy_(new)
    return buffer
