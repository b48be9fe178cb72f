"""Biased gradients that solve no adjoint system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metabroyden.gradients.base import FirstOrder, GradientMode, Replace, Report, damped_steps, parts_of
from metabroyden.solution import Cell, Solution, State
from metabroyden.solvers.base import check_number
from metabroyden.state import like


@dataclass(frozen=True)
class Phantom(GradientMode):
    """The phantom gradient: backpropagation through k damped steps from z* (Geng et al. 2021, unrolling form).

    z ← (1 − τ)z + τ f(z, x), k times. At an exact equilibrium the cotangent v at z* becomes
    τ Σᵢ₌₀ᵏ⁻¹ ((1 − τ)I + τJᵀ)ⁱ v instead of (I − Jᵀ)⁻¹v.

    Bias: the terms of the series from the k-th on, of the order ρ((1 − τ)I + τJ)ᵏ. Cost: k evaluations with their graphs
    and one backward pass through them; memory grows with k. First order only: differentiating twice raises a
    RuntimeError, since the steps do not know how z* moves.

    Attributes:
        steps: k ≥ 1.
        damping: τ in (0, 1].
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_number("Phantom", "steps", self.steps, 0, 10**6, whole=True)
        check_number("Phantom", "damping", self.damping, 0, 1)

    def attach(self, cell: Cell, solution: Solution, context: Any, report: Report | None = None) -> State:
        """z* with phantom gradients; `report` is not called."""
        star = parts_of(solution.z)
        with torch.enable_grad():
            start = pytree.tree_map(Tensor.detach, solution.z)
            parts = damped_steps(cell, start, context, self.steps, self.damping)
            values = [Replace.apply(value, part) for value, part in zip(parts, star, strict=True)]
            reason = f"{type(self).__name__} gradients are of first order: this would differentiate twice through a DEQ"
            return like(FirstOrder.apply(reason, *values), type(solution.z))


@dataclass(frozen=True)
class JacobianFree(Phantom):
    """Jacobian-free backpropagation (Fung et al. 2022): one step from z*, the cotangent v is used as u.

    Bias: J is taken for zero; a descent direction where f is a contraction and ∂f/∂θ well conditioned. Cost: one
    evaluation and its backward pass. First order only.
    """

    steps: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        if (self.steps, self.damping) != (1, 1.0):
            raise ValueError("JacobianFree is one undamped step: for others there is Phantom")
