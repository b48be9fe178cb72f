"""What the classical solvers share: ring buffers, the scale of a first step, checks of their options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROWTH = 3.0  # factor by which the first full step must make ‖g‖ grow before a quasi-Newton method changes its scale
ALIGNED = (0.5, 0.9)
"""Cosines between −Δg, or Δg, and Δz from which the scale is trusted: to shorten a step takes less than to turn it round."""


def ring_size(memory: int, problem: Any) -> int:
    """Entries of a ring buffer: the memory asked for, but no more than there can be steps."""
    return memory if problem is None else max(1, min(memory, problem.steps_left))


def first_scale(s: Tensor, y: Tensor, g: Tensor, damping: float) -> Tensor:
    """σ of the initial inverse Jacobian σI of g, by the first pair s = Δz, y = Δg (R, n); (R, 1), −1 where that did no harm.

    σ = sᵀy / yᵀy, its sign included (Shanno & Phua, Math. Program. 14, 1978; Barzilai & Borwein, IMA J. Numer. Anal. 8,
    1988; Nocedal & Wright, Numerical Optimization, eq. 6.20). It is taken where ‖g‖ grew by more than `GROWTH`, or would
    have without the damping or line search that shortened s from damping·g, and where y and s are `ALIGNED`: there the
    Jacobian is near to a multiple of I, and −I far from its inverse.
    """
    length, change, size = (torch.linalg.vector_norm(vector, dim=1, keepdim=True) for vector in (s, y, g))
    cosine = torch.linalg.vecdot(s / length, y / change).unsqueeze(1)
    scale = cosine * (length / change)
    full = torch.addcmul(g, y, damping * (size / length))
    harm = torch.linalg.vector_norm(full, dim=1, keepdim=True) > GROWTH * size
    aligned = (cosine < -ALIGNED[0]) | (cosine > ALIGNED[1])
    return torch.where(harm & aligned & torch.isfinite(scale) & (scale != 0), scale, -1.0)


def gather_ring(buffer: Tensor, index: Tensor, used: int) -> Tensor:
    """The rows `index` of a ring buffer (R, m, n) of which only the first `used` entries were ever written."""
    new = buffer.new_empty(len(index), *buffer.shape[1:])
    if used:
        new[:, :used] = buffer[:, :used].index_select(0, index)
    return new


def own(buffer: Tensor) -> Tensor:
    """The buffer, to be written to; a copy where gradients are recorded, whose graph needs the buffer as it was."""
    return buffer.clone() if torch.is_grad_enabled() else buffer


def into(slot: Tensor, operation: Any, a: Tensor, b: Tensor) -> Tensor:
    """operation(a, b) written to a slot of a ring buffer: in one pass, or as a compiler or autograd understands it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return slot.copy_(operation(a, b))
    return operation(a, b, out=slot)


def combine(base: Tensor, weights: Tensor, buffer: Tensor) -> Tensor:
    """base + Σⱼ weightsⱼ bufferⱼ, (R, n), for base (R, n), weights (R, 1, k) contiguous and buffer (R, k, n)."""
    if buffer.shape[1] == 1:  # the batched product is eight times slower here
        return torch.addcmul(base, weights.squeeze(1), buffer.squeeze(1))
    return torch.baddbmm(base.unsqueeze(1), weights, buffer).squeeze(1)


def check_number(solver: str, name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    """ValueError unless low < value ≤ high and, where asked, an integer; the message names all of it."""
    kind = "an integer" if whole else "a number"
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and low < value <= high
    if not good:
        raise ValueError(f"{solver}: {name} must be {kind} in ({low:g}, {high:g}], got {value!r}")
