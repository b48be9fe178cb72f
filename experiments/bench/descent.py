"""The plain training loop of models that experiments train for themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def descend(
    parameters: Iterable[nn.Parameter], steps: int, rate: float, loss_of: Callable[[int], Tensor], *, clip: float = 1.0
) -> float:
    """Adam on loss_of(0), loss_of(1), …, its rate falling as a cosine to zero; the last loss.

    Args:
        parameters: that are trained.
        steps: how many.
        rate: at first.
        loss_of: number of the step ↦ loss.
        clip: largest norm of a gradient.
    """
    parameters = list(parameters)
    optimiser = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    loss = torch.tensor(torch.nan)
    for step in range(steps):
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()
        schedule.step()
    return loss.item()
