"""What gradient modes share: their base class, evaluations with a graph, and nodes of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from metabroyden.shared import bare
from metabroyden.solution import Cell, Solution, State
from metabroyden.state import like

Report = Callable[[Solution], None]


class GradientMode:
    """How the equilibrium of a cell gets its gradient: by `attach` after the solve, or by `run` in its place."""

    replaces_solve: ClassVar[bool] = False  # whether `run` is called in place of the solve

    @property
    def wants_inverse(self) -> bool:
        """Whether the forward solve is to keep its inverse Jacobian, in `Solution.inverse`."""
        return False

    def attach(self, cell: Cell, solution: Solution, context: Any, report: Report | None = None) -> State:
        """The equilibrium `solution.z`, to the last bit, with gradients towards the cell's parameters and the context.

        Args:
            cell: the map that was solved.
            solution: where its solve ended.
            context: as the cell takes it.
            report: receives the `Solution` of an adjoint solve, where there is one.
        """
        raise NotImplementedError

    def run(self, cell: Cell, z0: State, context: Any, *, rtol: float, atol: float) -> tuple[State, Solution | None]:
        """(z with its graph, its `Solution`), from z0, in place of the solve."""
        raise NotImplementedError


def parts_of(z: State) -> tuple[Tensor, ...]:
    """The tensors of a state."""
    return (z,) if isinstance(z, Tensor) else tuple(z)


def evaluate(cell: Cell, parts: tuple[Tensor, ...], state_type: type, context: Any) -> tuple[Tensor, ...]:
    """The tensors of cell(z) or cell(z, context), in the dtype of the state; `state_type` is the type of the state."""
    z = like(parts, state_type)
    image = cell(z) if context is None else cell(z, bare(context))
    return tuple(value.to(part.dtype) for value, part in zip(parts_of(image), parts, strict=True))


def damped_steps(cell: Cell, z: State, context: Any, steps: int, damping: float) -> tuple[Tensor, ...]:
    """The tensors of z after so many steps z ← z + damping·(f(z) − z)."""
    parts = parts_of(z)
    for _ in range(steps):
        image = evaluate(cell, parts, type(z), context)
        parts = tuple(torch.lerp(part, value, damping) for part, value in zip(parts, image, strict=True))
    return parts


class Replace(torch.autograd.Function):
    """Forward: z*, the iterate that was found and reported. Backward: the graph of `value`."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, star: Tensor) -> Tensor:
        """A copy of z*."""
        return star.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        """The cotangent, to the graph of `value`."""
        return grads[0], None


class FirstOrder(torch.autograd.Function):
    """The identity on tensors whose gradient raises a RuntimeError, for `reason`, if it is differentiated again."""

    @staticmethod
    def forward(ctx: Any, reason: str, *parts: Tensor) -> tuple[Tensor, ...]:
        """The tensors themselves."""
        ctx.reason = reason
        ctx.save_for_backward(*parts)
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The cotangents; where a graph of this backward is built, tied to an error."""
        if torch.is_grad_enabled():
            grads = tuple(_Refuse.apply(ctx.reason, u, *ctx.saved_tensors, *grads) for u in grads)
        return (None, *grads)


class _Refuse(torch.autograd.Function):
    """The identity on u, a function of `ties` that raises if differentiated."""

    @staticmethod
    def forward(ctx: Any, reason: str, u: Tensor, *ties: Tensor) -> Tensor:
        ctx.reason = reason
        return u.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.reason)
