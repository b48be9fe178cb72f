"""The log-and-sign form of numbers of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_sign(value: Tensor, p: float = 10.0) -> Tensor:
    """(…, 2): (log|v|/p, sign v) where |v| ≥ e⁻ᵖ, else (−1, eᵖv); Andrychowicz et al. (2016), appendix A.

    >>> log_sign(torch.tensor([-1.0, 0.0]))
    tensor([[ 0., -1.],
            [-1.,  0.]])
    """
    size = value.abs()
    large = size >= math.exp(-p)
    logs = torch.where(large, size.clamp_min(math.exp(-p)).log() / p, -1.0)
    signs = torch.where(large, value.sign(), math.exp(p) * value)
    return torch.stack([logs, signs], dim=-1)
