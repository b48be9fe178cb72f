"""How gradients pass through a solved fixed point. So far: implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from metabroyden.solution import Solution, State
from metabroyden.solve import solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import Packing


@dataclass(frozen=True)
class Implicit:
    """Implicit differentiation (Bai et al. 2019, theorem 1): the cotangent v at z* becomes u = (I − Jᵀ)⁻¹v.

    u is found as the fixed point of u ↦ Jᵀu + v by any of our solvers. One evaluation of the cell at z* gives the graph
    for both Jᵀ and the way from u to the parameters and the context, which are those of the forward pass. Exact up to
    the tolerances; memory independent of the evaluations spent. First order only: differentiating twice raises a
    RuntimeError.

    Attributes:
        solver: solves the adjoint system.
        rtol, max_nfe: its tolerance and its budget of Jacobian–transpose products.
    """

    solver: Any = field(default_factory=lambda: Broyden(memory=30))
    rtol: float = 1e-3
    max_nfe: int = 30

    def attach(
        self, cell: Callable[..., State], z: State, context: Any, report: Callable[[Solution], None] | None = None
    ) -> State:
        """z* with gradients towards the cell's parameters and the context; `report` receives the adjoint's solution."""
        packing = Packing.of(z, "z")
        with torch.enable_grad():
            point = tuple(part.detach().requires_grad_() for part in _parts(z))
            start = point[0] if packing.single else point
            image = cell(start) if context is None else cell(start, context)
        flat = packing.pack(image)

        def adjoint(cotangent: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            given = packing.pack(cotangent[0] if packing.single else cotangent)
            finite = torch.isfinite(given)
            v = torch.where(finite, given, 0.0)  # what is not finite passes by the solve, as it would in a network

            def transpose(u: Tensor) -> Tensor:
                pulled = torch.autograd.grad(flat, point, u, retain_graph=True, materialize_grads=True)
                return packing.pack(pulled[0] if packing.single else pulled) + v

            found = solve(transpose, v, solver=self.solver, rtol=self.rtol, max_nfe=self.max_nfe, throw=False)
            if report is not None:
                report(found)
            assert isinstance(found.z, Tensor)
            return _parts(packing.unpack(torch.where(finite, found.z, given)))

        values = [_Replace.apply(value, star) for value, star in zip(_parts(image), _parts(z), strict=True)]
        attached = _Adjoint.apply(adjoint, *values)
        return attached[0] if packing.single else tuple(attached)


def _parts(z: State) -> tuple[Tensor, ...]:
    return (z,) if isinstance(z, Tensor) else z


class _Replace(torch.autograd.Function):
    """Forward: z*, the iterate that was found and reported. Backward: the graph of f(z*)."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, star: Tensor) -> Tensor:
        return star.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Adjoint(torch.autograd.Function):
    """The identity, whose backward solves the adjoint system."""

    @staticmethod
    def forward(ctx: Any, adjoint: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.adjoint = adjoint
        ctx.save_for_backward(*parts)
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            pulled = ctx.adjoint(tuple(grad.detach() for grad in grads))
        if torch.is_grad_enabled():  # somebody builds a graph of this backward: let them meet an error, not a number
            pulled = tuple(_Refuse.apply(u, *ctx.saved_tensors, *grads) for u in pulled)
        return (None, *pulled)


class _Refuse(torch.autograd.Function):
    """The identity on u, tied to all that it depends on: whoever differentiates it is told that this cannot be had."""

    @staticmethod
    def forward(ctx: FunctionCtx, u: Tensor, *ties: Tensor) -> Tensor:
        return u.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Any:
        raise RuntimeError("implicit gradients are of first order: this would differentiate twice through a DEQ")
