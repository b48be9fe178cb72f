"""How gradients pass through a solved fixed point. So far: implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils import _pytree as pytree

from metabroyden.solution import Solution, State
from metabroyden.solve import solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import Packing


@dataclass(frozen=True)
class Implicit:
    """Implicit differentiation (Bai et al. 2019, theorem 1): the cotangent v at z* becomes u = (I − Jᵀ)⁻¹v.

    u is found as the fixed point of u ↦ Jᵀu + v by any of our solvers; one more evaluation of the cell carries u to the
    parameters and the context. Exact up to the tolerances; memory independent of the evaluations spent. First order
    only: differentiating twice raises a RuntimeError.

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
        value = cell(z, context)
        packing = Packing.of(z, "z")
        parts = (value,) if isinstance(value, Tensor) else value

        def adjoint(cotangent: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                point = pytree.tree_map(lambda part: part.detach().requires_grad_(), z)
                frozen = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, context)
                image = packing.pack(cell(point, frozen))
            leaves = [point] if isinstance(point, Tensor) else list(point)
            v = packing.pack(cotangent if len(cotangent) > 1 or not packing.single else cotangent[0])

            def transpose(u: Tensor) -> Tensor:
                pulled = torch.autograd.grad(image, leaves, u, retain_graph=True)
                return packing.pack(pulled[0] if packing.single else pulled) + v

            found = solve(transpose, v, solver=self.solver, rtol=self.rtol, max_nfe=self.max_nfe, throw=False)
            if report is not None:
                report(found)
            assert isinstance(found.z, Tensor)
            u = packing.unpack(found.z)
            return (u,) if isinstance(u, Tensor) else u

        attached = _Adjoint.apply(adjoint, *(_at(part, star) for part, star in zip(parts, _parts(z), strict=True)))
        return attached[0] if packing.single else tuple(attached)


def _parts(z: State) -> tuple[Tensor, ...]:
    return (z,) if isinstance(z, Tensor) else z


def _at(value: Tensor, star: Tensor) -> Tensor:
    """The value of z* with the graph of f(z*)."""
    return _Replace.apply(value, star)


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
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.adjoint(grads))
