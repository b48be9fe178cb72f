"""Cells of sequences and graphs, whose state has two axes: `layout` says which axis is which, as `fit_solver` asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.strangers.cells import norm


class Trellis(nn.Module):
    """TrellisNet's: the gates of an LSTM come from a causal convolution; cell and hidden state are side by side.

    x has the channels of the gates.
    """

    layout = "nct"

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.gates = nn.Conv1d(width, 4 * width, 2)

    def start(self, x: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x[:, : x.shape[1] // 2])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """(B, 2·width, T) of x (B, 4·width, T)."""
        cell, hidden = z.chunk(2, dim=1)
        keep, write, new, show = (self.gates(functional.pad(hidden, (1, 0))) + x).chunk(4, dim=1)
        before = functional.pad(cell, (1, -1))
        cell = torch.sigmoid(keep) * before + torch.sigmoid(write) * torch.tanh(new)
        return torch.cat([cell, torch.sigmoid(show) * torch.tanh(cell)], dim=1)


class Gated(nn.Module):
    """A gated update along a sequence: (1 − u)·z + u·tanh(conv(z) + x), u of a second causal convolution."""

    layout = "nct"

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.new, self.gate, self.norm = nn.Conv1d(width, width, 3), nn.Conv1d(width, width, 3), norm(kind, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """(B, width, T)."""
        seen = functional.pad(z, (2, 0))
        update = torch.sigmoid(self.gate(seen))
        return (1 - update) * z + update * torch.tanh(self.new(seen) + x)


class Transformer(nn.Module):
    """A post-norm block of four heads.

    It is causal where x is a tensor. A dict "x", "pad" brings a mask, True where there is no token.
    """

    layout = "ntc"

    def __init__(self, width: int, kind: str, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def start(self, x: Any) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x["x"] if isinstance(x, dict) else x)

    def forward(self, z: Tensor, x: Any) -> Tensor:
        """(B, T, width)."""
        injected, pad = (x["x"], x["pad"]) if isinstance(x, dict) else (x, None)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(z).chunk(3, dim=2))
        mask = None if pad is None else ~pad[:, None, None, :]
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=pad is None)
        middle = self.first(z + injected + self.out(seen.transpose(1, 2).flatten(2)))
        return self.second(middle + self.narrow(torch.relu(self.widen(middle))))


class Graph(nn.Module):
    """Message passing; x is a dict of the injection "x", like the state, and "adjacency" (B, N, N), normalised."""

    layout = "ntc"

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width) if kind == "layer" else nn.Identity()

    def start(self, x: dict[str, Tensor]) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x["x"])

    def forward(self, z: Tensor, x: dict[str, Tensor]) -> Tensor:
        """(B, N, width)."""
        return self.norm(torch.tanh(self.own(z) + x["adjacency"] @ self.others(z) + x["x"]))
