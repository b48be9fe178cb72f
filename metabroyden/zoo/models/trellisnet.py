"""TrellisNet at equilibrium: a causal convolution with an LSTM's gates, weight-tied over depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.zoo.models.base import LanguageConfig, LanguageModel


class TrellisCell(nn.Module):
    """f((c, h), x̂): the four gates (i, f, g, o) = W₁ h_{t−d} + W₂ h_t + x̂_t, then

        c⁺_t = σ(f_t) ⊙ c_{t−d} + σ(i_t) ⊙ tanh(g_t),    h⁺_t = σ(o_t) ⊙ tanh(c⁺_t).

    A causal convolution of two taps, d tokens apart, with an LSTM's gates: the cell state comes from the token d back
    (Bai, Kolter & Koltun, TrellisNet, ICLR 2019, section 5.1), depth is the solver's (Bai et al., Deep Equilibrium Models,
    NeurIPS 2019, section 4). Before the first token stands the memory, the last d tokens of the equilibrium before: so
    segments end to end have the equilibrium of the whole. An evaluation carries a token's news d tokens further: plain
    iteration needs T/d of them and a few more. f sees every d-th token alone: beyond d = 1 the injection is to tell of
    those between ("conv" or "hashed" of `TokenStem`).

    No normalisation, as h is bounded by the gates, and c by the forget gate. f at a token depends on that token's h and
    on tokens before it: so an equilibrium is found token by token, each the fixed point of h ↦ σ(o) ⊙ tanh(c), a
    continuous map of a cube into itself, which has one.

    The context is (x̂, memory): (B, 4·channels, T) and (B, 2·channels, d); the state (B, 2·channels, T) is (c, h).

    Args:
        channels: of c, and of h.
        dilation: d.
    """

    layout = "nct"

    def __init__(self, channels: int = 128, dilation: int = 1) -> None:
        super().__init__()
        if channels < 1 or dilation < 1:
            raise ValueError(f"channels and dilation must be at least 1, got {channels} and {dilation}")
        self.channels, self.dilation = channels, dilation
        self.conv = nn.Conv1d(channels, 4 * channels, 2, dilation=dilation, bias=False)

    def initial_state(self, context: tuple[Tensor, Tensor]) -> Tensor:
        """Zeros, (B, 2·channels, T)."""
        injection, _ = context
        dtype = torch.promote_types(injection.dtype, torch.float32)  # under autocast the injection is half of it
        return injection.new_zeros(len(injection), 2 * self.channels, injection.shape[2], dtype=dtype)

    def forward(self, z: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """f(z, context), shaped like z."""
        injection, memory = context
        c, h = torch.cat([memory, z], dim=2).chunk(2, dim=1)
        i, f, g, o = (self.conv(h) + injection).chunk(4, dim=1)
        new = torch.sigmoid(f) * c[:, :, : z.shape[2]] + torch.sigmoid(i) * torch.tanh(g)
        return torch.cat([new, torch.sigmoid(o) * torch.tanh(new)], dim=1)


@dataclass(frozen=True)
class TrellisNetConfig(LanguageConfig):
    """Sizes of a `TrellisNet`: channels and dilation of its cell."""

    width_field = "channels"
    stem: str = "conv"
    channels: int = 128
    dilation: int = 2


class TrellisNet(LanguageModel, kind="trellisnet", config=TrellisNetConfig):
    """Tokens (B, T) → logits (B, T, vocabulary): embedding and stem, DEQ with a `TrellisCell`, linear head on h.

    It remembers the states of the last `dilation` tokens, (B, 2·channels, dilation).
    """

    def __init__(self, config: TrellisNetConfig | None = None, **deq_options: Any) -> None:
        c = TrellisNetConfig() if config is None else config
        super().__init__(c, TrellisCell(c.channels, c.dilation), **deq_options)
        self.channels, self.remembered = 2 * c.channels, c.dilation
        self.stem = c.make_stem(c.channels)
        self.head = nn.Linear(c.channels, c.vocabulary)

    def classify(self, z: Any) -> Tensor:
        """Logits of a state."""
        return self.head(z[:, self.config.channels :].transpose(1, 2))
