"""Cells z⁺ = f(z, x) as people write them: plain torch modules that know nothing of this package.

A state is a tensor, or a tuple of them (`Multiscale`). x is shaped like the state unless a cell says otherwise; the cell
then has a method `start`, x → z0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm


def norm(kind: str, channels: int) -> nn.Module:
    """A normalisation of (B, channels, ...): "group" (of four channels), "layer", "instance", or "none"."""
    groups = {"group": channels // 4, "layer": 1, "instance": channels}
    return nn.Identity() if kind == "none" else nn.GroupNorm(groups[kind], channels)


def conv(inputs: int, outputs: int, size: int = 3, gain: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps the image's size; its first weights are torch's, scaled by `gain`."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    with torch.no_grad():
        layer.weight *= gain
    return layer


class Dense(nn.Module):
    """norm(tanh(Wz + x)) of vectors."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), norm(kind, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """(B, width)."""
        return self.norm(torch.tanh(self.linear(z) + x))


class ResidualConv(nn.Module):
    """The cell of the NeurIPS 2020 tutorial on implicit layers, twice as wide inside."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.widen, self.narrow = conv(width, 2 * width, gain=0.2), conv(2 * width, width, gain=0.2)
        self.inner, self.middle, self.outer = norm(kind, 2 * width), norm(kind, width), norm(kind, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """(B, width, H, W)."""
        moved = self.narrow(self.inner(torch.relu(self.widen(z))))
        return self.outer(torch.relu(z + self.middle(x + moved)))


class DeepResidual(nn.Module):
    """A whole pre-activation block of four convolutions as one evaluation."""

    def __init__(self, width: int, kind: str, depth: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(width, width, gain=0.6) for _ in range(depth))
        self.norms = nn.ModuleList(norm(kind, width) for _ in range(depth))
        self.last = norm(kind, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """(B, width, H, W)."""
        moved = z + x
        for layer, normalised in zip(self.convs, self.norms, strict=True):
            moved = layer(functional.gelu(normalised(moved)))
        return self.last(z + x + moved)


class Multiscale(nn.Module):
    """Two resolutions that feed one another; x is a pair as well, shaped like the state."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.fine, self.coarse = conv(width, width, gain=0.4), conv(2 * width, 2 * width, gain=0.4)
        self.down, self.up = conv(width, 2 * width, gain=0.4), conv(2 * width, width, 1, gain=0.4)
        self.norms = nn.ModuleList([norm(kind, width), norm(kind, 2 * width)])

    def start(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Zeros."""
        return torch.zeros_like(x[0]), torch.zeros_like(x[1])

    def forward(self, z: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, width, H, W) and (B, 2·width, H/2, W/2)."""
        raised = functional.interpolate(self.up(z[1]), scale_factor=2.0)
        lowered = functional.avg_pool2d(self.down(z[0]), 2)
        fine = self.norms[0](torch.relu(self.fine(z[0]) + raised + x[0]))
        return fine, self.norms[1](torch.relu(self.coarse(z[1]) + lowered + x[1]))


class Monotone(nn.Module):
    """Winston & Kolter's W = (1 − m)I − AᵀA + B − Bᵀ, solved as a plain map: (1 − α)·z + α·relu(Wz + x)."""

    def __init__(self, width: int, kind: str, m: float = 0.3, alpha: float = 0.4) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(width, width) / width**0.5) for _ in range(2))
        self.m, self.alpha = m, alpha

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """(B, width)."""
        moved = (1 - self.m) * z - z @ self.a.T @ self.a + z @ (self.b.T - self.b)
        return (1 - self.alpha) * z + self.alpha * torch.relu(moved + x)


class Spectral(nn.Module):
    """relu of a spectrally normalised map, scaled to 0.95 in the norm, plus x: a contraction, if a slow one."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.linear = spectral_norm(nn.Linear(width, width))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """(B, width)."""
        return functional.leaky_relu(0.95 * self.linear(z) + x, 0.2)


class SpectralConv(nn.Module):
    """Two spectrally normalised convolutions with a residual connection."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.one, self.two = spectral_norm(conv(width, width)), spectral_norm(conv(width, width))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """(B, width, H, W)."""
        return torch.tanh(0.5 * z + self.two(torch.relu(self.one(z))) + x)


class Mixer(nn.Module):
    """An MLP-mixer block on 16 patches of an image, tokens × channels."""

    layout = "ntc"

    def __init__(self, width: int, kind: str, tokens: int = 16) -> None:
        super().__init__()
        self.tokens, self.channels = nn.Linear(tokens, tokens), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        with torch.no_grad():
            self.tokens.weight *= 0.3
            self.channels.weight *= 0.3

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """(B, 16, width)."""
        mixed = self.first(z + self.tokens(functional.gelu(z).transpose(1, 2)).transpose(1, 2) + x)
        return self.second(mixed + self.channels(functional.gelu(mixed)))


def feedforward(inputs: int, width: int, outputs: int, depth: int = 12) -> nn.Sequential:
    """A plain classifier of images, to be converted into a DEQ whose state are all its activations."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))
