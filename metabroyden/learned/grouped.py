"""One LSTM cell per channel or token, and a channel-mixing preconditioner: the coordinatewise idea at less cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metabroyden.learned.base import LearnedConfig, LearnedSolver
from metabroyden.learned.lstm import SharedLSTM
from metabroyden.learned.preconditioner import Frozen, LearnedInverse, Preconditioner
from metabroyden.solver import Phase, Step
from metabroyden.solvers.registry import register
from metabroyden.state import gather

_DIRECTIONS = 4  # residual, preconditioned residual, previous update, state; and one bias a group


@dataclass(frozen=True)
class GroupedConfig(LearnedConfig):
    """Adds to `LearnedConfig`.

    Attributes:
        rank: inner channels of the preconditioner.
        secant_start: whether Broyden, after the hand-over, starts from −(I + P) rather than −I.
    """

    hidden: int = 20
    rank: int = 32
    secant_start: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(rank=1)


class GroupedState(NamedTuple):
    """R rows, G groups, H hidden, n coordinates."""

    frozen: Frozen  # of the preconditioner
    update: Tensor  # (R, C, *S) previous update over its residual scale
    hidden: Tensor  # (R, H, G)
    cell: Tensor  # (R, H, G)
    scale: Tensor  # (R, 1, …) previous residual scale
    first: Tensor  # (R, 1, …) the first one
    weights: Tensor  # (R, G, 5) of the directions in the last step, the bias last; (R, G, 4) without one


@register("grouped")
class GroupedLSTM(LearnedSolver):
    """z⁺ = z + s·Σᵢ wᵢdᵢ over the directions r, P(r), previous update, z/rms(z) and 1, weights w from one LSTM a group.

    s is the residual's root mean square, r = g/s, P a `Preconditioner`. The LSTM of a group (see `Layout`) sees the
    sizes, correlations and means of the directions over the group's coordinates, log s and its last change. Untrained,
    P = 0 and w = (1, 1, 0, 0, 0): Picard.
    """

    config_type = GroupedConfig
    has_inverse = True
    config: GroupedConfig
    _base: Tensor

    def __init__(self, config: GroupedConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        config = self.config
        self.preconditioner = Preconditioner(self.layout, self.context_channels, config.rank)
        bias = not self.homogeneous
        pairs = _DIRECTIONS * (_DIRECTIONS - 1) // 2
        inputs = _DIRECTIONS + pairs + bias * _DIRECTIONS + 2  # rows of `direction_features`
        self.lstm = SharedLSTM(inputs, config.hidden, _DIRECTIONS + bias, self.layout.identities)
        base = torch.tensor([[1.0], [1.0], [0.0], [0.0], [0.0]])[: _DIRECTIONS + bias]
        self.register_buffer("_base", base, persistent=False)

    def safeguarded(self) -> list[Phase]:
        """As every learned solver's; Broyden carries on from the learned inverse Jacobian."""
        return self.config.safeguard.phases(self, LearnedInverse(self) if self.config.secant_start else None)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> GroupedState:
        """Zero memory; the preconditioner's gate is taken once."""
        shape = self.layout.resolve(problem.shape)
        frozen = self.frozen(z, problem)
        hidden, cell = self.lstm.begin(len(z), self.layout.groups(self.layout.extents(shape)), z)
        gc = self.layout.canonical(g, shape)
        scale = self.layout.scale(gc)
        weights = self._base.squeeze(1).expand(len(z), hidden.shape[2], -1)
        return GroupedState(frozen, torch.zeros_like(gc), hidden, cell, scale, scale, weights)

    def step(self, z: Tensor, g: Tensor, state: GroupedState, problem: Any) -> Step:
        """One learned step, (R, n)."""
        layout = self.layout
        shape = layout.resolve(problem.shape)
        zc, gc = layout.canonical(z, shape), layout.canonical(g, shape)
        scale = layout.scale(gc)
        r = gc / scale
        size = layout.scale(zc)
        directions = [r, self.preconditioner(r, *state.frozen), state.update, zc / size]
        stack = layout.grouped(torch.stack(directions, dim=2))  # (R, G, 4, P)
        features = direction_features(stack, scale, state.scale, state.first if self.homogeneous else None)
        output, hidden, cell = self.lstm(features, state.hidden, state.cell)
        weights = (output + self._base).transpose(1, 2)  # (R, G, 5)
        update = layout.ungrouped(mix(stack, weights), layout.extents(shape))
        z = z + layout.flat(scale * update)
        after = state._replace(update=update, hidden=hidden, cell=cell, scale=scale, weights=weights)
        return Step(z, after)

    def inverse(self, state: GroupedState, index: Tensor) -> Frozen:
        """What `rmatvec` needs of the rows `index`: the preconditioner's gates, the wiring."""
        return gather(state.frozen, index)

    def rmatvec(self, w: Tensor, inverse: Frozen) -> Tensor:
        """Bᵀw with B = −(I + P), for w (R, n)."""
        return -(w + LearnedInverse(self).rmatvec(w, inverse))


def direction_features(stack: Tensor, scale: Tensor, previous: Tensor, first: Tensor | None = None) -> Tensor:
    """(R, F, G): log sizes, correlations and means of directions over each group, log s and its last change.

    Args:
        stack: (R, G, K, P) the directions.
        scale: this step's residual scale s, (R, 1, …).
        previous: the last step's.
        first: where given, features are even and of degree zero in the problem: no means, log s relative to this one.
    """
    gram = stack @ stack.transpose(2, 3) / stack.shape[3]
    root = (torch.diagonal(gram, dim1=2, dim2=3) + 1e-8).sqrt()
    one, other = torch.triu_indices(stack.shape[2], stack.shape[2], offset=1, device=stack.device).unbind(0)
    correlations = gram[:, :, one, other] / (root[..., one] * root[..., other])
    level = scale if first is None else scale / first
    sizes = [level.log() / 5, (scale / previous).log().clamp(-3, 3)]
    columns = [value.flatten(1).unsqueeze(2).expand(-1, stack.shape[1], 1) for value in sizes]
    means = [stack.mean(dim=3) / root] if first is None else []
    return torch.cat([root.log(), correlations, *means, *columns], dim=2).transpose(1, 2)


def mix(stack: Tensor, weights: Tensor) -> Tensor:
    """Σₖ wₖ dₖ, (R, G, P), for directions (R, G, K, P) and weights (R, G, K), or (R, G, K + 1) with a bias last."""
    count = stack.shape[2]
    mixed = weights[..., count:] if weights.shape[2] > count else torch.zeros_like(stack[:, :, 0])
    for k in range(count):  # several times faster than one batched product this small
        mixed = torch.addcmul(mixed, weights[..., k : k + 1], stack[:, :, k])
    return mixed
