"""The model that `drop-in` makes faster, as one writes it with torchdeq: nothing in it knows of metabroyden's solvers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.zoo.models.conv import ConvCell

TRAINED: dict[str, Any] = {
    # most early solves stop at the budget, which is what training wants: gradients need no more
    "ift": True, "f_solver": "anderson", "f_max_iter": 30, "f_tol": 1e-3, "f_stop_mode": "rel",
    "b_solver": "broyden", "b_max_iter": 15, "b_tol": 1e-2, "b_stop_mode": "rel",
}  # fmt: skip
"""How it is trained: torchdeq's own solvers and implicit differentiation."""


class Classifier(nn.Module):
    """Images (B, 1, 8, 8) → logits; deq_options: of `torchdeq.get_deq`."""

    def __init__(self, channels: int, **deq_options: Any) -> None:
        import torchdeq

        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.GroupNorm(4, channels))
        self.cell = ConvCell(channels, 2 * channels)
        self.deq = torchdeq.get_deq(**deq_options)
        self.head = nn.Linear(channels * 8 * 8, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, through a solve."""
        return self.classify(self.equilibrium(images))

    def equilibrium(self, images: Tensor) -> Tensor:
        """(B, channels, 8, 8), where the solver ends."""
        x = self.stem(images)
        states, _ = self.deq(lambda z: self.cell(z, x), torch.zeros_like(x))
        return states[-1]

    def classify(self, z: Tensor) -> Tensor:
        """Logits of a state."""
        return self.head(z.flatten(1))
