"""The spectral radius of a cell at its equilibrium: above 1, plain iteration runs away from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metabroyden.nn.jacobian import pullback
from metabroyden.solution import Cell, State


def spectral_radius(f: Cell, z: State, context: Any = None, *, iterations: int = 30) -> Tensor:
    """Per-sample estimate (B,) of ρ(J_f(z)), the largest |eigenvalue| of the Jacobian.

    Arnoldi's method (Arnoldi 1951; Saad, Numerical methods for large eigenvalue problems, chapter 6) on Jᵀ, with full
    reorthogonalisation, batched over samples. Unlike power iteration it is right where the leading eigenvalues are a complex
    pair. Exact up to rounding for iterations ≥ n coordinates of a sample, or once the Krylov space is invariant; before that
    the modulus of the largest Ritz value, which can err to either side. One evaluation of f and min(iterations, n) products
    with Jᵀ, all from one graph; memory of as many states. The start is the same for every sample and every call, and torch's
    random state is left alone. A sample whose Jacobian is not finite gets NaN.

    Args:
        f: `f(z)` or `f(z, context)`, samples independent of one another.
        z: where to take the Jacobian: a tensor (B, ...) or a tuple of them.
        context: as f takes it.
        iterations: dimension of the Krylov space.

    Returns:
        (B,), in the dtype of z.

    Raises:
        ValueError: a bad state, fewer than one iteration, or f does not return what z is shaped like.
        TypeError: an argument is of another type than that.

    Examples:
        >>> import torch, metabroyden as mb
        >>> rotation = 0.9 * torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # eigenvalues ±0.9i
        >>> spectral_radius(lambda z: z @ rotation, torch.zeros(3, 2))
        tensor([0.9000, 0.9000, 0.9000])
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    point, pull = pullback(f, z, context)
    with torch.no_grad():
        h = _hessenberg(pull, point, min(iterations, point.shape[1]))
        finite = torch.isfinite(h).flatten(1).all(dim=1)
        # small matrices: LAPACK on the host
        matrices = torch.where(finite[:, None, None], h, 0.0).double().cpu()
        radius = torch.linalg.eigvals(matrices).abs().amax(dim=1).to(h)
        return torch.where(finite, radius, torch.nan)


def _hessenberg(product: Callable[[Tensor], Tensor], like: Tensor, size: int) -> Tensor:
    """(B, size, size): the map on the Krylov space of a fixed random vector; zero columns once that is invariant."""
    batch, n = like.shape
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(1, n, generator=generator, dtype=torch.float64, device="cpu").to(like)
    v = (start / start.norm()).expand(batch, n)
    basis, h = like.new_zeros(batch, size, n), like.new_zeros(batch, size, size)
    largest = like.new_zeros(batch, 1)
    rounding = torch.finfo(like.dtype).eps * max(10.0, n**0.5)
    for k in range(size):
        basis[:, k] = v
        w = product(v)
        largest = torch.maximum(largest, w.norm(dim=1, keepdim=True))
        known = basis[:, : k + 1]
        for _ in range(2):  # twice is enough to be orthogonal to rounding (Giraud et al. 2005)
            along = torch.einsum("bkn,bn->bk", known, w)
            w = w - torch.einsum("bkn,bk->bn", known, along)
            h[:, : k + 1, k] += along
        if k + 1 == size:
            break
        left = w.norm(dim=1, keepdim=True)
        goes_on = ~(left <= rounding * largest)  # what is not finite goes on, to be seen in the end
        h[:, k + 1, k] = torch.where(goes_on, left, 0.0).squeeze(1)
        v = torch.where(goes_on, w / torch.where(goes_on, left, 1.0), 0.0)
    return h
