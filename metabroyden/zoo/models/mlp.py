"""A feedforward classifier, trained as such, whose activations a DEQ then finds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from metabroyden.convert.network import to_deq
from metabroyden.zoo.models.base import EquilibriumModel, ImageConfig


@dataclass(frozen=True)
class MLPClassifierConfig(ImageConfig):
    """Sizes of an `MLPClassifier`: width and number of its hidden tanh layers."""

    width_field = "hidden"
    hidden: int = 64
    depth: int = 4


class MLPClassifier(EquilibriumModel, kind="mlp-classifier", config=MLPClassifierConfig):
    """Images (B, image_channels, side, side) → logits (B, classes): an MLP, converted to a DEQ by `to_deq`.

    The context is the flattened image, the state the tuple of all activations, logits last. In training mode the network
    computes itself: output and gradients are the same, for less. In evaluation mode the DEQ is solved.
    """

    def __init__(self, config: MLPClassifierConfig | None = None, **deq_options: Any) -> None:
        c = MLPClassifierConfig() if config is None else config
        if c.depth < 1:
            raise ValueError(f"depth must be at least 1 hidden layer, got {c.depth}")
        widths = [c.image_channels * c.side * c.side, *[c.hidden] * c.depth]
        layers = [[nn.Linear(a, b), nn.Tanh()] for a, b in itertools.pairwise(widths)]
        network = nn.Sequential(*itertools.chain(*layers), nn.Linear(c.hidden, c.classes))
        converted = to_deq(network, **deq_options)
        super().__init__(c, converted.cell)
        self.deq = converted.deq

    def inject(self, inputs: Tensor) -> Tensor:
        """The network's input: the DEQ's context."""
        return inputs.flatten(1)

    def classify(self, z: Any) -> Tensor:
        """The last activation."""
        return z[-1]

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of images: through the network in training mode, through a solve in evaluation mode."""
        if not self.training:
            return super().forward(inputs)
        activation = self.inject(inputs)
        for stage in self.cell.stages:  # type: ignore[union-attr]
            activation = stage(activation)
        return activation
