"""A secant method for any f whose damping, ridge and trust in its secants one small LSTM sets, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metabroyden.learned.base import LearnedConfig, LearnedSolver
from metabroyden.learned.layout import Layout
from metabroyden.learned.lstm import SharedLSTM
from metabroyden.learned.preconditioner import Frozen, Preconditioner
from metabroyden.learned.safeguard import BY_PROGRESS, Safeguard
from metabroyden.learned.secants import put
from metabroyden.solver import Step
from metabroyden.solvers.registry import register

_LOOKS = (1e-6, 1e-2, 1e-1)  # ridges at which the share of g that the pairs explain is looked at
_FEATURES = len(_LOOKS) + 9
_OUTPUTS = 5  # log damping, log ridge, its growth with a pair's age, trust in the secants, share of the slopes


@dataclass(frozen=True)
class UniversalConfig(LearnedConfig):
    """Adds to `LearnedConfig`. Without initializer and preconditioner, layout and shape bind it to nothing.

    Attributes:
        memory: secant pairs kept.
        ridge: of the least squares over the pairs, relative to each, in the untrained solver.
        rank: inner channels of a preconditioner; 0 for none.
    """

    layout: str = "vector"
    shape: tuple[int, ...] = (1,)
    hidden: int = 16
    initializer_width: int = 0
    memory: int = 10
    ridge: float = 1e-2
    rank: int = 0
    safeguard: Safeguard = BY_PROGRESS

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(rank=0, memory=1)
        self._check_share("ridge")


class UniversalState(NamedTuple):
    """Ring buffers of the last m pairs and what the LSTM keeps. R rows, n coordinates, H hidden."""

    residuals: Tensor  # (R, m, n) Δg
    moves: Tensor  # (R, m, n) Δz
    gram: Tensor  # (R, m, m) inner products of `residuals`, in float64
    z: Tensor  # (R, n) the last iterate
    g: Tensor  # (R, n) its residual
    rest: Tensor  # (R, n) what the pairs left of it
    damping: Tensor  # (R, 1) of the last step
    frozen: Frozen | None  # of the preconditioner; None without
    hidden: Tensor  # (R, H, 1)
    cell: Tensor  # (R, H, 1)
    steps: int


@register("universal")
class Universal(LearnedSolver):
    """z⁺ = z − ωΔZγ + β(1 + σh)∘(g − ωΔGγ), γ = argmin ‖g − ΔGγ‖² + Σ ρᵢ(‖Δgᵢ‖γᵢ)²; β, ω, ρ, σ from an LSTM cell a sample.

    Anderson's method (Walker & Ni, SIAM J. Numer. Anal. 49, 2011) with its settings in the hands of one LSTM that sees
    numbers without unit or size: how the residual changed, what share of it the pairs explain at three ridges, what the
    last damping did to the part they did not explain, the relative residual, the step. It has no weight that belongs to a
    coordinate, a channel or a layout, so it runs on any state. ρᵢ = ρ·exp(a·age) forgets pairs of where f was another.

    h are slopes coordinate by coordinate, what the pairs say of an inverse Jacobian that were diagonal: 1 + h is the
    least-squares −Δz/Δg of each coordinate, within [0.3, 5], and h shrinks to zero where a coordinate did not move.

    Untrained, ω = β = 1, σ = 0 and ρ is the config's ridge: `Anderson(memory, 1.0, ridge)`. One β, ω and γ a sample: on
    sequences it carries the future into the past, as Anderson's method does. Where gradients are recorded, they reach γ
    through ρ and ω alone.

    With an initializer or a preconditioner P it is bound to one layout, as `specialised` makes it: the start is learned and
    P is added to 1 + σh.

    Examples:
        >>> import metabroyden as mb
        >>> from metabroyden.zoo.testbed import make_problem
        >>> problem = make_problem("tanh_symmetric_1.5", dtype=torch.float32)
        >>> solver = mb.load_solver("universal")
        >>> bool(mb.solve(problem.f, problem.z0, problem.context, solver=solver, rtol=1e-3).converged.all())
        True
    """

    config_type = UniversalConfig
    config: UniversalConfig

    def __init__(self, config: UniversalConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        config = self.config
        self.lstm = SharedLSTM(_FEATURES, config.hidden, _OUTPUTS)
        self.preconditioner = Preconditioner(self.layout, self.context_channels, config.rank) if config.rank else None

    @property
    def dimension_free(self) -> bool:
        """Whether it runs on states of any shape."""
        return self.initializer is None and self.preconditioner is None

    def start(self, z0: Tensor, problem: Any) -> Tensor:
        """The learned first iterate, (R, n); z0 itself without an initializer."""
        self.check_dtype(z0)
        return z0 if self.initializer is None else super().start(z0, problem)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> UniversalState:
        """No pairs, zero memory."""
        m = self.config.memory
        buffer = z.new_zeros(len(z), m, z.shape[1])
        gram = torch.zeros(len(z), m, m, dtype=torch.float64, device=z.device)
        hidden, cell = self.lstm.begin(len(z), 1, z)
        frozen = None if self.preconditioner is None else self.frozen(z, problem)
        return UniversalState(buffer, buffer.clone(), gram, z, g, g, z.new_ones(len(z), 1), frozen, hidden, cell, 0)

    def step(self, z: Tensor, g: Tensor, state: UniversalState, problem: Any) -> Step:
        """One mixed step, (R, n)."""
        if state.steps:
            state = self._update(z, g, state)
        used = min(state.steps, self.config.memory)
        residuals, moves = state.residuals[:, :used], state.moves[:, :used]
        gram = state.gram[:, :used, :used]
        with torch.no_grad():
            right = torch.bmm(residuals, g.unsqueeze(2)).squeeze(2).double()
            features = self._features(z, g, state, gram, right)
        output, hidden, cell = self.lstm(features.unsqueeze(2), state.hidden, state.cell)
        damping, ridge, ageing, trust, share = output.squeeze(2).unbind(1)
        damping = torch.exp(1.2 * torch.tanh(damping)).unsqueeze(1)
        if used:
            m = self.config.memory
            age = ((state.steps - 1) % m - torch.arange(used, device=z.device)) % m  # steps since each pair was taken
            exponent = (3 * ridge).clamp(-12, 5).unsqueeze(1) + (torch.tanh(ageing) * 0.7).unsqueeze(1) * age
            gamma = _solve(gram, right, self.config.ridge * exponent.double().exp())
            gamma = (2 * torch.sigmoid(trust)).unsqueeze(1) * gamma.to(z.dtype)
            known = torch.bmm(gamma.unsqueeze(1), moves).squeeze(1)
            rest = g - torch.bmm(gamma.unsqueeze(1), residuals).squeeze(1)
            move = rest * (1 + torch.tanh(share).unsqueeze(1) * _slopes(residuals, moves))
        else:
            known, rest, move = torch.zeros_like(z), g, g
        if self.preconditioner is not None and state.frozen is not None:
            shape = self.layout.resolve(problem.shape)
            move = move + self.layout.flat(self.preconditioner(self.layout.canonical(rest, shape), *state.frozen))
        after = state._replace(z=z, g=g, rest=rest, damping=damping, hidden=hidden, cell=cell, steps=state.steps + 1)
        return Step(z - known + damping * move, after)

    def _update(self, z: Tensor, g: Tensor, state: UniversalState) -> UniversalState:
        """Take the pair between the last iterate and this one; in place, unless gradients are recorded."""
        m = self.config.memory
        slot, used = (state.steps - 1) % m, min(state.steps, m)
        residuals, moves = put(state.residuals, g - state.g, slot), put(state.moves, z - state.z, slot)
        gram = state.gram.clone() if torch.is_grad_enabled() else state.gram
        with torch.no_grad():
            row = torch.bmm(residuals[:, :used], residuals[:, slot].unsqueeze(2)).squeeze(2).double()
            gram[:, slot, :used] = row
            gram[:, :used, slot] = row
        return state._replace(residuals=residuals, moves=moves, gram=gram)

    def _features(self, z: Tensor, g: Tensor, state: UniversalState, gram: Tensor, right: Tensor) -> Tensor:
        """(R, F), without unit or size."""
        size, before, left = (vector.norm(dim=1).clamp_min(1e-30) for vector in (g, state.g, state.rest))
        drop = state.rest - g  # β(I − J) times what was left, were f linear
        best = state.damping.squeeze(1) * torch.linalg.vecdot(state.rest, drop) / drop.square().sum(1).clamp_min(1e-30)
        shares, total = [], torch.zeros_like(size)
        for ridge in _LOOKS:
            gamma = _solve(gram, right, gram.new_full((1, 1), ridge))
            explained = (gamma * (2 * right - torch.bmm(gram, gamma.unsqueeze(2)).squeeze(2))).sum(1).to(z.dtype)
            shares.append((1 - explained / size.square()).clamp(1e-6, 1).log() / 4)
            total = gamma.abs().sum(1).to(z.dtype)
        begun = 1.0 if state.steps else 0.0
        columns = [
            (size / before).log().clamp(-3, 3),
            (size / left).log().clamp(-3, 3),
            (size / (z + g).norm(dim=1).clamp_min(1e-30)).log().clamp(-12, 2) / 4,
            begun * torch.linalg.vecdot(g, state.g) / (size * before),
            begun * torch.linalg.vecdot(g, state.rest) / (size * left),
            begun * best.clamp(-1, 3),
            state.damping.squeeze(1).log(),
            total.log1p(),
            torch.full_like(size, min(state.steps, 30) / 10),
        ]
        return torch.nan_to_num(torch.stack([*columns, *shares], dim=1), 0.0, 3.0, -3.0)


def specialised(
    solver: Universal, layout: Layout, *, rank: int = 64, initializer_width: int = 64, **seen: Any
) -> Universal:
    """A copy of the solver with an initializer and a preconditioner for states of one layout, both zero-initialised.

    It takes the steps of the given one, which has no parts of its own, until it is trained. Rank and initializer_width are
    inner channels of the two, the rest is conditioning and context_channels as in `LearnedConfig`.
    """
    sizes: dict[str, Any] = {"shape": tuple(layout.shape), "rank": rank, "initializer_width": initializer_width}
    copy = Universal(replace(solver.config, layout=layout.kind, **sizes, **seen)).to(next(solver.parameters()))
    copy.lstm.load_state_dict(solver.lstm.state_dict())
    return copy


def _solve(gram: Tensor, right: Tensor, ridge: Tensor) -> Tensor:
    """(R, k) γ for Gram matrices (R, k, k), right sides (R, k) and relative ridges that broadcast to (R, k)."""
    diagonal = torch.diagonal(gram, dim1=1, dim2=2)
    lifted = gram + torch.diag_embed(torch.where(diagonal > 0, ridge * diagonal, 1.0))
    return torch.nan_to_num(torch.linalg.solve_ex(lifted, right)[0], 0.0, 0.0, 0.0)


@torch.no_grad()
def _slopes(residuals: Tensor, moves: Tensor) -> Tensor:
    """(R, n) h, for pairs (R, k, n)."""
    square = residuals.square().sum(1)
    floor = 0.1 * square.mean(1, keepdim=True) + torch.finfo(square.dtype).tiny
    slope = (-(residuals * moves).sum(1) / (square + floor)).clamp(0.3, 5)
    return square / (square + floor) * (slope - 1)
