"""Solvers as an unroll sees them: with features cut off from the graph, or with steps computed twice to save memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metabroyden.solver import SolverBase, Step


class FeatureDetached(SolverBase):
    """A learned solver whose features are constants of its parameters: ∂z⁺/∂z = I, and ∂u/∂(z, g) = 0 for its update u.

    The assumption of Andrychowicz et al. (2016), section 2 (edges from the gradients to the optimizer are dropped, those
    of its own state are kept): what a parameter does to later residuals is felt along z⁺ = z + u and through the
    solver's memory, not through what the solver sees of later iterates. Cheaper, and it does not explode with
    ∂u/∂g; biased. Values are those of the solver.
    """

    def __init__(self, solver: Any) -> None:
        self.solver = solver

    def start(self, z0: Tensor, problem: Any) -> Tensor:
        """The solver's."""
        return self.solver.start(z0, problem)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> Any:
        """The solver's, at a constant."""
        return self.solver.init(z.detach(), g.detach(), problem)

    def step(self, z: Tensor, g: Tensor, state: Any, problem: Any) -> Step:
        """The solver's, at a constant, with the identity towards z."""
        fixed = z.detach()
        step = self.solver.step(fixed, g.detach(), state, problem)
        return step._replace(z=step.z + (z - fixed))


class Checkpointed(SolverBase):
    """A solver whose steps keep their inputs alone and are computed once more in the backward pass."""

    def __init__(self, solver: Any) -> None:
        self.solver = solver

    def start(self, z0: Tensor, problem: Any) -> Tensor:
        """The solver's."""
        return self.solver.start(z0, problem)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> Any:
        """The solver's."""
        return self.solver.init(z, g, problem)

    def step(self, z: Tensor, g: Tensor, state: Any, problem: Any) -> Step:
        """The solver's."""
        return checkpoint(self.solver.step, z, g, state, problem, use_reentrant=False)
