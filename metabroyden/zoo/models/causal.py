"""A causal sequence cell: a gated temporal convolution, weight-tied over depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class CausalCell(nn.Module):
    """f(z, x) = norm(z + norm(x + V h)), h = tanh(a) ⊙ σ(b), (a, b) = W * z + U x.

    W is a causal dilated convolution over time, U and V act token by token. In the spirit of DEQ-TrellisNet (Bai, Kolter
    & Koltun, NeurIPS 2019; TrellisNet, ICLR 2019), with one gate in place of an LSTM cell's and no cell state. Both norms
    are over the channels of a token, so that nothing passes from the future to the past. The receptive field grows by
    (width − 1)·dilation with every evaluation.

    Args:
        channels: of state and injection; both are (B, channels, T).
        inner: channels of h; None for as many as the state's.
        width: taps of the convolution, at least 2.
        dilation: tokens between taps.
    """

    layout = "nct"

    def __init__(self, channels: int = 32, inner: int | None = None, width: int = 2, dilation: int = 1) -> None:
        super().__init__()
        if width < 2 or dilation < 1:
            raise ValueError(f"width must be at least 2 and dilation at least 1, got {width} and {dilation}")
        inner = channels if inner is None else inner
        self.reach = (width - 1) * dilation
        self.conv = nn.Conv1d(channels, 2 * inner, width, dilation=dilation, bias=False)
        self.inject = nn.Conv1d(channels, 2 * inner, 1)
        self.out = nn.Conv1d(inner, channels, 1, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """f(z, x), shaped like z."""
        past = functional.pad(z, (self.reach, 0))  # zeros stand before the first token
        a, b = (self.conv(past) + self.inject(x)).chunk(2, dim=1)
        h = torch.tanh(a) * torch.sigmoid(b)
        return _by_token(self.norm2, z + _by_token(self.norm1, x + self.out(h)))


def _by_token(norm: nn.LayerNorm, v: Tensor) -> Tensor:
    return norm(v.transpose(1, 2)).transpose(1, 2)
