"""A quasi-Newton method whose start, first steps and initial inverse Jacobian are learned, and whose secants are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metabroyden.deprecated import current
from metabroyden.learned.base import LearnedConfig, LearnedSolver
from metabroyden.learned.lstm import SharedLSTM
from metabroyden.learned.preconditioner import LearnedInverse, Preconditioner
from metabroyden.learned.safeguard import BY_PROGRESS, Safeguard
from metabroyden.learned.secants import Secants, SecantState
from metabroyden.learned.table import Table
from metabroyden.solver import Phase, Step
from metabroyden.solvers.registry import register
from metabroyden.state import gather


@dataclass(frozen=True)
class MetaBroydenConfig(LearnedConfig):
    """Adds to `LearnedConfig`.

    Attributes:
        rank: inner channels k of the preconditioner; 0: half of the state's (of all resolutions together), from 16 to 48.
        damping: of the iteration that it is before training.
        learned_steps: steps with learned weights, which see no secants; quasi-Newton steps from then on.
        coefficients: of those steps, "schedule" or "lstm", see `MetaBroyden`. `hidden` is the width of the latter.
        schedule_length: of the table, whose last one serves all later gated steps; 0: as many as those.
        dilations: of the preconditioner's two maps, see `Preconditioner`; both 1 for vectors and for several resolutions.
        memory: secant pairs kept, those of the gated steps among them; no more than the state has coordinates.
        ridge: of the least squares over the pairs, relative to each; at least 100 units of rounding of the state's dtype.
    """

    hidden: int = 8
    rank: int = 0
    damping: float = 1.0
    learned_steps: int = 28
    coefficients: str = "schedule"
    schedule_length: int = 0
    dilations: tuple[int, int] = (1, 1)
    memory: int = 10
    ridge: float = 1e-8
    safeguard: Safeguard = BY_PROGRESS

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "coefficients", current(self.coefficients, stacklevel=5))
        if self.coefficients not in ("schedule", "lstm"):
            raise ValueError(f"coefficients must be 'schedule' or 'lstm', got {self.coefficients!r}")
        for name, least in (("rank", 0), ("learned_steps", 1), ("memory", 1), ("schedule_length", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.schedule_length > self.learned_steps:
            raise ValueError(
                f"schedule_length must be at most learned_steps, {self.learned_steps}, got {self.schedule_length}"
            )
        for name in ("damping", "ridge"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")


class MetaBroydenState(NamedTuple):
    """R rows, n coordinates, C channels (of all resolutions), k inner ones, H hidden, P places (all of S)."""

    initial: Tensor  # (R, k, *S) the preconditioner's gates where the solve began
    gates: Tensor  # (R, k, *S) those of the last gated step
    direct: Tensor  # the residual's weight in that step: of places (R, 1, *S); from a table of channels (R, C)
    before: Tensor  # (R, n) the iterate before this one
    lstm: tuple[Tensor, Tensor, Tensor] | None  # hidden and cell state (R, H, P), previous residual scale (R, 1, …)
    trail: tuple[
        tuple[Tensor, Tensor, Tensor | None], ...
    ]  # (iterates, residuals, our rows in them) of the gated steps
    secants: SecantState | None  # made of the trail when first wanted
    steps: int


class _Weights(NamedTuple):
    """Of one gated step."""

    direct: Tensor  # as in the state
    onward: Tensor  # 1 + m, likewise
    gates: Tensor  # (R, k, *S)
    correction: Tensor | None  # s·c, (R, k, *S)
    lstm: tuple[Tensor, Tensor, Tensor] | None


@register("meta-broyden")
class MetaBroyden(LearnedSolver):
    """z⁺ = z − B_k g, B_k = B₀ + (ΔZ − B₀ΔG)ΔG⁺ with a learned B₀ = −(w + d + P) and exact secant pairs.

    P(g) = B(A(g) · γ) is a `Preconditioner` of k inner channels, whose gates γ the context sets once. The first steps are

        z⁺ = z + m·(z − z₋) + (w + d)·g + B(A(g)·γ + s·c)

    and what weighs them is either

    - a table: w and m for each step and channel, and a factor of the gates for each step and inner channel; c = d = 0. A
      step costs little more than P, two narrow maps; or
    - an LSTM: one cell a place (a pixel, a token, the sample of a vector), shared by all, sees the inner residual A(g)/s,
      the gates where the solve began, the residual's scale s and its last change, and sets γ, an inner correction c, w and
      m of the place; d is a constant for each channel. As few evaluations on most maps, fewer on some, at two to three
      times the price of a table's step (results/RESEARCH.md, 46 and 47).

    The pairs (Δz, Δg) of these steps are kept, the last `memory` of them. From then on the last γ and w are frozen, which
    makes B₀ linear, and every step is a multisecant one on top of it (see `Secants`; for sequences causal, token by token).
    With no more than `learned_steps` steps in an unroll, B₀ is learned from what the residuals of those steps want. A
    table's last row may go on for some steps after the unroll's length: they cost a third of a multisecant step on small
    maps.

    Untrained, P = 0, c = m = d = 0 and w is the damping: Picard's iteration, then Anderson's on its pairs.
    """

    config_type = MetaBroydenConfig
    has_inverse = True
    config: MetaBroydenConfig

    def __init__(self, config: MetaBroydenConfig) -> None:
        super().__init__(config)
        rank = self.rank = config.rank or min(48, max(16, sum(self.layout.part_channels) // 2))
        kernel = 1 if config.layout == "pyramid" else 3  # there finer pixels already go with their coarse one
        self.preconditioner = Preconditioner(
            self.layout, self.context_channels, rank, kernel=kernel, dilations=config.dilations
        )
        channels = sum(self.layout.part_channels)
        self.table: Table | None = None
        self.lstm: SharedLSTM | None = None
        if config.coefficients == "schedule":
            self.table = Table(self.trained_for, channels, rank, config.damping)
        else:
            self.channel = nn.Parameter(torch.zeros(channels))
            self.lstm = SharedLSTM(2 * rank + 2, config.hidden, 2 * rank + 2)
        self.secants = Secants(self.layout, config.memory, config.ridge)

    @property
    def trained_for(self) -> int:
        """Steps of the unrolls that it is made for."""
        return self.config.schedule_length or self.config.learned_steps

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> LearnedSolver:
        """The untrained solver of a described config."""
        if "dilations" in values:
            values["dilations"] = tuple(values["dilations"])
        return super().from_config(values)

    def safeguarded(self) -> list[Phase]:
        """As every learned solver's; Broyden carries on from B₀: that of a table's last row, or −(damping + d + P)."""
        return self.config.safeguard.phases(self, LearnedInverse(self, self._beyond_identity))

    def _beyond_identity(self, r: Tensor, shape: tuple[Any, ...]) -> Tensor:
        """(w + d − 1)·r for r (R, n), where there is no step to take w from."""
        parts = self.layout.parts(r, shape)
        weight = self.config.damping + self.channel if self.table is None else self.table.last[0]
        weights = _of_channels(weight.unsqueeze(0) - 1, self.layout.part_channels, parts[0])
        return self.layout.joined([part * w for part, w in zip(parts, weights, strict=True)])

    def gates(self, z: Tensor, problem: Any) -> Tensor:
        """The preconditioner's gates at z (R, n) where there is no step to take them from: (R, k, *S)."""
        gates = self._initial_gates(z, problem)
        return gates if self.table is None else gates * _along(self.table.last[2], gates)

    def _initial_gates(self, z: Tensor, problem: Any) -> Tensor:
        shape = self.layout.resolve(problem.shape)
        return self.preconditioner.gates(self.layout.canonical(z, shape), self.context_feature(problem, shape))

    def init(self, z: Tensor, g: Tensor, problem: Any) -> MetaBroydenState:
        """Zero memory, no pairs; the gates are taken once."""
        gates = self._initial_gates(z, problem)
        if self.lstm is None:
            channels = z.new_full((len(z), sum(self.layout.part_channels)), self.config.damping)
            return MetaBroydenState(gates, gates, channels, z, None, (), None, 0)
        hidden, cell = self.lstm.begin(len(z), gates[0, 0].numel(), z)
        scale = self.layout.scale_of(g, self.layout.resolve(problem.shape))
        direct = torch.full_like(gates[:, :1], self.config.damping)
        return MetaBroydenState(gates, gates, direct, z, (hidden, cell, scale), (), None, 0)

    def step(self, z: Tensor, g: Tensor, state: MetaBroydenState, problem: Any) -> Step:
        """One learned step, (R, n)."""
        shape = self.layout.resolve(problem.shape)
        if state.steps < self.config.learned_steps:
            return self._gated(z, g, state, shape)
        earlier = self._pairs(state, shape)
        secants = self.secants.init(z, g, shape) if earlier is None else self.secants.note(z, g, earlier, shape)
        known, rest = self.secants.explain(g, secants, shape)
        z = z - known - self._initial_inverse(rest, state, shape)
        return Step(z, state._replace(trail=(), secants=secants, steps=state.steps + 1))

    def _gated(self, z: Tensor, g: Tensor, state: MetaBroydenState, shape: tuple[Any, ...]) -> Step:
        layout = self.layout
        residuals = layout.parts(g, shape)
        inner = self.preconditioner.inward.of_parts(residuals)
        by_table = self.table is not None
        weights = self._weighed_by_table(state) if by_table else self._weighed_by_lstm(inner, g, state, shape)
        after, before = layout.parts(z, shape), layout.parts(state.before, shape)
        moved = [torch.lerp(*three) for three in zip(before, after, self._by_part(weights.onward, inner), strict=True)]
        inner = inner * weights.gates
        if weights.correction is not None:
            inner = inner + weights.correction
        learned = self.preconditioner.outward.to_parts(inner)
        for place, r, several, more in zip(
            moved, residuals, self._diagonal(weights.direct, inner), learned, strict=True
        ):
            for w in several:
                place.addcmul_(w, r)
            place.add_(more)
        trail = (*state.trail, (z, g, None))[-self.config.memory - 1 :]
        known = state._replace(
            gates=weights.gates, direct=weights.direct, before=z, lstm=weights.lstm, trail=trail, steps=state.steps + 1
        )
        return Step(layout.joined(moved), known)

    def _weighed_by_table(self, state: MetaBroydenState) -> _Weights:
        assert self.table is not None
        direct, onward, gates = self.table(state.steps)
        rows = len(state.initial)
        gates = state.initial * _along(gates, state.initial)
        return _Weights(direct.expand(rows, -1), onward.unsqueeze(0), gates, None, None)

    def _weighed_by_lstm(self, inner: Tensor, g: Tensor, state: MetaBroydenState, shape: tuple[Any, ...]) -> _Weights:
        assert self.lstm is not None
        assert state.lstm is not None
        hidden, cell, before = state.lstm
        rows, rank, places = len(g), self.rank, hidden.shape[2]
        scale = self.layout.scale_of(g, shape)
        level = torch.stack([scale.log() / 5, (scale / before).log().clamp(-3, 3)], dim=1).flatten(2)
        seen = [(inner / scale).reshape(rows, rank, places), state.initial.reshape(rows, rank, places)]
        output, hidden, cell = self.lstm(torch.cat([*seen, level.expand(-1, -1, places)], dim=1), hidden, cell)
        output = output.reshape(rows, -1, *inner.shape[2:])
        direct, momentum, change, correction = output.split([1, 1, rank, rank], dim=1)
        gates = state.initial * (1 + change)
        return _Weights(self.config.damping + direct, 1 + momentum, gates, scale * correction, (hidden, cell, scale))

    def _initial_inverse(self, r: Tensor, state: MetaBroydenState, shape: tuple[Any, ...]) -> Tensor:
        """B₀r for r (R, n), with the weights of the last gated step."""
        parts = self.layout.parts(r, shape)
        learned = self.preconditioner.outward.to_parts(self.preconditioner.inward.of_parts(parts) * state.gates)
        return -self.layout.joined(self._weighted(parts, state.direct, learned))

    def _weighted(self, parts: list[Tensor], direct: Tensor, more: list[Tensor]) -> list[Tensor]:
        """(w + d)·r and something more, part by part."""
        found = []
        for part, several, rest in zip(parts, self._diagonal(direct, parts[0]), more, strict=True):
            for w in several:
                rest = torch.addcmul(rest, w, part)
            found.append(rest)
        return found

    def _diagonal(self, direct: Tensor, like: Tensor) -> list[tuple[Tensor, ...]]:
        """For each of the layout's parts, what its residual is multiplied with, as terms."""
        weights = self._by_part(direct, like)
        if self.table is not None:
            return [(w,) for w in weights]
        constants = _of_channels(self.channel.unsqueeze(0), self.layout.part_channels, like)
        return list(zip(weights, constants, strict=True))

    def _by_part(self, weight: Tensor, like: Tensor) -> list[Tensor]:
        """Weights of places (R, 1, *S) or, with a table, of channels (R or 1, C), as weights of the layout's parts."""
        if self.table is None:
            return self.layout.spread(weight)
        return _of_channels(weight, self.layout.part_channels, like)

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
        """What `rmatvec` needs of the rows `index`: gates, weights and secant pairs."""
        state = self.gather(state, index)
        secants = self._pairs(state, self.layout.shape_like(state.gates.shape[2:]))
        if secants is None:
            return state.gates, state.direct, None
        used = min(secants.steps - 1, secants.residuals.shape[1])
        pairs = (secants.residuals[:, :used], secants.moves[:, :used], secants.gram[:, :, :used, :used])
        return state.gates, state.direct, pairs if used else None

    def rmatvec(self, w: Tensor, inverse: Any) -> Tensor:
        """Bᵀw with B of the class's formula, for w (R, n)."""
        gates, direct, pairs = inverse
        shape = self.layout.shape_like(gates.shape[2:])
        wc = self.layout.canonical(w, shape)
        learned = self.layout.parts(self.layout.flat(self.preconditioner.transpose(wc, gates)), shape)
        back = -self.layout.joined(self._weighted(self.layout.parts(w, shape), direct, learned))
        if pairs is None:
            return back
        residuals, moves, gram = pairs
        return back + self.secants.transposed(w, back, residuals, moves, gram, shape)


def _of_channels(weight: Tensor, channels: list[int], like: Tensor) -> list[Tensor]:
    """Weights (R or 1, C) as those of each part, which has so many channels and the axes of `like`."""
    return [part.reshape(*part.shape, *[1] * (like.dim() - 2)) for part in weight.split(channels, dim=1)]


def _along(weight: Tensor, like: Tensor) -> Tensor:
    """Weights (k,) of the channels of `like` (R, k, *S)."""
    return weight.reshape(-1, *[1] * (like.dim() - 2))
