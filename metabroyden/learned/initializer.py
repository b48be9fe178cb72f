"""A learned first iterate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from metabroyden.learned.layout import Layout
from metabroyden.learned.mixer import Mixer
from metabroyden.learned.wiring import Wiring

HEAD = 16
"""Channels of a head."""


class Attention(nn.Module):
    """A transformer layer with its norms in front, y + FF(norm y), y = v + attend(norm v), over canonical tokens.

    Heads of `HEAD` channels; nothing looks ahead in a causal layout, and nobody sees padding. It has `width` channels, twice
    as many inside FF.
    """

    def __init__(self, layout: Layout, width: int) -> None:
        super().__init__()
        if not layout.by_token:
            raise ValueError(f"attention is over tokens; layout {layout.kind!r} has none")
        self.causal, self.heads = layout.causal, max(1, width // HEAD)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, value: Tensor, wiring: Wiring | None = None) -> Tensor:
        """(R, width, T) → (R, width, T)."""
        tokens = value.transpose(1, 2)
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(tokens)).chunk(3, dim=2)
        )
        places = None if wiring is None or wiring.mask is None else wiring.mask
        seen = None if places is None else (places > 0)[:, None, None, :]
        if self.causal and seen is not None:
            seen = seen & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        heard = functional.scaled_dot_product_attention(q, k, v, seen, is_causal=self.causal and seen is None)
        tokens = tokens + self.out(heard.transpose(1, 2).flatten(2))
        tokens = tokens + self.outer(functional.gelu(self.inner(self.norm2(tokens))))
        return tokens.transpose(1, 2)


class Initializer(nn.Module):
    """h = base + W_d gelu(… gelu(W₁ c)), `Mixer`s by layout, W_d zero-initialised: untrained, the start is the base.

    A narrow network in the spirit of Bai, Koltun & Kolter (ICLR 2022), who take two maps and a kernel of 3: convolutions
    for images, causal ones for sequences, dense maps for vectors. c is the context feature in canonical form; the base is z0
    where c is the input, and f(z0) where c is that. It has `width` inner channels and d ≥ 2 maps, with odd `kernels`, and
    `layers` of attention before the last map.
    """

    def __init__(
        self, layout: Layout, context_channels: int, width: int, kernels: tuple[int, ...] = (3, 3), layers: int = 0
    ) -> None:
        super().__init__()
        first, *between, last = kernels
        self.inward = Mixer(layout, context_channels, width, kernel=first)
        self.between = nn.ModuleList(Mixer(layout, width, width, kernel=kernel) for kernel in between)
        self.attention = nn.ModuleList(Attention(layout, width) for _ in range(layers))
        self.outward = Mixer(layout, width, layout.channels, kernel=last, zero=True)

    def forward(self, context: Tensor, wiring: Wiring | None = None) -> Tensor:
        """The correction to the base, (R, C, *S)."""
        value = functional.gelu(self.inward(context, wiring=wiring))
        for mixer in self.between:
            value = functional.gelu(mixer(value, wiring=wiring))
        for layer in self.attention:
            value = layer(value, wiring)
        return self.outward(value, wiring=wiring)
