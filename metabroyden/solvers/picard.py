"""Picard (fixed-point) iteration with constant damping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metabroyden.problem import Problem
from metabroyden.solution import Cell, State
from metabroyden.solver import SolverBase, Step
from metabroyden.solvers.base import check_number
from metabroyden.solvers.registry import register
from metabroyden.solvers.tuning import tune


@register("picard")
@dataclass(frozen=True)
class Picard(SolverBase):
    """z⁺ = z + damping·g. With damping 1 this is z⁺ = f(z).

    Converges linearly where the spectral radius of I + damping·(J − I) is below one. For a symmetric J with eigenvalues in
    [a, b], b < 1, the best constant step is 2 / (2 − a − b) (Richardson 1910); `tuned` finds it on validation problems.

    Attributes:
        damping: step length in (0, 2].
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        check_number("Picard", "damping", self.damping, 0, 2)

    @classmethod
    def tuned(cls, f: Cell, z0: State, context: Any = None, **options: Any) -> Picard:
        """Picard with the best constant damping on validation problems; f, z0, context and options as for `tune`.

        Twenty dampings from 0.1 to 2, then two refinements around the best.
        """
        best, spacing = 1.0, 0.1
        grid = [round(spacing * k, 4) for k in range(1, 21)]
        for _ in range(3):
            best = tune([cls(damping) for damping in grid], f, z0, context, **options)[0][0].damping
            spacing /= 3
            grid = [damping for damping in (best - spacing, best, best + spacing) if 0 < damping <= 2]
        return cls(best)

    def step(self, z: Tensor, g: Tensor, state: tuple[()], problem: Problem) -> Step:
        """One damped step, (R, n)."""
        return Step(torch.add(z, g, alpha=self.damping), state)
