"""What carries on a learned solve that is not getting on: a multisecant method on a part of the learned inverse Jacobian."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metabroyden.learned.preconditioner import LearnedInverse
from metabroyden.learned.secants import SecantState
from metabroyden.solver import SolverBase, Step, Trail
from metabroyden.state import gather

JUDGED_ON = 5
"""Secant pairs, the last ones, on which the learned inverse Jacobian is judged."""


class MultisecantState(NamedTuple):
    """R rows."""

    share: Tensor  # (R, 1) θ in [0, 1], how much of the learned part of B₀ is used
    frozen: Any  # what the learned part was given at the start
    secants: SecantState | None  # None before the first iterate
    steps: int


class Multisecant(SolverBase):
    """z⁺ = z − ΔZγ + (I + θQ)(g − ΔGγ), γ the least-squares coefficients of g in the residuals' differences ΔG.

    The generalised Broyden method (Fang & Saad, Numer. Linear Algebra Appl. 16, 2009) with the initial inverse Jacobian
    B₀ = −(I + θQ), where −(I + Q) is the learned one. It begins with the pairs (ΔZ, ΔG) of the steps made so far, and these
    say how far Q is to be trusted: an inverse Jacobian takes every Δg to its Δz, and θ is the number in [0, 1] for which B₀
    does so best, in the least squares over an orthonormal basis of the span of the last `JUDGED_ON` pairs,

        θ = −tr(G⁻¹(ΔZ + ΔG)ᵀQΔG) / tr(G⁻¹(QΔG)ᵀQΔG),   G = ΔGᵀΔG.

    For a solver that fits its problem θ is near 1, for another one near 0, where the method is Anderson's. Without pairs θ
    is 1.

    Args:
        solver: the learned one, with `secants` and a layout.
        learned: Q.
    """

    has_inverse = True

    def __init__(self, solver: Any, learned: LearnedInverse) -> None:
        self.solver, self.learned = solver, learned

    def init(self, z: Tensor, g: Tensor, problem: Any) -> MultisecantState:
        """No pairs."""
        return MultisecantState(z.new_ones(len(z), 1), self.learned.init(z, g, problem), None, 0)

    def resume(self, z: Tensor, g: Tensor, trail: Trail, problem: Any) -> MultisecantState:
        """The pairs of the trail, and θ."""
        state, shape = self.init(z, g, problem), self.solver.layout.resolve(problem.shape)
        share = self._share(trail[-JUDGED_ON - 1 :], state.frozen)
        return state._replace(share=share, secants=self.solver.secants.of(trail, shape))

    def _share(self, trail: Trail, frozen: Any) -> Tensor:
        """θ (R, 1)."""
        points, residuals = (torch.stack(part, dim=1) for part in zip(*trail, strict=True))
        moves, changes = points.diff(dim=1), residuals.diff(dim=1)
        if moves.shape[1] == 0:
            return points.new_ones(len(points), 1)
        learned = torch.stack([self.learned.apply(change, frozen) for change in changes.unbind(1)], dim=1)
        gram = (changes @ changes.mT).double()
        ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(points.dtype).tiny)
        gram = gram + torch.diag_embed(ridge)
        products = torch.cat([(moves + changes) @ learned.mT, learned @ learned.mT], dim=2).double()
        found = torch.linalg.solve_ex(gram, products)[0]
        ahead, size = (part.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) for part in found.chunk(2, dim=2))
        return torch.nan_to_num(-ahead / size, 1.0, 0.0, 0.0).clamp(0, 1).to(points)

    def step(self, z: Tensor, g: Tensor, state: MultisecantState, problem: Any) -> Step:
        """One step, (R, n)."""
        shape, secants = self.solver.layout.resolve(problem.shape), self.solver.secants
        known = state.secants
        known = secants.init(z, g, shape) if known is None else secants.update(z, g, known, shape)
        explained, rest = secants.project(g, known, shape)
        more = torch.addcmul(rest, state.share, self.learned.apply(rest, state.frozen))
        return Step(z - explained + more, state._replace(secants=known, steps=state.steps + 1))

    def gather(self, state: MultisecantState, index: Tensor) -> MultisecantState:
        """The rows `index` of a state."""
        return gather(state, index)

    def inverse(self, state: MultisecantState, index: Tensor) -> Any:
        """What `rmatvec` needs of the rows `index`: θ, what Q was given, and the pairs."""
        state = gather(state, index)
        return state.share, state.frozen, None if state.secants is None else self.solver.secants.pairs(state.secants)

    def rmatvec(self, w: Tensor, inverse: Any) -> Tensor:
        """Bᵀw for w (R, n)."""
        share, frozen, pairs = inverse
        back = -torch.addcmul(w, share, self.learned.rmatvec(w, frozen))
        if pairs is None:
            return back
        shape = self.solver.layout.shape_like(frozen.shape[2:])
        return back + self.solver.secants.transposed(w, back, pairs, shape)

    def __repr__(self) -> str:
        return f"Multisecant({type(self.solver).__name__})"
