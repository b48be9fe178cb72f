"""scikit-learn's handwritten digits, 1797 images of 8×8, split once and for all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSplit:
    """Images (N, channels, H, W) in [0, 1], labels (N,), and the numbers of the samples in the source (N,)."""

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class ImageData:
    """Disjoint train, validation and test splits."""

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit


def load_digits(*, validation: int = 297, test: int = 300, split_seed: int = 0) -> ImageData:
    """The digits in a fixed random split; ships with scikit-learn, nothing is downloaded.

    Raises ValueError when the splits ask for more than there is.
    """
    from sklearn.datasets import load_digits as source

    bunch = source()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    if validation < 1 or test < 1 or validation + test >= len(images):
        raise ValueError(f"validation={validation} and test={test} must be positive and leave some of {len(images)}")
    order = torch.from_numpy(np.random.default_rng(split_seed).permutation(len(images)))
    parts = order.split([len(images) - validation - test, validation, test])
    return ImageData(*(ImageSplit(images[part], labels[part], part) for part in parts))


def shift(images: Tensor, generator: torch.Generator, reach: int = 1) -> Tensor:
    """Each image moved by up to `reach` pixels in either direction, zeros moving in: the usual augmentation of digits."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (reach,) * 4)
    offsets = torch.randint(0, 2 * reach + 1, (2, count), generator=generator)
    rows = offsets[0][:, None, None] + torch.arange(height)[None, :, None]
    columns = offsets[1][:, None, None] + torch.arange(width)[None, None, :]
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()
