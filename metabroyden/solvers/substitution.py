"""Successive substitution, exact in floating point."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from metabroyden.problem import Problem
from metabroyden.solver import SolverBase, Step
from metabroyden.solvers.registry import register


@register("substitution")
@dataclass(frozen=True)
class Substitution(SolverBase):
    """z⁺ = f(z) to the last bit, where Picard's z + (f(z) − z) rounds: a stack of L stages is exact after L evaluations."""

    def step(self, z: Tensor, g: Tensor, state: tuple[()], problem: Problem) -> Step:
        """f(z), (R, n)."""
        return Step(problem.image(z, g), state)
