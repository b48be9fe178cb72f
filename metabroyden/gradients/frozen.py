"""Where the backward pass evaluates the cell again: the map of the forward pass, and its graph for some samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.utils import _pytree as pytree

from metabroyden.function import CallerMode
from metabroyden.gradients.base import evaluate, parts_of
from metabroyden.gradients.view import is_compiled, seen_with
from metabroyden.nn.hold import parametrizations
from metabroyden.nn.jacobian import twice_differentiable
from metabroyden.nn.pin import Pinned
from metabroyden.solution import State
from metabroyden.state import gather

Parts = tuple[Tensor, ...]
_SAME = 1e-3  # relative difference that an evaluation of fewer samples may make
_RESTRICT_AT = 0.5  # the graph is made anew for the samples that are left once so small a share of its rows is

Map = Callable[[Parts, Sequence[Tensor]], Parts]
"""A fixed-point map of the state's tensors that depends on further tensors."""


class Frozen:
    """A cell with the weights and the context of this moment, as a map of the state and of what requires gradients.

    What the cell reads when backward runs may be something else (`torch.func.functional_call`). An evaluation therefore sees
    the tensors of the forward pass, pinned weights and masks (`pin`) among them, and writes them nowhere (`seen_with`).
    Tensors overwritten in place cannot be seen as they were: `unchanged` says whether there are any.

    Attributes:
        tensors: those that require gradients.
    """

    def __init__(self, cell: Any, context: Any, z: State) -> None:
        self.cell = cell
        self.state_type = type(z)
        self._pinned = isinstance(cell, Pinned)
        self._module = cell.cell if self._pinned else cell
        self._modules = _readers(self._module) if isinstance(self._module, nn.Module) else []
        self._compiled = any(map(is_compiled, self._modules))
        # where a module has its tensors; a tied one stands in several places
        self._slots = [
            (owner, name, tensor)
            for owner in self._modules
            for table in (owner._parameters, owner._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        own = {id(tensor): tensor for *_, tensor in self._slots}
        self._order = {key: number for number, key in enumerate(own)}
        leaves, self._spec = pytree.tree_flatten(context)
        self._everything = [*leaves, *own.values(), *(cell.weights if self._pinned else ())]
        self._live = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in self._everything]
        self.tensors = [leaf for leaf, live in zip(self._everything, self._live, strict=True) if live]
        self._before = self._versions()
        self._moved = False  # whether an evaluation has found something else than the forward pass
        self._call = CallerMode(evaluate, parts_of(z)[0].device.type)

    @property
    def rounding(self) -> float:
        """Unit rounding of the half precision that the cell computes in, by autocast or its own; 0 where it does not."""
        dtypes = (self._call.dtype, self.cell.dtype if self._pinned else None)
        return max((torch.finfo(dtype).eps for dtype in dtypes if dtype is not None), default=0.0)

    @property
    def unchanged(self) -> bool:
        """Whether nothing that the cell reads was written to since, and no module has changed its mode."""
        return not self._moved and self._versions() == self._before

    def _versions(self) -> tuple[list[int], list[bool]]:
        tensors = (leaf for leaf in self._everything if isinstance(leaf, Tensor) and not leaf.is_inference())
        return [tensor._version for tensor in tensors], [module.training for module in self._modules]

    def same(self, image: Parts, before: Iterable[Tensor]) -> bool:
        """Whether this evaluation finds what the forward pass did: else a write through `.data`, or to a module that the
        cell hides from us, has gone unnoticed."""
        tolerance = max(_SAME, 8 * self.rounding)  # of all samples together; what is not finite agrees
        for new, old in zip(image, before, strict=True):
            self._moved |= bool((new - old).detach().norm() > tolerance * old.detach().norm())
        return not self._moved

    def has_graph(self, point: Parts) -> bool:
        """Whether the map depends on something that requires gradients, known to us or not."""
        with torch.enable_grad():
            return any(value.requires_grad for value in self.first(tuple(part.detach() for part in point)))

    def first(self, point: Parts) -> Any:
        """The map at a point while the weights are still in their place."""
        if self._compiled:  # a compiled graph gives one product only, and is of first order
            return self._at(point, self.tensors, self._context_with(self.tensors))
        return self._call.differentiable(self.cell, point, self.state_type, self._context_with(self.tensors))

    def __call__(self, point: Parts, tensors: Sequence[Tensor]) -> Any:
        """The map at a point, with these in the place of the tensors that require gradients; differentiable twice."""
        with twice_differentiable():
            return self._at(point, tensors, self._context_with(tensors))

    def for_rows(self, samples: Tensor) -> Callable[[Parts], Any] | None:
        """The map of these samples' points; None where something has changed, or where there is no context, since f
        then sees the full batch always."""
        if all(leaf is None for leaf in self._everything[: self._spec.num_leaves]) or not self.unchanged:
            return None
        context = gather(self._context_with(self.tensors), samples)
        return lambda point: self._at(point, self.tensors, context)

    def _at(self, point: Parts, tensors: Sequence[Tensor], context: Any) -> Any:
        values = self._filled(tensors)[self._spec.num_leaves :]
        other = {
            (id(owner), name): values[self._order[id(tensor)]]
            for owner, name, tensor in self._slots
            if getattr(owner, name, None) is not values[self._order[id(tensor)]]
        }
        module = seen_with(self._module, other) if other or self._compiled else self._module
        if not self._pinned:
            return self._call.differentiable(module, point, self.state_type, context)
        pinned = partial(self.cell.call, module, values[len(self._order) :])
        return self._call.differentiable(lambda z, x=None: pinned(z, x), point, self.state_type, context)

    def _filled(self, tensors: Sequence[Tensor]) -> list[Any]:
        given = iter(tensors)
        return [next(given) if live else leaf for leaf, live in zip(self._everything, self._live, strict=True)]

    def _context_with(self, tensors: Sequence[Tensor]) -> Any:
        return pytree.tree_unflatten(self._filled(tensors)[: self._spec.num_leaves], self._spec)


def _readers(cell: nn.Module) -> list[nn.Module]:
    """The modules of a cell that read tensors while it is evaluated: not parametrizations, whose values are held."""
    inside = {id(part) for _, _, made in parametrizations(cell) for part in made.modules()}
    return [module for module in cell.modules() if id(module) not in inside]


def pull(values: Parts, towards: Sequence[Tensor], cotangents: Parts, **options: Any) -> Parts:
    """Σ ∂valuesᵀ cotangents towards some tensors; zeros where nothing depends on them."""
    live = [(value, cotangent) for value, cotangent in zip(values, cotangents, strict=True) if value.requires_grad]
    if not live:
        return tuple(torch.zeros_like(tensor) for tensor in towards)
    images, given = zip(*live, strict=True)
    return torch.autograd.grad(images, towards, given, materialize_grads=True, **options)


@dataclass(frozen=True)
class Graph:
    """The graph of a map at the equilibria of some samples.

    `place` (B,) says where a sample stands, −1 where it does not; None: all stand there, in order.
    """

    function: Map
    point: Parts
    image: Parts
    place: Tensor | None = None

    def holds(self, samples: Tensor) -> bool:
        """Whether these samples all stand in it: a solver may have asked for some of those at work only."""
        return self.place is None or not bool((self.place[samples] < 0).any())

    def for_rows(self, samples: Tensor) -> Graph:
        """The graph to go on with where only these samples are left: a new one once they are few.

        Making it costs them one evaluation; each product then saves the work on all others. If that evaluation finds another
        value than the forward pass did, the cell reads something that we cannot put back: then this graph stays.
        """
        few = len(samples) <= _RESTRICT_AT * len(self.point[0])
        if not few or not isinstance(self.function, Frozen) or _functorch.peek_interpreter_stack() is not None:
            return self
        cell = self.function.for_rows(samples)
        if cell is None:
            return self
        here = samples if self.place is None else self.place[samples]
        point = tuple(part.detach().index_select(0, here).requires_grad_() for part in self.point)
        size = len(self.point[0]) if self.place is None else len(self.place)
        place = samples.new_full((size,), -1).index_copy(0, samples, torch.arange(len(samples), device=samples.device))
        with torch.enable_grad():
            image = cell(point)
        if not self.function.same(image, [part.index_select(0, here) for part in self.image]):
            return self
        return Graph(self.function, point, image, place)

    def rmatvec(self, u: Parts) -> Parts:
        """Jᵀu at the equilibrium."""
        return pull(self.image, self.point, u, retain_graph=True)
