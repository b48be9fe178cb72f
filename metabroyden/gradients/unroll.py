"""Backpropagation through the iteration itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metabroyden.gradients.base import GradientMode, damped_steps
from metabroyden.gradients.transforms import transform_of
from metabroyden.solution import Cell, Solution, State
from metabroyden.solve import solve
from metabroyden.solvers.base import check_number
from metabroyden.solvers.picard import Picard
from metabroyden.state import like


@dataclass(frozen=True)
class Unroll(GradientMode):
    """Full unroll: `steps` damped Picard steps from z0, with their graph: the weight-tied network of that depth.

    It replaces the solve wherever gradients are enabled; the DEQ's own solver serves where they are not. The gradient is
    exactly that of the network of this depth, to any order, and tends to the equilibrium's where the iteration converges.
    Bias: that of the depth. Cost: `steps` evaluations and a backward pass through all of them, memory in proportion, and
    one evaluation that measures the residual.

    Attributes:
        steps: depth, at least 1.
        damping: in (0, 1].
    """

    replaces_solve = True
    steps: int = 30
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_number("Unroll", "steps", self.steps, 0, 10**6, whole=True)
        check_number("Unroll", "damping", self.damping, 0, 1)

    def run(self, cell: Cell, z0: State, context: Any, *, rtol: float, atol: float) -> tuple[State, Solution | None]:
        """(z with its graph, its `Solution`, None under a transform of torch.func); z0 may require gradients."""
        began = time.perf_counter()
        parts = damped_steps(cell, z0, context, self.steps, self.damping)
        z = like(parts, type(z0))
        if transform_of(parts) is not None:
            return z, None  # values cannot be read
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise RuntimeError(f"the unrolled iteration is not finite after {self.steps} steps: it diverges")
        end = pytree.tree_map(Tensor.detach, z)
        before = time.perf_counter() - began
        found = solve(cell, end, context, solver=Picard(), rtol=rtol, atol=atol, max_nfe=1, throw=False)
        trace = replace(found.trace, nfe=found.trace.nfe + self.steps, seconds=found.trace.seconds + before)
        return z, replace(found, nfe=found.nfe + self.steps, steps=found.steps + self.steps, trace=trace)
