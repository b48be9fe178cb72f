"""Dropout that leaves f one map through a solve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from metabroyden.nn.hold import held, holding


class VariationalDropout(nn.Module):
    """Dropout whose mask is drawn once a call of the DEQ and kept through its solve and its backward pass.

    Gal & Ghahramani 2016, A theoretically grounded application of dropout in recurrent neural networks. A fixed point
    exists only for a constant mask. `DEQ` draws a mask for every sample; it travels with the context, so that each sample
    keeps its own while others leave the solve. In evaluation mode the layer is the identity. In training mode, outside a
    `DEQ` and outside `held_masks`, it draws a new mask at every call, as ordinary dropout does.

    Args:
        p: probability that an entry is dropped, 0 ≤ p < 1; the rest is scaled by 1 / (1 − p).
        shape: of one sample's mask, as many axes as the layer's input has after the batch, each of its size or 1:
            (C, 1, 1) drops whole channels of (B, C, H, W), (1, D) features of (B, T, D) alike at all times.

    Raises:
        ValueError: p or shape out of range; at a call, an input that the mask does not fit.

    Examples:
        >>> import torch, metabroyden as mb
        >>> channels = mb.VariationalDropout(0.5, (4, 1, 1))
        >>> dropped = channels(torch.ones(2, 4, 3, 3))
        >>> bool((dropped == dropped[:, :, :1, :1]).all()), sorted(dropped.unique().tolist())
        (True, [0.0, 2.0])
    """

    def __init__(self, p: float, shape: Sequence[int]) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must lie in [0, 1), got {p}")
        self.p, self.shape = float(p), tuple(shape)
        if not self.shape or any(size < 1 for size in self.shape):
            raise ValueError(f"shape must be that of one sample's mask, sizes of at least 1, got {self.shape}")

    @property
    def mask(self) -> Tensor | None:
        """(B, *shape) bool, True is kept: the mask held in this thread during a call; None elsewhere."""
        return held(self)

    @property
    def active(self) -> bool:
        """Whether the layer drops anything."""
        return self.training and self.p > 0

    def draw(self, batch: int, device: torch.device) -> Tensor:
        """A mask (batch, *shape); the one that is held, where one is."""
        mask = self.mask
        if mask is not None:
            return mask
        return torch.rand(batch, *self.shape, device=device) >= self.p

    def forward(self, x: Tensor) -> Tensor:
        """x with entries dropped, shaped like x (B, ...)."""
        if not self.active:
            return x
        mask = self.draw(len(x), x.device)
        # broadcasting by torch's own rules might drop along the wrong axis
        fits = mask.dim() == x.dim() and len(mask) == len(x)
        if not fits or any(size not in (1, wanted) for size, wanted in zip(self.shape, x.shape[1:], strict=True)):
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} does not fit an input of shape {tuple(x.shape)}: "
                "wanted the batch first, then for every axis its size or 1"
            )
        return torch.where(mask, x / (1 - self.p), 0.0)

    def extra_repr(self) -> str:
        """For `print`."""
        return f"p={self.p}, shape={self.shape}"


def dropouts(module: nn.Module) -> list[VariationalDropout]:
    """The variational dropout layers of a module that drop something at present."""
    return [layer for layer in module.modules() if isinstance(layer, VariationalDropout) and layer.active]


@contextmanager
def held_masks(module: nn.Module, batch: int, device: torch.device | str | None = None) -> Iterator[None]:
    """Draw the masks of a module's `VariationalDropout` layers for `batch` samples, and hold them for a `with` block.

    Within the block a `DEQ` uses these masks, and so does anything else that calls the cell on the whole batch, such as a
    Jacobian penalty at the equilibrium. Other threads draw masks of their own.

    Args:
        module: the cell or the layer.
        batch: number of samples.
        device: of the state; None: of the module's parameters.

    Examples:
        >>> import torch, metabroyden as mb
        >>> layer = mb.VariationalDropout(0.5, (100,))
        >>> with mb.nn.held_masks(layer, 3):
        ...     bool((layer(torch.ones(3, 100)) == layer(torch.ones(3, 100))).all())
        True
    """
    if device is None:
        device = next((p.device for p in module.parameters()), "cpu")
    with holding([(layer, layer.draw(batch, torch.device(device))) for layer in dropouts(module)]):
        yield


def stochastic_layers(module: nn.Module) -> list[str]:
    """Warnings of layers that make f another map at each call, and of layers that couple the samples of a batch.

    Of the first kind are ordinary dropout, RReLU and a spectral norm attached as a hook, which cannot be held. Batch norm is
    of the second kind.
    """
    layers = [(f"{name or 'cell'} ({type(layer).__name__})", layer) for name, layer in module.named_modules()]
    random = ", ".join(told for told, layer in layers if layer.training and _draws(layer))
    coupled = ", ".join(told for told, layer in layers if _couples(layer))
    reasons = {
        "drops or learns anew at every evaluation, so that the cell has no fixed point to find; use VariationalDropout or "
        "normalise": random,
        "takes statistics over the batch, or learns them, at every evaluation: samples that leave the solve change f for "
        "the others; use GroupNorm or LayerNorm, or put it in evaluation mode": coupled,
    }
    return [f"{names} {reason}" for reason, names in reasons.items() if names]


def _draws(layer: nn.Module) -> bool:
    """Whether a layer in training mode is another map at each call."""
    if isinstance(layer, _DropoutNd):
        return layer.p > 0
    if isinstance(layer, nn.RReLU) or any(isinstance(hook, SpectralNorm) for hook in layer._forward_pre_hooks.values()):
        return True
    return isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)) and layer.dropout > 0


def _couples(layer: nn.Module) -> bool:
    """Whether a layer reads the whole batch, or updates statistics at each call."""
    if isinstance(layer, _BatchNorm):
        return layer.training or layer.running_mean is None
    return isinstance(layer, _InstanceNorm) and layer.training and layer.track_running_stats
