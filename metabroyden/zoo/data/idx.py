"""Folders of image files in MNIST's format, IDX (LeCun, Cortes & Burges, yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from metabroyden.zoo.data.images import ImageData, ImageSplit

IMAGES, LABELS = 0x803, 0x801  # magic numbers: bytes, in three dimensions and in one


def load_idx(
    folder: str | Path,
    *,
    validation: int = 10_000,
    limit: int | None = None,
    side: int | None = None,
    split_seed: int = 0,
) -> ImageData:
    """Labelled images of a folder of IDX files, gzipped (`.gz`) or not; nothing is downloaded.

    Files: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`.
    The t10k files are the test split. The training files are put in a fixed random order, whose end is the validation split
    and whose beginning trains. Test images are numbered on after the training files' in `ImageSplit.indices`.

    Args:
        validation: images held out of the training files.
        limit: train on the first so many of what remains; None for all. Does not change the validation split.
        side: average images down to side × side; it divides theirs. None: as they are.

    Returns images (N, 1, H, W), float32 in [0, 1].

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is cut off or of another format, images and labels do not agree, or there are not enough images.
    """
    folder = Path(folder)
    images, labels = _pair(folder, "train")
    test_images, test_labels = _pair(folder, "t10k")
    size, other = images.shape[1:], test_images.shape[1:]
    if size != other:
        raise ValueError(
            f"{folder}: training images are {_times(size)} pixels, test images {_times(other)}; they must agree"
        )
    if not 1 <= validation < len(images):
        raise ValueError(f"validation must be positive and leave some of {len(images)} images, got {validation}")
    left = len(images) - validation
    if limit is not None and not 1 <= limit <= left:
        raise ValueError(f"limit must lie in 1…{left}, the images left to train on, got {limit}")
    if side is not None and (side < 1 or size[0] != size[1] or size[0] % side):
        raise ValueError(f"side must divide the side of square images, got {side} for {_times(size)} pixels")
    order = np.random.default_rng(split_seed).permutation(len(images))
    return ImageData(
        train=_split(images, labels, order[:left][:limit], side),
        validation=_split(images, labels, order[left:], side),
        test=_split(test_images, test_labels, np.arange(len(test_images)), side, first=len(images)),
    )


def _split(images: NDArray, labels: NDArray, chosen: NDArray, side: int | None, first: int = 0) -> ImageSplit:
    pixels: Tensor = torch.from_numpy(images[chosen]).unsqueeze(1).float() / 255
    if side is not None:
        pixels = functional.avg_pool2d(pixels, pixels.shape[-1] // side)
    return ImageSplit(pixels, torch.from_numpy(labels[chosen].astype(np.int64)), torch.from_numpy(first + chosen))


def _pair(folder: Path, name: str) -> tuple[NDArray, NDArray]:
    images = _read(folder / f"{name}-images-idx3-ubyte", IMAGES)
    labels = _read(folder / f"{name}-labels-idx1-ubyte", LABELS)
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"{folder}: {name} has {len(images)} images and {len(labels)} labels; as many of both are wanted"
        )
    return images, labels


def _read(path: Path, magic: int) -> NDArray:
    """The array of one IDX file: a magic number, the sizes (big-endian 32 bits each), and the bytes."""
    path, content = _content(path)
    rank = magic & 0xFF
    header = 4 * (1 + rank)
    if len(content) < 4:
        raise ValueError(f"{path} is cut off: it holds {len(content)} bytes, not even the 4 of a magic number")
    found = int.from_bytes(content[:4], "big")
    if found != magic:
        raise ValueError(
            f"{path} is no IDX file of {rank} dimensions: its magic number is {found:#010x}, wanted {magic:#010x}"
        )
    if len(content) < header:
        raise ValueError(f"{path} is cut off: it holds {len(content)} bytes, the header alone has {header}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", rank, offset=4))
    wanted = header + int(np.prod(shape, dtype=object))
    if len(content) != wanted:
        fault = "is cut off" if len(content) < wanted else "is too long"
        raise ValueError(f"{path} {fault}: {_times(shape)} bytes and the header make {wanted}, it holds {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _content(path: Path) -> tuple[Path, bytes]:
    if path.is_file():
        return path, path.read_bytes()
    packed = path.with_name(path.name + ".gz")
    if not packed.is_file():
        raise FileNotFoundError(f"there is no {path.name} and no {packed.name} in {path.parent}")
    try:
        return packed, gzip.decompress(packed.read_bytes())
    except (EOFError, OSError, zlib.error) as fault:
        raise ValueError(f"{packed} cannot be unpacked, it is cut off or no gzip file: {fault}") from fault


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
