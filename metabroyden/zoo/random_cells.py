"""Random cells: fixed-point problems without end, for solvers that are to run on any."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Cell = Callable[[Tensor, Tensor], Tensor]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": functional.elu,
    "clip": lambda v: v.clamp(-1, 1),
}


def random_problem(generator: torch.Generator, batch: int, kind: str | None = None) -> tuple[Cell, Tensor, Tensor]:
    """(f, z0, x): a cell drawn at random, f(z, x) of (B, …) states, its starts (zeros) and its contexts.

    Kinds: "dense" σ(Wz + x), Gaussian or symmetric W of norm 0.4 to 3, half of them normalised; "shifted" the same with a
    multiple of −I or of a random −AAᵀ added, whose Picard iteration oscillates or diverges; "residual" norm(relu(z +
    norm(W₂ relu(W₁z) + x))), dense; "conv" σ(Wz + x) or the residual one, with 3×3 convolutions; "chain" a network of 3 to 8
    layers as one cell, nilpotent; "sequence" tokens that hear of those before them.

    ValueError for an unknown kind; None draws one.
    """
    draw = _Draw(generator)
    if kind is None:
        kind = draw.one(KINDS)
    if kind not in _MAKERS:
        raise ValueError(f"unknown kind of random cell {kind!r}: known are {', '.join(KINDS)}")
    f, shape = _MAKERS[kind](draw)
    x = draw.normal(batch, *shape) * draw.log_uniform(0.3, 2.0)
    return f, torch.zeros_like(x), x


class _Draw:
    """Random numbers of one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device="cpu")

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator, device="cpu"))

    def log_uniform(self, low: float, high: float) -> float:
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def whole(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator, device="cpu"))

    def one(self, choices: Any) -> Any:
        return list(choices)[self.whole(0, len(choices) - 1)]

    def activation(self) -> Callable[[Tensor], Tensor]:
        return _ACTIVATIONS[self.one(_ACTIVATIONS)]

    def matrix(self, n: int, low: float, high: float) -> Tensor:
        """Gaussian or symmetric, of a norm log-uniform between these."""
        w = self.normal(n, n)
        w = w + w.T if self.whole(0, 1) else w
        return w * (self.log_uniform(low, high) / torch.linalg.matrix_norm(w, 2))


def _dense(draw: _Draw) -> tuple[Cell, tuple[int, ...]]:
    n, sigma = draw.whole(16, 128), draw.activation()
    w = draw.matrix(n, 0.4, 3.0)
    if draw.whole(0, 1):
        return lambda z, x: sigma(functional.layer_norm(z @ w + x, (n,))), (n,)
    return lambda z, x: sigma(z @ w + x), (n,)


def _shifted(draw: _Draw) -> tuple[Cell, tuple[int, ...]]:
    n, sigma = draw.whole(16, 128), draw.activation()
    w = draw.matrix(n, 0.3, 1.5)
    if draw.whole(0, 1):
        w = w - draw.log_uniform(0.3, 6.0) * torch.eye(n, device="cpu")
    else:
        half = draw.normal(n, draw.whole(n // 4, n)) / n**0.5
        w = w - draw.log_uniform(0.3, 6.0) * half @ half.T
    return lambda z, x: sigma(z @ w + x), (n,)


def _residual(draw: _Draw) -> tuple[Cell, tuple[int, ...]]:
    n = draw.whole(16, 96)
    first, second = draw.normal(n, 2 * n), draw.normal(2 * n, n)
    weight = draw.log_uniform(0.5, 3.0)

    def f(z: Tensor, x: Tensor) -> Tensor:
        inner = functional.layer_norm(torch.relu(z @ first), (2 * n,)) @ second / (2 * n) ** 0.5
        return functional.layer_norm(torch.relu(z + functional.layer_norm(x + weight * inner, (n,))), (n,))

    return f, (n,)


def _conv(draw: _Draw) -> tuple[Cell, tuple[int, ...]]:
    channels, side, sigma = 4 * draw.whole(1, 4), draw.whole(5, 9), draw.activation()
    first = draw.normal(channels, channels, 3, 3) / (9 * channels) ** 0.5
    second = draw.normal(channels, channels, 3, 3) / (9 * channels) ** 0.5
    weight = draw.log_uniform(0.2, 1.2)

    def plain(z: Tensor, x: Tensor) -> Tensor:
        return sigma(weight * functional.conv2d(z, first, padding=1) + x)

    def residual(z: Tensor, x: Tensor) -> Tensor:
        inner = functional.group_norm(torch.relu(functional.conv2d(z, first, padding=1)), 4)
        inner = functional.group_norm(x + 3 * weight * functional.conv2d(inner, second, padding=1), 4)
        return functional.group_norm(torch.relu(z + inner), 4)

    return draw.one((plain, residual)), (channels, side, side)


def _chain(draw: _Draw) -> tuple[Cell, tuple[int, ...]]:
    layers, width, sigma = draw.whole(3, 8), draw.whole(8, 32), draw.activation()
    weights = draw.normal(layers, width, width) * (draw.log_uniform(0.7, 2.0) / width**0.5)
    n = layers * width

    def f(z: Tensor, x: Tensor) -> Tensor:
        below = torch.cat([x[:, :width], z[:, : n - width]], dim=1).unflatten(1, (layers, width))
        return sigma(torch.einsum("bli,lij->blj", below, weights)).flatten(1)

    return f, (n,)


def _sequence(draw: _Draw) -> tuple[Cell, tuple[int, ...]]:
    tokens, channels, sigma = draw.whole(8, 24), draw.whole(8, 24), draw.activation()
    back, shift = draw.whole(1, 3), draw.log_uniform(0.5, 1.5) / channels**0.5
    here, before = draw.normal(channels, channels), draw.normal(channels, channels)
    stay = draw.uniform(0.0, 0.6) / channels**0.5

    def f(z: Tensor, x: Tensor) -> Tensor:
        heard = functional.pad(z, (0, 0, back, 0))[:, :tokens]
        return sigma(stay * z @ here + shift * heard @ before + x)

    return f, (tokens, channels)


_MAKERS = {
    "dense": _dense,
    "shifted": _shifted,
    "residual": _residual,
    "conv": _conv,
    "chain": _chain,
    "sequence": _sequence,
}
KINDS = tuple(_MAKERS)


class RandomCells:
    """A new random cell at every draw, see `random_problem`."""

    def problem(self, batch: int, generator: torch.Generator) -> tuple[Any, Tensor, Tensor]:
        """(f, z0, x) of a random batch."""
        return random_problem(generator, batch)
