"""scikit-learn's handwritten digits, 1797 images of 8×8, split once and for all."""

from __future__ import annotations

import numpy as np
import torch

from metabroyden.zoo.data.images import ImageData, ImageSplit


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
