"""Learned inner steps: how a solver's fast weights follow from the gradients on D_train.

θₜ = fₜ ⊙ θₜ₋₁ − iₜ ⊙ ∇ₜ with forget and input gates, the cell state of an LSTM being the weights themselves (Ravi &
Larochelle, ICLR 2017, eq. 2): with f = 1 and i a learning rate it is gradient descent, which is what untrained ones are.
Gradients are made unit-sized, all of them together, so that a rate, `rate` to begin with, means the same for every DEQ.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metabroyden.learned.coordinatewise import log_sign

Weights = dict[str, Tensor]


def _unit(grads: Weights) -> Weights:
    size = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt() + 1e-12
    return {name: grad / size for name, grad in grads.items()}


_OPEN = 9.0  # a forget gate begins at 1 − 1e-4


class Rates(nn.Module):
    """A forget gate and a learning rate for every weight, the same at all T updates."""

    def __init__(self, solver: nn.Module, rate: float) -> None:
        super().__init__()
        self.names = [name for name, _ in solver.named_parameters()]
        values = [value for _, value in solver.named_parameters()]
        self.log_rate = nn.ParameterList([torch.full_like(value, math.log(rate)) for value in values])
        self.forget = nn.ParameterList([torch.full_like(value, _OPEN) for value in values])

    def begin(self, weights: Weights) -> None:
        """The memory before the first update: nothing."""

    def forward(self, weights: Weights, grads: Weights, loss: Tensor, memory: Any) -> tuple[Weights, Any]:
        """(weights, None) after one update."""
        grads, after = _unit(grads), {}
        for name, rate, forget in zip(self.names, self.log_rate, self.forget, strict=True):
            after[name] = torch.sigmoid(forget) * weights[name] - rate.exp() * grads[name]
        return after, None


class GatedMemory(NamedTuple):
    """Of each weight: the LSTM's states (2, H, N) over preprocessed gradients, and the last gates (2, N)."""

    states: dict[str, tuple[Tensor, Tensor]]
    gates: dict[str, tuple[Tensor, Tensor]]


class Gated(nn.Module):
    """Gates from what each weight has seen: iₜ = σ(W_I [hₜ, θₜ₋₁, iₜ₋₁] + b_I), fₜ likewise, h an LSTM over (∇, loss).

    One LSTM cell whose weights all coordinates share reads ∇ and the loss in the log-and-sign form of Andrychowicz et al.
    (2016, appendix A, p = 10). Ravi & Larochelle's eqs. 3 and 4. The input gate is scaled so that half-open it is the rate.
    """

    hidden = 8

    def __init__(self, solver: nn.Module, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.lstm = nn.LSTMCell(4, self.hidden)
        self.enter = nn.Parameter(torch.zeros(self.hidden + 2))
        self.forget = nn.Parameter(torch.zeros(self.hidden + 2))
        self.enter_offset = nn.Parameter(torch.zeros(()))
        self.forget_offset = nn.Parameter(torch.tensor(_OPEN))
        self.to(next(solver.parameters()))

    def begin(self, weights: Weights) -> GatedMemory:
        """Empty states, gates as they open."""
        states, gates = {}, {}
        for name, value in weights.items():
            zeros = value.new_zeros(value.numel(), self.hidden)
            states[name] = zeros, zeros
            flat = value.new_ones(value.numel())
            gates[name] = 0.5 * flat, flat
        return GatedMemory(states, gates)

    def forward(
        self, weights: Weights, grads: Weights, loss: Tensor, memory: GatedMemory
    ) -> tuple[Weights, GatedMemory]:
        """(weights, memory) after one update."""
        unit, after = _unit(grads), {}
        states, gates = {}, {}
        for name, value in weights.items():
            flat, grad = value.reshape(-1), unit[name].reshape(-1)
            seen = torch.cat([log_sign(grad), log_sign(loss.reshape(1)).expand(len(flat), -1)], dim=1)
            hidden, cell = self.lstm(seen.to(flat.dtype), memory.states[name])
            entered, forgot = memory.gates[name]
            entered = torch.sigmoid(self._gate(hidden, flat, entered, self.enter) + self.enter_offset)
            forgot = torch.sigmoid(self._gate(hidden, flat, forgot, self.forget) + self.forget_offset)
            after[name] = (forgot * flat - 2 * self.rate * entered * grad).reshape(value.shape)
            states[name], gates[name] = (hidden, cell), (entered, forgot)
        return after, GatedMemory(states, gates)

    @staticmethod
    def _gate(hidden: Tensor, flat: Tensor, last: Tensor, weight: Tensor) -> Tensor:
        return hidden @ weight[:-2] + flat * weight[-2] + last * weight[-1]


UPDATES: dict[str, type[Any]] = {"gated": Gated, "rates": Rates}  # our inner steps by name
