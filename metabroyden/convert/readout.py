"""A DEQ whose output is part of its state."""

from __future__ import annotations

from typing import Any

from torch import nn

from metabroyden.deq import DEQ
from metabroyden.solution import State


class Readout(nn.Module):
    """y = cell.output(z*) with z* = cell(z*, x); the options are those of `DEQ`.

    Attributes:
        deq: the `DEQ`; `deq(x)` gives the whole state, `deq.last_solution` what it cost.
    """

    def __init__(self, cell: nn.Module, **deq_options: Any) -> None:
        super().__init__()
        self.deq = DEQ(cell, **deq_options)

    @property
    def cell(self) -> nn.Module:
        """The DEQ's cell f(z, x)."""
        return self.deq.cell

    def forward(self, x: Any) -> State:
        """The output for x (batch first), through a solve."""
        return self.cell.output(self.deq(x))  # type: ignore[operator]
