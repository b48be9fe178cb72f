"""Linear maps f(z, x) = Wz + x with a chosen spectrum: z* = (I − W)⁻¹x."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metabroyden.zoo.testbed.base import KnownProblem, generator, register

_N = 24


def _problem(
    w: Tensor,
    dtype: torch.dtype,
    batch: int,
    seed: int,
    correct: str,
    *,
    expects: Mapping[str, str] | None = None,
    contractive: bool = False,
    max_nfe: int = 200,
    scale: Tensor | None = None,
    distance: float = 1e-6,
) -> KnownProblem:
    """The problem of a float64 matrix; with a scale (n,), in the coordinates z = scale·y."""
    n = len(w)
    d = torch.ones(n, dtype=torch.float64) if scale is None else scale
    x = torch.randn(batch, n, generator=generator(seed + 1), dtype=torch.float64)
    star = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - w, x.T).T * d
    matrix = (d[:, None] * w / d).to(dtype)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return (z.unsqueeze(1) * matrix).sum(2) + x  # row by row: no BLAS call sees the batch size

    return KnownProblem(
        f,
        torch.zeros(batch, n, dtype=dtype),
        (x * d).to(dtype),
        correct,
        star,
        max_nfe=max_nfe,
        expects=expects or {},
        contractive=contractive,
        distance=distance,
    )


def _orthogonal(seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(_N, _N, generator=generator(seed), dtype=torch.float64))[0]


@register("linear_normal")
def normal(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """Symmetric, spectrum in [−0.9, 0.9]."""
    q = _orthogonal(seed)
    w = q @ torch.diag(torch.linspace(-0.9, 0.9, _N, dtype=torch.float64)) @ q.T
    return _problem(
        w, dtype, batch, seed, "Every solver converges; Picard's error shrinks by 0.9 a step.", contractive=True
    )


@register("linear_nonnormal")
def nonnormal(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """Triangular, all eigenvalues 0.5, entries of size 0.5 above the diagonal: residuals grow before they shrink."""
    upper = torch.triu(torch.randn(_N, _N, generator=generator(seed), dtype=torch.float64), 1)
    w = 0.5 * torch.eye(_N, dtype=torch.float64) + 0.5 * upper / upper.norm(dim=1, keepdim=True).clamp_min(1e-9)
    correct = "Every solver converges, past a transient in which Picard's residual grows."
    return _problem(w, dtype, batch, seed, correct, max_nfe=400)


@register("linear_expansive")
def expansive(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """Symmetric, spectrum in [−4, −0.5]: a fixed point that repels."""
    q = _orthogonal(seed)
    w = q @ torch.diag(torch.linspace(-4, -0.5, _N, dtype=torch.float64)) @ q.T
    correct = "Picard diverges and says so; the others converge."
    return _problem(w, dtype, batch, seed, correct, expects={"picard": "fails"})


@register("linear_ill_scaled")
def ill_scaled(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """The normal problem in coordinates whose units differ by up to six orders of magnitude."""
    q = _orthogonal(seed)
    w = q @ torch.diag(torch.linspace(-0.9, 0.9, _N, dtype=torch.float64)) @ q.T
    scale = torch.logspace(-3, 3, _N, dtype=torch.float64)
    correct = "Every solver converges; the smallest coordinates are less exact than the relative residual."
    return _problem(w, dtype, batch, seed, correct, max_nfe=400, scale=scale, distance=1e-5)
