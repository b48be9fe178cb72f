"""Momentum whose matrices are made orthogonal: large, even steps for the few updates of an adaptation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class OrthogonalMomentum(torch.optim.Optimizer):
    """W ← W − lr·√max(1, rows/columns)·orth(M), M ← momentum·M + ∇; filters of a convolution as rows.

    Muon (Jordan et al. 2024) without Nesterov's form: orth(M) is UVᵀ of M = USVᵀ, by five steps of the Newton–Schulz
    iteration with the quintic's coefficients from there, which bring singular values near one. A zero matrix, which has no
    scale of its own, moves as far as any other.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                memory = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                memory.mul_(group["momentum"]).add_(parameter.grad)
                rows, columns = parameter.flatten(1).shape
                parameter.sub_(orthogonal(memory), alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(value: Tensor) -> Tensor:
    """(rows, …): the nearest matrix with singular values of about one; shaped as it came."""
    matrix = value.flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp_min(1e-30)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return (x if wide else x.T).reshape(value.shape)


def is_matrix(value: Tensor) -> bool:
    """Whether a parameter is a map between spaces of several dimensions, which is what orthogonality is for."""
    return value.dim() >= 2 and value.shape[0] >= 8 and value[0].numel() >= 8
