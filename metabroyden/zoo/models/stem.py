"""Tokens → injection: what of a sequence model's input is computed once a segment, outside the fixed-point problem."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

STEMS = ("linear", "conv", "hashed")  # what a stem may be

_BASE, _PRIME = 1_000_003, 2**31 - 1  # of the rolling hash: products stay below 2^63


class TokenStem(nn.Module):
    """Tokens (B, T) → injection (B, T, outputs): embedding, then a linear map, or more of the last few tokens before it.

    "linear": U e_t + b, as in DEQ-TrellisNet and DEQ-Transformer (Bai, Kolter & Koltun, NeurIPS 2019), the token alone.
    "conv": U gelu(W * e)_t + b, the token and the `reach` − 1 before it, as in the character convolutions of Al-Rfou et
    al. 2019: the equilibrium then need not find out what the last few letters were.
    "hashed": U (e_t, a_t², …, a_tʳ) + b with r = `reach`, where aⁿ is the row of a table that a hash of the last n tokens
    points to (Svenstrup, Hansen & Winther, Hash Embeddings, NeurIPS 2017): what is known of an n-gram costs no arithmetic,
    and several may share a row. In training mode each row is left out with probability `drop`, as n-grams of other texts
    will be unknown. With `recent` > 0 it has (b_t², …, b_tʳ) beside these: bⁿ is a row for the token that followed when the
    last n tokens were read the last time, in this segment or among so many before it, or for none. What a text repeats, its
    names above all, need then not be remembered by states (the cache of Grave, Joulin & Usunier, ICLR 2017, as an input).

    Before a segment stand the last `back` tokens of the one before it; none, written −1, at a text's beginning.

    There are `vocabulary` tokens, e_t has `embedding` coordinates, the convolution `inner` channels and `reach` taps, the
    table `rows` rows of `row` coordinates. ValueError for a kind not in `STEMS`, or sizes that are not positive (`reach` at
    least 2 for n-grams, `recent` at least 0).
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
        recent: int = 0,
    ) -> None:
        super().__init__()
        if kind not in STEMS:
            raise ValueError(f"stem must be one of {STEMS}, got {kind!r}")
        if reach < (2 if kind == "hashed" else 1) or rows < 1 or recent < 0:
            raise ValueError(f"reach, rows and recent of a {kind} stem cannot be {reach}, {rows} and {recent}")
        self.drop = drop
        self.back = {"linear": 0, "conv": reach - 1, "hashed": max(reach - 1, recent)}[kind]
        self.embed = nn.Embedding(vocabulary, embedding)
        self.conv = nn.Conv1d(embedding, inner, reach) if kind == "conv" else None
        few = 0.1 * torch.randn(rows, row) if kind == "hashed" else None
        self.table = None if few is None else nn.Embedding.from_pretrained(few, freeze=False)
        self.orders = reach - 1
        follows = self.table is not None and recent > 0
        self.follow = nn.Embedding(self.orders * (vocabulary + 1), row) if follows else None
        rest = row * self.orders * (2 if follows else 1)
        entering = {"linear": embedding, "conv": inner, "hashed": embedding + rest}[kind]
        self.linear = nn.Linear(entering, outputs)

    def forward(self, tokens: Tensor, before: Tensor | None = None) -> Tensor:
        """The injection of tokens (B, T), given those before them (B, back) or None at a text's beginning.

        ValueError for what are no tokens; on a GPU and where compiled the range is not looked at.
        """
        self._check(tokens, "tokens", 0)
        if before is None:
            before = tokens.new_full((len(tokens), self.back), -1)
        if before.numel():
            self._check(before, "tokens before them", -1)
        read = torch.cat([before, tokens], dim=1)
        e = self.embed(tokens)
        if self.conv is not None:
            known = self.embed(read.clamp_min(0)) * (read >= 0).unsqueeze(2)
            e = functional.gelu(self.conv(known.transpose(1, 2))).transpose(1, 2)
        if self.table is not None:
            keys = self._keys(read)
            found = self.table(keys[:, self.back :] % self.table.num_embeddings)
            kept = functional.dropout(torch.ones_like(found[..., :1]), self.drop, self.training)
            e = torch.cat([e, (kept * found).flatten(2)], dim=2)
            if self.follow is not None:
                places = (self.follow.num_embeddings // self.orders) * torch.arange(self.orders, device=tokens.device)
                e = torch.cat([e, self.follow(followers(read, keys)[:, self.back :] + 1 + places).flatten(2)], dim=2)
        return self.linear(e)

    def _check(self, tokens: Tensor, name: str, lowest: int) -> None:
        if tokens.ndim != 2 or not tokens.numel() or tokens.dtype != torch.long:
            raise ValueError(f"{name} must be int64 (B, T), not empty, got {tokens.dtype} of {tuple(tokens.shape)}")
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return
        (least, most), size = (int(end) for end in tokens.aminmax()), self.embed.num_embeddings
        if least < lowest or most >= size:
            raise ValueError(f"{name} must be from {lowest} to {size - 1}, got some from {least} to {most}")

    def _keys(self, read: Tensor) -> Tensor:
        """Of each token (B, L), hashes (B, L, orders) of the n-grams that end there, n = 2, 3, …"""
        known = read + 1  # 0: before the text
        key, keys = known, []
        for n in range(1, self.orders + 1):
            key = (key * _BASE + functional.pad(known, (n, 0))[:, : read.shape[1]]) % _PRIME
            keys.append(key)
        return torch.stack(keys, dim=2)


def followers(read: Tensor, keys: Tensor) -> Tensor:
    """Of tokens (B, L) with keys (B, L, orders): the token after the last earlier place of the same key, −1 for none."""
    found, place = keys.sort(dim=1, stable=True)
    again = found[:, 1:] == found[:, :-1]
    earlier = functional.pad(torch.where(again, place[:, :-1], -1), (0, 0, 1, 0), value=-1)
    last = torch.empty_like(place).scatter_(1, place, earlier)
    after = read.unsqueeze(2).expand_as(last).gather(1, last.clamp_min(0) + (last >= 0).long())
    return torch.where(last >= 0, after, -1)
