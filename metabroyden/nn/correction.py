"""A loss on the way to the fixed point."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from metabroyden.solution import State

_WEIGHTS: dict[str, Callable[[int, int, float], float]] = {
    "exponential": lambda age, count, gamma: gamma**age,
    "linear": lambda age, count, gamma: 1 - gamma * age / count,
    "uniform": lambda age, count, gamma: 1.0,
}


def fixed_point_correction(
    criterion: Callable[[State], Tensor], states: Iterable[State], *, weights: str = "exponential", gamma: float = 0.8
) -> Tensor:
    """Σₖ wₖ criterion(zₖ) over K states that approach the fixed point, the last with weight 1; a scalar.

    Bai et al. 2022, Deep equilibrium optical flow estimation: a loss on states short of the fixed point, too, keeps them
    close to it. With a = K − 1 − k, how long before the last, the weights are γᵃ ("exponential"), 1 − γ·a/K ("linear")
    or 1 ("uniform").

    Args:
        criterion: the loss of one state, a scalar.
        states: in the order in which they were found; each a tensor or a tuple of tensors.
        weights: how the weights grow.
        gamma: in (0, 1]; of no effect on uniform weights.

    Raises:
        ValueError: no states, unknown weights, gamma out of range, or a criterion that is no scalar.
        TypeError: a bare tensor of states.

    Examples:
        >>> import torch, metabroyden as mb
        >>> fixed_point_correction(torch.sum, [torch.ones(2), torch.ones(2)], gamma=0.5)  # 0.5 · 2 + 1 · 2
        tensor(3.)
    """
    if weights not in _WEIGHTS:
        raise ValueError(f"weights must be one of {sorted(_WEIGHTS)}, got {weights!r}")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
    if isinstance(states, Tensor):
        raise TypeError("states must be a sequence of states, got one tensor")
    losses = [torch.as_tensor(criterion(state)) for state in states]
    if not losses:
        raise ValueError("fixed_point_correction needs at least one state, got none")
    for loss in losses:
        if loss.dim():
            raise ValueError(f"criterion must return a scalar, got shape {tuple(loss.shape)}")
    count = len(losses)
    return torch.stack([_WEIGHTS[weights](count - 1 - k, count, gamma) * loss for k, loss in enumerate(losses)]).sum()
