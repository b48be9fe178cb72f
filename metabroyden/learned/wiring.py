"""Which places of a padded state are real and, in graphs, along which edges news travels between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from metabroyden.learned.layout import Layout
from metabroyden.padded import Graphs, length_mask


class Edges(NamedTuple):
    """E edges a graph, in the order of their targets, of T nodes."""

    source: Tensor  # (R, E)
    target: Tensor  # (R, E)
    begin: Tensor  # (R, T) the first edge that goes to a node, or to one after it
    weight: Tensor  # (R, E) zero for padding


class Wiring(NamedTuple):
    """Of R padded samples with T places."""

    mask: Tensor | None  # (R, T) one where a place is real, else zero; None where all are
    edges: Edges | None = None

    def blanked(self, value: Tensor) -> Tensor:
        """A canonical value (R, C, T), zero where no place is."""
        return value if self.mask is None else value * self.mask.unsqueeze(1)

    def mean(self, value: Tensor) -> Tensor:
        """(R, C) of the real places of a value (R, C, T) that is zero elsewhere."""
        return (
            value.mean(dim=2) if self.mask is None else value.sum(dim=2) / self.mask.sum(1, keepdim=True).clamp_min(1)
        )

    def carried(self, value: Tensor, hops: int, *, back: bool = False) -> Tensor:
        """Âᵏy for a value y (R, T, k), `hops` times along the edges (back: against them, by the transposed matrix).

        Â has w/√(Σ|w| of the edges out of the source · Σ|w| of those into the target) for an edge of weight w.
        """
        assert self.edges is not None
        numbers = torch.arange(len(value), device=value.device).unsqueeze(1)
        flat, nodes = value.flatten(0, 1), numbers * value.shape[1]
        source, weight = (self.edges.source + nodes).flatten(), self.edges.weight.flatten()
        if back:  # of edges in another order: seldom wanted
            target = (self.edges.target + nodes).flatten()
            for _ in range(hops):
                flat = torch.zeros_like(flat).index_add(0, source, flat[target] * weight.unsqueeze(1))
            return flat.view_as(value)
        begin = (self.edges.begin + numbers * self.edges.source.shape[1]).flatten()
        for _ in range(hops):  # sums of bags: many times faster than index_add
            flat = functional.embedding_bag(source, flat, begin, mode="sum", per_sample_weights=weight)
        return flat.view_as(value)


def wiring_of(context: Any, layout: Layout, like: Tensor) -> Wiring | None:
    """The wiring of the problems with this context, in the dtype of `like`; None where nothing is marked.

    ValueError where layout "graph" has no `Graphs`.
    """
    if layout.kind == "graph" and not isinstance(context, Graphs):
        raise ValueError(
            f"layout 'graph' needs the edges: give mb.Graphs for the context, and mb.OnGraphs(cell) for f; got "
            f"{type(context).__name__}"
        )
    mask = length_mask(context) if layout.by_token else None
    if mask is None:
        return None
    places = mask.to(like.dtype)
    edges = _edges(context, places) if layout.kind == "graph" else None
    whole = mask.is_cpu and not torch.compiler.is_compiling() and bool(mask.all())
    return Wiring(None if whole else places, edges)


def _edges(graphs: Graphs, places: Tensor) -> Edges:
    length = places.shape[1]
    target = graphs.target.clamp_max(length - 1)  # an edge that is none has no weight
    weight = graphs.weight.to(places.dtype) * (graphs.target < length)
    size = weight.abs()
    out, into = (torch.zeros_like(places).scatter_add(1, e, size).gather(1, e) for e in (graphs.source, target))
    every = torch.arange(length, device=places.device).repeat(len(places), 1)
    begin = torch.searchsorted(graphs.target.contiguous(), every)
    return Edges(graphs.source, target, begin, weight * (out * into).clamp_min(1e-30).rsqrt())
