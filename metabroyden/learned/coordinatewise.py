"""The coordinatewise LSTM of "learning to learn by gradient descent by gradient descent", on residuals."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metabroyden.learned.base import LearnedConfig, LearnedSolver, register
from metabroyden.learned.lstm import SharedLSTM
from metabroyden.solvers.base import Step


class CoordinatewiseState(NamedTuple):
    """R rows, H hidden, n coordinates."""

    context: Tensor  # (R, n) context feature a coordinate
    update: Tensor  # (R, n) previous update over its residual scale
    hidden: Tensor  # (R, H, n)
    cell: Tensor  # (R, H, n)
    scale: Tensor  # (R, n) or (R, 1) previous residual scale


@register("coordinatewise")
class CoordinatewiseLSTM(LearnedSolver):
    """z⁺ = z + s·((1 + a)·r + b), (a, b) from one LSTM cell whose weights all coordinates share.

    After Andrychowicz et al. (2016), with the residual g = f(z) − z in the gradient's place: s is the residual's root
    mean square (per sample; running over the past for sequences), r = g/s. Inputs a coordinate: r, z, the context
    feature, the previous update over its scale, log s and the last change of log s. Splitting g into r and log s plays
    the part of the paper's log/sign preprocessing. Untrained, a = b = 0: Picard. The state's shape is free, save for the
    initializer and a context with as many channels as the state.
    """

    def __init__(self, config: LearnedConfig) -> None:
        super().__init__(config)
        if self.context_channels != self.layout.channels:
            raise ValueError(
                f"the coordinatewise solver needs a context feature with the state's {self.layout.channels} channels, "
                f"got {self.context_channels}; use context='f0'"
            )
        self.lstm = SharedLSTM(inputs=6, hidden=config.hidden, outputs=2)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> CoordinatewiseState:
        """Zero memory; the context feature is taken once."""
        shape = self.layout.resolve(problem.shape)
        context = self.layout.flat(self.context_feature(problem, shape))
        hidden, cell = self.lstm.begin(len(z), z.shape[1], z)
        return CoordinatewiseState(context, torch.zeros_like(z), hidden, cell, self._scale(g, shape))

    def step(self, z: Tensor, g: Tensor, state: CoordinatewiseState, problem: Any) -> Step:
        """One learned step, (R, n)."""
        scale = self._scale(g, self.layout.resolve(problem.shape))
        r = g / scale
        change = (scale / state.scale).log().clamp(-3, 3).expand_as(z)
        features = torch.stack([r, z, state.context, state.update, (scale.log() / 5).expand_as(z), change], dim=1)
        output, hidden, cell = self.lstm(features, state.hidden, state.cell)
        update = (1 + output[:, 0]) * r + output[:, 1]
        return Step(z + scale * update, state._replace(update=update, hidden=hidden, cell=cell, scale=scale))

    def _scale(self, g: Tensor, shape: tuple[int, ...]) -> Tensor:
        canonical = self.layout.canonical(g, shape)
        scale = self.layout.scale(canonical)
        return self.layout.flat(scale.expand_as(canonical)) if self.layout.causal else scale.reshape(-1, 1)
