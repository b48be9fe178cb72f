"""Convolutions with circular padding, and the exact inverse of maps made of them.

Images that wrap round make a convolution a circulant operator: the Fourier transform takes it apart into one small matrix
for every frequency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

Images = tuple[Tensor, ...]


def convolve(z: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """Kz for z (B, C, S, S) and a kernel (C', C, k, k), k odd, wrapping round: (B, C', S/stride, S/stride)."""
    reach = kernel.shape[-1] // 2
    return functional.conv2d(functional.pad(z, (reach,) * 4, mode="circular"), kernel, stride=stride)


def convolve_transposed(a: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """Kᵀa, the adjoint of `convolve` with a 3×3 kernel: (B, C', S/stride, S/stride) → (B, C, S, S)."""
    if stride == 1:
        return convolve(a, transpose(kernel))
    side = stride * a.shape[-1]
    around = functional.pad(a, (0, 1, 0, 1), mode="circular")
    return functional.conv_transpose2d(around, kernel, stride=stride, padding=1)[..., :side, :side]


def transpose(kernel: Tensor) -> Tensor:
    """The kernel (C, C', k, k) of the adjoint of a convolution with kernel (C', C, k, k) and stride 1."""
    return kernel.transpose(0, 1).flip(2, 3)


def resolvent(
    linear: Callable[[Images], Images], shapes: Sequence[tuple[int, int, int]], alpha: float, like: Tensor
) -> Callable[[Images], Images]:
    """v ↦ (I + α(I − W))⁻¹v for a linear map W of images that wrap round, exact but for rounding.

    Images (B, Cᵢ, Sᵢ, Sᵢ) of one or several resolutions S₁ ≥ S₂ ≥ …, each a multiple of the last. W must commute with
    shifts by one pixel of the coarsest image (made along with those of the others): any chain of circular convolutions
    between tiers does, strided ones included. The pixels of a finer tier that fall on one coarse pixel are channels of it
    (polyphase form), N = Σ Cᵢ(Sᵢ/S)² channels in all on the coarsest side S: W is then an N×N matrix for every frequency,
    found by what it makes of N unit impulses.

    `linear` is z ↦ Wz, of tuples of images of these shapes (Cᵢ, Sᵢ, Sᵢ); `like` has the dtype and device to work with.
    ValueError where a side is no multiple of the last.
    """
    side = shapes[-1][1]
    if any(shape[1] % side for shape in shapes):
        raise ValueError(f"the sides of all tiers must be multiples of the last, got {[shape[1] for shape in shapes]}")
    factors = [shape[1] // side for shape in shapes]
    sizes = [shape[0] * factor**2 for shape, factor in zip(shapes, factors, strict=True)]
    count = sum(sizes)

    def fold(images: Images) -> Tensor:
        """(B, N, S, S)."""
        parts = [functional.pixel_unshuffle(z, factor) for z, factor in zip(images, factors, strict=True)]
        return torch.cat(parts, dim=1)

    def unfold(folded: Tensor) -> Images:
        """The images again."""
        parts = folded.split(sizes, dim=1)
        return tuple(functional.pixel_shuffle(part, factor) for part, factor in zip(parts, factors, strict=True))

    impulses = like.new_zeros(count, count, side, side)
    impulses[:, :, 0, 0] = torch.eye(count, dtype=like.dtype, device=like.device)
    symbol = torch.fft.rfft2(fold(linear(unfold(impulses)))).permute(2, 3, 1, 0)  # (S, S/2 + 1, N, N)
    unit = torch.eye(count, dtype=like.dtype, device=like.device)
    inverse = torch.linalg.inv((1 + alpha) * unit - alpha * symbol)

    def apply(images: Images) -> Images:
        transformed = torch.fft.rfft2(fold(images)).permute(2, 3, 1, 0)  # (S, S/2 + 1, N, B)
        solved = (inverse @ transformed).permute(3, 2, 0, 1)
        return unfold(torch.fft.irfft2(solved, s=(side, side)))

    return apply
