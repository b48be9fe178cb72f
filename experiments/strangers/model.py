"""A stranger whole: stem (inputs → x), DEQ, head (equilibrium → outputs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import metabroyden as mb
from experiments.strangers import cells, sequences
from experiments.strangers.ends import SIDE, Last, Nodes, Pair, Patches, PerToken, Pooled, Tokens
from experiments.strangers.generated import Data
from experiments.strangers.suite import Spec


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
    "trellis": _sequences(sequences.Trellis, channels_first=True, gates=4, states=2),
    "gated": _sequences(sequences.Gated, channels_first=True),
    "causal": _sequences(sequences.Transformer),
    "padded": _sequences(sequences.Transformer),
    "graph": _Ends(
        sequences.Graph,
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
