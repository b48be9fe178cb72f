"""The smallest cell, one weight matrix, and a classifier round it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.zoo.models.base import EquilibriumModel, ImageConfig


class DenseCell(nn.Module):
    """f(z, x) = tanh(norm(W z + x)), with a layer norm; state and injection are (B, n).

    W starts as 0.8 times an orthogonal matrix: with an injection of unit size f is a contraction then.

    Args:
        n: coordinates of the state.
    """

    layout = "vector"

    def __init__(self, n: int = 32) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n, bias=False)
        self.norm = nn.LayerNorm(n)
        nn.init.orthogonal_(self.linear.weight, gain=0.8)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """f(z, x), shaped like z."""
        return torch.tanh(self.norm(self.linear(z) + x))


@dataclass(frozen=True)
class DenseClassifierConfig(ImageConfig):
    """Sizes of a `DenseClassifier`: n coordinates of the state."""

    width_field = "n"
    n: int = 64


class DenseClassifier(EquilibriumModel, kind="dense-classifier", config=DenseClassifierConfig):
    """Images (B, image_channels, side, side) → logits (B, classes): linear injection, DEQ with a `DenseCell`, linear head.

    The injection is brought to unit size by a layer norm.
    """

    def __init__(self, config: DenseClassifierConfig | None = None, **deq_options: Any) -> None:
        c = DenseClassifierConfig() if config is None else config
        super().__init__(c, DenseCell(c.n), **deq_options)
        self.stem = nn.Sequential(nn.Linear(c.image_channels * c.side * c.side, c.n), nn.LayerNorm(c.n))
        self.head = nn.Linear(c.n, c.classes)

    def inject(self, inputs: Tensor) -> Tensor:
        """The injection x of images, (B, n): the DEQ's context."""
        return self.stem(inputs.flatten(1))
