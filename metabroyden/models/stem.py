"""Tokens → injection: what of a sequence model's input is computed once a segment, outside the fixed-point problem."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

STEMS = ("linear", "conv", "hashed")
"""What a stem may be."""

_BASE, _PRIME = 1_000_003, 2**31 - 1  # of the rolling hash: products stay below 2^63


class TokenStem(nn.Module):
    """Tokens (B, T) → injection (B, T, outputs): embedding, then a linear map, or more of the last few tokens before it.

    "linear": U e_t + b, as in DEQ-TrellisNet and DEQ-Transformer (Bai, Kolter & Koltun, NeurIPS 2019), the token alone.
    "conv": U gelu(W * e)_t + b, the token and the `reach` − 1 before it, as in the character convolutions of Al-Rfou et
    al. 2019: the equilibrium then need not find out what the last few letters were. Zeros stand before a segment.
    "hashed": U (e_t, a_t², …, a_tʳ) + b with r = `reach`, where aⁿ is a row of a table, the one that a hash of the last n
    tokens points to (Svenstrup, Hansen & Winther, Hash Embeddings, NeurIPS 2017): what is known of an n-gram costs no
    arithmetic, and several may share a row. In training mode each row is left out with probability `drop`, as n-grams of
    other texts will be unknown. Nothing stands before a segment.

    Args:
        vocabulary: tokens there are.
        embedding: coordinates of e_t.
        inner: channels of the convolution.
        outputs: of the injection.
        kind: one of `STEMS`.
        reach: taps of the convolution, or the longest n-gram.
        rows, row: of a hash table, and coordinates of each. drop: see above.

    ValueError for an unknown kind.
    """

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        inner: int,
        outputs: int,
        kind: str,
        reach: int = 4,
        rows: int = 4096,
        row: int = 16,
        drop: float = 0.2,
    ) -> None:
        super().__init__()
        if kind not in STEMS:
            raise ValueError(f"stem must be one of {STEMS}, got {kind!r}")
        self.rows, self.drop = rows, drop
        self.embed = nn.Embedding(vocabulary, embedding)
        self.conv = nn.Conv1d(embedding, inner, reach) if kind == "conv" else None
        few = [0.1 * torch.randn(rows, row) for _ in range(reach - 1) if kind == "hashed"]
        self.tables = nn.ModuleList(nn.Embedding.from_pretrained(table, freeze=False) for table in few)
        entering = {"linear": embedding, "conv": inner, "hashed": embedding + row * (reach - 1)}[kind]
        self.linear = nn.Linear(entering, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """The injection of tokens (B, T).

        ValueError for what are no tokens; on a GPU and where compiled the range is not looked at.
        """
        self._check(tokens)
        e = self.embed(tokens)
        if self.conv is not None:
            past = functional.pad(e.transpose(1, 2), (self.conv.kernel_size[0] - 1, 0))
            e = functional.gelu(self.conv(past)).transpose(1, 2)
        if self.tables:
            found = torch.stack([table(key) for table, key in zip(self.tables, self._keys(tokens), strict=True)], dim=2)
            kept = functional.dropout(torch.ones_like(found[..., :1]), self.drop, self.training)
            e = torch.cat([e, (kept * found).flatten(2)], dim=2)
        return self.linear(e)

    def _check(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or not tokens.numel() or tokens.dtype != torch.long:
            raise ValueError(f"tokens must be int64 (B, T), not empty, got {tokens.dtype} of {tuple(tokens.shape)}")
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return
        least, most = (int(end) for end in tokens.aminmax())
        if least < 0 or most >= self.embed.num_embeddings:
            raise ValueError(
                f"tokens must be from 0 to {self.embed.num_embeddings - 1}, got some from {least} to {most}"
            )

    def _keys(self, tokens: Tensor) -> list[Tensor]:
        """Of each token, the rows of the n-grams that end there, n = 2, 3, …"""
        key, keys = tokens, []
        for back in range(1, len(self.tables) + 1):
            before = functional.pad(tokens + 1, (back, 0))[:, : tokens.shape[1]]  # 0: before the segment
            key = (key * _BASE + before) % _PRIME
            keys.append(key % self.rows)
        return keys
