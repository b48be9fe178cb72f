"""A quasi-Newton method whose start, first steps and initial inverse Jacobian are learned, and whose secants are not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metabroyden.learned.base import register
from metabroyden.learned.features import mix
from metabroyden.learned.grouped import GroupedConfig, GroupedLSTM, GroupedState
from metabroyden.learned.safeguard import Safeguard
from metabroyden.learned.secants import Secants, SecantState
from metabroyden.solvers.base import Step


@dataclass(frozen=True)
class MetaBroydenConfig(GroupedConfig):
    """Adds to `GroupedConfig`.

    Attributes:
        gated: steps weighed by the LSTM, which see no secants; quasi-Newton steps from then on.
        memory: secant pairs kept, those of the gated steps among them.
        ridge: of the least squares over the pairs, relative to each; at least 100 units of rounding of the state's dtype.
    """

    gated: int = 14
    memory: int = 20
    ridge: float = 1e-8
    safeguard: Safeguard = field(default_factory=lambda: Safeguard(horizon=None, patience=15, progress=0.5))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gated", "memory"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.ridge <= 1:
            raise ValueError(f"ridge must be in (0, 1], got {self.ridge}")


class MetaBroydenState(NamedTuple):
    """What the LSTM keeps, the secant pairs, and the steps made."""

    gated: GroupedState
    secants: SecantState
    steps: int


@register("meta-broyden")
class MetaBroyden(GroupedLSTM):
    """z⁺ = z − B_k g, B_k = B₀ + (ΔZ − B₀ΔG)ΔG⁺ with a learned B₀ = −(w_r + w_P P) and exact secant pairs.

    The first steps are those of `GroupedLSTM`: one LSTM cell a group weighs the residual, the preconditioned residual P(r),
    the last update and the state. Their pairs (Δz, Δg) are kept, the last `memory` of them. From then on the LSTM rests: its
    last weights w_r, w_P of each group and the gates of P are frozen, which makes B₀ linear, and every step is a multisecant
    one on top of it (see `Secants`; for sequences causal, token by token). With no more than `gated` steps in an unroll, it
    is trained as `GroupedLSTM` is, weight for weight: B₀ is learned from what the residuals of its early steps want.

    Untrained, P = 0 and w_r = 1: Picard's iteration, then Anderson's on its pairs.
    """

    config_type = MetaBroydenConfig
    config: MetaBroydenConfig

    def __init__(self, config: MetaBroydenConfig) -> None:
        super().__init__(config)
        self.secants = Secants(self.layout, config.memory, config.ridge)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> Any:
        """Zero memory, no pairs."""
        secants = self.secants.init(z, g, self.layout.resolve(problem.shape))
        return MetaBroydenState(super().init(z, g, problem), secants, 0)

    def step(self, z: Tensor, g: Tensor, state: Any, problem: Any) -> Step:
        """One learned step, (R, n)."""
        layout, shape = self.layout, self.layout.resolve(problem.shape)
        secants = self.secants.note(z, g, state.secants, shape) if state.steps else state.secants
        if state.steps < self.config.gated:
            step = super().step(z, g, state.gated, problem)
            return Step(step.z, MetaBroydenState(step.state, secants, state.steps + 1))
        known, rest = self.secants.explain(g, secants, shape)
        r = layout.canonical(rest, shape)
        weights = state.gated.weights[:, :, :2]
        stack = layout.grouped(torch.stack([r, self.preconditioner(r, state.gated.gates)], dim=2))
        move = layout.flat(layout.ungrouped(mix(stack, weights), layout.extents(shape)))
        return Step(z - known + move, state._replace(secants=secants, steps=state.steps + 1))

    def inverse(self, state: Any, index: Tensor) -> Any:
        """What `transposed` needs of the rows `index`: gates, weights and secant pairs."""
        gated = state.gated.gates.index_select(0, index), state.gated.weights.index_select(0, index)
        used = min(state.secants.steps - 1, self.config.memory)
        pairs = tuple(part[:, :used].index_select(0, index) for part in (state.secants.residuals, state.secants.moves))
        return *gated, *pairs, state.secants.gram[:, :, :used, :used].index_select(0, index)

    def transposed(self, w: Tensor, frozen: Any) -> Tensor:
        """Bᵀw with B of the class's formula, for w (R, n)."""
        gates, weights, residuals, moves, gram = frozen
        layout = self.layout
        shape = layout.shape_like(gates.shape[2:])

        def initial(v: Tensor) -> Tensor:
            """B₀ᵀv."""
            groups = layout.grouped(layout.canonical(v, shape).unsqueeze(2))
            direct, through = (
                layout.ungrouped(groups[:, :, 0] * weights[:, :, k : k + 1], layout.extents(shape)) for k in (0, 1)
            )
            return -layout.flat(direct + self.preconditioner.transpose(through, gates))

        back = initial(w)
        if residuals.shape[1] == 0:
            return back
        return back + self.secants.transposed(w, back, residuals, moves, gram, shape)
