"""A quasi-Newton method whose start, first steps and initial inverse Jacobian are learned, and whose secants are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metabroyden.deprecated import current
from metabroyden.learned.base import LearnedConfig, LearnedSolver
from metabroyden.learned.coefficients import StepLSTM, StepSchedule, by_channel
from metabroyden.learned.preconditioner import Frozen, LearnedInverse, Preconditioner
from metabroyden.learned.safeguard import BY_PROGRESS, Safeguard
from metabroyden.learned.secants import Secants, SecantState
from metabroyden.learned.trusted_inverse import JUDGED_ON, TrustedInverse
from metabroyden.learned.wiring import Wiring
from metabroyden.solver import Phase, Step, Trail
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
        object.__setattr__(self, "coefficients", current(self.coefficients))
        self._check_choice("coefficients", "schedule", "lstm")
        self._check_least(rank=0, learned_steps=1, memory=1, schedule_length=0)
        if self.schedule_length > self.learned_steps:
            raise ValueError(
                f"schedule_length must be at most learned_steps, {self.learned_steps}, got {self.schedule_length}"
            )
        self._check_share("damping", "ridge")


class MetaBroydenState(NamedTuple):
    """R rows, n coordinates, C channels (of all resolutions), k inner ones."""

    initial: Tensor  # (R, k, *S) the preconditioner's gates where the solve began
    wiring: Wiring | None
    before: Tensor  # (R, n) the iterate before this one
    memory: Any  # of the coefficients, see `StepCoefficients`
    trail: tuple[Any, ...]  # (iterates, residuals, our rows in them or None) of the learned steps
    secants: SecantState | None  # made of the trail when first wanted
    steps: int


@register("meta-broyden")
class MetaBroyden(LearnedSolver):
    """z⁺ = z − B_k g, B_k = B₀ + (ΔZ − B₀ΔG)ΔG⁺ with a learned B₀ = −(w + d + P) and exact secant pairs.

    P(g) = B(A(g) · γ) is a `Preconditioner` of k inner channels, whose gates γ the context sets once. The first steps are

        z⁺ = z + m·(z − z₋) + (w + d)·g + B(A(g)·γ + s·c)

    with coefficients from a `StepSchedule` (w and m for each step and channel, a factor of γ for each step and inner
    channel; c = d = 0: a step costs little more than P, two narrow maps) or from a `StepLSTM` (γ, c, w and m for each
    place, d a constant for each channel: as few evaluations on most maps, fewer on some, at two to three times the price,
    results/RESEARCH.md, 46 and 47).

    The pairs (Δz, Δg) of these steps are kept, the last `memory` of them. From then on the last γ and w are frozen, which
    makes B₀ linear, and every step is a multisecant one on top of it (see `Secants`; for sequences causal, token by token).
    With no more than `learned_steps` steps in an unroll, B₀ is learned from what the residuals of those steps want. A
    schedule's last row may go on for some steps after the unroll's length: they cost a third of a multisecant step on
    small maps.

    Untrained, P = 0, c = m = d = 0 and w is the damping: Picard's iteration, then Anderson's on its pairs.
    """

    config_type = MetaBroydenConfig
    has_inverse = True
    config: MetaBroydenConfig

    def __init__(self, config: MetaBroydenConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        config = self.config
        rank = self.rank = config.rank or min(48, max(16, sum(self.layout.part_channels) // 2))
        kernel = 1 if config.layout == "pyramid" else 3  # there finer pixels already go with their coarse one
        self.preconditioner = Preconditioner(
            self.layout, self.context_channels, rank, kernel=kernel, dilations=config.dilations
        )
        self.coefficients: Any = (
            StepSchedule(self.layout, self.trained_for, rank, config.damping)
            if config.coefficients == "schedule"
            else StepLSTM(self.layout, config.hidden, rank, config.damping)
        )
        self.secants = Secants(self.layout, config.memory, config.ridge)

    @property
    def trained_for(self) -> int:
        """Steps of the unrolls that it is made for."""
        return self.config.schedule_length or self.config.learned_steps

    def safeguarded(self) -> list[Phase]:
        """As every learned solver's; Broyden carries on from B₀ with the coefficients' final step size and gates, as far as
        these fit."""
        return self.config.safeguard.phases(self, TrustedInverse(LearnedInverse(self, self._beyond_identity)))

    def _beyond_identity(self, r: Tensor, shape: tuple[Any, ...]) -> Tensor:
        """(w + d − 1)·r for r (R, n), where there is no step to take w from."""
        parts = self.layout.parts(r, shape)
        weights = by_channel(self.coefficients.final_step_size.unsqueeze(0) - 1, self.layout, parts[0])
        return self.layout.joined([part * w for part, w in zip(parts, weights, strict=True)])

    def frozen(self, z: Tensor, problem: Any) -> Frozen:
        """As every learned solver's, with the gates (R, k, *S) of where there is no step to take them from."""
        gates, wiring = super().frozen(z, problem)
        return self.coefficients.final_gates(gates), wiring

    def init(self, z: Tensor, g: Tensor, problem: Any) -> MetaBroydenState:
        """Zero memory, no pairs; the gates are taken once."""
        gates, wiring = super().frozen(z, problem)
        memory = self.coefficients.begin(gates, g, self.layout.resolve(problem.shape))
        return MetaBroydenState(gates, wiring, z, memory, (), None, 0)

    def step(self, z: Tensor, g: Tensor, state: MetaBroydenState, problem: Any) -> Step:
        """One learned step, (R, n)."""
        shape = self.layout.resolve(problem.shape)
        if state.steps < self.config.learned_steps:
            return self._learned_step(z, g, state, shape, self._trail(z, g, state, problem))
        earlier = self._pairs(state, shape)
        secants = self.secants.init(z, g, shape) if earlier is None else self.secants.update(z, g, earlier, shape)
        explained, rest = self.secants.project(g, secants, shape)
        z = z - explained - self._initial_inverse(rest, state, shape)
        return Step(z, state._replace(trail=(), secants=secants, steps=state.steps + 1))

    def _trail(self, z: Tensor, g: Tensor, state: MetaBroydenState, problem: Any) -> tuple[Any, ...]:
        """The trail with this iterate: as far back as the secant steps, or what takes over, will look."""
        config, step = self.config, state.steps
        late = step >= config.learned_steps - 1 - config.memory
        pairs = problem.keep_inverse or (late and step + problem.steps_left > config.learned_steps)
        most = config.memory if pairs else JUDGED_ON * problem.hands_over
        return (*state.trail, (z, g, None))[-most - 1 :] if most else ()

    def _learned_step(
        self, z: Tensor, g: Tensor, state: MetaBroydenState, shape: tuple[Any, ...], trail: tuple[Any, ...]
    ) -> Step:
        layout = self.layout
        residuals = layout.parts(g, shape)
        inner = self.preconditioner.inward.of_parts(residuals, state.wiring)
        found = self.coefficients.at(state.steps, state.initial, inner, g, state.memory, shape)
        for gate in found.gates:
            inner = inner * gate if torch.is_grad_enabled() else inner.mul_(gate)
        if found.correction is not None:
            inner = inner + found.correction
        moved = self.preconditioner.outward.to_parts(inner, state.wiring)
        iterates = zip(layout.parts(z, shape), layout.parts(state.before, shape), strict=True)
        sums = zip(moved, residuals, found.step_sizes, iterates, found.momenta, strict=True)
        for place, r, terms, points, momenta in sums:  # onto what P gave
            for weight, value in (*((term, r) for term in terms), *zip(momenta, points, strict=True)):
                place.addcmul_(weight, value)
        after = state._replace(before=z, memory=found.memory, trail=trail, steps=state.steps + 1)
        return Step(layout.joined(moved), after)

    def _initial_inverse(self, r: Tensor, state: MetaBroydenState, shape: tuple[Any, ...]) -> Tensor:
        """B₀r for r (R, n), with the coefficients of the last learned step."""
        parts = self.layout.parts(r, shape)
        step_size, gates = self.coefficients.last(state.initial, state.memory)
        inner = self.preconditioner.inward.of_parts(parts, state.wiring) * gates
        more = self.preconditioner.outward.to_parts(inner, state.wiring)
        return -self.layout.joined(self._add_diagonal(parts, step_size, more))

    def _add_diagonal(self, parts: list[Tensor], step_size: Tensor, more: list[Tensor]) -> list[Tensor]:
        """(w + d)·r + more, part by part."""
        found = []
        for part, terms, total in zip(parts, self.coefficients.diagonal(step_size, parts[0]), more, strict=True):
            for weight in terms:
                total = torch.addcmul(total, weight, part)
            found.append(total)
        return found

    def _pairs(self, state: MetaBroydenState, shape: tuple[Any, ...]) -> SecantState | None:
        """The secant pairs known so far; None before the first iterate is noted."""
        if state.secants is not None or not state.trail:
            return state.secants
        return self.secants.of([(z, g) if rows is None else (z[rows], g[rows]) for z, g, rows in state.trail], shape)

    def gather(self, state: MetaBroydenState, index: Tensor) -> MetaBroydenState:
        """The rows `index` of a state; iterates that may never be asked for are not copied."""
        trail = tuple((z, g, index if rows is None else rows.index_select(0, index)) for z, g, rows in state.trail)
        return gather(state._replace(trail=()), index)._replace(trail=trail)

    def trail(self, state: MetaBroydenState, index: Tensor) -> Trail:
        """The last iterates of the learned steps: more pairs would cost more to take over than they save."""
        last = state.trail[-JUDGED_ON:]
        kept = ((z, g, index if rows is None else rows.index_select(0, index)) for z, g, rows in last)
        return [(z.index_select(0, rows), g.index_select(0, rows)) for z, g, rows in kept]

    def inverse(self, state: MetaBroydenState, index: Tensor) -> Any:
        """What `rmatvec` needs of the rows `index`: gates, weights and secant pairs."""
        state = self.gather(state, index)
        step_size, gates = self.coefficients.last(state.initial, state.memory)
        secants = self._pairs(state, self.layout.shape_like(gates.shape[2:]))
        return gates, state.wiring, step_size, None if secants is None else self.secants.pairs(secants)

    def rmatvec(self, w: Tensor, inverse: Any) -> Tensor:
        """Bᵀw with B of the class's formula, for w (R, n)."""
        gates, wiring, step_size, pairs = inverse
        shape = self.layout.shape_like(gates.shape[2:])
        wc = self.layout.canonical(w, shape)
        learned = self.layout.parts(self.layout.flat(self.preconditioner.transpose(wc, gates, wiring)), shape)
        back = -self.layout.joined(self._add_diagonal(self.layout.parts(w, shape), step_size, learned))
        return back if pairs is None else back + self.secants.transposed(w, back, pairs, shape)
