"""Stems, which make x of inputs, and heads, which make outputs of equilibria."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.strangers.cells import conv

SIDE = 4
"""Of the grid that images are pooled to before they are classified."""


class Pair(nn.Module):
    """Images → x of two resolutions."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.fine, self.coarse = conv(inputs, width), nn.Conv2d(inputs, 2 * width, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, width, H, W), (B, 2·width, H/2, W/2)."""
        side = images.shape[-1] // 4 * 4
        images = images[..., :side, :side]
        return self.fine(images), self.coarse(images)


class Patches(nn.Module):
    """Images → 16 patches as tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.places = nn.LazyLinear(width), nn.Parameter(0.1 * torch.randn(SIDE**2, width))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 16, width)."""
        step = images.shape[-1] // SIDE
        return self.linear(functional.unfold(images, step, stride=step)[..., : SIDE**2].transpose(1, 2)) + self.places


class Tokens(nn.Module):
    """Tokens → embeddings with learned places; with a mask beside them where they came with one."""

    def __init__(
        self, symbols: int, width: int, longest: int, *, places: bool = True, channels_first: bool = False
    ) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.places = nn.Parameter(0.5 * torch.randn(longest, width)) if places else None
        self.channels_first = channels_first

    def forward(self, inputs: Any) -> Any:
        """(B, T, width), or (B, width, T), or a dict with "x" and "pad"."""
        if isinstance(inputs, dict):
            return {"x": self(inputs["tokens"]), "pad": inputs["pad"]}
        x = self.symbols(inputs)
        x = x if self.places is None else x + self.places
        return x.transpose(1, 2).contiguous() if self.channels_first else x


class Nodes(nn.Module):
    """Features of nodes → x; the adjacency goes along."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A dict with "x" and "adjacency"."""
        return {"x": self.linear(inputs["features"]), "adjacency": inputs["adjacency"]}


class Pooled(nn.Module):
    """States that are images, or several → classes."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels * SIDE**2, outputs)

    def forward(self, z: Any) -> Tensor:
        """(B, classes)."""
        parts = (z,) if isinstance(z, Tensor) else z
        return self.linear(torch.cat([functional.adaptive_avg_pool2d(part, SIDE).flatten(1) for part in parts], dim=1))


class PerToken(nn.Module):
    """States along a sequence → outputs at each place."""

    def __init__(self, channels: int, outputs: int, *, channels_first: bool = False) -> None:
        super().__init__()
        self.linear, self.channels_first = nn.Linear(channels, outputs), channels_first

    def forward(self, z: Tensor) -> Tensor:
        """(B, T, outputs)."""
        return self.linear(z.transpose(1, 2) if self.channels_first else z)


class Last(nn.Module):
    """The last of several states."""

    def forward(self, z: tuple[Tensor, ...]) -> Tensor:
        """It."""
        return z[-1]
