"""One LSTM cell shared by all groups (or coordinates) of a state."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SharedLSTM(nn.Module):
    """An LSTM cell (Hochreiter & Schmidhuber 1997) with weights shared over G groups, features first.

    Features (R, F, G) and states (R, H, G) keep the groups last, so a step is one batched product and a few long
    elementwise loops. The linear read-out is zero-initialised; the forget gate starts open. Groups with an identity
    (channels of an image) have a bias each: `identities` is 1, or G. F inputs, H hidden, O outputs.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, identities: int = 1) -> None:
        super().__init__()
        self.hidden = hidden
        bound = 1 / hidden**0.5
        self.weight = nn.Parameter(torch.empty(4 * hidden, inputs + hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(4 * hidden, identities))
        self.readout = nn.Parameter(torch.zeros(outputs, hidden))
        self.offset = nn.Parameter(torch.zeros(outputs, identities))
        with torch.no_grad():
            self.bias[hidden : 2 * hidden] = 1

    def begin(self, rows: int, groups: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Zero hidden and cell states, (R, H, G) each."""
        zeros = like.new_zeros(rows, self.hidden, groups)
        return zeros, zeros

    def forward(self, features: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(read-out (R, O, G), hidden, cell) after one step."""
        gates = _affine(self.bias, self.weight, torch.cat([features, hidden], dim=1))
        squashed, candidate = gates[:, : 3 * self.hidden], gates[:, 3 * self.hidden :]
        # in place where no graph is kept: on a CPU fresh memory costs more than the arithmetic
        if torch.is_grad_enabled():
            squashed, candidate = torch.sigmoid(squashed), torch.tanh(candidate)
        else:
            squashed.sigmoid_(), candidate.tanh_()
        enter, forget, leave = squashed.chunk(3, dim=1)
        cell = torch.addcmul(forget * cell, enter, candidate)
        hidden = leave * torch.tanh(cell)
        return _affine(self.offset, self.readout, hidden), hidden, cell


def _affine(bias: Tensor, weight: Tensor, value: Tensor) -> Tensor:
    """bias (O, 1 or G) + weight (O, F) · value (R, F, G), (R, O, G)."""
    if value.shape[2] == 1:  # one product for all rows, where the batched one makes a small one for each
        return torch.addmm(bias[:, 0], value[:, :, 0], weight.T).unsqueeze(2)
    return torch.baddbmm(bias.unsqueeze(0), weight.expand(len(value), -1, -1), value)
