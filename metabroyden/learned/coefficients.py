"""What weighs the learned steps of a `MetaBroyden`: a schedule by the number of the step, or an LSTM that sees the solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metabroyden.learned.layout import Layout
from metabroyden.learned.lstm import SharedLSTM


class StepCoefficients(NamedTuple):
    """Of one learned step, weights of the layout's parts: of their channels or, from an LSTM, of places, too."""

    step_sizes: Sequence[tuple[Tensor, ...]]  # terms of w + d, of the residual
    momenta: Sequence[tuple[Tensor, Tensor]]  # 1 + m and −m, of this iterate and the one before; m weighs the last move
    gates: tuple[Tensor, ...]  # (R or 1, k, *S) factors of γ
    correction: Tensor | None  # (R, k, *S) s·c
    memory: Any  # of a schedule (row, all rows); of the LSTM hidden and cell state (R, H, P), scale (R, 1, …), w and γ


class _Rows:
    """A schedule's weights as its steps want them, split into rows once for a whole solve."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows


class StepSchedule(nn.Module):
    """A learned schedule: a step size and a momentum for each step and channel, and a factor of each inner gate.

    After its last row that one goes on. In the manner of unrolled iterations with weights of their own for each step
    (Gregor & LeCun, LISTA, ICML 2010), but for scalars of channels alone, as the coefficients of Chebyshev's
    semi-iteration are.

    Args:
        layout: of the states.
        steps: rows K.
        rank: inner channels k.
        damping: the step size before training.
    """

    def __init__(self, layout: Layout, steps: int, rank: int, damping: float) -> None:
        super().__init__()
        self.layout, self.damping, channels = layout, damping, sum(layout.part_channels)
        # an axis of one in front: to an optimizer of matrices these are none
        self.step_size = nn.Parameter(torch.full((1, steps, channels), damping))
        self.momentum = nn.Parameter(torch.ones(1, steps, channels))
        self.gates = nn.Parameter(torch.ones(1, steps, rank))

    def begin(self, gates: Tensor, g: Tensor, shape: Any) -> Any:
        """The memory before the first step, for gates (R, k, *S) and the residual g (R, n)."""
        if torch.is_grad_enabled():
            return 0, None
        # on a CPU passes over states are faster without broadcasting; weights of all places must be few beside the states
        few = gates.is_cpu and 4 * self.step_size.shape[1] <= gates.shape[0]
        spread = few and self.layout.kind in ("image", "nct")
        return 0, _Rows(self._rows(gates, slice(None), spread=spread))

    def _rows(self, like: Tensor, rows: slice, *, spread: bool = False) -> list[Any]:
        """(step sizes, momenta, factor of the gates) of each of these rows, for states with the axes of `like`.

        spread: weights of places, those of a channel alike.
        """

        def split(weight: Tensor) -> tuple[Tensor, ...]:
            return (weight.expand(*weight.shape[:2], *like.shape[2:]).contiguous() if spread else weight).unbind()

        momentum = self.momentum[0, rows]
        weights = [
            [split(part) for part in by_channel(weight, self.layout, like)]
            for weight in (self.step_size[0, rows], momentum, 1 - momentum)
        ]
        found = []
        for row, factor in enumerate(split(_along(self.gates[0, rows], like))):
            sizes, here, before = ([part[row] for part in weight] for weight in weights)
            found.append(([(size,) for size in sizes], list(zip(here, before, strict=True)), factor))
        return found

    def at(self, step: int, initial: Tensor, inner: Tensor, g: Tensor, memory: Any, shape: Any) -> StepCoefficients:
        """Those of step 0, 1, …, for the gates where the solve began and the inner residual A(g), both (R, k, *S)."""
        row, split = min(step, self.step_size.shape[1] - 1), memory[1]
        if split is None or torch.is_grad_enabled():
            ((step_sizes, momenta, factor),) = self._rows(initial, slice(row, row + 1))
        else:
            step_sizes, momenta, factor = split.rows[row]
        return StepCoefficients(step_sizes, momenta, (initial, factor), None, (row, split))

    def last(self, initial: Tensor, memory: Any) -> tuple[Tensor, Tensor]:
        """(step size with the rows first, gates (R, k, *S)) of the last step."""
        step_size = self.step_size[:, memory[0]].expand(initial.shape[0], -1)
        return step_size, initial * _along(self.gates[:, memory[0]], initial)

    def diagonal(self, step_size: Tensor, like: Tensor) -> list[tuple[Tensor, ...]]:
        """For each part of the residual, with the axes of `like`, what it is multiplied with, as terms."""
        return [(weight,) for weight in by_channel(step_size, self.layout, like)]

    @property
    def final_step_size(self) -> Tensor:
        """(C,) where there is no step to take it from."""
        return self.step_size[0, -1]

    def final_gates(self, initial: Tensor) -> Tensor:
        """(R, k, *S) where there is no step to take them from."""
        return initial * _along(self.gates[:, -1], initial)


class StepLSTM(nn.Module):
    """One LSTM cell a place (a pixel, a token, the sample of a vector), its weights shared by all.

    It sees the inner residual A(g)/s, the gates where the solve began, the residual's scale s and its last change, and sets
    gates, correction, step size and momentum of the place. The step size has a learned constant for each channel, too.

    `hidden` is its width; layout, rank and damping as for `StepSchedule`.
    """

    def __init__(self, layout: Layout, hidden: int, rank: int, damping: float) -> None:
        super().__init__()
        self.layout, self.damping, self.rank = layout, damping, rank
        self.channel = nn.Parameter(torch.zeros(sum(layout.part_channels)))
        self.lstm = SharedLSTM(2 * rank + 2, hidden, 2 * rank + 2)

    def begin(self, gates: Tensor, g: Tensor, shape: Any) -> Any:
        """As `StepSchedule.begin`."""
        hidden, cell = self.lstm.begin(len(g), gates[0, 0].numel(), g)
        step_size = torch.full_like(gates[:, :1], self.damping)
        return hidden, cell, self.layout.scale_of(g, shape), step_size, gates

    def at(self, step: int, initial: Tensor, inner: Tensor, g: Tensor, memory: Any, shape: Any) -> StepCoefficients:
        """As `StepSchedule.at`."""
        hidden, cell, before, *_ = memory
        rows, rank, places = len(g), self.rank, hidden.shape[2]
        scale = self.layout.scale_of(g, shape)
        level = torch.stack([scale.log() / 5, (scale / before).log().clamp(-3, 3)], dim=1).flatten(2)
        seen = [(inner / scale).reshape(rows, rank, places), initial.reshape(rows, rank, places)]
        output, hidden, cell = self.lstm(torch.cat([*seen, level.expand(-1, -1, places)], dim=1), hidden, cell)
        output = output.reshape(rows, -1, *inner.shape[2:])
        step_size, momentum, change, correction = output.split([1, 1, rank, rank], dim=1)
        step_size, gates = self.damping + step_size, initial * (1 + change)
        memory = hidden, cell, scale, step_size, gates
        momenta = list(zip(self.layout.spread(1 + momentum), self.layout.spread(-momentum), strict=True))
        return StepCoefficients(self.diagonal(step_size, inner), momenta, (gates,), scale * correction, memory)

    def last(self, initial: Tensor, memory: Any) -> tuple[Tensor, Tensor]:
        """As `StepSchedule.last`."""
        return memory[3:]

    def diagonal(self, step_size: Tensor, like: Tensor) -> list[tuple[Tensor, ...]]:
        """As `StepSchedule.diagonal`."""
        constants = by_channel(self.channel.unsqueeze(0), self.layout, like)
        return list(zip(self.layout.spread(step_size), constants, strict=True))

    @property
    def final_step_size(self) -> Tensor:
        """As `StepSchedule.final_step_size`."""
        return self.damping + self.channel

    def final_gates(self, initial: Tensor) -> Tensor:
        """As `StepSchedule.final_gates`."""
        return initial


def by_channel(weight: Tensor, layout: Layout, like: Tensor) -> list[Tensor]:
    """Weights (R or 1, C) as those of each of the layout's parts, which have the axes of `like`."""
    parts = weight.split(layout.part_channels, dim=1) if layout.kind == "pyramid" else (weight,)
    return [_along(part, like) for part in parts]


def _along(weight: Tensor, like: Tensor) -> Tensor:
    """Weights (…, k) of the channels of `like` (R, k, *S)."""
    return weight.view(weight.shape + (1,) * (like.dim() - 2))
