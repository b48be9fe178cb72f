"""What the strangers are trained on: inputs and targets, made by seed from what is installed; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from experiments.strangers.generated import IGNORED, TEST, TRAIN, Data, blocks, counts, latch, reach
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.data.fashion_mnist import load_fashion_mnist
from metabroyden.zoo.data.images import ImageData
from metabroyden.zoo.data.shakespeare import load_shakespeare
from metabroyden.zoo.data.text import TextSplit


def _classified(data: ImageData) -> Data:
    train, test = data.train.first(TRAIN), data.test.first(TEST)
    return Data(train.images, train.labels, test.images, test.labels, 1, 10)


def digits() -> Data:
    """scikit-learn's digits, 8×8."""
    return _classified(load_digits())


def fashion() -> Data:
    """Fashion-MNIST at 14×14, where it is installed."""
    return _classified(load_fashion_mnist(side=14))


def _photographs(side: int = 12) -> tuple[Tensor, Tensor]:
    """Patches (N, 1, side, side) in [0, 1], at half the resolution, of six pictures to train on and of two others."""
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError("these photographs come with scikit-image: pip install scikit-image==0.26.0") from error
    generator = np.random.default_rng(0)

    def patches(names: str, count: int) -> Tensor:
        found = []
        for name in names.split():
            image = np.asarray(getattr(data, name)(), dtype=np.float32) / 255
            image = image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2]
            image = (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4
            corners = generator.integers(0, np.array(image.shape) - side, size=(count, 2))
            found += [image[row : row + side, column : column + side] for row, column in corners]
        return torch.from_numpy(np.stack(found))[:, None]

    def shuffled(images: Tensor) -> Tensor:
        return images[torch.from_numpy(generator.permutation(len(images)))]

    return shuffled(patches("camera moon text brick gravel cell", TRAIN // 6)), shuffled(
        patches("coins grass", TEST // 2)
    )


def denoise() -> Data:
    """Photographs, noise of deviation 0.2 to be removed."""
    train, test = _photographs()
    generator = torch.Generator().manual_seed(1)
    spoilt = [image + 0.2 * torch.randn(image.shape, generator=generator) for image in (train, test)]
    return Data(spoilt[0], train, spoilt[1], test, 1, 1)


def inpaint() -> Data:
    """Photographs of which two fifths of the pixels are missing; a second channel says which are there."""
    train, test = _photographs()
    generator = torch.Generator().manual_seed(2)
    there = [(torch.rand(image.shape, generator=generator) > 0.4).float() for image in (train, test)]
    holed = [torch.cat([image * seen, seen], dim=1) for image, seen in zip((train, test), there, strict=True)]
    return Data(holed[0], train, holed[1], test, 2, 1)


def text(length: int = 64) -> Data:
    """Windows of Shakespeare's plays: predict the next character."""
    plays = load_shakespeare()
    generator = torch.Generator().manual_seed(3)

    def windows(split: TextSplit, count: int) -> Tensor:
        places = torch.randint(len(split.tokens) - length, (count, 1), generator=generator)
        return split.tokens[places + torch.arange(length + 1)]

    train, test = windows(plays.train, TRAIN), windows(plays.test, TEST)
    symbols = len(plays.vocabulary)
    return Data(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:], symbols, symbols)


def lines(longest: int = 40) -> Data:
    """Lines of Shakespeare's plays, padded: guess the fifth of the characters that is covered."""
    plays = load_shakespeare()
    generator, blank = torch.Generator().manual_seed(4), plays.vocabulary.index("\n")
    covered = len(plays.vocabulary)

    def padded(split: TextSplit, count: int) -> tuple[dict[str, Tensor], Tensor]:
        ends = (split.tokens == blank).nonzero().squeeze(1)
        long = (ends[1:] - ends[:-1] - 1).clamp(max=longest)
        chosen = (long >= 8).nonzero().squeeze(1)
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:count]]
        tokens = split.tokens[(ends[chosen] + 1)[:, None] + torch.arange(longest)]
        pad = torch.arange(longest) >= long[chosen][:, None]
        hidden = (torch.rand(tokens.shape, generator=generator) < 0.2) & ~pad
        read = tokens.masked_fill(hidden, covered).masked_fill(pad, covered + 1)
        return {"tokens": read, "pad": pad}, tokens.masked_fill(~hidden, IGNORED)

    return Data(*padded(plays.train, TRAIN), *padded(plays.test, TEST), covered + 2, covered)


SOURCES: dict[str, Callable[[], Data]] = {
    "digits": digits, "fashion": fashion, "denoise": denoise, "inpaint": inpaint, "text": text, "lines": lines,
    "latch": latch, "counts": counts, "blocks": blocks, "reach": reach,
}  # fmt: skip


@cache
def load_data(name: str) -> Data:
    """The task of that name; ImportError or FileNotFoundError says what to install where its data are not there."""
    return SOURCES[name]()
