"""The smallest cell: one weight matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DenseCell(nn.Module):
    """f(z, x) = tanh(norm(W z + x)), with a layer norm; state and injection are (B, n).

    W starts as 0.8 times an orthogonal matrix: with an injection of unit size f is a contraction then.

    Args:
        n: coordinates of the state.
    """

    layout = "nd"

    def __init__(self, n: int = 32) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n, bias=False)
        self.norm = nn.LayerNorm(n)
        nn.init.orthogonal_(self.linear.weight, gain=0.8)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """f(z, x), shaped like z."""
        return torch.tanh(self.norm(self.linear(z) + x))
