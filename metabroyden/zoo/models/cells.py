"""Every cell by name, each with a small example of it: what tests of all cells iterate over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from metabroyden.zoo.models.causal import CausalCell
from metabroyden.zoo.models.conv import ConvCell
from metabroyden.zoo.models.dense import DenseCell
from metabroyden.zoo.models.monotone import MonotoneConv, MonotoneDense, MonotoneMultiTier
from metabroyden.zoo.models.multiscale import MultiscaleCell
from metabroyden.zoo.models.transformer import TransformerCell
from metabroyden.zoo.models.trellisnet import TrellisCell


class Example(NamedTuple):
    """How to build a small cell, and the shape of one sample of its context: one shape, or a tuple of shapes.

    The state is `initial_state(cell, context)`, of at most 60 coordinates a sample.
    """

    build: Callable[[], nn.Module]
    context: tuple[Any, ...]


CELLS: dict[str, Example] = {
    "dense": Example(lambda: DenseCell(12), (12,)),
    "conv": Example(lambda: ConvCell(4, 6, 2), (4, 3, 4)),
    "causal": Example(lambda: CausalCell(6, 5), (6, 7)),
    "trellisnet": Example(lambda: TrellisCell(4, 2), ((16, 6), (8, 2))),
    "transformer": Example(lambda: TransformerCell(8, 2, 10), ((5, 32), (3, 8))),
    "monotone dense": Example(lambda: MonotoneDense(12), (12,)),
    "monotone conv": Example(lambda: MonotoneConv(3, 4), (3, 4, 4)),
    "monotone multi-tier": Example(lambda: MonotoneMultiTier((2, 3), 4), ((2, 4, 4), (3, 2, 2))),
    "multiscale": Example(lambda: MultiscaleCell((2, 4), 1), (2, 4, 3)),
}
"""Small examples of the cells, by name."""


def make_cell(name: str, *, dtype: torch.dtype = torch.float32, batch: int = 2, seed: int = 0) -> tuple[nn.Module, Any]:
    """The small example of a cell at its initial weights, and a random context: a tensor (batch, ...) or a tuple of them.

    Both follow from the seed alone; the dtype rounds them. ValueError for an unknown name.

    Examples:
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
        if all(isinstance(size, int) for size in example.context):
            return cell.to(dtype), torch.randn(batch, *example.context).to(dtype)
        context = tuple(torch.randn(batch, *shape).to(dtype) for shape in example.context)
    return cell.to(dtype), context
