"""Implicit differentiation: the adjoint fixed point, solved by any solver, to any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metabroyden.gradients.base import Replace, Report, evaluate, parts_of
from metabroyden.inverse import FinalInverse, TransposedInverse
from metabroyden.ledger import InCallersMode
from metabroyden.solution import Solution, State
from metabroyden.solve import check_options, solve
from metabroyden.solvers.base import ClassicalSolver
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import Packing, gather
from metabroyden.training.pin import Pinned

Parts = tuple[Tensor, ...]
_RESTRICT_AT = 0.5  # the graph is made anew for the samples that are left once so small a share of its rows is

Map = Callable[[Parts, Sequence[Tensor]], Parts]
"""A fixed-point map of the state's tensors that depends on further tensors."""


@dataclass(frozen=True)
class Implicit:
    """Implicit differentiation (Bai et al. 2019, theorem 1): the cotangent v at z* becomes u = (I − Jᵀ)⁻¹v.

    u is found as the fixed point of u ↦ Jᵀu + v by any of our solvers. One evaluation of the cell at z* gives the graph
    for both Jᵀ and the way from u to the parameters and the context, which are those of the forward pass.

    Bias: none but the two tolerances. Cost: one evaluation with its graph, and a vector–Jacobian product for each
    evaluation of the adjoint, which `DEQ.last_backward_solution` reports (a product is one of the whole batch, until half
    of the samples are done: then the graph is made anew for the rest); memory independent of the evaluations. Of any
    order: a backward that is itself to be differentiated evaluates the cell three more times, and u becomes a fixed point
    with implicit gradients of its own. Then the cell must be a module, or depend on nothing that requires gradients but z
    and the context: else a RuntimeError.

    Attributes:
        solver: solves the adjoint system. A learned one must be homogeneous in v (`AdjointLSTM`); it gets a context with
            the equilibrium (R, n) under "z".
        rtol, max_nfe: its tolerance and its budget of products. Where the cell computed in half precision (autocast), no
            tolerance below four roundings of it is asked for.
        precondition: reuse the forward solve's inverse Jacobian, transposed, as start and as initial inverse Jacobian of
            the adjoint's Broyden (SHINE, Ramzi et al. 2022, in its refined form). Needs a forward solver that has one,
            `Broyden` or `GroupedLSTM`, and a Broyden here.
    """

    solver: Any = field(default_factory=lambda: Broyden(memory=30))
    rtol: float = 1e-3
    max_nfe: int = 30
    precondition: bool = False

    def __post_init__(self) -> None:
        check_options(solve, self.solver, self.rtol, 0.0, self.max_nfe, 1, None)
        if getattr(self.solver, "homogeneous", True) is False:
            raise ValueError(
                f"{type(self.solver).__name__} is no solver of adjoint systems, which scale with the cotangent: fit_adjoint "
                "makes one"
            )
        if self.precondition and not (isinstance(self.solver, Broyden) and self.solver.initial is None):
            raise ValueError(
                f"Implicit(precondition=True) starts a plain Broyden from the forward inverse, got solver={self.solver!r}"
            )

    @property
    def wants_inverse(self) -> bool:
        """Whether the forward solve is to keep its inverse Jacobian."""
        return self.precondition

    def attach(
        self, cell: Callable[..., State], solution: Solution, context: Any, report: Report | None = None
    ) -> State:
        """z* with implicit gradients; `report` receives the adjoint's `Solution`."""
        final = solution.inverse if self.precondition else None
        if self.precondition and final is None:
            raise ValueError("Implicit(precondition=True) needs a solution found with keep_inverse=True")
        frozen = _Frozen(cell, context, solution.z)
        adjoint = _AdjointSolve(self, Packing.of(solution.z, "z"), final, report, 4 * frozen.rounding)
        attached = _fixed_point(frozen, frozen.tensors, parts_of(solution.z), adjoint)
        return attached[0] if isinstance(solution.z, Tensor) else attached


@dataclass(frozen=True)
class _AdjointSolve:
    """Solves u = Jᵀu + v, given the product with Jᵀ."""

    mode: Implicit
    packing: Packing
    final: FinalInverse | None
    report: Report | None
    floor: float  # no tolerance below it

    def __call__(self, graph: _Graph, cotangent: Parts) -> Parts:
        """u for the cotangent v. Coordinates of v that are not finite pass by the solve, to the weights."""
        mode, packing, star = self.mode, self.packing, tuple(part.detach() for part in graph.point)
        given = packing.pack(cotangent[0] if packing.single else cotangent)
        finite = torch.isfinite(given)
        v = torch.where(finite, given, 0.0)
        # by a power of two, so that nothing under- or overflows and not a bit changes otherwise
        _, exponent = torch.frexp(v.abs().amax(dim=1, keepdim=True))
        scale = torch.exp2(exponent.clamp(-100, 100).to(v.dtype))
        v = v / scale
        sample, whole = torch.arange(len(v), device=v.device), graph

        def product(u: Tensor) -> Tensor:
            pulled = graph.pull(parts_of(packing.unpack(u)))
            return packing.pack(pulled[0] if packing.single else pulled)

        def transpose(u: Tensor, rows: dict[str, Tensor]) -> Tensor:
            nonlocal graph
            if rows["sample"] is sample and graph is whole:
                return product(u) + v
            graph = (graph if graph.holds(rows["sample"]) else whole).for_rows(rows["sample"])
            place = rows["sample"] if graph.place is None else graph.place[rows["sample"]]
            spread = u.new_zeros(len(graph.point[0]), u.shape[1]).index_copy(0, place, u)
            return product(spread).index_select(0, place) + rows["v"]

        solver, start = mode.solver, v
        if self.final is not None:
            solver, start = replace(solver, initial=TransposedInverse(self.final)), -self.final.transpose(v)
            start = torch.where(torch.isfinite(start).all(dim=1, keepdim=True), start, v)
        context = {"sample": sample, "z": packing.pack(star[0] if packing.single else star), "v": v}
        rtol = max(mode.rtol, self.floor)
        found = solve(transpose, start, context, solver=solver, rtol=rtol, max_nfe=mode.max_nfe, throw=False)
        if self.report is not None:
            self.report(found)
        assert isinstance(found.z, Tensor)
        return parts_of(packing.unpack(torch.where(finite, found.z * scale, given)))

    def plain(self) -> _AdjointSolve:
        """The solver of the adjoint of an adjoint: its matrix is J again, so no trained solver, and nobody asked what
        it costs."""
        solver = self.mode.solver if isinstance(self.mode.solver, ClassicalSolver) else Broyden(memory=30)
        return _AdjointSolve(
            replace(self.mode, precondition=False, solver=solver), self.packing, None, None, self.floor
        )


class _Frozen:
    """A cell with the weights and the context of this moment, as a map of the state and of what requires gradients.

    What the cell reads when backward runs may be something else (`torch.func.functional_call`): the tensors of the forward
    pass are put back for an evaluation, pinned weights and masks (`pin`) among them. Not what was overwritten in place:
    `unchanged` says whether something was.
    """

    def __init__(self, cell: Callable[..., State], context: Any, z: State) -> None:
        self.cell: Any = cell
        self.single = isinstance(z, Tensor)
        module = cell.cell if isinstance(cell, Pinned) else cell
        self._modules = list(module.modules()) if isinstance(module, nn.Module) else []
        # where a module keeps its tensors; a tied one stands in several places
        self._slots = [
            (places, name, id(tensor))
            for owner in self._modules
            for places in (owner._parameters, owner._buffers)
            for name, tensor in places.items()
            if tensor is not None
        ]
        own = {id(tensor): tensor for places, name, _ in self._slots if (tensor := places[name]) is not None}
        self._order = {key: number for number, key in enumerate(own)}
        leaves, self._spec = pytree.tree_flatten(context)
        self._everything = [*leaves, *own.values(), *(cell.weights if isinstance(cell, Pinned) else ())]
        self._live = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in self._everything]
        self.tensors = [leaf for leaf, live in zip(self._everything, self._live, strict=True) if live]
        self._versions, self._modes = self._state()
        self._call = InCallersMode(evaluate, parts_of(z)[0].device.type)

    @property
    def rounding(self) -> float:
        """Unit rounding of the dtype that autocast chose; 0 without autocast."""
        return 0.0 if self._call.dtype is None else torch.finfo(self._call.dtype).eps

    @property
    def unchanged(self) -> bool:
        """Whether nothing that the cell reads was written to since, and no module has changed its mode."""
        return self._state() == (self._versions, self._modes)

    def _state(self) -> tuple[list[int], list[bool]]:
        tensors = (leaf for leaf in self._everything if isinstance(leaf, Tensor) and not leaf.is_inference())
        return [tensor._version for tensor in tensors], [module.training for module in self._modules]

    def first(self, point: Parts) -> Any:
        """The map at a point while the weights are still in their place."""
        return self._call.differentiable(self.cell, point, self.single, self._context_with(self.tensors))

    def __call__(self, point: Parts, tensors: Sequence[Tensor]) -> Any:
        """The map at a point, with these in the place of the tensors that require gradients."""
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
        pinned = values[len(self._order) :]

        def cell(z: State, context: Any = None) -> State:
            if isinstance(self.cell, Pinned):
                return self.cell.call(self.cell.cell, pinned, z, context)
            return self.cell(z) if context is None else self.cell(z, context)

        before: list[tuple[Any, str, Tensor | None]] = []
        for places, name, key in self._slots:
            value = values[self._order[key]]
            if places[name] is not value:
                before.append((places, name, places[name]))
                before[-1][0][name] = value
        try:
            return self._call.differentiable(cell, point, self.single, context)
        finally:
            for places, name, value in before:
                places[name] = value

    def _filled(self, tensors: Sequence[Tensor]) -> list[Any]:
        given = iter(tensors)
        return [next(given) if live else leaf for leaf, live in zip(self._everything, self._live, strict=True)]

    def _context_with(self, tensors: Sequence[Tensor]) -> Any:
        return pytree.tree_unflatten(self._filled(tensors)[: self._spec.num_leaves], self._spec)


def pull(values: Parts, towards: Sequence[Tensor], cotangents: Parts, **options: Any) -> Parts:
    """Σ ∂valuesᵀ cotangents towards some tensors; zeros where nothing depends on them."""
    live = [(value, cotangent) for value, cotangent in zip(values, cotangents, strict=True) if value.requires_grad]
    if not live:
        return tuple(torch.zeros_like(tensor) for tensor in towards)
    images, given = zip(*live, strict=True)
    return torch.autograd.grad(images, towards, given, materialize_grads=True, **options)


def _fixed_point(function: Any, tensors: Sequence[Tensor], star: Parts, adjoint: _AdjointSolve) -> Parts:
    """star = function(star, tensors), with gradients towards the tensors (and whatever else the function's graph holds)."""
    first = getattr(function, "first", None)
    with torch.enable_grad():
        if first is not None and not tensors:  # whether there is anything to differentiate, known to us or not
            values = first(tuple(part.detach() for part in star))
            if not any(value.requires_grad for value in values):
                return tuple(part.clone() for part in star)
        point = tuple(part.detach().requires_grad_() for part in star)
        image = function(point, tensors) if first is None else first(point)
        values = [Replace.apply(value, part) for value, part in zip(image, star, strict=True)]
        return _Adjoint.apply(_Node(_Graph(function, point, image), adjoint), *values, *tensors)


@dataclass(frozen=True)
class _Node:
    """What the backward of one fixed point needs: the graph of its map and the solver of its adjoint."""

    graph: _Graph
    adjoint: _AdjointSolve


@dataclass(frozen=True)
class _Graph:
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

    def for_rows(self, samples: Tensor) -> _Graph:
        """The graph to go on with where only these samples are left: a new one once they are few.

        Making it costs them one evaluation; each product then saves the work on all others.
        """
        if len(samples) > _RESTRICT_AT * len(self.point[0]) or not isinstance(self.function, _Frozen):
            return self
        cell = self.function.for_rows(samples)
        if cell is None:
            return self
        here = samples if self.place is None else self.place[samples]
        point = tuple(part.detach().index_select(0, here).requires_grad_() for part in self.point)
        size = len(self.point[0]) if self.place is None else len(self.place)
        place = samples.new_full((size,), -1).index_copy(0, samples, torch.arange(len(samples), device=samples.device))
        with torch.enable_grad():
            return _Graph(self.function, point, cell(point), place)

    def pull(self, u: Parts) -> Parts:
        """Jᵀu at the equilibrium."""
        return pull(self.image, self.point, u, retain_graph=True)


class _Adjoint(torch.autograd.Function):
    """The identity on the values (the tensors pass by), whose backward solves the adjoint system.

    An ordinary backward hands u to the graph of the values. One that is to be differentiated itself may not: that graph
    ends at a detached z*. It computes the tensors' gradients anew, from the live z* and from a u with a graph.
    """

    @staticmethod
    def forward(ctx: Any, node: _Node, *inputs: Tensor) -> Parts:
        count = len(node.graph.point)
        outputs = tuple(value.view_as(value) for value in inputs[:count])
        ctx.node, ctx.others = node, len(inputs) - count
        ctx.save_for_backward(*outputs, *inputs[count:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        node, count = ctx.node, len(grads)
        with torch.no_grad():
            detached = tuple(grad.detach() for grad in grads)
            u = node.adjoint(node.graph, detached)
        if not torch.is_grad_enabled():
            return (None, *u, *[None] * ctx.others)
        live, tensors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        function = node.graph.function
        if isinstance(function, _Frozen):
            _refuse_hidden(function, live, tensors)
        transposed = _Transposed(function, count, len(tensors))
        found = _fixed_point(transposed, (*live, *tensors, *grads), u, node.adjoint.plain())
        wanted = [number for number, tensor in enumerate(tensors) if tensor.requires_grad]
        partial = [tensor.view_as(tensor) for tensor in tensors]  # z* depends on the tensors too: not that way
        towards: list[Tensor | None] = [None] * len(tensors)
        if wanted:
            pulled = pull(function(live, partial), [partial[number] for number in wanted], found, create_graph=True)
            for number, gradient in zip(wanted, pulled, strict=True):
                towards[number] = gradient
        return (None, *[None] * count, *towards)


@dataclass(frozen=True)
class _Transposed:
    """u ↦ Jᵀu + v as a map of u that depends on z*, on what the cell depends on, and on v."""

    function: Map
    count: int
    others: int

    def __call__(self, u: Parts, tensors: Sequence[Tensor]) -> Parts:
        live, rest = tuple(tensors[: self.count]), tensors[self.count : self.count + self.others]
        v = tensors[self.count + self.others :]
        image = self.function(live, rest)
        pulled = pull(image, live, u, create_graph=True)
        return tuple(a + b for a, b in zip(pulled, v, strict=True))


def _refuse_hidden(function: _Frozen, live: Parts, tensors: Sequence[Tensor]) -> None:
    """RuntimeError where the cell depends on something that requires gradients and that we do not know, or has changed."""
    if not function.unchanged:
        raise RuntimeError(
            "this would differentiate twice through a DEQ whose weights, buffers or context were modified by an inplace "
            "operation, or whose cell changed between training and evaluation mode, since its forward pass"
        )
    image = function(tuple(part.detach() for part in live), [tensor.detach() for tensor in tensors])
    if any(value.requires_grad for value in image):
        raise RuntimeError(
            "this would differentiate twice through a DEQ whose cell holds tensors that require gradients and are neither "
            "its parameters nor in its context: make the cell a module, or pass them in the context"
        )
