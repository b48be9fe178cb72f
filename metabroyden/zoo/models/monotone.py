"""Monotone operator equilibrium networks: cells whose fixed point exists and is unique, whatever their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from metabroyden.solution import State
from metabroyden.zoo.models.circular import convolve, convolve_transposed, resolvent, transpose

_GAIN = 0.5  # of the initial weights: plain iteration converges at first


class MonotoneCell(nn.Module):
    """f(z, x) = relu(Wz + x) with W = (1 − m)I − AᵀA + B − Bᵀ, m > 0.

    Winston & Kolter, Monotone operator equilibrium networks (NeurIPS 2020), proposition 1: I − W is strongly monotone with
    constant m, vᵀ(I − W)v ≥ m‖v‖², for any A and B, and any such W is of this form; so z = f(z, x) has exactly one solution.
    Subclasses say what A and B are. Beside f a cell offers its parts, which the splitting solvers use (`ForwardBackward`,
    `PeacemanRachford`): f = prox ∘ linear.

    Args:
        m: the constant of strong monotonicity.
    """

    def __init__(self, m: float) -> None:
        super().__init__()
        if not m > 0:
            raise ValueError(f"m must be positive, got {m!r}")
        self.m = m

    def linear(self, z: Any, x: Any) -> Any:
        """Wz + x, shaped like z."""
        raise NotImplementedError

    def resolvent(self, alpha: float) -> Callable[[Any, Any], Any]:
        """The map (v, x) ↦ (I + α(I − W))⁻¹(v + αx), with W as it is now; v, x shaped like the state."""
        raise NotImplementedError

    def prox(self, v: State) -> State:
        """relu(v): the proximal operator, for any step length, of the indicator of v ≥ 0."""
        return torch.relu(v) if isinstance(v, Tensor) else tuple(torch.relu(part) for part in v)

    def forward(self, z: Any, x: Any) -> Any:
        """f(z, x), shaped like z."""
        return self.prox(self.linear(z, x))


class MonotoneDense(MonotoneCell):
    """The monotone cell with dense matrices A and B; state and injection are (B, n).

    `weight` is W, (n, n): a parametrization of A and B, which lie one upon the other in a (2, n, n) parameter. A `DEQ`
    computes it once a call.

    Args:
        n: coordinates of the state.
    """

    layout = "vector"

    def __init__(self, n: int = 87, m: float = 1.0) -> None:
        super().__init__(m)
        self.n = n
        self.weight = nn.Parameter(_initial(2, n, n, fan_in=n))
        parametrize.register_parametrization(self, "weight", _DenseWeight(m), unsafe=True)

    def linear(self, z: Tensor, x: Tensor) -> Tensor:
        """Wz + x, (B, n)."""
        return functional.linear(z, self.weight) + x

    def resolvent(self, alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
        """The map (v, x) ↦ (I + α(I − W))⁻¹(v + αx), by the inverse matrix; v, x (B, n)."""
        weight = self.weight
        unit = torch.eye(self.n, dtype=weight.dtype, device=weight.device)
        inverse = torch.linalg.inv((1 + alpha) * unit - alpha * weight)
        return lambda v, x: functional.linear(v + alpha * x, inverse)


class MonotoneConv(MonotoneCell):
    """The monotone cell with 3×3 convolutions A and B that wrap round; state and injection are (B, channels, side, side).

    `weight` is the kernel of W, (channels, channels, 5, 5): a parametrization of the kernels of A and B, which lie one upon
    the other in a (2, channels, channels, 3, 3) parameter. A `DEQ` computes it once a call.

    Args:
        channels: of state and injection.
        side: of the images.
    """

    layout = "image"

    def __init__(self, channels: int = 16, side: int = 8, m: float = 1.0) -> None:
        super().__init__(m)
        if side < 2:
            raise ValueError(f"side must be at least 2, got {side}")
        self.channels, self.side = channels, side
        self.weight = nn.Parameter(_initial(2, channels, channels, 3, 3, fan_in=9 * channels))
        parametrize.register_parametrization(self, "weight", _ConvWeight(m), unsafe=True)

    def linear(self, z: Tensor, x: Tensor) -> Tensor:
        """Wz + x, (B, channels, side, side)."""
        return convolve(z, self.weight) + x

    def resolvent(self, alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
        """The map (v, x) ↦ (I + α(I − W))⁻¹(v + αx), by an inverse for every frequency; v, x shaped like the state."""
        weight, shape = self.weight, (self.channels, self.side, self.side)
        solve = resolvent(lambda z: (convolve(z[0], weight),), [shape], alpha, weight)
        return lambda v, x: solve((v + alpha * x,))[0]


class MonotoneMultiTier(MonotoneCell):
    """The monotone cell on tiers of images, each of half the side of the one before (section 4 of the paper).

    State and injection are tuples of tensors (B, channelsᵢ, side / 2ⁱ, side / 2ⁱ). A is block lower bidiagonal: 3×3
    convolutions Aᵢ within the tiers, and convolutions Dᵢ of stride 2 from a tier to the next; B is block diagonal, 3×3
    convolutions Bᵢ. All wrap round.

    Args:
        channels: of each tier, the finest first.
        side: of the finest tier; halved for each of the others, to at least 2 (else ValueError).
    """

    layout = "pyramid"

    def __init__(self, channels: Sequence[int] = (16, 32), side: int = 8, m: float = 1.0) -> None:
        super().__init__(m)
        coarsest, rest = divmod(side, 2 ** (len(channels) - 1)) if channels else (0, 0)
        if rest or coarsest < 2:
            raise ValueError(
                f"side must be a multiple of 2 for every tier after the first and leave the last a side of at least 2, "
                f"got side {side} and {len(channels)} tiers"
            )
        self.shapes = [(count, side >> tier, side >> tier) for tier, count in enumerate(channels)]
        within = [_initial(count, count, 3, 3, fan_in=9 * count) for count in channels]
        self.a = nn.ParameterList(within)
        self.b = nn.ParameterList([_initial(*kernel.shape, fan_in=9 * len(kernel)) for kernel in within])
        between = [_initial(coarse, fine, 3, 3, fan_in=9 * fine) for fine, coarse in pairwise(channels)]
        self.d = nn.ParameterList(between)

    def initial_state(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Zeros like the injection."""
        return tuple(torch.zeros_like(part) for part in x)

    def linear(self, z: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Wz + x, a tuple of tensors shaped like z's."""
        return tuple(wz + part for wz, part in zip(self._product(z), x, strict=True))

    def _product(self, z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Wz."""
        az = [convolve(part, kernel) for part, kernel in zip(z, self.a, strict=True)]
        az[1:] = [here + convolve(finer, kernel, 2) for here, finer, kernel in zip(az[1:], z, self.d, strict=False)]
        found = []
        for tier, part in enumerate(z):
            ata = convolve_transposed(az[tier], self.a[tier])
            if tier + 1 < len(z):
                ata = ata + convolve_transposed(az[tier + 1], self.d[tier], 2)
            skew = self.b[tier] - transpose(self.b[tier])
            found.append((1 - self.m) * part - ata + convolve(part, skew))
        return tuple(found)

    def resolvent(self, alpha: float) -> Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """The map (v, x) ↦ (I + α(I − W))⁻¹(v + αx), by an inverse for every frequency of the coarsest tier."""
        solve = resolvent(self._product, self.shapes, alpha, self.a[0])
        return lambda v, x: solve(tuple(part + alpha * given for part, given in zip(v, x, strict=True)))


class _DenseWeight(nn.Module):
    """(A, B) ↦ W for matrices, (2, n, n) → (n, n)."""

    def __init__(self, m: float) -> None:
        super().__init__()
        self.m = m

    def forward(self, both: Tensor) -> Tensor:
        a, b = both
        unit = torch.eye(len(a), dtype=a.dtype, device=a.device)
        return (1 - self.m) * unit - a.T @ a + b - b.T


class _ConvWeight(_DenseWeight):
    """(A, B) ↦ W for kernels, (2, C, C, 3, 3) → (C, C, 5, 5)."""

    def forward(self, both: Tensor) -> Tensor:
        a, b = both
        unit = torch.eye(len(a), dtype=a.dtype, device=a.device)[:, :, None, None]
        # (AᵀA)ᵢⱼ(d) = Σ Aₖᵢ(s)·Aₖⱼ(s + d), summed over k and s
        columns = a.transpose(0, 1)
        ata = functional.conv2d(functional.pad(columns, (2,) * 4), columns).transpose(0, 1)
        skew = b - transpose(b)
        return functional.pad((1 - self.m) * unit, (2,) * 4) - ata + functional.pad(skew, (1,) * 4)


def _initial(*shape: int, fan_in: int) -> Tensor:
    """torch's own initial weights, times a gain."""
    return _GAIN * fan_in**-0.5 * (2 * torch.rand(shape) - 1)
