"""Anderson acceleration, type II, per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metabroyden.problem import Problem
from metabroyden.solver import SolverBase, Step
from metabroyden.solvers.base import check_number, combine, first_scale, gather_ring, into, own, ring_size
from metabroyden.solvers.registry import register


class AndersonState(NamedTuple):
    """Ring buffers of the last `memory` differences. R rows, m memory, n coordinates."""

    residuals: Tensor  # (R, m, n) Δgᵢ
    mixed: Tensor  # (R, m, n) Δzᵢ + βΔgᵢ
    gram: Tensor  # (R, m, m) inner products of `residuals`, the diagonal times 1 + ridge, kept in float64
    plain: Tensor  # (R, n) previous iterate z + βg
    mixing: Tensor  # (R, 1) β
    g: Tensor  # (R, n) its residual
    steps: int


@register("anderson")
@dataclass(frozen=True)
class Anderson(SolverBase):
    """z⁺ = z + βg − (ΔZ + βΔG)γ with γ = argmin ‖g − ΔGγ‖² + ridge·Σ(‖Δgᵢ‖γᵢ)².

    The type-II form of Anderson (1965) as in Walker & Ni, SIAM J. Numer. Anal. 49 (2011), eq. 2.7. The ridge is relative
    to the columns, so it does not grow in weight as the residual shrinks; the Gram matrix is solved in float64. Where it
    cannot be solved (overflow) the step is the plain one, z + βg.

    What the differences do not explain of g a step multiplies by I + β(J − I), so that it grows where ‖β(J − I)‖ is large,
    however good γ is. Where the first step makes ‖g‖ grow more than threefold and moves it along the step, the mixing
    becomes −damping·sᵀy / yᵀy from then on, its sign included, s and y being the first differences (see `first_scale`).
    Elsewhere it stays, to the last bit.

    Attributes:
        memory: differences kept, m ≥ 1; no more than the state has coordinates.
        damping: mixing β in (0, 2].
        ridge: relative Tikhonov term, at least 1e-14.
        rescale: let the first difference change the scale of the mixing.
    """

    memory: int = 5
    damping: float = 1.0
    ridge: float = 1e-8
    rescale: bool = True

    def __post_init__(self) -> None:
        check_number("Anderson", "memory", self.memory, 0, 10_000, whole=True)
        check_number("Anderson", "damping", self.damping, 0, 2)
        check_number("Anderson", "ridge", self.ridge, 0.99e-14, 1)
        if not isinstance(self.rescale, bool):
            raise ValueError(f"Anderson: rescale must be True or False, got {self.rescale!r}")

    def init(self, z: Tensor, g: Tensor, problem: Problem) -> AndersonState:
        """Empty buffers."""
        memory = ring_size(min(self.memory, z.shape[1]), problem)
        residuals, mixed = (z.new_empty(z.shape[0], memory, z.shape[1]) for _ in range(2))
        gram = torch.zeros(z.shape[0], memory, memory, dtype=torch.float64, device=z.device)
        return AndersonState(residuals, mixed, gram, z, z.new_full((z.shape[0], 1), self.damping), g, 0)

    def step(self, z: Tensor, g: Tensor, state: AndersonState, problem: Problem) -> Step:
        """Plain damped step first; from then on the mixed step over the differences seen so far."""
        mixing = state.mixing
        if state.steps == 1 and self.rescale:
            mixing = -self.damping * first_scale(self.damping * state.g, g - state.g, state.g, self.damping)
            state = state._replace(plain=torch.addcmul(state.plain, mixing - self.damping, state.g))
        plain = torch.addcmul(z, mixing, g)
        residuals, mixed, gram = map(own, state[:3])
        after = AndersonState(residuals, mixed, gram, plain, mixing, g, state.steps + 1)
        if state.steps == 0:
            return Step(plain, after)
        memory = residuals.shape[1]
        used, slot = min(state.steps, memory), (state.steps - 1) % memory
        dg = into(residuals.select(1, slot), torch.sub, g, state.g)
        into(mixed.select(1, slot), torch.sub, plain, state.plain)
        across = residuals.narrow(1, 0, used).transpose(1, 2)
        row = torch.bmm(dg.unsqueeze(1), across).squeeze(1)
        gram.select(1, slot).narrow(1, 0, used).copy_(row)
        gram.select(2, slot).narrow(1, 0, used).copy_(row)
        gram.select(1, slot).select(1, slot).mul_(1 + self.ridge)
        right = torch.bmm(g.unsqueeze(1), across)
        known = gram.narrow(1, 0, used).narrow(2, 0, used)
        gamma, _ = torch.linalg.solve_ex(known, right.squeeze(1).double())
        weights = right.copy_(gamma.unsqueeze(1)).neg_()  # contiguous: else the product is ten times slower
        torch.nan_to_num_(weights, 0.0, 0.0, 0.0)
        return Step(combine(plain, weights, mixed.narrow(1, 0, used)), after)

    def gather(self, state: AndersonState, index: Tensor) -> AndersonState:
        """The rows `index`, without copying the part of the buffers that nothing was written to."""
        used = min(max(state.steps - 1, 0), state.residuals.shape[1])
        residuals, mixed = (gather_ring(buffer, index, used) for buffer in (state.residuals, state.mixed))
        gram, plain, mixing, g = (part.index_select(0, index) for part in state[2:6])
        return AndersonState(residuals, mixed, gram, plain, mixing, g, state.steps)
