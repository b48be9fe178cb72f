"""The residual convolutional cell of the field, and a classifier round it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.deq import DEQ


class ConvCell(nn.Module):
    """f(z, x) = norm(relu(z + norm(x + W₂ * norm(relu(W₁ * z))))), group norm throughout, 3×3 convolutions.

    The residual cell of Kolter, Duvenaud & Johnson, Deep Implicit Layers (NeurIPS 2020 tutorial), chapter 4.

    Args:
        channels: channels of state and injection; both are (B, channels, H, W).
        inner: channels between the two convolutions.
        groups: of the group norms; divides both.
    """

    layout = "nchw"

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
class ConvClassifierConfig:
    """Sizes of a `ConvClassifier`: image channels and side, classes, and those of its cell."""

    channels: int = 16
    inner: int = 32
    groups: int = 4
    image_channels: int = 1
    side: int = 8
    classes: int = 10


class ConvClassifier(nn.Module):
    """Images (B, image_channels, side, side) → logits (B, classes): injection, DEQ with a `ConvCell`, linear head."""

    kind = "conv-classifier"

    def __init__(self, config: ConvClassifierConfig | None = None, **deq_options: Any) -> None:
        super().__init__()
        self.config = c = ConvClassifierConfig() if config is None else config
        self.stem = nn.Sequential(
            nn.Conv2d(c.image_channels, c.channels, 3, padding=1), nn.GroupNorm(c.groups, c.channels)
        )
        self.deq = DEQ(ConvCell(c.channels, c.inner, c.groups), **deq_options)
        self.head = nn.Linear(c.channels * c.side * c.side, c.classes)

    @property
    def cell(self) -> nn.Module:
        """The DEQ's cell f(z, x)."""
        return self.deq.cell

    def inject(self, images: Tensor) -> Tensor:
        """The injection x, (B, channels, side, side): the DEQ's context."""
        return self.stem(images)

    def classify(self, z: Tensor) -> Tensor:
        """Logits of a state."""
        return self.head(z.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, through a solve."""
        return self.classify(self.deq(self.inject(images)))

    def describe(self) -> dict[str, Any]:
        """What a checkpoint needs to build the model again."""
        return asdict(self.config)
