"""Weights of a solver's first steps, by the number of the step alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Table(nn.Module):
    """A learned schedule: what step k gives to the residual and to the last move, by channel, and to inner gates.

    After the last row that one goes on.

    In the manner of unrolled iterations with weights of their own for each step (Gregor & LeCun, LISTA, ICML 2010), but for
    scalars of channels alone, as the coefficients of Chebyshev's semi-iteration are.

    Args:
        steps: rows K. channels: C of the state. rank: inner channels k. damping: the residual's weights before training.
    """

    def __init__(self, steps: int, channels: int, rank: int, damping: float) -> None:
        super().__init__()
        # an axis of one in front: to an optimizer of matrices these are none
        self.direct = nn.Parameter(torch.full((1, steps, channels), damping))
        self.onward = nn.Parameter(torch.ones(1, steps, channels))
        self.gates = nn.Parameter(torch.ones(1, steps, rank))

    def forward(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of step 0, 1, …: weight of the residual (C,), one plus that of the last move (C,), factor of the gates (k,)."""
        row = min(step, self.direct.shape[1] - 1)
        return self.direct[0, row], self.onward[0, row], self.gates[0, row]

    @property
    def last(self) -> tuple[Tensor, Tensor, Tensor]:
        """The last row."""
        return self(-1)
