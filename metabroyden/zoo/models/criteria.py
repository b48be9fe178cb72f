"""What models are trained for: batches with their losses, and the score on a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metabroyden.zoo.data.images import ImageData, ImageSplit, shift
from metabroyden.zoo.data.text import TextData
from metabroyden.zoo.models.base import LanguageModel


def unaltered(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images as they are."""
    return images


@dataclass(frozen=True)
class Images:
    """Classification by cross-entropy.

    Attributes:
        augment: of training images; a shift of up to a pixel unless told otherwise.
        batches: of an epoch, at most, from all training images; None for as many as there are.
        limit: validation images that are looked at, at most.
    """

    data: ImageData
    augment: Callable[[Tensor, torch.Generator], Tensor] = shift
    batches: int | None = None
    limit: int | None = None
    metric = "accuracy"
    higher = True

    def steps(self, batch: int) -> int:
        """Whole batches of an epoch."""
        count = len(self.data.train.images)
        if batch > count:
            raise ValueError(f"a batch of {batch} is more than the {count} training images")
        return count // batch if self.batches is None else min(self.batches, count // batch)

    def losses(self, model: Any, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Mean cross-entropies over one pass through the training images (or its beginning) in random order."""
        split, device = self.data.train, device_of(model)
        order = torch.randperm(len(split.images), generator=generator)
        for index in order[: self.steps(batch) * batch].split(batch):
            images = self.augment(split.images[index], generator).to(device)
            yield nn.functional.cross_entropy(model(images).float(), split.labels[index].to(device))

    def score(self, model: Any, split: str) -> float:
        """Share of a split's images that the model gets right; of validation at most `limit` images."""
        part: ImageSplit = getattr(self.data, split)
        return accuracy(model, part.first(self.limit) if split == "validation" else part)


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], split: ImageSplit, batch: int = 1000) -> float:
    """Share of a split's images that the model gets right."""
    if isinstance(model, nn.Module):
        model.eval()
    device, right = device_of(model), 0
    for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
        right += int((model(images.to(device)).argmax(dim=1).cpu() == labels).sum())
    return right / len(split.labels)


def device_of(model: Any) -> torch.device:
    """Where a model's parameters are; the CPU for what has none."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


@dataclass(frozen=True)
class NextToken:
    """Prediction of the token that follows, in nats for training and in bits for the score.

    Attributes:
        length: tokens of a segment.
        segments: consecutive ones in a stretch, each with the memory of the one before; the first has that of a text's
            beginning.
        stretches: of an epoch, each from random places; long ones let a model live in the plays at hand.
        limit: validation tokens that are looked at, rounded up to whole batches of segments.
    """

    data: TextData
    length: int = 64
    segments: int = 10
    stretches: int = 25
    limit: int = 65_536
    higher = False

    @property
    def metric(self) -> str:
        """Bits per character, or per word."""
        return f"bits per {self.data.unit}"

    def steps(self, batch: int) -> int:
        """Segments of an epoch."""
        return self.segments * self.stretches

    def losses(self, model: LanguageModel, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Mean cross-entropies of the segments of stretches that begin at random places in the training split."""
        for _ in range(self.stretches):
            stretch = self.data.train.random_streams(batch, self.length, self.segments, generator)
            for logits, targets in _read(model, stretch):
                yield nn.functional.cross_entropy(logits.float(), targets)

    def score(self, model: LanguageModel, split: str) -> float:
        """Bits per token; of validation at most `limit` tokens."""
        return bits_per_token(model, self.data, split, self.length, self.limit if split == "validation" else None)


class Criterion(Protocol):
    """What is trained for: the `losses` of an epoch's `steps`, and the `score` on a split, in `metric`."""

    @property
    def metric(self) -> str:
        """What the score is."""

    @property
    def higher(self) -> bool:
        """Whether a higher score is better."""

    def steps(self, batch: int) -> int:
        """Batches of an epoch."""

    def losses(self, model: Any, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The training losses of an epoch, one a batch."""

    def score(self, model: Any, split: str) -> float:
        """The score of a model on "validation" or "test"."""


OfFamily = Images | NextToken
"""What families are trained for, on data of their own."""


def _read(model: LanguageModel, segments: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets, token by token, of consecutive segments, each read with the memory of the one before."""
    memory, device = None, device_of(model)
    for tokens, targets in segments:
        tokens = tokens.to(device)
        z = model.deq(model.inject(tokens, memory))
        memory = model.remember(z, tokens, memory)
        yield model.classify(z).flatten(0, 1), targets.to(device).flatten()


@torch.no_grad()
def bits_per_token(
    model: LanguageModel, data: TextData, split: str, length: int, limit: int | None = None, batch: int = 64
) -> float:
    """Mean −log₂ of the probabilities that the model gives the tokens of a split, read in `batch` parallel streams."""
    model.eval()
    nats, count = 0.0, 0
    for logits, targets in _read(model, getattr(data, split).streams(batch, length)):
        nats += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += targets.numel()
        if limit is not None and count >= limit:
            break
    return nats / count / math.log(2)
