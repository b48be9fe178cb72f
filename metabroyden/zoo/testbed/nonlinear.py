"""Systems F(z) = 0 from the numerical literature, as f(z) = z − c·F(z).

Moré, Garbow & Hillstrom, ACM Trans. Math. Softw. 7 (1981), by their numbers; Chandrasekhar's H-equation as in Kelley,
Iterative Methods for Linear and Nonlinear Equations (1995), section 5.6. Where there is no closed form the answer is
MINPACK's (hybrd, by scipy).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from metabroyden.zoo.testbed.base import KnownProblem, generator, register

System = Callable[[Tensor], Tensor]


def _near(start: Tensor, batch: int, seed: int, spread: float) -> Tensor:
    """(B, n) starts: the standard one first, the rest around it."""
    noise = torch.randn(batch, len(start), generator=generator(seed), dtype=torch.float64)
    noise[0] = 0
    return start + spread * noise


def _minpack(system: System, start: Tensor) -> Tensor:
    from scipy.optimize import root

    def residual(z: np.ndarray) -> np.ndarray:
        return system(torch.from_numpy(z)[None])[0].numpy()

    found = root(residual, start.numpy(), method="hybr", tol=1e-14)
    if np.abs(found.fun).max() > 1e-10:
        raise RuntimeError(f"MINPACK did not solve {system}: {found.message}")
    return torch.from_numpy(found.x)


def _problem(
    system: System,
    start: Tensor,
    c: float,
    correct: str,
    dtype: torch.dtype,
    batch: int,
    seed: int,
    *,
    star: Tensor | None = None,
    expects: Mapping[str, str],
    spread: float = 0.05,
    max_nfe: int = 300,
    distance: float = 1e-5,
) -> KnownProblem:
    star = _minpack(system, start) if star is None else star
    z0 = _near(start, batch, seed, spread)
    return KnownProblem(
        lambda z, _: z - c * system(z),
        z0.to(dtype),
        torch.zeros(batch, 1, dtype=dtype),
        correct,
        star.expand(batch, -1),
        max_nfe=max_nfe,
        expects=expects,
        distance=distance,
    )


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


_ONLY_NEWTON = {"picard": "open", "anderson": "open", "broyden": "open"}


@register("rosenbrock")
def rosenbrock(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """Number 1: (10(y − x²), 1 − x), z* = (1, 1)."""

    def system(z: Tensor) -> Tensor:
        return torch.stack([z[:, 0] - 1, 10 * (z[:, 1] - z[:, 0] ** 2)], dim=1)

    correct = "Newton needs two steps; the others are not promised."
    return _problem(
        system, _double(-1.2, 1.0), 0.1, correct, dtype, batch, seed, star=_double(1.0, 1.0), expects=_ONLY_NEWTON
    )


@register("powell_singular")
def powell_singular(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """Number 13, moved to z* = (1, 1, 1, 1), where its Jacobian has rank two."""

    def system(z: Tensor) -> Tensor:
        a, b, c, d = (z - 1).unbind(1)
        return torch.stack([a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2], dim=1)

    correct = "Newton converges linearly, halving the error; z is far less exact than its residual."
    start = _double(3.0, -1.0, 0.0, 1.0) + 1
    return _problem(
        system,
        start,
        0.1,
        correct,
        dtype,
        batch,
        seed,
        star=_double(1.0, 1.0, 1.0, 1.0),
        expects=_ONLY_NEWTON,
        distance=1e-2,
    )


@register("broyden_tridiagonal")
def broyden_tridiagonal(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """Number 30: (3 − 2zᵢ)zᵢ − zᵢ₋₁ − 2zᵢ₊₁ + 1, twenty unknowns."""

    def system(z: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(z, (1, 1))
        return (3 - 2 * z) * z - padded[:, :-2] - 2 * padded[:, 2:] + 1

    return _problem(
        system, -torch.ones(20, dtype=torch.float64), 0.15, "Every solver converges.", dtype, batch, seed, expects={}
    )


@register("discrete_boundary_value")
def discrete_boundary_value(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """Number 28: 2zᵢ − zᵢ₋₁ − zᵢ₊₁ + h²(zᵢ + tᵢ + 1)³/2, ten unknowns; condition number about fifty."""
    n = 10
    t = torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)

    def system(z: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(z, (1, 1))
        return 2 * z - padded[:, :-2] - padded[:, 2:] + (z + t.to(z) + 1) ** 3 / (2 * (n + 1) ** 2)

    correct = "Secant methods and Newton converge; Picard too, in hundreds of evaluations."
    return _problem(
        system, t * (t - 1), 0.5, correct, dtype, batch, seed, expects={"picard": "open"}, spread=0.01, max_nfe=400
    )


@register("discrete_integral_equation")
def discrete_integral_equation(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """Number 29: zᵢ + h/2·Σⱼ kᵢⱼ(zⱼ + tⱼ + 1)³ with Green's kernel, twenty unknowns: a contraction near its root."""
    n = 20
    h = 1 / (n + 1)
    t = h * torch.arange(1, n + 1, dtype=torch.float64)
    kernel = 0.5 * h * torch.where(t[None] <= t[:, None], (1 - t[:, None]) * t[None], t[:, None] * (1 - t[None]))

    def system(z: Tensor) -> Tensor:
        return z + ((z + t.to(z) + 1) ** 3) @ kernel.to(z).T

    return _problem(system, t * (t - 1), 1.0, "Every solver converges.", dtype, batch, seed, expects={}, spread=0.01)


def _h_equation(omega: float, n: int = 64) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(f, start): H = (1 − ω/2 ∫ μH(ν)/(μ+ν) dν)⁻¹ by the midpoint rule."""
    mu = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    kernel = 0.5 * omega / n * mu[:, None] / (mu[:, None] + mu[None])
    return lambda h: 1 / (1 - h @ kernel.to(h).T), torch.ones(n, dtype=torch.float64)


def _chandrasekhar(
    omega: float, correct: str, dtype: torch.dtype, batch: int, seed: int, expects: Mapping[str, str], distance: float
) -> KnownProblem:
    f, start = _h_equation(omega)
    return _problem(
        lambda h: h - f(h), start, 1.0, correct, dtype, batch, seed, expects=expects, spread=0.02, distance=distance
    )


@register("h_equation")
def h_equation(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """Chandrasekhar's equation of radiative transfer, ω = 0.9, sixty-four nodes."""
    return _chandrasekhar(0.9, "Every solver converges.", dtype, batch, seed, {}, 1e-6)


@register("h_equation_singular")
def h_equation_singular(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """The same with ω = 1: I − J is singular at the answer, up to the quadrature's error."""
    correct = "Picard is sublinear; the others converge, z less exact than its residual."
    return _chandrasekhar(1.0, correct, dtype, batch, seed, {"picard": "open", "newton": "open"}, 1e-2)
