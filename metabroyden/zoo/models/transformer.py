"""DEQ-Transformer: one block of causal relative self-attention, weight-tied over depth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from metabroyden.zoo.models.base import LanguageConfig, LanguageModel


class TransformerCell(nn.Module):
    """f(z, x) = norm(y + FF(y)), y = norm(z + x⁰ + W_o attend(q, k, v)), FF(y) = W₂ gelu(W₁ y), layer norms of a token.

    (q, k, v)_t = W_qkv z_t + x¹_t, with the injection x = (x⁰, x¹) added to queries, keys and values as in DEQ-Transformer
    (Bai, Kolter & Koltun, NeurIPS 2019, section 4.2), and to the residual: else, while attention says little, y is the
    norm of z and little more, f is all but the identity and its equilibrium hard to find. Token i attends to itself, to
    those before it and to the memory, M tokens of the equilibrium before (keys and values from W_qkv alone), with the
    scores of Transformer-XL (Dai et al., ACL 2019, section 3.3):

        ((q_i + u)ᵀ k_j + (q_i + v)ᵀ W_r r_{i−j}) / √(width / heads),

    r_n the sinusoids of the distance n. The same block at every depth: Universal Transformers (Dehghani et al., ICLR
    2019). A memory of zeros, at a text's beginning, is taken as it is: tokens with nothing to tell.

    The context is (x, memory): (B, T, 4·width) and (B, M, width); the state is (B, T, width).

    Args:
        width: coordinates of a token, even and divided by `heads`.
        heads: of the attention.
        inner: coordinates of W₁ y.
    """

    layout = "ntc"

    def __init__(self, width: int = 128, heads: int = 4, inner: int = 256) -> None:
        super().__init__()
        if width % 2 or width % heads:
            raise ValueError(f"width must be even and divided by heads, got {width} and {heads}")
        self.width, self.heads = width, heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.position = nn.Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(0.1 * torch.randn(width))  # u
        self.position_bias = nn.Parameter(0.1 * torch.randn(width))  # v
        self.out = nn.Linear(width, width, bias=False)
        self.ff1, self.ff2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def initial_state(self, context: tuple[Tensor, Tensor]) -> Tensor:
        """Zeros, (B, T, width)."""
        injection, _ = context
        dtype = torch.promote_types(injection.dtype, torch.float32)  # under autocast the injection is half of it
        return injection.new_zeros(*injection.shape[:2], self.width, dtype=dtype)

    def forward(self, z: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """f(z, context), shaped like z."""
        injection, memory = context
        entering, projected = injection.split([self.width, 3 * self.width], dim=2)
        q, k, v = (self.qkv(z) + projected).chunk(3, dim=2)
        past_k, past_v = functional.linear(memory, self.qkv.weight[self.width :]).chunk(2, dim=2)
        heard = self.attend(q, torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1))
        y = self.norm1(z + entering + self.out(heard))
        return self.norm2(y + self.ff2(functional.gelu(self.ff1(y))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the last T of L tokens hear, (B, T, width), of queries (B, T, width) and keys and values (B, L, width)."""
        queries, length = q.shape[1], k.shape[1]
        r = self._heads(self.position(sinusoids(length, self.width, like=q)).unsqueeze(0))
        key, value = self._heads(k), self._heads(v)
        content = self._heads(q + self.content_bias) @ key.transpose(2, 3)
        position = shifted(self._heads(q + self.position_bias) @ r.transpose(2, 3))
        future = torch.ones(queries, length, dtype=torch.bool, device=q.device).triu(length - queries + 1)
        scores = (content + position) / math.sqrt(self.width // self.heads)
        weights = scores.masked_fill(future, -math.inf).softmax(dim=3)
        return (weights @ value).transpose(1, 2).flatten(2)

    def _heads(self, v: Tensor) -> Tensor:
        """(B, T, width) → (B, heads, T, width / heads)."""
        return v.unflatten(2, (self.heads, -1)).transpose(1, 2)


def sinusoids(length: int, width: int, *, like: Tensor) -> Tensor:
    """r (length, width) of the distances length − 1, …, 0, sines then cosines, in the dtype and on the device of `like`.

    The angles are computed in float32 at least: bfloat16 does not tell a distance of 95 from one of 96.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    distance = torch.arange(length - 1, -1, -1, dtype=dtype, device=like.device)
    rate = torch.exp(torch.arange(0, width, 2, dtype=dtype, device=like.device) * (-math.log(10000.0) / width))
    angle = distance[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(like.dtype)


def shifted(scores: Tensor) -> Tensor:
    """Scores (…, T, L) by distance L − 1, …, 0 → by key: entry (i, j) moves from the place of the distance between the
    i-th of the last T tokens and token j (Dai et al. 2019, appendix B). Entries of the future are without meaning."""
    *batch, queries, length = scores.shape
    padded = functional.pad(scores, (1, 0)).reshape(*batch, length + 1, queries)
    return padded[..., 1:, :].reshape(*batch, queries, length)


@dataclass(frozen=True)
class DEQTransformerConfig(LanguageConfig):
    """Sizes of a `DEQTransformer`: those of its cell, and tokens of memory."""

    width: int = 128
    heads: int = 4
    inner: int = 256
    memory: int = 32

    def narrowed(self, width: int) -> Self:
        """The same with so wide a state, rounded up to what heads divide, and an inner width in proportion."""
        unit = math.lcm(2, self.heads)
        width = -(-width // unit) * unit
        return replace(self, width=width, inner=max(1, width * self.inner // self.width))


class DEQTransformer(LanguageModel, kind="transformer", config=DEQTransformerConfig):
    """Tokens (B, T) → logits (B, T, vocabulary): embedding and stem, DEQ with a `TransformerCell`, linear head.

    It remembers the states of the last M tokens, (B, M, width).
    """

    def __init__(self, config: DEQTransformerConfig | None = None, **deq_options: Any) -> None:
        c = DEQTransformerConfig() if config is None else config
        super().__init__(c, TransformerCell(c.width, c.heads, c.inner), **deq_options)
        self.channels, self.remembered = c.width, c.memory
        self.stem = c.make_stem(c.width)
        self.head = nn.Linear(c.width, c.vocabulary)
