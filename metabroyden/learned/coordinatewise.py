"""The coordinatewise LSTM of "learning to learn by gradient descent by gradient descent", on residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metabroyden.learned.base import LearnedConfig, LearnedSolver
from metabroyden.learned.layout import Layout
from metabroyden.learned.lstm import SharedLSTM
from metabroyden.solver import Step
from metabroyden.solvers.registry import register

_INPUTS = {"log-sign": 12, "scaled": 6}
_KEPT = 0.8  # share of the sums over past pairs that a step keeps


@dataclass(frozen=True)
class CoordinatewiseConfig(LearnedConfig):
    """Adds to `LearnedConfig`.

    Attributes:
        layers: LSTM cells on top of one another, 1 or 2.
        preprocessing: what the LSTM sees: "log-sign", all of what `CoordinatewiseLSTM` lists; or "scaled", without secants,
            and with residual, update, state and context as they are.
    """

    hidden: int = 8
    layers: int = 1
    preprocessing: str = "log-sign"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("layers", 1, 2)
        self._check_choice("preprocessing", *_INPUTS)


class CoordinatewiseState(NamedTuple):
    """R rows, L layers, H hidden, n coordinates."""

    context: Tensor  # (R, n) context feature a coordinate
    update: Tensor  # (R, n) previous update over its residual scale
    hidden: Tensor  # (R, LH, n)
    cell: Tensor  # (R, LH, n)
    scale: Tensor  # (R, n) or (R, 1) previous residual scale
    z: Tensor  # (R, n) previous iterate
    g: Tensor  # (R, n) its residual
    products: Tensor  # (R, 2, n) fading sums of Δz·Δg and of Δg², over squares of residual scales


@register("coordinatewise")
class CoordinatewiseLSTM(LearnedSolver):
    """z⁺ = z + s·((1 + a)·r + b), (a, b) from one LSTM whose weights all coordinates share.

    After Andrychowicz et al. (2016), with the residual g = f(z) − z in the gradient's place: s is the residual's root
    mean square (per sample; running over the past for sequences), r = g/s. Inputs a coordinate: r and the previous update
    over s, both in the log-and-sign form of its appendix A and squashed; the last change of r; the slope −ΔzΔg/Δg² over
    fading sums of past pairs, what a diagonal inverse Jacobian would be; state and context over their own root mean
    squares; log s and its last change. Untrained, a = b = 0: Picard.

    No weight belongs to a channel: without an initializer it runs on states of any width, and on those of another layout as
    on vectors, where s is one number a sample (for sequences that are not laid out as the fitted ones, that leaks).
    """

    config_type = CoordinatewiseConfig
    config: CoordinatewiseConfig

    def __init__(self, config: LearnedConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        config = self.config
        if self.context_channels != self.layout.channels:
            raise ValueError(
                f"the coordinatewise solver needs a context feature with the state's {self.layout.channels} channels, "
                f"got {self.context_channels}; use conditioning='initial_value'"
            )
        inputs, hidden = _INPUTS[config.preprocessing], config.hidden
        self.below = SharedLSTM(inputs, hidden, 0) if config.layers == 2 else None
        self.lstm = SharedLSTM(inputs if config.layers == 1 else hidden, hidden, 2)

    @property
    def dimension_free(self) -> bool:
        """Whether it runs on states of any shape."""
        return self.initializer is None

    def start(self, z0: Tensor, problem: Any) -> Tensor:
        """The learned first iterate, (R, n); f(z0) or z0, by the kind of context, without an initializer."""
        if not self.dimension_free:
            return super().start(z0, problem)
        self.check_dtype(z0)
        return problem.origin() if self.config.conditioning == "initial_value" else z0

    def init(self, z: Tensor, g: Tensor, problem: Any) -> CoordinatewiseState:
        """Zero memory; the context feature is taken once."""
        layout, shape = self._place(problem)
        hidden, cell = self.lstm.begin(len(z), z.shape[1], z)
        if self.below is not None:
            hidden = cell = torch.cat([hidden, hidden], dim=1)
        products = torch.zeros_like(z).unsqueeze(1).expand(-1, 2, -1)
        context = self._context(layout, shape, problem)
        scale = _scale(g, layout, shape)
        return CoordinatewiseState(context, torch.zeros_like(z), hidden, cell, scale, z, g, products)

    def step(self, z: Tensor, g: Tensor, state: CoordinatewiseState, problem: Any) -> Step:
        """One learned step, (R, n)."""
        layout, shape = self._place(problem)
        scale = _scale(g, layout, shape)
        r = g / scale
        change = (scale / state.scale).log().clamp(-3, 3).expand_as(z)
        level = (scale.log() / 5).expand_as(z)
        products = state.products
        if self.config.preprocessing == "scaled":
            features = torch.stack([r, z, state.context, state.update, level, change], dim=1)
        else:
            move, turn = (z - state.z) / state.scale, (g - state.g) / state.scale
            products = _KEPT * products + torch.stack([move * turn, turn.square()], dim=1)
            slope = (-products[:, 0] / (products[:, 1] + 0.1)).clamp(-3, 3)
            seen = z / _scale(z, layout, shape), state.context / _scale(state.context, layout, shape)
            coordinates = [turn.clamp(-5, 5), slope, *seen, level, change, torch.tanh(r), torch.tanh(state.update)]
            signs = torch.cat([log_sign(r), log_sign(state.update)], dim=2).transpose(1, 2)
            features = torch.cat([signs, torch.stack(coordinates, dim=1)], dim=1)
        output, hidden, cell = self._recur(features, state.hidden, state.cell)
        update = (1 + output[:, 0]) * r + output[:, 1]
        return Step(z + scale * update, CoordinatewiseState(state.context, update, hidden, cell, scale, z, g, products))

    def _recur(self, features: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.below is None:
            return self.lstm(features, hidden, cell)
        first, second = zip(hidden.chunk(2, dim=1), cell.chunk(2, dim=1), strict=True)
        _, low, low_cell = self.below(features, *first)
        output, high, high_cell = self.lstm(low, *second)
        return output, torch.cat([low, high], dim=1), torch.cat([low_cell, high_cell], dim=1)

    def _place(self, problem: Any) -> tuple[Layout, Any]:
        """The layout of this problem's state and its per-sample shape."""
        if self.dimension_free:
            return self.layout.anywhere(problem.shape)
        return self.layout, self.layout.resolve(problem.shape)

    def _context(self, layout: Layout, shape: Any, problem: Any) -> Tensor:
        if self.config.conditioning == "initial_value":
            return problem.origin()
        if layout is self.layout:
            return layout.flat(self.context_feature(problem, shape))
        context = problem.context[0] if isinstance(problem.context, tuple) and problem.context else problem.context
        if isinstance(context, Tensor) and tuple(context.shape[1:]) == tuple(shape):
            return context.flatten(1)
        raise ValueError(
            "this solver was fitted with conditioning='input': it needs a tensor shaped like the state, "
            f"{tuple(shape)} a sample; use conditioning='initial_value'"
        )


def _scale(value: Tensor, layout: Layout, shape: Any) -> Tensor:
    canonical = layout.canonical(value, shape)
    scale = layout.scale(canonical)
    return layout.flat(scale.expand_as(canonical)) if layout.causal else scale.reshape(-1, 1)


def log_sign(value: Tensor, p: float = 10.0) -> Tensor:
    """(…, 2): (log|v|/p, sign v) where |v| ≥ e⁻ᵖ, else (−1, eᵖv); Andrychowicz et al. (2016), appendix A.

    Examples:
        >>> log_sign(torch.tensor([-1.0, 0.0]))
        tensor([[ 0., -1.],
                [-1.,  0.]])
    """
    size = value.abs()
    large = size >= math.exp(-p)
    logs = torch.where(large, size.clamp_min(math.exp(-p)).log() / p, -1.0)
    signs = torch.where(large, value.sign(), math.exp(p) * value)
    return torch.stack([logs, signs], dim=-1)
