"""What transformers among the workloads are trained for: samples that are drawn as they are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from experiments.bench.runner import Row
from metabroyden.zoo.models.fit import Training, history, train

SCORED_ON = 8
"""Batches that a score is the mean of."""


def missed(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the targets there are, from 0; classes last."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


@dataclass(frozen=True)
class Drawn:
    """A `Criterion`. Subclasses give `draw`, `worth`, `metric` and `higher`.

    Attributes:
        batches: of an epoch.
    """

    batches: int = 100
    metric: ClassVar[str]
    higher: ClassVar[bool]
    worth: ClassVar[Any]
    """(logits, targets) ↦ (B,), higher is better."""
    scored: ClassVar[int]
    """Samples of a batch that is scored."""

    def draw(self, split: str, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """(*what the model takes, targets), each with the samples first."""
        raise NotImplementedError

    def steps(self, batch: int) -> int:
        """Batches of an epoch."""
        return self.batches

    def losses(self, model: Any, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Mean cross-entropies."""
        for _ in range(self.batches):
            *inputs, targets = self.draw("train", batch, generator)
            yield missed(model(*inputs).float(), targets)

    @torch.no_grad()
    def score(self, model: Any, split: str) -> float:
        """The mean worth, or minus that where a lower score is better."""
        model.eval()
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(SCORED_ON):
            *inputs, targets = self.draw(split, self.scored, generator)
            found.append(self.worth(model(*inputs), targets))
        mean = float(torch.cat(found).mean())
        return mean if self.higher else -mean


def trained(model: Any, criterion: Drawn, training: Training, path: Path) -> Row:
    """Train a model; interrupted, it goes on from its last epoch, which is at `path`. Facts about it."""
    train(lambda: model, criterion, training, path=path)
    score = criterion.score(model, "test")
    return {"seconds": round(history(path)[-1].seconds), "steps": criterion.batches * training.epochs, "score": score}
