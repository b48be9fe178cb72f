"""Implicit differentiation: the adjoint fixed point, solved by any solver, to any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metabroyden.gradients.adjoint import AdjointSolve
from metabroyden.gradients.base import GradientMode, Replace, Report, parts_of
from metabroyden.gradients.frozen import Frozen, Graph, Parts, pull
from metabroyden.gradients.transforms import refuse_batched
from metabroyden.solution import Cell, Solution, State
from metabroyden.solve import check_options, solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import Packing, like


@dataclass(frozen=True)
class Implicit(GradientMode):
    """Implicit differentiation (Bai et al. 2019, theorem 1): the cotangent v at z* becomes u = (I − Jᵀ)⁻¹v.

    u is the fixed point of u ↦ Jᵀu + v, found by any of our solvers. One evaluation of the cell at z* gives the graph for
    Jᵀ and for the way from u to the parameters and the context, which are those of the forward pass.

    Bias: none but the two tolerances. Cost: one evaluation with its graph, and one vector–Jacobian product for each
    evaluation of the adjoint, which `DEQ.last_backward_solution` reports. A product covers the whole batch until half of
    the samples are done; then the graph is made anew for the rest. Memory does not depend on the number of evaluations.

    A sample that fails gets the best multiple of its best iterate or of v, for one or two more products: ‖Jᵀu + v − u‖ is
    then no larger than with no adjoint (u = 0) or with `JacobianFree` (u = v).

    Gradients of any order: a backward pass that is itself differentiated evaluates the cell three more times, and u becomes
    a fixed point with implicit gradients of its own. The cell must then be a module, or depend on nothing that requires
    gradients but z and the context; otherwise a RuntimeError.

    Attributes:
        solver: solves the adjoint system. A learned one must be homogeneous in v (`AdjointLSTM`); it gets a context
            with the equilibrium (R, n) under "z".
        rtol: tolerance of the adjoint solve. Where the cell computed in half precision, the tolerance is at
            least four roundings of that type.
        max_nfe: products with Jᵀ that the adjoint solve may take.
        precondition: reuse the forward solve's inverse Jacobian, transposed, as start and as initial inverse Jacobian
            of the adjoint's Broyden (SHINE, Ramzi et al. 2022, in its refined form). Needs a forward solver that has
            one, `Broyden` or `GroupedLSTM`, and a Broyden here.
    """

    solver: Any = field(default_factory=lambda: Broyden(memory=30))
    rtol: float = 1e-3
    max_nfe: int = 30
    precondition: bool = False

    def __post_init__(self) -> None:
        solver = check_options(solve, self.solver, self.rtol, 0.0, self.max_nfe, 1, None)
        if solver.is_learned and not solver.homogeneous:
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

    def attach(self, cell: Cell, solution: Solution, context: Any, report: Report | None = None) -> State:
        """z* with implicit gradients; `report` receives the adjoint's `Solution`."""
        final = solution.inverse if self.precondition else None
        if self.precondition and final is None:
            raise ValueError("Implicit(precondition=True) needs a solution found with keep_inverse=True")
        frozen, star = Frozen(cell, context, solution.z), parts_of(solution.z)
        adjoint = AdjointSolve(self, Packing.of(solution.z, "z"), final, report, 4 * frozen.rounding)
        if not frozen.tensors and not frozen.has_graph(star):
            return like((part.clone() for part in star), type(solution.z))
        return like(_fixed_point(frozen, frozen.tensors, star, adjoint), type(solution.z))


def _fixed_point(function: Any, tensors: Sequence[Tensor], star: Parts, adjoint: AdjointSolve) -> Parts:
    """star = function(star, tensors), with gradients towards the tensors (and whatever else the function's graph holds)."""
    with torch.enable_grad():
        point = tuple(part.detach().requires_grad_() for part in star)
        image = function.first(point) if isinstance(function, Frozen) else function(point, tensors)
        values = [Replace.apply(value, part) for value, part in zip(image, star, strict=True)]
        return _Adjoint.apply(Graph(function, point, image), adjoint, *values, *tensors)


class _Adjoint(torch.autograd.Function):
    """The identity on the values (the tensors pass by), whose backward solves the adjoint system.

    An ordinary backward hands u to the graph of the values. One that is to be differentiated itself may not: that graph
    ends at a detached z*. It computes the tensors' gradients anew, from the live z* and from a u with a graph.
    """

    @staticmethod
    def forward(ctx: Any, graph: Graph, adjoint: AdjointSolve, *inputs: Tensor) -> Parts:
        count = len(graph.point)
        outputs = tuple(value.view_as(value) for value in inputs[:count])
        ctx.graph, ctx.adjoint, ctx.others = graph, adjoint, len(inputs) - count
        ctx.save_for_backward(*outputs, *inputs[count:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, function = len(grads), ctx.graph.function
        refuse_batched(grads)
        with torch.no_grad():
            u = ctx.adjoint(ctx.graph, tuple(grad.detach() for grad in grads))
        if not torch.is_grad_enabled():
            return (None, None, *u, *[None] * ctx.others)
        live, tensors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if isinstance(function, Frozen):
            _refuse_hidden(function, ctx.graph.image, live, tensors)

        def adjoint_map(u: Parts, everything: Sequence[Tensor]) -> Parts:
            """u ↦ Jᵀu + v as a map of u that depends on z*, on what the cell depends on, and on v."""
            point, rest, v = tuple(everything[:count]), everything[count:-count], everything[-count:]
            pulled = pull(function(point, rest), point, u, create_graph=True)
            return tuple(a + b for a, b in zip(pulled, v, strict=True))

        found = _fixed_point(adjoint_map, (*live, *tensors, *grads), u, ctx.adjoint.plain())
        wanted = [number for number, tensor in enumerate(tensors) if tensor.requires_grad]
        partial = [tensor.view_as(tensor) for tensor in tensors]  # z* depends on the tensors too: not that way
        towards: list[Tensor | None] = [None] * len(tensors)
        if wanted:
            pulled = pull(function(live, partial), [partial[number] for number in wanted], found, create_graph=True)
            for number, gradient in zip(wanted, pulled, strict=True):
                towards[number] = gradient
        return (None, None, *[None] * count, *towards)


def _refuse_hidden(function: Frozen, before: Parts, live: Parts, tensors: Sequence[Tensor]) -> None:
    """RuntimeError where the cell depends on something that requires gradients and that we do not know, or has changed."""
    image = function(tuple(part.detach() for part in live), [tensor.detach() for tensor in tensors])
    if any(value.requires_grad for value in image):
        raise RuntimeError(
            "this would differentiate twice through a DEQ whose cell holds tensors that require gradients and are neither "
            "its parameters nor in its context: make the cell a module, pass them in the context, or, in a module that "
            "`higher` made functional, use mb.Unroll() or torch.func.functional_call instead"
        )
    if not (function.unchanged and function.same(image, before)):
        raise RuntimeError(
            "this would differentiate twice through a DEQ whose weights, buffers or context were modified by an inplace "
            "operation, or whose cell changed between training and evaluation mode, since its forward pass, or whose cell "
            "draws or learns anew at every call"
        )
