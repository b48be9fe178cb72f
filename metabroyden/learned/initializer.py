"""A learned first iterate."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from metabroyden.learned.layout import Layout
from metabroyden.learned.mixer import Mixer
from metabroyden.learned.wiring import Wiring


class Initializer(nn.Module):
    """h = base + W_d gelu(… gelu(W₁ c)), `Mixer`s by layout, W_d zero-initialised: untrained, the start is the base.

    A narrow network in the spirit of Bai, Koltun & Kolter (ICLR 2022), who take two maps and a kernel of 3: convolutions
    for images, causal ones for sequences, dense maps for vectors. c is the context feature in canonical form; the base is z0
    where c is the input, and f(z0) where c is that. It has `width` inner channels and d ≥ 2 maps, with odd `kernels`.
    """

    def __init__(self, layout: Layout, context_channels: int, width: int, kernels: tuple[int, ...] = (3, 3)) -> None:
        super().__init__()
        first, *between, last = kernels
        self.inward = Mixer(layout, context_channels, width, kernel=first)
        self.between = nn.ModuleList(Mixer(layout, width, width, kernel=kernel) for kernel in between)
        self.outward = Mixer(layout, width, layout.channels, kernel=last, zero=True)

    def forward(self, context: Tensor, wiring: Wiring | None = None) -> Tensor:
        """The correction to the base, (R, C, *S)."""
        value = functional.gelu(self.inward(context, wiring=wiring))
        for mixer in self.between:
            value = functional.gelu(mixer(value, wiring=wiring))
        return self.outward(value, wiring=wiring)
