"""Every cell by name, each with a small example of it: what tests of all cells iterate over."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metabroyden.models.causal import CausalCell
from metabroyden.models.conv import ConvCell
from metabroyden.models.dense import DenseCell


class Example(NamedTuple):
    """How to build a small cell, and the shape of one sample of its state and injection (at most 60 coordinates)."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


CELLS: dict[str, Example] = {
    "dense": Example(lambda: DenseCell(12), (12,)),
    "conv": Example(lambda: ConvCell(4, 6, 2), (4, 3, 4)),
    "causal": Example(lambda: CausalCell(6, 5), (6, 7)),
}
"""Small examples of the cells, by name."""


def make_cell(
    name: str, *, dtype: torch.dtype = torch.float32, batch: int = 2, seed: int = 0
) -> tuple[nn.Module, Tensor]:
    """The small example of a cell at its initial weights, and a random injection (batch, ...), shaped like the state.

    Both follow from the seed alone; the dtype rounds them. ValueError for an unknown name.

    >>> cell, x = make_cell("dense", batch=3)
    >>> cell(torch.zeros_like(x), x).shape
    torch.Size([3, 12])
    """
    if name not in CELLS:
        raise ValueError(f"unknown cell {name!r}: known are {', '.join(CELLS)}")
    example = CELLS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cell = example.build()
        x = torch.randn(batch, *example.shape)
    return cell.to(dtype), x.to(dtype)
