"""What a task is, and the tasks whose inputs are generated: sequences and graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""A target that does not count."""
TRAIN, TEST = 3000, 300
"""Samples, at most."""


@dataclass(frozen=True)
class Data:
    """A task.

    Attributes:
        train: inputs, a tensor or a dict of tensors, samples first; `test` those of other samples.
        train_targets: classes, int64, or values; `test_targets` as well.
        inputs: channels, features or symbols of an input.
        outputs: classes or values of an output.
    """

    train: Any
    train_targets: Tensor
    test: Any
    test_targets: Tensor
    inputs: int
    outputs: int


def _generated(
    make: Callable[[int, torch.Generator], tuple[Any, Tensor]], seed: int, inputs: int, outputs: int
) -> Data:
    generator = torch.Generator().manual_seed(seed)
    return Data(*make(TRAIN, generator), *make(TEST, generator), inputs, outputs)


def latch(length: int = 32, symbols: int = 6) -> Data:
    """Sequences of symbols, some of them marked: repeat the last marked one at every place."""

    def make(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        values = torch.randint(symbols, (count, length), generator=generator)
        marked = torch.rand(count, length, generator=generator) < 0.15
        marked[:, 0] = True
        last = torch.where(marked, torch.arange(length), 0).cummax(dim=1).values
        return values + symbols * marked, values.gather(1, last)

    return _generated(make, 5, 2 * symbols, symbols)


def counts(longest: int = 24, symbols: int = 8) -> Data:
    """Sequences of 6 to 24 symbols, padded: how often each place's symbol occurs, once, twice, … five times or more."""

    def make(count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        tokens = torch.randint(symbols, (count, longest), generator=generator)
        pad = torch.arange(longest) >= torch.randint(6, longest + 1, (count, 1), generator=generator)
        same = (tokens[:, :, None] == tokens[:, None]) & ~pad[:, None]
        often = (same.sum(dim=2).clamp(max=5) - 1).masked_fill(pad, IGNORED)
        return {"tokens": tokens.masked_fill(pad, symbols), "pad": pad}, often

    return _generated(make, 6, symbols + 1, 5)


def _normalised(edges: Tensor) -> Tensor:
    """D^−½(A + I)D^−½ of symmetric edges (B, N, N)."""
    whole = ((edges + edges.transpose(1, 2)) > 0).float()
    whole = whole.maximum(torch.eye(whole.shape[1]))
    scale = whole.sum(dim=2).rsqrt()
    return scale[:, :, None] * whole * scale[:, None]


def blocks(nodes: int = 16) -> Data:
    """Graphs of two communities, of a quarter of whose nodes it is known to which they belong: tell of all nodes."""

    def make(count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        label = torch.randint(2, (count, nodes), generator=generator)
        chance = torch.where(label[:, :, None] == label[:, None], 0.5, 0.1)
        edges = (torch.rand(chance.shape, generator=generator) < chance).float().tril(-1)
        told = torch.rand(count, nodes, 1, generator=generator) < 0.25
        features = torch.cat([torch.nn.functional.one_hot(label, 2).float() * told, told.float()], dim=2)
        return {"features": features, "adjacency": _normalised(edges)}, label

    return _generated(make, 7, 3, 2)


def reach(nodes: int = 20) -> Data:
    """Sparse graphs with one marked node: which nodes can be reached from it, over up to a dozen edges."""

    def make(count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        edges = (torch.rand(count, nodes, nodes, generator=generator) < 1.7 / nodes).float().tril(-1)
        adjacency = _normalised(edges)
        reached = torch.linalg.matrix_power((adjacency > 0).float(), nodes)[:, :, :1] > 0
        marked = torch.zeros(count, nodes, 1)
        marked[:, 0] = 1
        return {"features": marked, "adjacency": adjacency}, reached.squeeze(2).long()

    return _generated(make, 8, 1, 2)
