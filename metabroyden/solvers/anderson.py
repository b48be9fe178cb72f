"""Anderson acceleration, type II, per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metabroyden.problem import Problem
from metabroyden.solvers.base import ClassicalSolver, Step, check_number
from metabroyden.solvers.registry import register


class AndersonState(NamedTuple):
    """Ring buffers of the last `memory` differences. R rows, m memory, n coordinates."""

    residuals: Tensor  # (R, m, n) Δgᵢ / ‖Δgᵢ‖
    iterates: Tensor  # (R, m, n) Δzᵢ / ‖Δgᵢ‖
    gram: Tensor  # (R, m, m) inner products of `residuals`, kept in float64
    z: Tensor  # (R, n) previous iterate
    g: Tensor  # (R, n) its residual
    steps: int


@register("anderson")
@dataclass(frozen=True)
class Anderson(ClassicalSolver):
    """z⁺ = z + βg − (ΔZ + βΔG)γ with γ = argmin ‖g − ΔGγ‖² + ridge·‖γ‖², the columns of ΔG scaled to unit length.

    The type-II form of Anderson (1965) as in Walker & Ni, SIAM J. Numer. Anal. 49 (2011), eq. 2.7. The ridge is relative
    to the columns, so it does not grow in weight as the residual shrinks; the Gram matrix is solved in float64.

    Attributes:
        memory: differences kept, m ≥ 1.
        damping: mixing β in (0, 2].
        ridge: relative Tikhonov term, at least 1e-14.
    """

    memory: int = 5
    damping: float = 1.0
    ridge: float = 1e-8

    def __post_init__(self) -> None:
        check_number("Anderson", "memory", self.memory, 0, 10_000, whole=True)
        check_number("Anderson", "damping", self.damping, 0, 2)
        check_number("Anderson", "ridge", self.ridge, 0.99e-14, 1)

    def init(self, z: Tensor, g: Tensor, problem: Problem) -> AndersonState:
        """Empty buffers."""
        buffers = z.new_empty(2, len(z), self.memory, z.shape[1])
        gram = torch.zeros(len(z), self.memory, self.memory, dtype=torch.float64, device=z.device)
        return AndersonState(buffers[0], buffers[1], gram, z, g, 0)

    def step(self, z: Tensor, g: Tensor, state: AndersonState, problem: Problem) -> Step:
        """Plain damped step first; from then on the mixed step over the differences seen so far."""
        if state.steps == 0:
            return Step(z + self.damping * g, state._replace(z=z, g=g, steps=1))
        used = min(state.steps, self.memory)
        slot = (state.steps - 1) % self.memory
        dz, dg = z - state.z, g - state.g
        size = torch.linalg.vector_norm(dg, dim=1, keepdim=True)
        inverse = torch.where(size > 0, 1 / size, 0.0)
        state.residuals[:, slot] = dg * inverse
        state.iterates[:, slot] = dz * inverse
        basis = state.residuals[:, :used]
        products = torch.bmm(basis, torch.stack([basis[:, slot], g], dim=2)).double()
        state.gram[:, slot, :used] = products[..., 0]
        state.gram[:, :used, slot] = products[..., 0]
        weights = self._weights(state.gram[:, :used, :used], products[..., 1]).to(z.dtype).unsqueeze(1)
        back_z = torch.bmm(weights, state.iterates[:, :used]).squeeze(1)
        back_g = torch.bmm(weights, basis).squeeze(1)
        return Step(z - back_z + self.damping * (g - back_g), state._replace(z=z, g=g, steps=state.steps + 1))

    def _weights(self, gram: Tensor, right: Tensor) -> Tensor:
        """γ of the ridged normal equations, (R, k); zero (a plain step) where they cannot be solved."""
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        gamma, info = torch.linalg.solve_ex(gram + self.ridge * eye, right.unsqueeze(-1))
        gamma = gamma.squeeze(-1)
        good = (info == 0) & torch.isfinite(gamma).all(dim=1)
        return torch.where(good[:, None], gamma, 0.0)
