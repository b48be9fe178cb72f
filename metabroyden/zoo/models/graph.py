"""An implicit graph neural network: nodes agree with their neighbours on a fixed point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from metabroyden.deq import DEQ
from metabroyden.padded import Graphs, OnGraphs


class GraphCell(nn.Module):
    """f(z, x, edge_index) = relu(Âz W + x), IGNN (Gu et al., NeurIPS 2020), in the convention of PyTorch Geometric.

    Â has one over the root of the degrees of its ends for an edge. ‖W‖∞ ≤ κ: below 1 f is a contraction in a norm weighted
    by these degrees; chains, whose Â is nilpotent, have an equilibrium with any W.

    Args:
        width: coordinates of a node.
        bound: κ.
    """

    def __init__(self, width: int = 32, bound: float = 0.99) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.eye(width) + 0.01 * torch.randn(width, width))
        parametrize.register_parametrization(self, "weight", _Bounded(bound))

    def forward(self, z: Tensor, x: Tensor, edge_index: Tensor, batch: Any = None) -> Tensor:
        """f(z, …), (N, width), for z and x (N, width) and edge_index (2, E)."""
        source, target = edge_index
        ones = z.new_ones(len(source))
        out, into = (z.new_zeros(len(z)).index_add(0, ends, ones) for ends in (source, target))
        weight = (out[source] * into[target]).rsqrt()
        come = torch.zeros_like(z).index_add(0, target, (z @ self.weight.T)[source] * weight[:, None])
        return torch.relu(come + x)


class _Bounded(nn.Module):
    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.bound / weight.abs().sum(1, keepdim=True)).clamp_max(1)


class GraphClassifier(nn.Module):
    """Classes of nodes: a linear map in, the equilibrium of a `GraphCell`, a norm and a linear map out.

    Args:
        features: of a node.
        classes: how many there are.
        width: coordinates of a node.
        bound: κ of the cell.
        deq: options of the `DEQ`.
    """

    def __init__(self, features: int, classes: int, width: int = 32, bound: float = 0.99, **deq: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(features, width, bias=False)
        self.deq = DEQ(OnGraphs(GraphCell(width, bound)), **deq)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def inject(self, x: Tensor, edge_index: Tensor, batch: Tensor, y: Tensor | None = None) -> Graphs:
        """The context of the equilibrium, with classes y (N,) for a metric."""
        return Graphs.of(self.stem(x), edge_index, batch, y=y)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        """(N, classes) logits, for x (N, features), edge_index (2, E) and batch (N,)."""
        graphs = self.inject(x, edge_index, batch)
        return self.head(graphs.nodes(self.deq(graphs)))
