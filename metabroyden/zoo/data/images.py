"""Labelled images in splits, and the augmentation they share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSplit:
    """Images (N, channels, H, W) in [0, 1], labels (N,), and the numbers of the samples in the source (N,)."""

    images: Tensor
    labels: Tensor
    indices: Tensor

    def first(self, count: int | None) -> ImageSplit:
        """The first so many samples; None for all."""
        return ImageSplit(self.images[:count], self.labels[:count], self.indices[:count])


@dataclass(frozen=True)
class ImageData:
    """Disjoint train, validation and test splits."""

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit


def shift(images: Tensor, generator: torch.Generator, reach: int = 1) -> Tensor:
    """Each image moved by up to `reach` pixels in either direction, zeros moving in: the usual augmentation of digits."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (reach,) * 4)
    offsets = torch.randint(0, 2 * reach + 1, (2, count), generator=generator)
    rows = offsets[0][:, None, None] + torch.arange(height)[None, :, None]
    columns = offsets[1][:, None, None] + torch.arange(width)[None, None, :]
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()
