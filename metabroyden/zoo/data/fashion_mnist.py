"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747): 70,000 grey images of clothes, 28×28, ten classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from metabroyden.zoo.data.idx import load_idx
from metabroyden.zoo.data.images import ImageData

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts it


def load_fashion_mnist(folder: str | Path | None = None, **options: Any) -> ImageData:
    """60,000 images to train on and validate with, in a fixed random split, and the 10,000 of the test files.

    Args:
        folder: of the four IDX files; None: `$METABROYDEN_DATA/fashion-mnist` and nowhere else where that variable is set,
            otherwise where Debian's package installs them.
        options: of `load_idx`; `side=14` averages 2×2 pixels.

    Raises FileNotFoundError that says how to get the files (nothing is downloaded), and what `load_idx` does.
    """
    root, hint = os.environ.get("METABROYDEN_DATA"), ""
    if folder is None and root:
        folder = Path(root) / "fashion-mnist"
        hint = " METABROYDEN_DATA is set, so that only this folder counts: unset it to use Debian's package."
    try:
        return load_idx(folder or DEBIAN, **options)
    except FileNotFoundError as fault:
        raise FileNotFoundError(
            f"Fashion-MNIST is not there ({fault}). Get it with `apt install dataset-fashion-mnist`, or name a folder that "
            f"holds its four IDX files, or put them into the folder fashion-mnist of $METABROYDEN_DATA.{hint}"
        ) from fault
