"""Contexts of samples that differ in length: padded tokens, and graphs, with what is padding marked."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Padded(NamedTuple):
    """A context padded to one length, with a mask. f takes it as it is, its state is (B, T, C).

    What f returns where the mask is False is taken for zeros, so that padding counts in no norm and may hold anything, NaN
    too. The maps of learned solvers of the layouts "ntc", "tokens" and "set" look at real tokens alone, and to a
    `MetaBroyden` more padding makes no difference.

    Attributes:
        x: (B, T, F), or a tuple or dict of tensors with the samples first.
        mask: (B, T) bool, True where a token is.
        y: (B, T, …) what a metric compares tokens with, or None. Learned solvers do not look at it, and f must not.

    Examples:
        >>> import torch, metabroyden as mb
        >>> x = mb.Padded(torch.ones(2, 3, 1), torch.tensor([[True, True, False], [True, False, False]]))
        >>> f = lambda z, x: 0.5 * (z + x.x)
        >>> mb.solve(f, torch.zeros(2, 3, 1), x, solver=mb.Broyden(), rtol=1e-3).z.squeeze(2).round(decimals=1)
        tensor([[1., 1., 0.],
                [1., 0., 0.]])
    """

    x: Any
    mask: Tensor
    y: Tensor | None = None


class Graphs(NamedTuple):
    """A batch of graphs, padded to one number of nodes and of edges. Made by `of`; taken by a cell in `OnGraphs`.

    Attributes:
        x: (B, T, F) of nodes, zero where there is none.
        mask: (B, T) bool, True where a node is.
        source: (B, E) node of its own graph that an edge comes from, in the order of the nodes that edges go to.
        target: (B, E) node that an edge goes to; T where there is no edge.
        weight: (B, E) of edges; 1 where none were given, 0 where there is no edge.
        y: (B, T, …) what a metric compares nodes with, zero where there is none, or None; no cell in `OnGraphs` sees it.
    """

    x: Tensor
    mask: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor
    y: Tensor | None = None

    @classmethod
    def of(cls, x: Any, edge_index: Any = None, batch: Any = None, *, edge_weight: Any = None, y: Any = None) -> Graphs:
        """Graphs in the convention of PyTorch Geometric.

        Args:
            x: (N, F) of the nodes of all graphs; or an iterable of objects with attributes `x` and `edge_index` (and
                `batch`, `edge_weight`, `y` of nodes), such as a list of its `Data`, or one of them.
            edge_index: (2, E) numbers of nodes from which, and to which, edges go.
            batch: (N,) the number of each node's graph, rising; None: they are of one.
            edge_weight: (E,), or None for ones.
            y: (N, …) of the nodes, or None.

        Raises:
            TypeError: not these things.
            ValueError: shapes or numbers that do not fit, edges between graphs.
        """
        if isinstance(x, Tensor):
            return _packed(_checked(x, edge_index, batch, edge_weight, y))
        given = [x] if hasattr(x, "edge_index") else list(x) if isinstance(x, Iterable) else []
        if not given or not all(hasattr(each, "x") and hasattr(each, "edge_index") for each in given):
            raise TypeError(
                "Graphs.of takes x (N, F) with edge_index (2, E), or objects with attributes x and edge_index; got "
                f"{type(x).__name__}"
            )
        return _packed(_joined(given))

    @classmethod
    def around(
        cls, x: Tensor, edge_index: Tensor, *, hops: int, count: int, most: int = 256, seed: int = 0,
        edge_weight: Any = None, y: Any = None,
    ) -> Graphs:  # fmt: skip
        """Parts of one large graph, to fit a solver to, which then runs on the whole graph.

        Each part has a random node, what lies within so many edges of it, whichever way they go, and the edges between
        these; of more than `most` nodes the nearest, at random among those at equal distance. At its rim nodes lose edges: a
        cell that divides by degrees is given them by `edge_weight`, made before.

        Args:
            x: as for `of`; so are edge_index, edge_weight and y.
            edge_index: (2, E).
            hops: edges from the first node, at most: several times those that an evaluation of f carries news.
            count: parts.
            most: nodes of a part.
            seed: of the choice.
            edge_weight: (E,), or None.
            y: (N, …), or None.

        Raises:
            TypeError: x or edge_index that are no tensors.
            ValueError: what `of` raises, and numbers below one.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"Graphs.around takes x (N, F) and edge_index (2, E) of one graph, got {type(x).__name__}")
        if min(hops, count, most) < 1:
            raise ValueError(f"hops, count and most must be at least 1, got {hops}, {count} and {most}")
        x, edges, _, weight, y = _checked(x, edge_index, None, edge_weight, y)
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(len(x), (count,), generator=generator)
        parts, number = [], torch.full((len(x),), -1, device=x.device)
        for node in first.tolist():
            nodes = _near(node, edges, len(x), hops, generator)[:most]
            number.fill_(-1)[nodes] = torch.arange(len(nodes), device=x.device)
            inside = (number[edges] >= 0).all(0)
            batch = torch.zeros(len(nodes), dtype=torch.long, device=x.device)
            parts.append((x[nodes], number[edges[:, inside]], batch, weight[inside], None if y is None else y[nodes]))
        return _packed(_united(parts))

    def nodes(self, z: Tensor) -> Tensor:
        """(N, …) values of the nodes there are, graph by graph, of padded ones (B, T, …)."""
        return z[self.mask]

    def padded(self, values: Tensor) -> Tensor:
        """(B, T, …) zero where no node is, of values (N, …) of the nodes there are: the inverse of `nodes`."""
        whole = values.new_zeros(*self.mask.shape, *values.shape[1:])
        whole[self.mask] = values
        return whole


class _Union(NamedTuple):
    """Graphs as one graph of N nodes, in the convention of PyTorch Geometric."""

    places: Tensor  # (N,) of the nodes among B·T
    edge_index: Tensor  # (2, E)
    batch: Tensor  # (N,)
    weight: Tensor  # (E,)


class OnGraphs(nn.Module):
    """A cell of PyTorch Geometric's kind as a map of `Graphs`: samples are graphs, each of which stops on its own.

    The cell is called on the graphs at hand as one, without padding, nodes in their order, edges in the order of their
    targets. Its attributes `dilation` (hops that an evaluation carries news) and `initial_state`, a function of the same
    arguments but z, are its own to give; else the state begins at zeros like x.

    Args:
        cell: z⁺ = cell(z, x, edge_index, batch), with z (N, C) and x (N, F); one that takes no fourth argument is given
            three. A parameter `edge_weight` is given the weights.

    Examples:
        >>> import torch, metabroyden as mb
        >>> def cell(z, x, edge_index):
        ...     source, target = edge_index
        ...     return torch.tanh(0.5 * torch.zeros_like(z).index_add(0, target, z[source]) + x)
        >>> x, edges, batch = torch.ones(5, 1), torch.tensor([[0, 1, 3], [1, 2, 4]]), torch.tensor([0, 0, 0, 1, 1])
        >>> graphs = mb.Graphs.of(x, edges, batch)
        >>> z = mb.DEQ(mb.OnGraphs(cell), rtol=1e-4)(graphs)
        >>> graphs.nodes(z).shape
        torch.Size([5, 1])
    """

    layout = "graph"

    def __init__(self, cell: Any) -> None:
        super().__init__()
        if not callable(cell):
            raise TypeError(f"cell must be callable, got {type(cell).__name__}")
        self.cell = cell
        self.dilation = getattr(cell, "dilation", 1)
        self._several, self._weighted = _takes(cell)
        self._last: tuple[tuple[Tensor, ...], _Union] | None = None  # of the graphs seen last

    def initial_state(self, graphs: Graphs) -> Tensor:
        """The cell's own start, or zeros like x, (B, T, C)."""
        _check_graphs(graphs)
        maker = getattr(self.cell, "initial_state", None)
        if maker is None:
            return torch.zeros_like(graphs.x)
        union = self._union(graphs)
        given, weights = self._arguments(graphs, union)
        return graphs.padded(maker(*given, **weights))

    def forward(self, z: Tensor, graphs: Graphs) -> Tensor:
        """f(z, graphs), (B, T, C), zero where no node is."""
        _check_graphs(graphs)
        union = self._union(graphs)
        given, weights = self._arguments(graphs, union)
        rows = z.flatten(0, 1)
        found = self.cell(rows.index_select(0, union.places), *given, **weights)
        return torch.zeros_like(rows, dtype=found.dtype).index_copy(0, union.places, found).view_as(z)

    def _arguments(self, graphs: Graphs, union: _Union) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        x = graphs.x.flatten(0, 1).index_select(0, union.places)
        weights = {"edge_weight": union.weight} if self._weighted else {}
        return (x, union.edge_index, union.batch)[: 3 if self._several else 2], weights

    def _union(self, graphs: Graphs) -> _Union:
        last, parts = self._last, (graphs.mask, graphs.source, graphs.target, graphs.weight)
        if last is None or any(one is not other for one, other in zip(last[0], parts, strict=True)):
            last = self._last = parts, _union(graphs)
        return last[1]


def values_of(context: Any) -> Any:
    """What a state is like where nothing else is said: the context itself, or what it pads."""
    return context.x if isinstance(context, (Padded, Graphs)) else context


def length_mask(context: Any) -> Tensor | None:
    """(B, T) the mask of a context, where it has one."""
    return context.mask if isinstance(context, (Padded, Graphs)) else None


def _check_graphs(graphs: Any) -> None:
    if not isinstance(graphs, Graphs):
        raise TypeError(f"a cell on graphs takes mb.Graphs for its context, got {type(graphs).__name__}")


def _takes(cell: Any) -> tuple[bool, bool]:
    """Whether a cell takes a fourth argument, and weights."""
    try:
        parameters = inspect.signature(cell.forward if isinstance(cell, nn.Module) else cell).parameters
    except (TypeError, ValueError):
        return True, False
    kinds = inspect.Parameter
    weighted = "edge_weight" in parameters
    places = [
        name
        for name, each in parameters.items()
        if each.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD) and name != "edge_weight"
    ]
    any_number = any(each.kind is kinds.VAR_POSITIONAL for each in parameters.values())
    return any_number or len(places) >= 4, weighted


def _union(graphs: Graphs) -> _Union:
    batch, length = graphs.mask.shape
    numbers = graphs.mask.flatten().cumsum(0).sub_(1).view(batch, length)  # of each node among the real ones
    row, edge = (graphs.target < length).nonzero(as_tuple=True)
    ends = [numbers[row, end[row, edge]] for end in (graphs.source, graphs.target)]
    places = graphs.mask.flatten().nonzero().squeeze(1)
    return _Union(places, torch.stack(ends), places // length, graphs.weight[row, edge])


_Whole = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""x, edge_index, batch, edge_weight and y of a union."""


def _checked(x: Tensor, edge_index: Any, batch: Any, edge_weight: Any, y: Any) -> _Whole:
    """What `Graphs.of` is given, whole; ValueError for what does not fit."""
    if x.dim() != 2 or len(x) == 0:
        raise ValueError(f"x must be (N, F), features of at least one node, got shape {tuple(x.shape)}")
    edges = _checked_edges(edge_index, len(x))
    batch = torch.zeros(len(x), dtype=torch.long, device=x.device) if batch is None else batch.long()
    if batch.shape != (len(x),) or bool((batch.diff() < 0).any()):
        raise ValueError(
            f"batch must be ({len(x)},), the number of each node's graph, rising, got shape {tuple(batch.shape)}"
        )
    if bool((batch[edges[0]] != batch[edges[1]]).any()):
        raise ValueError("edge_index must join nodes of one graph; by batch some go from one to another")
    weight = x.new_ones(edges.shape[1]) if edge_weight is None else edge_weight.to(x)
    if weight.shape != edges.shape[1:]:
        raise ValueError(f"edge_weight must be ({edges.shape[1]},), got shape {tuple(weight.shape)}")
    if y is not None and y.shape[:1] != (len(x),):
        raise ValueError(f"y must be ({len(x)}, …), of the nodes, got shape {tuple(y.shape)}")
    return x, edges, batch, weight, y


def _checked_edges(edge_index: Any, nodes: int) -> Tensor:
    if not isinstance(edge_index, Tensor) or edge_index.is_floating_point() or edge_index.shape[:1] != (2,):
        found = tuple(edge_index.shape) if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise ValueError(f"edge_index must be (2, E) integers, got {found}")
    low, high = (int(edge_index.min()), int(edge_index.max())) if edge_index.numel() else (0, 0)
    if low < 0 or high >= nodes:
        raise ValueError(f"edge_index must hold numbers of nodes, from 0 to {nodes - 1}, got some from {low} to {high}")
    return edge_index.long()


def _joined(given: list[Any]) -> _Whole:
    """Several objects, each of one graph or of several, as one union."""
    more = ("batch", "edge_weight", "y")
    return _united([_checked(each.x, each.edge_index, *(getattr(each, name, None) for name in more)) for each in given])


def _united(parts: list[_Whole]) -> _Whole:
    """Unions as one."""
    moved, nodes, graphs = [], 0, 0
    for part in parts:
        moved.append((part[0], part[1] + nodes, part[2] + graphs, *part[3:]))
        nodes, graphs = nodes + len(part[0]), graphs + int(part[2][-1]) + 1
    xs, edges, batches, weights, ys = zip(*moved, strict=True)
    told = [y for y in ys if y is not None]
    y = torch.cat(told) if len(told) == len(parts) else None
    return torch.cat(xs), torch.cat(edges, dim=1), torch.cat(batches), torch.cat(weights), y


def _near(node: int, edges: Tensor, count: int, hops: int, generator: torch.Generator) -> Tensor:
    """Nodes within so many edges of one, nearest first, those at equal distance in random order."""
    found = torch.tensor([node], device=edges.device)
    seen = torch.zeros(count, dtype=torch.bool, device=edges.device)
    seen[node] = True
    ring = seen.clone()
    for _ in range(hops):
        next_to = torch.zeros_like(seen)
        next_to[edges[1, ring[edges[0]]]] = next_to[edges[0, ring[edges[1]]]] = True
        ring = next_to & ~seen
        seen |= ring
        nodes = ring.nonzero().flatten()
        found = torch.cat([found, nodes[torch.randperm(len(nodes), generator=generator).to(nodes.device)]])
    return found


def _packed(whole: _Whole) -> Graphs:
    """A union as padded graphs; numbers of graphs without a node are left out."""
    x, edge_index, batch, weight, y = whole
    _, batch, sizes = torch.unique_consecutive(batch, return_inverse=True, return_counts=True)
    first = sizes.cumsum(0) - sizes
    length = int(sizes.max())
    mask = torch.arange(length, device=x.device) < sizes.unsqueeze(1)
    order = torch.argsort(edge_index[1], stable=True)
    (source, target), weight = edge_index[:, order], weight[order]
    owner = batch[target]
    many = torch.bincount(owner, minlength=len(sizes))
    place = torch.arange(len(owner), device=x.device) - (many.cumsum(0) - many)[owner]
    most = max(1, int(many.max()))

    def spread(values: Tensor, empty: int) -> Tensor:
        whole = values.new_full((len(sizes), most), empty)
        whole[owner, place] = values
        return whole

    ends = spread(source - first[owner], 0), spread(target - first[owner], length)
    made = Graphs(x.new_zeros(*mask.shape, x.shape[1]), mask, *ends, spread(weight, 0))
    return made._replace(x=made.padded(x), y=None if y is None else made.padded(y))
