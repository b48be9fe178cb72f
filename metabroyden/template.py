"""Your DEQ for metabroyden's command line. Replace the example below with your own model and inputs, then run

metabroyden fit template.py:problem --out runs/mine
metabroyden compare template.py:problem --solver runs/mine/solver.safetensors --out runs/mine-compared
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Cell(nn.Module):
    """An example: z⁺ = tanh(Wz + x). Yours is a trained one, with its weights loaded."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.orthogonal_(self.linear.weight, gain=0.9)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One evaluation: states z (B, 16) and contexts x (B, 16) → new states (B, 16)."""
        return torch.tanh(self.linear(z) + x)


def problem() -> dict[str, Any]:
    """What is solved: a map f and the contexts x that it is solved for. No labels are needed.

    Returns:
        A dict with these keys; `return f, x` does, too, where no other key is needed.

        f: z⁺ = f(z, x), batch first. Or an `mb.DEQ`, or a whole model with one DEQ in it (torchdeq's, too); the contexts
            are then what that is called with.
        x: contexts of some hundred samples, samples first: a tensor, or a pytree (dict, tuple, list) of tensors. Every
            fifth sample is kept from `fit`, for `compare` alone. Or give both parts: x_train and x_test.
        z0 (optional): x → start; default zeros like x.
        layout (optional): the axes of a state: "vector", "nct", "ntc", "tokens", "set", "image", "pyramid"; default a guess.
        conditioning (optional): what a learned solver sees of x: "input", "initial_value"; default "auto".
        metric (optional): (z, x) → what states are worth for your task, higher being better, a number for each sample or
            the mean. Labels may travel in x, beside what f reads.
    """
    torch.manual_seed(0)
    f = Cell().requires_grad_(False).eval()
    x = torch.randn(500, 16)
    return {"f": f, "x": x}
