"""Neural fixed-point acceleration: Picard's iteration with a recurrent correction, or a gate between it and secants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metabroyden.learned.base import LearnedConfig, LearnedSolver
from metabroyden.learned.lstm import SharedLSTM
from metabroyden.learned.secants import Secants, SecantState
from metabroyden.solver import Step
from metabroyden.solvers.registry import register


@dataclass(frozen=True)
class NeuralFixedPointConfig(LearnedConfig):
    """Adds to `LearnedConfig`.

    Attributes:
        form: "delta", a free correction; or "secant", a gate between Picard's step and a secant one.
        memory: secant pairs kept.
        ridge: of the least squares over them, relative to each. Both of form "secant".
    """

    hidden: int = 16
    form: str = "delta"
    memory: int = 5
    ridge: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("form", "delta", "secant")
        self._check_least(memory=1)
        self._check_share("ridge")


class NeuralFixedPointState(NamedTuple):
    """R rows, H hidden, G sites."""

    hidden: Tensor  # (R, H, G)
    cell: Tensor  # (R, H, G)
    scale: Tensor  # (R, 1, …) previous residual scale
    secants: SecantState | None
    steps: int


@register("neural-fixed-point")
class NeuralFixedPoint(LearnedSolver):
    """z⁺ = f(z) + δ, δ from a recurrent cell on (z, f(z), f(z) − z).

    After Venkataraman & Amos, Neural Fixed-Point Acceleration for Convex Optimization (2021), whose loss is
    `ResidualObjective("normalised", "uniform")`. Their cell reads the whole vector; here one cell is shared by the sites of
    a state, each a pixel, a token, or the whole of a vector, and reads all channels there. So any layout will do, and for
    sequences nothing crosses time. z and f(z) are divided by their common size, the residual by its root mean square s;
    log s and its last change are inputs too, and δ = s·(read-out).

    Form "secant" has no δ: z⁺ = f(z) + w ∘ (q − f(z)), where q is the multisecant step of the last pairs from −I (see
    `Secants`, its coefficients constants for the gradient) and w = 2σ(·) − 1 a gate a coordinate, in (−1, 1). It also
    reads q − f(z). However it is trained, no step goes further from Picard's than the secant step does.

    Untrained, δ = 0 or w = 0: Picard, to the last bit.
    """

    config_type = NeuralFixedPointConfig
    config: NeuralFixedPointConfig

    def __init__(self, config: NeuralFixedPointConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        config = self.config
        gated = config.form == "secant"
        self.secants = Secants(self.layout, config.memory, config.ridge) if gated else None
        self.lstm = SharedLSTM((3 + gated) * self.layout.channels + 2, config.hidden, self.layout.channels)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> NeuralFixedPointState:
        """Zero memory, no pairs."""
        shape = self.layout.resolve(problem.shape)
        gc = self.layout.canonical(g, shape)
        hidden, cell = self.lstm.begin(len(z), math.prod(self.layout.extents(shape)), z)
        secants = None if self.secants is None else self.secants.init(z, g, shape)
        return NeuralFixedPointState(hidden, cell, self.layout.scale(gc), secants, 0)

    def step(self, z: Tensor, g: Tensor, state: NeuralFixedPointState, problem: Any) -> Step:
        """One learned step, (R, n)."""
        layout, picard = self.layout, z + g
        shape = layout.resolve(problem.shape)
        zc, gc, fc = (layout.canonical(value, shape) for value in (z, g, picard))
        scale, size = layout.scale(gc), layout.scale(torch.cat([zc, fc], dim=1))
        change = (scale / state.scale).log().clamp(-3, 3)
        levels = [value.expand_as(gc[:, :1]) for value in (scale.log() / 5, change)]
        features = [zc / size, fc / size, gc / scale, *levels]
        secants = state.secants
        if self.secants is not None and secants is not None:
            if state.steps:
                secants = self.secants.update(z, g, secants, shape)
            known, rest = self.secants.project(g, secants, shape)
            beyond = layout.canonical(rest - known - g, shape)  # q − f(z)
            features.append(beyond / scale)
        seen = torch.cat(features, dim=1)
        output, hidden, cell = self.lstm(seen.reshape(*seen.shape[:2], -1), state.hidden, state.cell)
        read = output.reshape(gc.shape)
        move = scale * read if self.secants is None else (2 * torch.sigmoid(read) - 1) * beyond
        after = NeuralFixedPointState(hidden, cell, scale, secants, state.steps + 1)
        return Step(picard + layout.flat(move), after)
