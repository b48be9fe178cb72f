"""Small problems with known answers, shared by the tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Known:
    """f(z, x) with its start, contexts, and (where there is a closed form) its fixed points."""

    f: Callable[[Tensor, Tensor], Tensor]
    z0: Tensor
    x: Tensor
    star: Tensor | None = None


def linear(
    batch: int = 6, n: int = 12, radius: float = 0.8, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Known:
    """f(z, x) = Wz + x with ‖W‖₂ = radius: z* = (I − W)⁻¹x."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, n, generator=g, dtype=dtype)
    w = radius * w / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(batch, n, generator=g, dtype=dtype)
    star = torch.linalg.lstsq(torch.eye(n, dtype=dtype) - w, x.T).solution.T
    return Known(lambda z, x: (z.unsqueeze(1) * w).sum(2) + x, torch.zeros_like(x), x, star)


def tanh(batch: int = 6, n: int = 12, gain: float = 0.95, dtype: torch.dtype = torch.float64, seed: int = 0) -> Known:
    """f(z, x) = tanh(Wz + x), ‖W‖₂ = gain. Row-wise deterministic: no BLAS call sees the batch size."""
    problem = linear(batch, n, gain, dtype, seed)
    return Known(lambda z, x: torch.tanh(problem.f(z, x)), problem.z0, problem.x)


@pytest.fixture
def contraction() -> Known:
    return linear()


@pytest.fixture
def nonlinear() -> Known:
    return tanh()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)  # learn2learn draws its tasks with it
