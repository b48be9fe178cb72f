"""Picard (fixed-point) iteration with constant damping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metabroyden.problem import Problem
from metabroyden.solvers.base import ClassicalSolver, Step, check_number
from metabroyden.solvers.registry import register


@register("picard")
@dataclass(frozen=True)
class Picard(ClassicalSolver):
    """z⁺ = z + damping·g. With damping 1 this is z⁺ = f(z).

    Converges linearly where the spectral radius of I + damping·(J − I) is below one.

    Attributes:
        damping: step length in (0, 2].
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        check_number("Picard", "damping", self.damping, 0, 2)

    def init(self, z: Tensor, g: Tensor, problem: Problem) -> tuple[()]:
        """No state."""
        return ()

    def step(self, z: Tensor, g: Tensor, state: tuple[()], problem: Problem) -> Step:
        """One damped step, (R, n)."""
        return Step(torch.add(z, g, alpha=self.damping), state)
