"""What a solve returns: `Solution`, `Trace`, `Status`, and the one definition of the residual."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from metabroyden.inverse import FinalInverse

State = Tensor | tuple[Tensor, ...]
"""A DEQ state as the user sees it: one batch-first tensor, or several (a tuple of scales)."""
Cell = Callable[..., State]  # a fixed-point map, f(z) or f(z, context): batch first, samples independent of one another


class Status(enum.IntEnum):
    """Why a sample stopped. `Solution.status` holds these as integers."""

    CONVERGED = 0
    MAX_NFE = 1
    NON_FINITE = 2
    STALLED = 3
    ILL_CONDITIONED = 4

    @property
    def message(self) -> str:
        """One sentence for a person."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "the residual reached the tolerance",
    Status.MAX_NFE: "the evaluation budget max_nfe ran out before the tolerance was reached",
    Status.NON_FINITE: "f returned a value that is not finite; the best finite iterate was kept",
    Status.STALLED: "the iterate stopped moving (a step below rounding) short of the tolerance",
    Status.ILL_CONDITIONED: "of an adjoint system: it met the tolerance only by growing, as I − J is close to singular",
}


class SolveError(RuntimeError):
    """Raised by `solve(..., throw=True)` when samples failed. `solution` holds what was found all the same."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy with the solution: the default passes on the message alone."""
        return type(self), (*self.args, self.solution), self.__dict__


@dataclass(frozen=True)
class Trace:
    """What happened at each call of f, in order; K calls, B samples.

    Attributes:
        residual: (K, B), relative residual that the call measured; NaN where that sample took no part in it, or where
            f was not finite.
        nfe: (K, B) int64, evaluations the sample had spent once the call was made (Jacobian products included, which have
            no row of their own); 0 where it took no part.
        seconds: (K,) float64, wall-clock seconds since `solve` began, read after the stopping test of that call.
        phase: (K, B) int8, 0 while the solver itself is at work, 1, 2, … after its safeguard handed the sample over;
            -1 where that sample took no part.
        absolute: (K, B), ‖f(z)−z‖₂, NaN as in `residual`; None in a record of another library's run.
    """

    residual: Tensor
    nfe: Tensor
    seconds: Tensor
    phase: Tensor
    absolute: Tensor | None = None

    def evaluations_to(self, tolerance: float, budget: int) -> tuple[np.ndarray, np.ndarray]:
        """(evaluations, reached), (B,) each: what a sample had spent when its residual first reached the tolerance.

        A sample that does not get there within the budget counts as the budget, with reached False.
        """
        hit = (self.residual <= tolerance).cpu().numpy()
        spent = np.where(hit, self.nfe.numpy(), budget + 1).min(axis=0, initial=budget + 1)
        reached = spent <= budget
        return np.where(reached, spent, budget), reached


@dataclass(frozen=True)
class Solution:
    """The result of `metabroyden.solve`, per sample; B samples.

    Attributes:
        z: shaped like z0, per sample the first iterate that reached the tolerance, else that of smallest ‖f(z)−z‖₂ (not of
            smallest relative residual, which falls where z merely grows); never non-finite.
        residual: (B,), ‖f(z)−z‖₂ / ‖f(z)‖₂ at `z` (0/0 = 0); NaN where not one evaluation gave a finite f(z) − z.
        nfe: (B,) int64, evaluations of f spent on the sample, Jacobian products included; at most max_nfe.
        steps: (B,) int64, solver steps.
        converged: (B,) bool, ‖f(z)−z‖₂ ≤ atol + rtol·‖f(z)‖₂.
        status: (B,) int64 of `Status` values.
        trace: every evaluation, see `Trace`; of no call where it was switched off or the batch is empty.
        snapshots: where asked for, the best iterates after so many evaluations, each shaped like z0.
        inverse: where asked for, what the solver knows of the inverse Jacobian at the end, see `FinalInverse`.
    """

    z: State
    residual: Tensor
    nfe: Tensor
    steps: Tensor
    converged: Tensor
    status: Tensor
    trace: Trace
    snapshots: tuple[State, ...] = ()
    inverse: FinalInverse | None = None

    @property
    def seconds(self) -> float:
        """Wall-clock seconds from the start of the solve to the stopping test of its last call of f; 0 where there was none.

        On a GPU they cover the work of the device, which each stopping test waits for.
        """
        return float(self.trace.seconds[-1]) if len(self.trace.seconds) else 0.0

    def failures(self) -> str:
        """A sentence saying how many samples failed and why; empty when none did."""
        parts = []
        for status in Status:
            count = int((self.status == status).sum())
            if status is not Status.CONVERGED and count:
                parts.append(f"{count} × {status.name.lower()} ({status.message})")
        if not parts:
            return ""
        failed = int((~self.converged).sum())
        return f"{failed} of {self.converged.numel()} samples did not converge: " + "; ".join(parts)


def residual_norms(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(g, ‖g‖₂, ‖f(z)‖₂) with g = f(z) − z, for z and fz of shape (B, n); the norms are per sample, (B,)."""
    g = fz - z
    return g, torch.linalg.vector_norm(g, dim=1), torch.linalg.vector_norm(fz, dim=1)


SAFE_NORMS = {torch.float32: (1e-15, 1e15), torch.float64: (1e-140, 1e140)}
"""By dtype of x: a norm of x in this range is true, the squares it was made of have neither over- nor underflown."""


def is_safe(norms: Tensor) -> bool:
    """Whether norms of tensors of this dtype are all in `SAFE_NORMS`, which no NaN is; waits for the device."""
    low, high = SAFE_NORMS[norms.dtype]
    smallest, largest = torch.aminmax(norms)
    return low < smallest.item() and largest.item() < high


def scaled_norm(x: Tensor) -> Tensor:
    """‖x‖₂ per sample in float64, (B,), for x (B, n) of any magnitude: scaled, so that no square over- or underflows.

    The largest float64 where x is finite and its norm is not: what is finite is never judged otherwise.
    """
    if x.dtype == torch.float32:  # float64 holds all their squares
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    top = x.abs().amax(dim=1, keepdim=True).double()
    finite = torch.isfinite(top)
    scale = torch.where((top > 0) & finite, top, 1.0)
    norm = torch.linalg.vector_norm(x.double() / scale, dim=1) * scale.squeeze(1)
    return torch.where(finite.squeeze(1), norm.clamp(max=torch.finfo(torch.float64).max), norm)


def relative(g_norm: Tensor, f_norm: Tensor) -> Tensor:
    """‖g‖₂ / ‖f(z)‖₂ per sample, with 0/0 = 0 (an exact fixed point at the origin)."""
    exact = g_norm == 0
    # the quotient not taken must be finite too: its gradient would be NaN
    quotient = g_norm / torch.where(exact, 1.0, f_norm)
    return torch.where(exact & ~torch.isfinite(f_norm), torch.nan, quotient)


def relative_residual(z: Tensor, fz: Tensor) -> Tensor:
    """The relative residual ‖f(z)−z‖₂ / ‖f(z)‖₂ per sample, for z and fz of any equal batch-first shape; (B,).

    Examples:
        >>> relative_residual(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
        tensor([0.5000])
    """
    size = fz.shape[0], math.prod(fz.shape[1:])
    flat = fz.reshape(size)
    return relative(scaled_norm(flat - z.reshape(size)), scaled_norm(flat)).to(z.dtype)
