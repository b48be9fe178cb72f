"""A state of several tensors as one vector, for what takes one tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metabroyden.deq import initial_state
from metabroyden.state import Packing


class Packed(nn.Module):
    """The cell f(z, x) on packed states: (B, n), the tensors of z flattened, one after another.

    The same fixed points, by the same evaluations; what is lost is the layout of each tensor. The packing is that of the
    cell's state, `Packing.of(z0)`.
    """

    layout = "vector"

    def __init__(self, cell: nn.Module, packing: Packing) -> None:
        super().__init__()
        self.cell, self.packing = cell, packing

    def initial_state(self, x: Any) -> Tensor:
        """The cell's, packed."""
        return self.packing.pack(initial_state(self.cell, x))

    def forward(self, z: Tensor, x: Any) -> Tensor:
        """f(z, x), (B, n)."""
        return self.packing.pack(self.cell(self.packing.unpack(z), x))
