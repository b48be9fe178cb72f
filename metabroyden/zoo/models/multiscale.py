"""A cell of several resolutions at once, and a classifier round it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from metabroyden.zoo.models.base import EquilibriumModel, ImageConfig


class MultiscaleCell(nn.Module):
    """f(z, x)_i = norm(relu(z_i + norm(Σ_j T_ji h_j + x·[i = 0]))), h_j = norm(relu(W_j * z_j)): several resolutions.

    T_ii is a 3×3 convolution, T_ji to a coarser scale one of stride 2^(i−j) over 2^(i−j) + 1 pixels, T_ji to a finer scale a
    1×1 convolution with each pixel repeated. Group norms throughout. The state is z_0, …, z_{S−1}; z_i is
    (B, widths[i], H_i, W_i), each side half of the scale before, rounded up; z_0 and x are shaped alike.

    After Bai, Koltun & Kolter, Multiscale Deep Equilibrium Models, NeurIPS 2020, section 3: a residual block for each
    scale, all scales fused with one another, the injection in the finest alone. Theirs finish the block with a norm before
    they fuse and norm again; twice normed, the untrained map expands, so here block and fusion share one residual sum.

    Args:
        widths: channels of each scale, finest first, at least two (else ValueError).
        groups: of the group norms; divides all widths.
    """

    layout = "pyramid"

    def __init__(self, widths: tuple[int, ...] = (16, 32), groups: int = 4) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"a multiscale cell needs at least two widths, got {widths!r}")
        self.widths = tuple(widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for width in widths)
        scales = range(len(widths))
        self.fusion = nn.ModuleList(nn.ModuleList(_path(j, i, self.widths) for j in scales) for i in scales)
        self.norms1, self.norms2, self.norms3 = (
            nn.ModuleList(nn.GroupNorm(groups, width) for width in self.widths) for _ in range(3)
        )
        # Only ways down start large: what drives a scale, the injection or the finer ones, outweighs what it adds itself.
        small = [*self.convs, *(self.fusion[i][j] for i in scales for j in scales if j >= i)]  # type: ignore[index]
        for conv in small:
            nn.init.normal_(conv.weight, std=0.01)

    def initial_state(self, x: Tensor) -> tuple[Tensor, ...]:
        """Zeros for each scale, given the injection (B, widths[0], H, W)."""
        height, width = x.shape[2:]
        return tuple(
            x.new_zeros(len(x), channels, math.ceil(height / 2**i), math.ceil(width / 2**i))
            for i, channels in enumerate(self.widths)
        )

    def forward(self, z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        """f(z, x), shaped like z."""
        h = [norm(torch.relu(conv(part))) for norm, conv, part in zip(self.norms1, self.convs, z, strict=True)]
        images = []
        for i, part in enumerate(z):
            paths: Any = self.fusion[i]
            sent = [path(source) for path, source in zip(paths, h, strict=True)]
            size = part.shape[2:]  # of a coarser scale each pixel is repeated
            sent = [y if y.shape[2:] == size else functional.interpolate(y, size=size, mode="nearest") for y in sent]
            total = sum(sent, x) if i == 0 else sum(sent[1:], sent[0])
            images.append(self.norms3[i](torch.relu(part + self.norms2[i](total))))
        return tuple(images)


def _path(source: int, target: int, widths: tuple[int, ...]) -> nn.Conv2d:
    """The convolution from a scale to another, or to itself; to a finer one before its pixels are repeated."""
    if source > target:
        return nn.Conv2d(widths[source], widths[target], 1, bias=False)
    stride = 2 ** (target - source)
    size, padding = (3, 1) if stride == 1 else (stride + 1, stride // 2)
    return nn.Conv2d(widths[source], widths[target], size, stride, padding, bias=False)


@dataclass(frozen=True)
class MultiscaleClassifierConfig(ImageConfig):
    """Sizes of a `MultiscaleClassifier`."""

    width: int = 16  # channels of the finest scale
    growth: int = 2  # how many times those of the scale before each coarser one has
    scales: int = 2  # at least two
    groups: int = 4  # of the group norms
    stride: int = 1  # of the stem's second convolution

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each scale, finest first."""
        return tuple(self.width * self.growth**i for i in range(self.scales))

    def narrowed(self, width: int) -> Self:
        """The same with so many channels in the finest scale, and the groups that divide them."""
        return replace(self, width=width, groups=math.gcd(self.groups, width))


_QUARTERS = 2  # pooled cells a side: a plain mean would forget where things are


class MultiscaleClassifier(EquilibriumModel, kind="multiscale-classifier", config=MultiscaleClassifierConfig):
    """Images (B, image_channels, side, side) → logits (B, classes): injection, DEQ with a `MultiscaleCell`, head.

    The stem is two convolutions with group norms, the second of the stride given. The head is linear in the mean over
    quarters of each scale (2×2 cells), all scales together.
    """

    def __init__(self, config: MultiscaleClassifierConfig | None = None, **deq_options: Any) -> None:
        c = MultiscaleClassifierConfig() if config is None else config
        super().__init__(c, MultiscaleCell(c.widths, c.groups), **deq_options)
        self.stem = nn.Sequential(
            nn.Conv2d(c.image_channels, c.width, 3, padding=1),
            nn.GroupNorm(c.groups, c.width),
            nn.ReLU(),
            nn.Conv2d(c.width, c.width, 3, c.stride, padding=1),
            nn.GroupNorm(c.groups, c.width),
        )
        self.head = nn.Linear(sum(c.widths) * _QUARTERS**2, c.classes)

    def classify(self, z: Any) -> Tensor:
        """Logits of a state."""
        pooled = [functional.adaptive_avg_pool2d(part, _QUARTERS).flatten(1) for part in z]
        return self.head(torch.cat(pooled, dim=1))
