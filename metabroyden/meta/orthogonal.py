"""Momentum whose matrices are made orthogonal: large, even steps, for few updates or many."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.9  # of the matrices


class OrthogonalAdam(torch.optim.Adam):
    """Adam, but for the parameters `matrices`: W ← W − rate·√max(1, rows/columns)·orth(M), M ← momentum·M + ∇.

    Muon (Jordan et al. 2024) without Nesterov's form: orth(M) is UVᵀ of M = USVᵀ, by five steps of the Newton–Schulz
    iteration with the quintic's coefficients from there, which bring singular values near one. Filters of a convolution are
    rows. A zero matrix, which has no scale of its own, moves as far as any other.

    `set_rates` sets both rates to a share of what they were made with.
    """

    def __init__(
        self, parameters: Iterable[Tensor], matrices: Iterable[Tensor], *, lr: float, orthogonal_rate: float
    ) -> None:
        super().__init__(parameters, lr=lr)
        self.matrices = list(matrices)
        self.peaks = lr, orthogonal_rate
        self.orthogonal_rate = orthogonal_rate

    def set_rates(self, share: float) -> None:
        """Both rates, as a share of those the optimizer was made with."""
        rate, self.orthogonal_rate = (share * peak for peak in self.peaks)
        for group in self.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        grads = [matrix.grad for matrix in self.matrices]
        for matrix, grad in zip(self.matrices, grads, strict=True):
            if grad is not None:
                state = self.state[matrix]
                state.setdefault("step", torch.tensor(0.0))  # what Adam asks for of every state it is given back
                memory = state.setdefault("momentum", torch.zeros_like(matrix))
                memory.mul_(MOMENTUM).add_(grad)
                rows, columns = matrix.flatten(1).shape
                matrix.sub_(orthogonal(memory), alpha=self.orthogonal_rate * max(1.0, rows / columns) ** 0.5)
                matrix.grad = None
        super().step()
        for matrix, grad in zip(self.matrices, grads, strict=True):
            matrix.grad = grad


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


def make_optimizer(solver: Any, learning_rate: float, orthogonal_rate: float) -> OrthogonalAdam:
    """For all weights of a solver: Adam, at `orthogonal_rate` above zero but for its matrices."""
    matrices = [p for p in solver.parameters() if is_matrix(p)] if orthogonal_rate else []
    return OrthogonalAdam(solver.parameters(), matrices, lr=learning_rate, orthogonal_rate=orthogonal_rate)


def is_matrix(value: Tensor) -> bool:
    """Whether a parameter is a map between spaces of several dimensions, which is what orthogonality is for."""
    return value.dim() >= 2 and value.shape[0] >= 8 and value[0].numel() >= 8
