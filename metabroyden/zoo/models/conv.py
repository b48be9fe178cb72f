"""The residual convolutional cell of the field, and a classifier round it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from metabroyden.zoo.models.base import EquilibriumModel, ImageConfig


class ConvCell(nn.Module):
    """f(z, x) = norm(relu(z + norm(x + W₂ * norm(relu(W₁ * z))))), group norm throughout, 3×3 convolutions.

    The residual cell of Kolter, Duvenaud & Johnson, Deep Implicit Layers (NeurIPS 2020 tutorial), chapter 4.

    Args:
        channels: channels of state and injection; both are (B, channels, H, W).
        inner: channels between the two convolutions.
        groups: of the group norms; divides both.
    """

    layout = "image"

    def __init__(self, channels: int = 16, inner: int = 32, groups: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, inner)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.norm3 = nn.GroupNorm(groups, channels)
        nn.init.normal_(self.conv1.weight, std=0.01)
        nn.init.normal_(self.conv2.weight, std=0.01)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """f(z, x), shaped like z."""
        y = self.norm1(torch.relu(self.conv1(z)))
        return self.norm3(torch.relu(z + self.norm2(x + self.conv2(y))))


@dataclass(frozen=True)
class ConvClassifierConfig(ImageConfig):
    """Sizes of a `ConvClassifier`: those of its cell, and the stem's stride."""

    channels: int = 16
    inner: int = 32
    groups: int = 4
    stride: int = 1

    def narrowed(self, width: int) -> Self:
        """The same with so many channels, as many inner ones for each, and the groups that divide both."""
        inner = max(1, round(width * self.inner / self.channels))
        return replace(self, channels=width, inner=inner, groups=math.gcd(self.groups, width, inner))


class ConvClassifier(EquilibriumModel, kind="conv-classifier", config=ConvClassifierConfig):
    """Images (B, image_channels, side, side) → logits (B, classes): injection, DEQ with a `ConvCell`, linear head.

    The state has side/stride pixels a side, rounded up.
    """

    def __init__(self, config: ConvClassifierConfig | None = None, **deq_options: Any) -> None:
        c = ConvClassifierConfig() if config is None else config
        super().__init__(c, ConvCell(c.channels, c.inner, c.groups), **deq_options)
        self.stem = nn.Sequential(
            nn.Conv2d(c.image_channels, c.channels, 3, c.stride, padding=1), nn.GroupNorm(c.groups, c.channels)
        )
        self.head = nn.Linear(c.channels * math.ceil(c.side / c.stride) ** 2, c.classes)

    def classify(self, z: Any) -> Tensor:
        """Logits of a state."""
        return self.head(z.flatten(1))
