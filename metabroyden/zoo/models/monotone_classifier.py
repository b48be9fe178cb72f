"""A classifier of images round a monotone cell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from metabroyden.solution import State
from metabroyden.zoo.models.base import EquilibriumModel, ImageConfig
from metabroyden.zoo.models.monotone import MonotoneCell, MonotoneConv, MonotoneDense, MonotoneMultiTier

_STRUCTURES = ("dense", "conv", "multi-tier")
_POOLED = 4  # side of the images that the head sees


@dataclass(frozen=True)
class MonotoneClassifierConfig(ImageConfig):
    """Sizes of a `MonotoneClassifier`: units of the dense state, or channels of the convolutional one or the first tier."""

    structure: str = "dense"  # the paper's fully connected one, of 87 units for MNIST; or "conv" or "multi-tier"
    width: int = 87  # each further tier has twice that of the one before
    m: float = 1.0  # constant of strong monotonicity
    margin: int = 1  # pixels of zeros round an image, which the state has too, as convolutions wrap round; not if dense
    tiers: int = 2  # of the multi-tier cell

    def __post_init__(self) -> None:
        if self.structure not in _STRUCTURES:
            raise ValueError(f"structure must be one of {_STRUCTURES}, got {self.structure!r}")
        if self.margin < 0 or self.tiers < 1 or self.width < 1:
            raise ValueError(
                f"margin must be at least 0, tiers and width at least 1, got {self.margin}, {self.tiers} and {self.width}"
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each tier; none where the state is dense."""
        if self.structure == "dense":
            return ()
        return tuple(self.width << tier for tier in range(self.tiers if self.structure == "multi-tier" else 1))


class MonotoneClassifier(EquilibriumModel, kind="monotone-classifier", config=MonotoneClassifierConfig):
    """Images (B, image_channels, side, side) → logits (B, classes): injection, DEQ with a monotone cell, linear head.

    The injection is norm(Ux + b), the norm over all that a sample has there. Dense: U is a matrix on all pixels. Else a 3×3
    convolution of the padded image for each tier, of the image averaged over 2ⁱ×2ⁱ pixels for tier i; the head sees every
    tier averaged to 4×4. It begins with a layer norm, as AᵀA makes states small. The paper has neither norm.

    Once trained, plain iteration does not converge, and 30 products of Broyden's method may be too few for the adjoint
    system. What trains well: `solver=PeacemanRachford(0.5)` with
    `backward=Implicit(solver=Anderson(memory=10, damping=0.3), max_nfe=60)`.
    """

    def __init__(self, config: MonotoneClassifierConfig | None = None, **deq_options: object) -> None:
        c = MonotoneClassifierConfig() if config is None else config
        super().__init__(c, _cell(c), **deq_options)
        stems = [
            nn.Sequential(nn.Conv2d(c.image_channels, count, 3, padding=1), nn.GroupNorm(1, count))
            for count in c.channels
        ]
        dense = nn.Sequential(nn.Linear(c.image_channels * c.side**2, c.width), nn.LayerNorm(c.width))
        self.stems = nn.ModuleList(stems or [dense])
        features = sum(c.channels) * _POOLED**2 or c.width
        self.head = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, c.classes))

    def inject(self, inputs: Tensor) -> State:
        """The injection of images, shaped like the state: the DEQ's context."""
        if self.config.structure == "dense":
            return self.stems[0](inputs.flatten(1))
        padded = functional.pad(inputs, (self.config.margin,) * 4)
        found = tuple(stem(functional.avg_pool2d(padded, 2**tier)) for tier, stem in enumerate(self.stems))
        return found if self.config.structure == "multi-tier" else found[0]

    def classify(self, z: State) -> Tensor:
        """Logits of a state."""
        if self.config.structure == "dense":
            return self.head(z)
        tiers = (z,) if isinstance(z, Tensor) else z
        pooled = [functional.adaptive_avg_pool2d(part, _POOLED).flatten(1) for part in tiers]
        return self.head(torch.cat(pooled, dim=1))


def _cell(c: MonotoneClassifierConfig) -> MonotoneCell:
    if c.structure == "dense":
        return MonotoneDense(c.width, c.m)
    side = c.side + 2 * c.margin
    return MonotoneConv(c.width, side, c.m) if c.structure == "conv" else MonotoneMultiTier(c.channels, side, c.m)
