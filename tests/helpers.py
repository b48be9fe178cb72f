"""What several test files share: tensors, cells and learned solvers made in a line, and refusals checked in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """Normal numbers that follow from the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def contexts(count: int, seed: int = 0) -> Tensor:
    """Contexts (count, 3, 4, 4) for `ConvTanh`."""
    return 0.5 * normal(count, 3, 4, 4, seed=seed)


def refused(words: str, call: Callable[[], Any], error: type[Exception] = ValueError) -> None:
    """The call raises this error, with these words."""
    with pytest.raises(error, match=words):
        call()


def vector(name: str, n: int, **options: Any) -> Any:
    """A learned solver for states (B, n), in float64."""
    return make_learned(name, Layout("vector", (n,)), **options).double()


def perturbed(solver: Any, size: float = 0.1, seed: int = 2) -> Any:
    """The solver, with noise of this size on its weights."""
    for parameter in solver.parameters():
        parameter.data += size * normal(*parameter.shape, seed=seed).to(parameter)
    return solver


def same_parameters(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights and buffers, bit for bit."""
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


class ConvTanh(nn.Module):
    """tanh(conv(z) + x) on 3 channels, which expands in a direction or two: plain Picard fails."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.conv.weight.data = 0.25 * normal(3, 3, 3, 3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(z) + x)
