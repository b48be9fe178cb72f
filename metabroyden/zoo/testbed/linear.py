"""Linear maps f(z, x) = Wz + x with a chosen spectrum: z* = (I − W)⁻¹x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metabroyden.zoo.testbed.base import KnownProblem, generator, register

Matrix = Callable[[int], Tensor]
_N = 24


def _spectrum(low: float, high: float, seed: int) -> Tensor:
    """A symmetric matrix with evenly spaced eigenvalues."""
    q = torch.linalg.qr(torch.randn(_N, _N, generator=generator(seed), dtype=torch.float64))[0]
    return q @ torch.diag(torch.linspace(low, high, _N, dtype=torch.float64)) @ q.T


def _linear(name: str, correct: str, scale: Tensor | float = 1.0, **options: Any) -> Callable[[Matrix], Matrix]:
    """Decorator: registers the problem of a float64 matrix W that follows from a seed, in coordinates z = scale·y."""

    def add(matrix: Matrix) -> Matrix:
        @register(name)
        def maker(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
            w, d = matrix(seed), torch.ones(_N, dtype=torch.float64) * scale
            x = torch.randn(batch, _N, generator=generator(seed + 1), dtype=torch.float64)
            star = torch.linalg.solve(torch.eye(_N, dtype=torch.float64) - w, x.T).T * d
            scaled = (d[:, None] * w / d).to(dtype)

            def f(z: Tensor, x: Tensor) -> Tensor:
                return (z.unsqueeze(1) * scaled).sum(2) + x  # row by row: no BLAS call sees the batch size

            return KnownProblem(f, torch.zeros(batch, _N, dtype=dtype), (x * d).to(dtype), correct, star, **options)

        return matrix

    return add


@_linear("linear_normal", "Every solver converges; Picard's error shrinks by 0.9 a step.", contractive=True)
def normal(seed: int) -> Tensor:
    """Symmetric, spectrum in [−0.9, 0.9]."""
    return _spectrum(-0.9, 0.9, seed)


@_linear("linear_nonnormal", "Every solver converges, past a transient in which Picard's residual grows.", max_nfe=400)
def nonnormal(seed: int) -> Tensor:
    """Triangular, all eigenvalues 0.5, entries of size 0.5 above the diagonal: residuals grow before they shrink."""
    upper = torch.triu(torch.randn(_N, _N, generator=generator(seed), dtype=torch.float64), 1)
    return 0.5 * torch.eye(_N, dtype=torch.float64) + 0.5 * upper / upper.norm(dim=1, keepdim=True).clamp_min(1e-9)


@_linear("linear_expansive", "Picard diverges and says so; the others converge.", expects={"picard": "fails"})
def expansive(seed: int) -> Tensor:
    """Symmetric, spectrum in [−4, −0.5]: a fixed point that repels."""
    return _spectrum(-4, -0.5, seed)


@_linear(
    "linear_ill_scaled",
    "Every solver converges; the smallest coordinates are less exact than the relative residual.",
    torch.logspace(-3, 3, _N, dtype=torch.float64),
    max_nfe=400,
    distance=1e-5,
)
def ill_scaled(seed: int) -> Tensor:
    """The normal problem in coordinates whose units differ by up to six orders of magnitude."""
    return normal(seed)
