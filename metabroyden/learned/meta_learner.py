"""The meta-learner LSTM of few-shot learning, on residuals: the iterate is the cell state of an LSTM."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metabroyden.learned.base import LearnedConfig, LearnedSolver
from metabroyden.learned.lstm import SharedLSTM
from metabroyden.solver import Step
from metabroyden.solvers.registry import register


class MetaLearnerState(NamedTuple):
    """R rows, H hidden, n coordinates."""

    gates: Tensor  # (R, 2, n) what the forget and the input gate were last, less one; the former over s/size
    hidden: Tensor  # (R, H, n)
    cell: Tensor  # (R, H, n)
    scale: Tensor  # (R, n) previous residual scale s


@register("meta-learner")
class MetaLearnerLSTM(LearnedSolver):
    """z⁺ = φ ∘ z + ι ∘ g with a forget gate φ and an input gate ι for each coordinate.

    After Ravi & Larochelle, Optimization as a Model for Few-Shot Learning (ICLR 2017), eq. 2–4: an LSTM's cell update is
    gradient descent where the cell state is the learner's parameters and the candidate is the negative gradient. Here the
    iterate z is that cell state and the residual g = f(z) − z the candidate. The gates come, as there, from what a plain
    LSTM makes of candidate, loss, cell state and the previous gates; its weights are shared by all coordinates, so the
    state's shape is free but for the start. Inputs a coordinate: r = g/s, z over its size, log s (the loss), its last
    change, and the previous gates; s and size are root mean squares (per sample; over the past for sequences).

    With the read-out (a, b): φ = 1 + (s/size)·a and ι = 1 + b. Forgetting goes with the relative residual, or it would put a
    floor under it. Not sigmoids: those are neither 1 at a finite input nor larger. Untrained, φ = ι = 1: Picard, to the
    last bit.
    """

    def __init__(self, config: LearnedConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.lstm = SharedLSTM(inputs=6, hidden=self.config.hidden, outputs=2)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> MetaLearnerState:
        """Zero memory, gates at one."""
        hidden, cell = self.lstm.begin(len(z), z.shape[1], z)
        scale = self._scale(g, problem)
        return MetaLearnerState(z.new_zeros(len(z), 2, z.shape[1]), hidden, cell, scale)

    def step(self, z: Tensor, g: Tensor, state: MetaLearnerState, problem: Any) -> Step:
        """One learned step, (R, n)."""
        scale, size = self._scale(g, problem), self._scale(z, problem)
        unit = z / size
        change = (scale / state.scale).log().clamp(-3, 3)
        features = torch.stack([g / scale, unit, scale.log() / 5, change, *state.gates.unbind(1)], dim=1)
        gates, hidden, cell = self.lstm(features, state.hidden, state.cell)
        forgotten = gates[:, 0] * scale * unit  # (φ − 1) ∘ z
        z = z + g + (forgotten + gates[:, 1] * g)
        return Step(z, MetaLearnerState(gates, hidden, cell, scale))

    def _scale(self, value: Tensor, problem: Any) -> Tensor:
        """(R, n) root mean square."""
        canonical = self.layout.canonical(value, self.layout.resolve(problem.shape))
        return self.layout.flat(self.layout.scale(canonical).expand_as(canonical))
