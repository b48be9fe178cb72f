"""A stranger whole: stem (inputs → x), DEQ, head (equilibrium → outputs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import metabroyden as mb
from experiments.strangers import cells
from experiments.strangers.data import Data
from experiments.strangers.suite import Spec

SIDE = 4
"""Of the grid that images are pooled to before they are classified."""


class Model(nn.Module):
    """Stem, DEQ and head; `forward` gives outputs, `inject` what the DEQ's cell gets as x."""

    def __init__(self, stem: nn.Module, deq: mb.DEQ, head: nn.Module) -> None:
        super().__init__()
        self.stem, self.deq, self.head = stem, deq, head

    def inject(self, inputs: Any) -> Any:
        """x of inputs."""
        return self.stem(inputs)

    def forward(self, inputs: Any) -> Tensor:
        """Outputs: (B, classes), (B, T, classes), or images."""
        return self.of(self.inject(inputs))

    def of(self, x: Any) -> Tensor:
        """Outputs for contexts."""
        return self.head(self.deq(x, start(self.deq.cell, x)))


def start(cell: Any, x: Any) -> Any:
    """z0 by the cell's own method, or None for what `DEQ` takes."""
    return cell.start(x) if hasattr(cell, "start") else None


class Pair(nn.Module):
    """Images → x of two resolutions."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.fine, self.coarse = cells.conv(inputs, width), nn.Conv2d(inputs, 2 * width, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, width, H, W), (B, 2·width, H/2, W/2)."""
        side = images.shape[-1] // 4 * 4
        images = images[..., :side, :side]
        return self.fine(images), self.coarse(images)


class Patches(nn.Module):
    """Images → 16 patches as tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.places = nn.LazyLinear(width), nn.Parameter(0.1 * torch.randn(SIDE**2, width))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 16, width)."""
        step = images.shape[-1] // SIDE
        return self.linear(functional.unfold(images, step, stride=step)[..., : SIDE**2].transpose(1, 2)) + self.places


class Tokens(nn.Module):
    """Tokens → embeddings with learned places; with a mask beside them where they came with one."""

    def __init__(
        self, symbols: int, width: int, longest: int, *, places: bool = True, channels_first: bool = False
    ) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.places = nn.Parameter(0.5 * torch.randn(longest, width)) if places else None
        self.channels_first = channels_first

    def forward(self, inputs: Any) -> Any:
        """(B, T, width), or (B, width, T), or a dict with "x" and "pad"."""
        if isinstance(inputs, dict):
            return {"x": self(inputs["tokens"]), "pad": inputs["pad"]}
        x = self.symbols(inputs)
        x = x if self.places is None else x + self.places
        return x.transpose(1, 2).contiguous() if self.channels_first else x


class Nodes(nn.Module):
    """Features of nodes → x; the adjacency goes along."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A dict with "x" and "adjacency"."""
        return {"x": self.linear(inputs["features"]), "adjacency": inputs["adjacency"]}


class Pooled(nn.Module):
    """States that are images, or several → classes."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels * SIDE**2, outputs)

    def forward(self, z: Any) -> Tensor:
        """(B, classes)."""
        parts = (z,) if isinstance(z, Tensor) else z
        return self.linear(torch.cat([functional.adaptive_avg_pool2d(part, SIDE).flatten(1) for part in parts], dim=1))


class PerToken(nn.Module):
    """States along a sequence → outputs at each place."""

    def __init__(self, channels: int, outputs: int, *, channels_first: bool = False) -> None:
        super().__init__()
        self.linear, self.channels_first = nn.Linear(channels, outputs), channels_first

    def forward(self, z: Tensor) -> Tensor:
        """(B, T, outputs)."""
        return self.linear(z.transpose(1, 2) if self.channels_first else z)


class Last(nn.Module):
    """The last of several states."""

    def forward(self, z: tuple[Tensor, ...]) -> Tensor:
        """It."""
        return z[-1]


class _Ends(NamedTuple):
    cell: Callable[[int, str], nn.Module]
    stem: Callable[[Spec, Data], nn.Module]
    head: Callable[[Spec, Data], nn.Module]


def _longest(data: Data) -> int:
    return (data.train["tokens"] if isinstance(data.train, dict) else data.train).shape[1]


def _vectors(cell: Any) -> _Ends:
    flat = lambda spec, data: nn.Sequential(nn.Flatten(), nn.Linear(data.train[0].numel(), spec.width))  # noqa: E731
    return _Ends(cell, flat, lambda spec, data: nn.Linear(spec.width, data.outputs))


def _images(cell: Any) -> _Ends:
    def head(spec: Spec, data: Data) -> nn.Module:
        values = data.train_targets.is_floating_point()
        return cells.conv(spec.width, data.outputs) if values else Pooled(spec.width, data.outputs)

    return _Ends(cell, lambda spec, data: cells.conv(data.inputs, spec.width), head)


def _sequences(cell: Any, *, channels_first: bool = False, gates: int = 1, states: int = 1) -> _Ends:
    def stem(spec: Spec, data: Data) -> nn.Module:
        options = {"places": not channels_first, "channels_first": channels_first}
        return Tokens(data.inputs, gates * spec.width, _longest(data), **options)

    return _Ends(
        cell, stem, lambda spec, data: PerToken(states * spec.width, data.outputs, channels_first=channels_first)
    )


KINDS: dict[str, _Ends] = {
    "dense": _vectors(cells.Dense),
    "monotone": _vectors(cells.Monotone),
    "spectral": _vectors(cells.Spectral),
    "conv": _images(cells.ResidualConv),
    "deep": _images(cells.DeepResidual),
    "spectral-conv": _images(cells.SpectralConv),
    "multiscale": _Ends(
        cells.Multiscale,
        lambda spec, data: Pair(data.inputs, spec.width),
        lambda spec, data: Pooled(3 * spec.width, data.outputs),
    ),
    "trellis": _sequences(cells.Trellis, channels_first=True, gates=4, states=2),
    "gated": _sequences(cells.Gated, channels_first=True),
    "causal": _sequences(cells.Transformer),
    "padded": _sequences(cells.Transformer),
    "graph": _Ends(
        cells.Graph,
        lambda spec, data: Nodes(data.inputs, spec.width),
        lambda spec, data: PerToken(spec.width, data.outputs),
    ),
    "mixer": _Ends(
        cells.Mixer,
        lambda spec, data: Patches(spec.width),
        lambda spec, data: nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2 * spec.width, data.outputs)),
    ),
}
"""By the name of the cell; "mlp" beside them is a converted feed-forward network."""


def build(spec: Spec, data: Data, seed: int | None = None) -> Model:
    """The untrained model; its weights by the stranger's own seed, or by another one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed if seed is None else seed)
        if spec.cell == "mlp":
            network = cells.feedforward(data.train[0].numel(), spec.width, data.outputs)
            return Model(nn.Identity(), mb.to_deq(network, warn=False).deq, Last())
        ends = KINDS[spec.cell]
        solver = mb.Anderson() if spec.solver == "anderson" else mb.Broyden()
        backward = mb.Implicit(solver=mb.Broyden(memory=30), rtol=max(spec.rtol, 1e-2), max_nfe=30)
        cell = ends.cell(spec.width, spec.norm)
        deq = mb.DEQ(cell, solver=solver, backward=backward, rtol=spec.rtol, max_nfe=50, warn=False)
        model = Model(ends.stem(spec, data), deq, ends.head(spec, data))
        with torch.no_grad():
            model.stem(torch.utils._pytree.tree_map(lambda part: part[:1], data.train))  # sizes what is lazy
        return model
