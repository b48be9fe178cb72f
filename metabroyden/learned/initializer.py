"""A learned first iterate."""

from __future__ import annotations

from torch import Tensor, nn

from metabroyden.learned.layout import Layout, Mixer


class Initializer(nn.Module):
    """h = base + W₂ gelu(W₁ c), `Mixer`s by layout, W₂ zero-initialised: untrained, the start is the base.

    A narrow network in the spirit of Bai, Koltun & Kolter (ICLR 2022). c is the context feature in canonical form; the
    base is z0 where c is a native context, and f(z0) where c is that.
    """

    def __init__(self, layout: Layout, context_channels: int, width: int) -> None:
        super().__init__()
        self.inward = Mixer(layout, context_channels, width)
        self.outward = Mixer(layout, width, layout.channels, zero=True)

    def forward(self, context: Tensor) -> Tensor:
        """The correction to the base, (R, C, *S)."""
        return self.outward(nn.functional.gelu(self.inward(context)))
