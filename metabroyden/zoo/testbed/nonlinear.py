"""Systems F(z) = 0 from the numerical literature, as f(z) = z − c·F(z).

Moré, Garbow & Hillstrom, ACM Trans. Math. Softw. 7 (1981), by their numbers; Chandrasekhar's H-equation as in Kelley,
Iterative Methods for Linear and Nonlinear Equations (1995), section 5.6. Where there is no closed form the answer is
MINPACK's (hybrd, by scipy).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metabroyden.zoo.testbed.base import KnownProblem, generator, register

System = Callable[[Tensor], Tensor]
_ONLY_NEWTON = {"picard": "open", "anderson": "open", "broyden": "open"}


def _minpack(system: System, start: Tensor) -> Tensor:
    from scipy.optimize import root

    def residual(z: np.ndarray) -> np.ndarray:
        return system(torch.from_numpy(z)[None])[0].numpy()

    found = root(residual, start.numpy(), method="hybr", tol=1e-14)
    if np.abs(found.fun).max() > 1e-10:
        raise RuntimeError(f"MINPACK did not solve {system}: {found.message}")
    return torch.from_numpy(found.x)


def _system(
    name: str,
    start: Tensor,
    c: float,
    correct: str,
    *,
    star: Tensor | None = None,
    spread: float = 0.05,
    **options: Any,
) -> Callable[[System], System]:
    """Decorator: registers z − c·F(z) of a system F; the first sample starts at `start` (n,), the others around it."""

    def add(system: System) -> System:
        @register(name)
        def maker(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
            answer = _minpack(system, start) if star is None else star
            noise = torch.randn(batch, len(start), generator=generator(seed), dtype=torch.float64)
            noise[0] = 0
            return KnownProblem(
                lambda z, _: z - c * system(z),
                (start + spread * noise).to(dtype),
                torch.zeros(batch, 1, dtype=dtype),
                correct,
                answer.expand(batch, -1),
                **{"max_nfe": 300, "distance": 1e-5, **options},
            )

        return system

    return add


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@_system(
    "rosenbrock",
    _double(-1.2, 1.0),
    0.1,
    "Newton needs two steps; the others are not promised.",
    star=_double(1.0, 1.0),
    expects=_ONLY_NEWTON,
)
def rosenbrock(z: Tensor) -> Tensor:
    """Number 1: (10(y − x²), 1 − x), z* = (1, 1)."""
    return torch.stack([z[:, 0] - 1, 10 * (z[:, 1] - z[:, 0] ** 2)], dim=1)


@_system(
    "powell_singular",
    _double(3.0, -1.0, 0.0, 1.0) + 1,
    0.1,
    "Newton converges linearly, halving the error; z is far less exact than its residual.",
    star=_double(1.0, 1.0, 1.0, 1.0),
    expects=_ONLY_NEWTON,
    distance=1e-2,
)
def powell_singular(z: Tensor) -> Tensor:
    """Number 13, moved to z* = (1, 1, 1, 1), where its Jacobian has rank two."""
    a, b, c, d = (z - 1).unbind(1)
    return torch.stack([a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2], dim=1)


@_system("broyden_tridiagonal", -torch.ones(20, dtype=torch.float64), 0.15, "Every solver converges.")
def broyden_tridiagonal(z: Tensor) -> Tensor:
    """Number 30: (3 − 2zᵢ)zᵢ − zᵢ₋₁ − 2zᵢ₊₁ + 1, twenty unknowns."""
    padded = torch.nn.functional.pad(z, (1, 1))
    return (3 - 2 * z) * z - padded[:, :-2] - 2 * padded[:, 2:] + 1


_T10 = torch.arange(1, 11, dtype=torch.float64) / 11


@_system(
    "discrete_boundary_value",
    _T10 * (_T10 - 1),
    0.5,
    "Secant methods and Newton converge; Picard too, in hundreds of evaluations.",
    expects={"picard": "open"},
    spread=0.01,
    max_nfe=400,
)
def discrete_boundary_value(z: Tensor) -> Tensor:
    """Number 28: 2zᵢ − zᵢ₋₁ − zᵢ₊₁ + h²(zᵢ + tᵢ + 1)³/2, ten unknowns; condition number about fifty."""
    padded = torch.nn.functional.pad(z, (1, 1))
    return 2 * z - padded[:, :-2] - padded[:, 2:] + (z + _T10.to(z) + 1) ** 3 / (2 * 11**2)


_H = 1 / 21
_T20 = _H * torch.arange(1, 21, dtype=torch.float64)
_GREEN = 0.5 * _H * torch.where(_T20[:, None] >= _T20, (1 - _T20[:, None]) * _T20, _T20[:, None] * (1 - _T20))


@_system("discrete_integral_equation", _T20 * (_T20 - 1), 1.0, "Every solver converges.", spread=0.01)
def discrete_integral_equation(z: Tensor) -> Tensor:
    """Number 29: zᵢ + h/2·Σⱼ kᵢⱼ(zⱼ + tⱼ + 1)³ with Green's kernel, twenty unknowns: a contraction near its root."""
    return z + ((z + _T20.to(z) + 1) ** 3) @ _GREEN.to(z).T


def _h_equation(omega: float, n: int = 64) -> System:
    """Chandrasekhar's equation of radiative transfer, H = (1 − ω/2 ∫ μH(ν)/(μ+ν) dν)⁻¹, by the midpoint rule."""
    mu = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    kernel = 0.5 * omega / n * mu[:, None] / (mu[:, None] + mu[None])
    return lambda h: h - 1 / (1 - h @ kernel.to(h).T)


_ONES = torch.ones(64, dtype=torch.float64)
_system("h_equation", _ONES, 1.0, "Every solver converges.", spread=0.02, distance=1e-6)(_h_equation(0.9))
# I − J is singular at the answer, up to the quadrature's error
_system(
    "h_equation_singular",
    _ONES,
    1.0,
    "Picard is sublinear; the others converge, z less exact than its residual.",
    expects={"picard": "open", "newton": "open"},
    spread=0.02,
    distance=1e-2,
)(_h_equation(1.0))
