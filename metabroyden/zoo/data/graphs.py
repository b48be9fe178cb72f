"""Graphs whose nodes are to be told apart by what few of them know: chains, trees, a club."""

from __future__ import annotations

from typing import NamedTuple

import networkx
import torch
from torch import Tensor

LENGTHS = (20, 200)
"""Nodes of a chain, from and to."""


class NodeTask(NamedTuple):
    """Graphs in the convention of PyTorch Geometric, with the class of each node."""

    x: Tensor  # (N, F)
    edge_index: Tensor  # (2, E)
    batch: Tensor  # (N,)
    y: Tensor  # (N,)


def chains(
    count: int,
    seed: int,
    *,
    lengths: tuple[int, int] = LENGTHS,
    held: bool = False,
    classes: int = 4,
    noise: float = 0.01,
) -> NodeTask:
    """Directed chains whose nodes are numbered in random order.

    The first node's features are its class, one of as many; all have noise. Whoever classifies the last node must carry
    that over the whole chain (Gu et al., Implicit Graph Neural Networks, NeurIPS 2020, section 5).

    Args:
        count: how many.
        seed: of lengths, classes, noise and order.
        lengths: the least and the largest number of nodes, both included.
        held: of lengths that are multiples of three, or of the others.
        classes: how many there are.
        noise: its standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = lengths
    allowed = torch.tensor([length for length in range(low, high + 1) if (length % 3 == 0) == held])
    sizes = allowed[torch.randint(len(allowed), (count,), generator=generator)]
    kinds = torch.randint(classes, (count,), generator=generator)
    x = noise * torch.randn(int(sizes.sum()), classes, generator=generator)
    edges, first = [], 0
    for size, kind in zip(sizes.tolist(), kinds.tolist(), strict=True):
        order = first + torch.randperm(size, generator=generator)
        x[order[0], kind] += 1
        edges.append(torch.stack([order[:-1], order[1:]]))
        first += size
    batch = torch.arange(count).repeat_interleave(sizes)
    return NodeTask(x, torch.cat(edges, dim=1), batch, kinds[batch])


def trees(count: int, seed: int, *, sizes: tuple[int, int] = (20, 100), classes: int = 4) -> NodeTask:
    """Random trees, edges both ways, of whose nodes one in twenty, and one at least, know the class of all.

    Each node is joined to one of the three before it, so that trees are long. `seed` is of all draws; `sizes` are the least
    and the largest number of nodes.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = sizes
    counts = torch.randint(low, high + 1, (count,), generator=generator)
    kinds = torch.randint(classes, (count,), generator=generator)
    xs, edges, first = [], [], 0
    for size, kind in zip(counts.tolist(), kinds.tolist(), strict=True):
        order = torch.randperm(size, generator=generator)
        child = torch.arange(1, size)
        parent = (child - torch.randint(1, 4, (size - 1,), generator=generator)).clamp_min(0)
        one, other = first + order[parent], first + order[child]
        edges.append(torch.stack([torch.cat([one, other]), torch.cat([other, one])]))
        xs.append(_shown(torch.full((size,), kind), max(1, size // 20), classes, generator))
        first += size
    batch = torch.arange(count).repeat_interleave(counts)
    return NodeTask(torch.cat(xs), torch.cat(edges, dim=1), batch, kinds[batch])


def karate(count: int, seed: int, *, known: tuple[int, int] = (2, 8)) -> NodeTask:
    """Zachary's karate club, as networkx has it, again and again: two of its halves, of which some members are known.

    Each time from 2 to 8 of its 34 members, drawn anew, tell which side they take (`known`, of both sides together).
    """
    generator = torch.Generator().manual_seed(seed)
    club = networkx.karate_club_graph()
    sides = torch.tensor([int(side == "Officer") for _, side in club.nodes(data="club")])
    edge_index = torch.tensor([*club.edges, *((b, a) for a, b in club.edges)]).T
    xs = []
    for _ in range(count):
        some = int(torch.randint(known[0], known[1] + 1, (), generator=generator))
        xs.append(_shown(sides, some, 2, generator))
    numbers = torch.arange(count) * len(sides)
    edges = (edge_index.unsqueeze(1) + numbers[:, None]).flatten(1)
    return NodeTask(torch.cat(xs), edges, torch.arange(count).repeat_interleave(len(sides)), sides.repeat(count))


def renumbered(task: NodeTask, seed: int) -> NodeTask:
    """The same graphs, the nodes of each in another order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.argsort(task.batch + torch.rand(len(task.batch), generator=generator))  # new place → old number
    places = torch.argsort(order)
    return NodeTask(task.x[order], places[task.edge_index], task.batch, task.y[order])


def _shown(y: Tensor, known: int, classes: int, generator: torch.Generator) -> Tensor:
    """(N, classes) the classes of so many random nodes, zero at the others."""
    seen = torch.zeros(len(y), 1)
    seen[torch.randperm(len(y), generator=generator)[:known]] = 1
    return torch.nn.functional.one_hot(y, classes) * seen
