"""Normalised weights for a cell: a bound on its Lipschitz constant, or a scale apart from the direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrizations, parametrize

M = TypeVar("M", bound=nn.Module)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_KINDS = ("spectral", "weight")


def normalise(module: M, kind: str = "spectral", *, skip: Sequence[str] = (), max_norm: float | None = None) -> M:
    """Normalise the weights of every linear and convolutional layer in a cell, in place; returns the cell.

    `DEQ` computes such weights once a call and holds them through the solve and the gradient, so that f stays one map
    (in training mode a spectral norm makes a power iteration whenever its weight is read). The same holds for any
    parametrization made with `torch.nn.utils.parametrize`. Make the optimizer afterwards: the parameters are new.

    Args:
        module: the cell, or a single layer.
        kind: "spectral", W / σ(W) (Miyato et al. 2018), or "weight", g·v/‖v‖ for every output (Salimans & Kingma 2016);
            both are torch's own. A convolution's σ is that of its weight as an (outputs, rest) matrix.
        skip: names of submodules to leave alone, with all that is in them.
        max_norm: with "spectral": W is scaled only where σ(W) exceeds it, to W·max_norm / σ(W).

    Returns:
        The module.

    Raises:
        ValueError: an unknown kind or name, no layer to normalise, one normalised already, a bad max_norm.

    Examples:
        >>> import torch, metabroyden as mb
        >>> layer = mb.normalise(torch.nn.Linear(8, 8)).eval()
        >>> bool((torch.linalg.matrix_norm(layer.weight, 2) - 1).abs() < 0.1)
        True
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {_KINDS}, got {kind!r}")
    if max_norm is not None and (kind != "spectral" or not max_norm > 0):
        raise ValueError(f"max_norm must be positive and goes with kind='spectral', got {max_norm} with {kind!r}")
    for layer in _layers(module, skip):
        outputs = 1 if isinstance(layer, _TRANSPOSED) else 0  # the axis of its weight that counts them
        if kind == "weight":
            parametrizations.weight_norm(layer, dim=outputs)
        elif max_norm is None:
            parametrizations.spectral_norm(layer)
        else:
            parametrize.register_parametrization(layer, "weight", _Bounded(layer.weight, max_norm, outputs))
    return module


def _layers(module: nn.Module, skip: Sequence[str]) -> list[Any]:
    """The linear and convolutional layers of a module; ValueError where there is none, or one is parametrized already."""
    if isinstance(skip, str):
        raise ValueError(f"skip must be a sequence of names, got the string {skip!r}")
    modules = dict(module.named_modules())
    unknown = [name for name in skip if name not in modules]
    if unknown:
        raise ValueError(f"skip names {unknown}, of which the cell has none; it has {sorted(filter(None, modules))}")
    layers = {
        name: layer
        for name, layer in modules.items()
        if isinstance(layer, _LAYERS) and not any(f"{name}.".startswith(f"{left}.") for left in skip)
    }
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear or convolutional layer to normalise")
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"the weight of layer {name!r} is parametrized already")
    return list(layers.values())


class _Bounded(nn.Module):
    """W·min(1, bound / σ(W)), σ from one power iteration whenever it is computed in training mode."""

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, bound: float, axis: int) -> None:
        super().__init__()
        self.bound, self.axis = bound, axis
        matrix = self._matrix(weight.detach())
        self.register_buffer("u", normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.register_buffer("v", torch.zeros_like(matrix[0]))
        self._iterate(matrix, 15)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.axis, 0).flatten(1)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor, times: int) -> None:
        for _ in range(times):
            self.v.copy_(normalize(matrix.T @ self.u, dim=0))
            self.u.copy_(normalize(matrix @ self.v, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        matrix = self._matrix(weight)
        if self.training:
            self._iterate(matrix.detach(), 1)
        # copies: the next iteration writes into these, perhaps before this graph is used
        sigma = self.u.clone() @ (matrix @ self.v.clone())
        return torch.where(sigma > self.bound, weight * (self.bound / sigma), weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight
