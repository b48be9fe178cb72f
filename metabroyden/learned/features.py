"""What the LSTM of a group sees of the directions it weighs, and how it mixes them."""

from __future__ import annotations

import torch
from torch import Tensor


def feature_count(directions: int, *, homogeneous: bool = False) -> int:
    """Rows F of `direction_features`."""
    means = 0 if homogeneous else directions
    return directions + directions * (directions - 1) // 2 + means + 2


def direction_features(stack: Tensor, scale: Tensor, previous: Tensor, first: Tensor | None = None) -> Tensor:
    """(R, F, G): log sizes, correlations and means of directions over each group, log s and its last change.

    Args:
        stack: (R, G, K, P) the directions. scale, previous: this step's residual scale s and the last one's, (R, 1, …).
        first: where given, features are even and of degree zero in the problem: no means, and log s relative to this one.
    """
    gram = stack @ stack.transpose(2, 3) / stack.shape[3]
    root = (torch.diagonal(gram, dim1=2, dim2=3) + 1e-8).sqrt()
    one, other = torch.triu_indices(stack.shape[2], stack.shape[2], offset=1, device=stack.device).unbind(0)
    correlations = gram[:, :, one, other] / (root[..., one] * root[..., other])
    level = scale if first is None else scale / first
    sizes = [level.log() / 5, (scale / previous).log().clamp(-3, 3)]
    columns = [value.flatten(1).unsqueeze(2).expand(-1, stack.shape[1], 1) for value in sizes]
    means = [stack.mean(dim=3) / root] if first is None else []
    return torch.cat([root.log(), correlations, *means, *columns], dim=2).transpose(1, 2)


def mix(stack: Tensor, weights: Tensor) -> Tensor:
    """Σₖ wₖ dₖ, (R, G, P), for directions (R, G, K, P) and weights (R, G, K), or (R, G, K + 1) with a bias last."""
    count = stack.shape[2]
    mixed = weights[..., count:] if weights.shape[2] > count else torch.zeros_like(stack[:, :, 0])
    for k in range(count):  # several times faster than one batched product this small
        mixed = torch.addcmul(mixed, weights[..., k : k + 1], stack[:, :, k])
    return mixed
