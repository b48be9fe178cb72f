"""Tokens → injection: what of a sequence model's input is computed once a segment, outside the fixed-point problem."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

STEMS = ("linear", "conv")
"""What a stem may be."""


class TokenStem(nn.Module):
    """Tokens (B, T) → injection (B, T, outputs): embedding, then a linear map, or a causal convolution before it.

    "linear": U e_t + b, as in DEQ-TrellisNet and DEQ-Transformer (Bai, Kolter & Koltun, NeurIPS 2019), the token alone.
    "conv": U gelu(W * e)_t + b, the token and the `reach` − 1 before it, as in the character convolutions of Al-Rfou et
    al. 2019: the equilibrium then need not find out what the last few letters were. Zeros stand before a segment.

    Args:
        vocabulary: tokens there are.
        embedding: coordinates of e_t.
        inner: channels of the convolution.
        outputs: of the injection.
        kind: one of `STEMS`.
        reach: taps of the convolution.

    ValueError for an unknown kind.
    """

    def __init__(self, vocabulary: int, embedding: int, inner: int, outputs: int, kind: str, reach: int = 4) -> None:
        super().__init__()
        if kind not in STEMS:
            raise ValueError(f"stem must be one of {STEMS}, got {kind!r}")
        self.embed = nn.Embedding(vocabulary, embedding)
        self.conv = nn.Conv1d(embedding, inner, reach) if kind == "conv" else None
        self.linear = nn.Linear(inner if kind == "conv" else embedding, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """The injection of tokens (B, T)."""
        e = self.embed(tokens)
        if self.conv is not None:
            past = functional.pad(e.transpose(1, 2), (self.conv.kernel_size[0] - 1, 0))
            e = functional.gelu(self.conv(past)).transpose(1, 2)
        return self.linear(e)
