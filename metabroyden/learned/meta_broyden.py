"""A quasi-Newton method whose start, first steps and initial inverse Jacobian are learned, and whose secants are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metabroyden.learned.base import LearnedConfig, LearnedSolver, register
from metabroyden.learned.lstm import SharedLSTM
from metabroyden.learned.preconditioner import LearnedInverse, Preconditioner
from metabroyden.learned.safeguard import BY_PROGRESS, Safeguard
from metabroyden.learned.secants import Secants, SecantState
from metabroyden.solve import Phase
from metabroyden.solvers.base import Step
from metabroyden.state import gather


@dataclass(frozen=True)
class MetaBroydenConfig(LearnedConfig):
    """Adds to `LearnedConfig`.

    Attributes:
        rank: inner channels k of the preconditioner, which are what the LSTM sees and gates; 0: half of the state's (of all
            its resolutions together), from 16 to 48.
        damping: of the iteration that it is before training.
        gated: steps weighed by the LSTM, which see no secants; quasi-Newton steps from then on.
        memory: secant pairs kept, those of the gated steps among them.
        ridge: of the least squares over the pairs, relative to each; at least 100 units of rounding of the state's dtype.
    """

    hidden: int = 8
    rank: int = 0
    damping: float = 1.0
    gated: int = 28
    memory: int = 10
    ridge: float = 1e-8
    safeguard: Safeguard = BY_PROGRESS

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("rank", 0), ("gated", 1), ("memory", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("damping", "ridge"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")


class MetaBroydenState(NamedTuple):
    """R rows, n coordinates, k inner channels, H hidden, P places (all of S)."""

    initial: Tensor  # (R, k, *S) the preconditioner's gates where the solve began
    gates: Tensor  # (R, k, *S) those of the last gated step
    direct: Tensor  # (R, 1, *S) weight of the residual in the last gated step
    before: Tensor  # (R, n) the iterate before this one
    hidden: Tensor  # (R, H, P)
    cell: Tensor  # (R, H, P)
    scale: Tensor  # (R, 1, …) previous residual scale
    trail: tuple[
        tuple[Tensor, Tensor, Tensor | None], ...
    ]  # (iterates, residuals, our rows in them) of the gated steps
    secants: SecantState | None  # made of the trail when first wanted
    steps: int


@register("meta-broyden")
class MetaBroyden(LearnedSolver):
    """z⁺ = z − B_k g, B_k = B₀ + (ΔZ − B₀ΔG)ΔG⁺ with a learned B₀ = −(w + d + P) and exact secant pairs.

    P(g) = B(A(g) · γ) is a `Preconditioner` of k inner channels. In the first steps one LSTM cell a place (a pixel, a token,
    the sample of a vector), shared by all, sees the inner residual A(g)/s, the gates where the solve began, the residual's
    scale s and its last change, and sets the inner gates γ, an inner correction c, the weight w of the residual and that of
    the last move:

        z⁺ = z + m·(z − z₋) + (w + d)·g + B(A(g)·γ + s·c)

    with a constant d for each channel, since resolutions and features differ in the step they want. All else that is learned
    happens in k channels; of the state's size there are few operations. The pairs (Δz, Δg) of these steps are kept, the last
    `memory` of them. From then on the LSTM rests: its last γ and w are frozen, which makes B₀ linear, and every step is a
    multisecant one on top of it (see `Secants`; for sequences causal, token by token).
    With no more than `gated` steps in an unroll, B₀ is learned from what the residuals of the gated steps want.

    Untrained, P = 0, c = m = d = 0 and w is the damping: Picard's iteration, then Anderson's on its pairs.
    """

    config_type = MetaBroydenConfig
    config: MetaBroydenConfig

    def __init__(self, config: MetaBroydenConfig) -> None:
        super().__init__(config)
        rank = self.rank = config.rank or min(48, max(16, sum(self.layout.part_channels) // 2))
        kernel = 1 if config.layout == "scales" else 3  # there finer pixels already go with their coarse one
        self.preconditioner = Preconditioner(self.layout, self.context_channels, rank, kernel=kernel)
        self.channel = nn.Parameter(torch.zeros(sum(self.layout.part_channels)))
        self.lstm = SharedLSTM(2 * rank + 2, config.hidden, 2 * rank + 2)
        self.secants = Secants(self.layout, config.memory, config.ridge)

    def plan(self, solver: Any) -> list[Phase]:
        """As every learned solver's; Broyden carries on from −(damping + d + P)."""
        return self.config.safeguard.phases(self, LearnedInverse(self, self._beyond_identity))

    def _beyond_identity(self, r: Tensor, shape: tuple[Any, ...]) -> Tensor:
        """(damping − 1 + d)·r for r (R, n)."""
        parts = self.layout.parts(r, shape)
        shift = self.config.damping - 1
        return self.layout.joined([part * (d + shift) for part, d in zip(parts, self._channels(parts[0]), strict=True)])

    def gates(self, z: Tensor, problem: Any) -> Tensor:
        """The preconditioner's gates at z (R, n): (R, k, *S)."""
        shape = self.layout.resolve(problem.shape)
        return self.preconditioner.gates(self.layout.canonical(z, shape), self.context_feature(problem, shape))

    def init(self, z: Tensor, g: Tensor, problem: Any) -> MetaBroydenState:
        """Zero memory, no pairs; the gates are taken once."""
        gates = self.gates(z, problem)
        hidden, cell = self.lstm.begin(len(z), gates[0, 0].numel(), z)
        scale = self.layout.scale_of(g, self.layout.resolve(problem.shape))
        direct = torch.full_like(gates[:, :1], self.config.damping)
        return MetaBroydenState(gates, gates, direct, z, hidden, cell, scale, (), None, 0)

    def step(self, z: Tensor, g: Tensor, state: MetaBroydenState, problem: Any) -> Step:
        """One learned step, (R, n)."""
        shape = self.layout.resolve(problem.shape)
        if state.steps < self.config.gated:
            return self._gated(z, g, state, shape)
        earlier = self._pairs(state, shape)
        secants = self.secants.init(z, g, shape) if earlier is None else self.secants.note(z, g, earlier, shape)
        known, rest = self.secants.explain(g, secants, shape)
        z = z - known - self._initial_inverse(rest, state, shape)
        return Step(z, state._replace(trail=(), secants=secants, steps=state.steps + 1))

    def _gated(self, z: Tensor, g: Tensor, state: MetaBroydenState, shape: tuple[Any, ...]) -> Step:
        layout, rank = self.layout, self.rank
        residuals = layout.parts(g, shape)
        scale = layout.scale_of(g, shape)
        inner = self.preconditioner.inward.of_parts(residuals)
        level = torch.stack([scale.log() / 5, (scale / state.scale).log().clamp(-3, 3)], dim=1).flatten(2)
        places = state.hidden.shape[2]
        seen = [(inner / scale).reshape(len(z), rank, places), state.initial.reshape(len(z), rank, places)]
        features = torch.cat([*seen, level.expand(-1, -1, places)], dim=1)
        output, hidden, cell = self.lstm(features, state.hidden, state.cell)
        output = output.reshape(len(z), -1, *inner.shape[2:])
        direct, momentum, change, correction = output.split([1, 1, rank, rank], dim=1)
        direct, gates = self.config.damping + direct, state.initial * (1 + change)
        after, before = layout.parts(z, shape), layout.parts(state.before, shape)
        moved = [torch.lerp(*pair) for pair in zip(before, after, layout.spread(1 + momentum), strict=True)]
        learned = self.preconditioner.outward.to_parts(torch.addcmul(inner * gates, scale, correction))
        for place, r, w, d, more in zip(
            moved, residuals, layout.spread(direct), self._channels(direct), learned, strict=True
        ):
            place.addcmul_(w, r).addcmul_(d, r).add_(more)
        trail = (*state.trail, (z, g, None))[-self.config.memory - 1 :]
        known = MetaBroydenState(
            state.initial, gates, direct, z, hidden, cell, scale, trail, None, steps=state.steps + 1
        )
        return Step(layout.joined(moved), known)

    def _initial_inverse(self, r: Tensor, state: MetaBroydenState, shape: tuple[Any, ...]) -> Tensor:
        """B₀r for r (R, n), with the weights of the last gated step."""
        parts = self.layout.parts(r, shape)
        learned = self.preconditioner.outward.to_parts(self.preconditioner.inward.of_parts(parts) * state.gates)
        return -self.layout.joined(self._weighted(parts, state.direct, learned))

    def _weighted(self, parts: list[Tensor], direct: Tensor, more: list[Tensor]) -> list[Tensor]:
        """(w + d)·r and something more, part by part."""
        weights = zip(parts, self.layout.spread(direct), self._channels(direct), more, strict=True)
        return [torch.addcmul(rest, part, w + d) for part, w, d, rest in weights]

    def _channels(self, like: Tensor) -> list[Tensor]:
        """d for each of the layout's parts, to be multiplied with it."""
        return [d.view(-1, *[1] * (like.dim() - 2)) for d in self.channel.split(self.layout.part_channels)]

    def _pairs(self, state: MetaBroydenState, shape: tuple[Any, ...]) -> SecantState | None:
        """The secant pairs known so far; None before the first iterate is noted."""
        if state.secants is not None or not state.trail:
            return state.secants
        (first, *others) = ((z, g) if rows is None else (z[rows], g[rows]) for z, g, rows in state.trail)
        found = self.secants.init(*first, shape)
        for z, g in others:
            found = self.secants.note(z, g, found, shape)
        return found

    def gather(self, state: MetaBroydenState, index: Tensor) -> MetaBroydenState:
        """The rows `index` of a state; iterates that may never be asked for are not copied."""
        trail = tuple((z, g, index if rows is None else rows.index_select(0, index)) for z, g, rows in state.trail)
        return gather(state._replace(trail=()), index)._replace(trail=trail)

    def inverse(self, state: MetaBroydenState, index: Tensor) -> Any:
        """What `transposed` needs of the rows `index`: gates, weights and secant pairs."""
        state = self.gather(state, index)
        secants = self._pairs(state, self.layout.shape_like(state.gates.shape[2:]))
        if secants is None:
            return state.gates, state.direct, None
        used = min(secants.steps - 1, self.config.memory)
        pairs = (secants.residuals[:, :used], secants.moves[:, :used], secants.gram[:, :, :used, :used])
        return state.gates, state.direct, pairs if used else None

    def transposed(self, w: Tensor, frozen: Any) -> Tensor:
        """Bᵀw with B of the class's formula, for w (R, n)."""
        gates, direct, pairs = frozen
        shape = self.layout.shape_like(gates.shape[2:])
        wc = self.layout.canonical(w, shape)
        learned = self.layout.parts(self.layout.flat(self.preconditioner.transpose(wc, gates)), shape)
        back = -self.layout.joined(self._weighted(self.layout.parts(w, shape), direct, learned))
        if pairs is None:
            return back
        residuals, moves, gram = pairs
        return back + self.secants.transposed(w, back, residuals, moves, gram, shape)
