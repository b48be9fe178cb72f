"""DEQ cells f(z, x) = tanh(Wz + x) with Gaussian or symmetric W of a given norm, dense or convolutional."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from metabroyden.zoo.testbed.base import ALL_OPEN, KnownProblem, generator, register

_TO_ONE = "Converges to an equilibrium."


def weights(n: int, norm: float, *, symmetric: bool, seed: int, dtype: torch.dtype) -> Tensor:
    """(n, n) Gaussian matrix, symmetrised where asked, scaled to spectral norm `norm`."""
    w = torch.randn(n, n, generator=generator(seed), dtype=torch.float64)
    w = w + w.T if symmetric else w
    return (norm * w / torch.linalg.matrix_norm(w, 2)).to(dtype)


def dense(
    batch: int, n: int, norm: float, *, symmetric: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
) -> KnownProblem:
    """A dense cell with x chosen so that z* = tanh(u), u standard normal, is its fixed point.

    It is the only one where the norm is below one. Row by row: no BLAS call sees the batch size.
    """
    w = weights(n, norm, symmetric=symmetric, seed=seed, dtype=torch.float64)
    u = torch.randn(batch, n, generator=generator(seed + 1), dtype=torch.float64)
    star = torch.tanh(u)
    x = (u - star @ w.T).to(dtype)
    matrix = w.to(dtype)
    return KnownProblem(
        lambda z, x: torch.tanh((z.unsqueeze(1) * matrix).sum(2) + x),
        torch.zeros(batch, n, dtype=dtype),
        x,
        "Converges to the equilibrium.",
        star if norm < 1 else None,
        max_nfe=400,
        contractive=norm < 1,
    )


def blas(batch: int, n: int, norm: float, *, symmetric: bool = False, seed: int = 0, x_seed: int = 1) -> KnownProblem:
    """The dense cell as a network has it, float32, one matrix product; x standard normal, the answer not singled out."""
    w = weights(n, norm, symmetric=symmetric, seed=seed, dtype=torch.float32).T.contiguous()
    x = torch.randn(batch, n, generator=generator(seed + 1000 * x_seed))
    return KnownProblem(lambda z, x: torch.tanh(torch.addmm(x, z, w)), torch.zeros(batch, n), x, _TO_ONE)


def conv(
    batch: int, channels: int, side: int, norm: float, *, symmetric: bool = False, seed: int = 0, x_seed: int = 1
) -> KnownProblem:
    """A 3×3 convolutional cell, float32, its norm by power iteration on the side×side grid with zero padding."""
    w = torch.randn(channels, channels, 3, 3, generator=generator(seed))
    if symmetric:
        w = w + w.transpose(0, 1).flip(2, 3)
    v = torch.randn(1, channels, side, side, generator=generator(seed + 1))
    for _ in range(100):
        v = functional.conv_transpose2d(functional.conv2d(v, w, padding=1), w, padding=1)
        v = v / v.norm()
    w = norm * w / functional.conv2d(v, w, padding=1).norm()
    x = torch.randn(batch, channels, side, side, generator=generator(seed + 1000 * x_seed))
    z0 = torch.zeros_like(x)
    return KnownProblem(lambda z, x: torch.tanh(functional.conv2d(z, w, padding=1) + x), z0, x, _TO_ONE)


def _registered(symmetric: bool, norm: float, expects: Mapping[str, str], correct: str) -> None:
    kind = "symmetric" if symmetric else "gaussian"

    @register(f"tanh_{kind}_{norm:g}")
    def maker(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
        problem = dense(batch, 32, norm, symmetric=symmetric, seed=seed, dtype=dtype)
        return replace(problem, expects=expects, correct=correct)

    maker.__doc__ = f"tanh(Wz + x), W {kind} of norm {norm:g}, 32 coordinates."


_EASY = "A contraction: every solver converges to the one equilibrium."
_MIDDLE = "Secant methods converge; Picard may cycle; undamped Newton from zero is not promised."
_HARD = "Chaotic for Picard. Whatever is found has a true residual; failures are reported."
for _symmetric in (False, True):
    _registered(_symmetric, 0.95, {}, _EASY)
    _registered(_symmetric, 1.5, {"picard": "open", "newton": "open"}, _MIDDLE)
    _registered(_symmetric, 3.0, ALL_OPEN, _HARD)


@register("cosine")
def cosine(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """f(z) = cos z in every coordinate: the Dottie number."""
    star = torch.full((batch, 3), 0.7390851332151607, dtype=torch.float64)
    x = torch.zeros(batch, 3, dtype=dtype)
    return KnownProblem(
        lambda z, x: torch.cos(z) + x, x, x, "Every solver converges.", star, contractive=True, distance=1e-7
    )


@register("two_tensors")
def two_tensors(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """A state of two tensors, (4,) and (2, 3), each driven by the other."""
    g = generator(seed)
    across, back = (
        0.4 * torch.randn(*shape, generator=g, dtype=torch.float64) / math.sqrt(6) for shape in ((4, 6), (6, 4))
    )
    star = (
        torch.randn(batch, 4, generator=g, dtype=torch.float64),
        torch.randn(batch, 2, 3, generator=g, dtype=torch.float64),
    )
    xa = star[0] - torch.tanh(star[1].flatten(1) @ across.T)
    xb = star[1] - torch.tanh(star[0] @ back.T).reshape(batch, 2, 3)
    across, back = across.to(dtype), back.to(dtype)

    def f(z: tuple[Tensor, Tensor], x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = z
        first = (b.flatten(1).unsqueeze(1) * across).sum(2)
        second = (a.unsqueeze(1) * back).sum(2)
        return torch.tanh(first) + x["a"], torch.tanh(second).reshape(b.shape) + x["b"]

    context = {"a": xa.to(dtype), "b": xb.to(dtype)}
    z0 = tuple(torch.zeros_like(part) for part in context.values())
    return KnownProblem(f, z0, context, "Every solver converges.", star, contractive=True)
