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
    al. 2019: the equilibrium then need not find out what the last few letters were.
    "hashed": U (e_t, a_t², …, a_tʳ) + b with r = `reach`, where aⁿ is a row of a table, the one that a hash of the last n
    tokens points to (Svenstrup, Hansen & Winther, Hash Embeddings, NeurIPS 2017): what is known of an n-gram costs no
    arithmetic, and several may share a row. In training mode each row is left out with probability `drop`, as n-grams of
    other texts will be unknown.

    Before a segment stand the last `back` tokens of the one before it; none, written −1, at a text's beginning.

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
        self.rows, self.drop, self.back = rows, drop, 0 if kind == "linear" else reach - 1
        self.embed = nn.Embedding(vocabulary, embedding)
        self.conv = nn.Conv1d(embedding, inner, reach) if kind == "conv" else None
        few = [0.1 * torch.randn(rows, row) for _ in range(reach - 1) if kind == "hashed"]
        self.tables = nn.ModuleList(nn.Embedding.from_pretrained(table, freeze=False) for table in few)
        entering = {"linear": embedding, "conv": inner, "hashed": embedding + row * (reach - 1)}[kind]
        self.linear = nn.Linear(entering, outputs)

    def forward(self, tokens: Tensor, before: Tensor | None = None) -> Tensor:
        """The injection of tokens (B, T), given those before them (B, back) or None at a text's beginning.

        ValueError for what are no tokens; on a GPU and where compiled the range is not looked at.
        """
        self._check(tokens)
        if before is None:
            before = tokens.new_full((len(tokens), self.back), -1)
        read = torch.cat([before, tokens], dim=1)
        e = self.embed(tokens)
        if self.conv is not None:
            known = self.embed(read.clamp_min(0)) * (read >= 0).unsqueeze(2)
            e = functional.gelu(self.conv(known.transpose(1, 2))).transpose(1, 2)
        if self.tables:
            found = torch.stack([table(key) for table, key in zip(self.tables, self._keys(read), strict=True)], dim=2)
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

    def _keys(self, read: Tensor) -> list[Tensor]:
        """Of each token but the first `back`, the rows of the n-grams that end there, n = 2, 3, …"""
        count, keys = read.shape[1] - self.back, []
        key = read[:, self.back :]
        for n in range(1, self.back + 1):
            earlier = read.narrow(1, self.back - n, count) + 1  # 0: before the text
            key = (key * _BASE + earlier) % _PRIME
            keys.append(key % self.rows)
        return keys
