"""What a solve leaves behind of the inverse Jacobian: reused by the backward pass (SHINE)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metabroyden.deprecated import warn


class FinalInverse:
    """B ≈ (J − I)⁻¹ at the end of a solve, sample by sample, for J the Jacobian of f; B samples, n coordinates.

    Solvers that have such an operator give it by `inverse` and `rmatvec` (see `SolverBase`). Samples of which nothing is
    known have B = −I.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._parts: list[tuple[Tensor, Any, Any]] = []

    def add(self, samples: Tensor, solver: Any, frozen: Any) -> None:
        """Take over what a solver knows of these samples (k,)."""
        self._parts.append((samples, solver, frozen))

    @property
    def known(self) -> int:
        """Number of samples of which something is known."""
        return sum(len(samples) for samples, _, _ in self._parts)

    def rmatvec(self, w: Tensor, samples: Tensor | None = None) -> Tensor:
        """Bᵀw for w (R, n), of these samples (R,) (None: all, in order)."""
        whole = w if samples is None else w.new_zeros(self._batch, w.shape[1]).index_copy(0, samples, w)
        result = -whole
        for part, solver, frozen in self._parts:
            result = result.index_copy(0, part, solver.rmatvec(whole.index_select(0, part), frozen))
        return result if samples is None else result.index_select(0, samples)

    def transpose(self, w: Tensor, samples: Tensor | None = None) -> Tensor:
        """The old name of `rmatvec`."""
        warn("transpose", "rmatvec")
        return self.rmatvec(w, samples)


class TransposedInverse:
    """A `FinalInverse`, transposed, as the initial inverse Jacobian of a quasi-Newton method on the adjoint system.

    The adjoint's Jacobian is Jᵀ − I, whose inverse Bᵀ approximates: −(I + P) = Bᵀ. Its context must be a dict with the
    sample numbers under "sample".
    """

    def __init__(self, final: FinalInverse) -> None:
        self.final = final

    def init(self, z: Tensor, g: Tensor, problem: Any) -> Tensor:
        """Sample numbers of the rows."""
        return problem.context["sample"]

    def resume(self, z: Tensor, g: Tensor, trail: Any, problem: Any) -> Tensor:
        """As `init`."""
        return self.init(z, g, problem)

    def apply(self, r: Tensor, frozen: Tensor) -> Tensor:
        """P r for r (R, n)."""
        return -self.final.rmatvec(r, frozen) - r

    def __repr__(self) -> str:
        return "TransposedInverse(…)"
