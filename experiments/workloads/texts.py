"""Transformers as PyTorch has them: an encoder of padded lines, and a wide causal one, on Shakespeare's plays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import metabroyden as mb
from experiments.bench.runner import Row
from experiments.workloads.brought import Brought
from experiments.workloads.drawn import Drawn, missed, trained
from metabroyden.zoo.data.shakespeare import load_shakespeare
from metabroyden.zoo.data.text import TextData
from metabroyden.zoo.models.fit import Training
from metabroyden.zoo.models.transformer import sinusoids

CONTEXTS = 600
TRAIN, TEST, LESSON = 1, 2, 3
"""Seeds of contexts to fit to, of those to measure on, and of texts to co-train on."""
HIDDEN = 0.2
"""Share of a line's characters that are to be guessed, beside its first one."""


class Block(nn.Module):
    """f(z, x) = layer(z + x): PyTorch's own layer, made a deep equilibrium; x is `mb.Padded`, embeddings, or a
    tuple that begins with them.

    Args:
        width: coordinates of a token.
        heads: of the attention.
        causal: whether tokens see only those before them.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.layout = "ntc" if causal else "tokens"
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True
        )

    def initial_state(self, x: Any) -> Tensor:
        """Zeros, for `mb.Padded`, embeddings (B, T, width), or a tuple that begins with them."""
        return torch.zeros_like(x[0] if isinstance(x, tuple) else x)

    def forward(self, z: Tensor, x: Any) -> Tensor:
        """f(z, x), (B, T, width)."""
        if isinstance(x, mb.Padded):
            return self.layer(z + x.x, src_key_padding_mask=~x.mask)
        x = x[0] if isinstance(x, tuple) else x
        future = nn.Transformer.generate_square_subsequent_mask(z.shape[1], device=z.device, dtype=z.dtype)
        return self.layer(z + x, src_mask=future, is_causal=True)


class Encoder(nn.Module):
    """Characters (B, T) ↦ logits (B, T, vocabulary): embeddings, the equilibrium of a `Block`, a linear map."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(sinusoids(length, width, like=self.embed.weight))
        self.deq: Any = mb.DEQ(
            Block(width, heads, causal), solver=mb.Anderson(), backward=mb.Phantom(steps=4), rtol=1e-2, max_nfe=24,
            warn=False,
        )  # fmt: skip
        self.head = nn.Linear(width, vocabulary)

    def inject(self, tokens: Tensor, mask: Tensor | None = None) -> Any:
        """The context of the equilibrium."""
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        return x if mask is None else mb.Padded(x, mask)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits."""
        return self.head(self.deq(self.inject(tokens, mask)))


@cache
def plays() -> TextData:
    """Shakespeare's, as characters."""
    return load_shakespeare()


@cache
def lines(split: str, shortest: int, longest: int) -> list[Tensor]:
    """The lines of a split that have so many characters."""
    data = plays()
    tokens, end = getattr(data, split).tokens, data.vocabulary.index("\n")
    ends = (tokens == end).nonzero().flatten().tolist()
    found = [tokens[start + 1 : stop] for start, stop in pairwise(ends)]
    return [line for line in found if shortest <= len(line) <= longest]


def guessed(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) share of the targets that are most likely."""
    asked = targets >= 0
    return ((logits.argmax(2) == targets) & asked).sum(1).double() / asked.sum(1)


def bits(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) −bits per character, higher is better."""
    return -functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1) / math.log(2)


@dataclass(frozen=True)
class Lines(Drawn):
    """Padded lines, some of whose characters are hidden: those are to be guessed."""

    shortest: int = 12
    longest: int = 64
    metric, higher, worth, scored = "accuracy", True, staticmethod(guessed), 64

    def draw(self, split: str, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(characters with the hidden ones replaced, mask, targets: −1 where nothing is hidden), each (B, T)."""
        those = lines(split, self.shortest, self.longest)
        chosen = [those[int(i)] for i in torch.randint(len(those), (batch,), generator=generator)]
        mask = torch.arange(self.longest) < torch.tensor([len(line) for line in chosen]).unsqueeze(1)
        whole = torch.zeros(batch, self.longest, dtype=torch.long)
        whole[mask] = torch.cat(chosen)
        hidden = (torch.rand(batch, self.longest, generator=generator) < HIDDEN) & mask
        hidden[:, 0] = True  # at least one
        return torch.where(hidden, len(plays().vocabulary), whole), mask, torch.where(hidden, whole, -1)


@dataclass(frozen=True)
class Following(Drawn):
    """The character that follows, of segments each read by itself."""

    length: int = 128
    metric, higher, worth, scored = "bits per character", False, staticmethod(bits), 32

    def draw(self, split: str, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(characters, those that follow), each (B, T)."""
        return getattr(plays(), split).random_streams(batch, self.length, 1, generator)[0]


@dataclass(frozen=True)
class Task:
    """One encoder and its training.

    Attributes:
        words: what it is.
        measure: what its metric is.
        criterion: what it is trained for.
        sizes: of the `Encoder`: length, width, heads, and whether it is causal.
        training: how.
        slack: see `Brought`.
        most: test problems.
        seconds: of a fit.
    """

    words: str
    measure: str
    criterion: Drawn
    sizes: tuple[int, int, int, bool]
    training: Training
    slack: float
    most: int
    seconds: float | None = None

    def build(self) -> Encoder:
        """The untrained model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            causal = self.sizes[-1]
            return Encoder(len(plays().vocabulary) + (not causal), *self.sizes)  # one more, for what is hidden

    def train(self, model: Encoder, path: Path) -> Row:
        """Train it; interrupted, it goes on from its last epoch, which is at `path`."""
        return trained(model, self.criterion, self.training, path)

    def lesson(self) -> dict[str, Any]:
        """Arguments of `mb.cotrain`."""
        *inputs, targets = self.criterion.draw("train", 4000, torch.Generator().manual_seed(LESSON))
        data = tuple(inputs), targets
        return {"data": data, "loss": missed, "score": self.criterion.worth, "steps": 200, "batch_size": 32}

    @torch.no_grad()
    def bring(self, model: Encoder, samples: int) -> Brought:
        """The block with embedded lines or segments."""
        train = self.contexts(model, "train", CONTEXTS, TRAIN)
        test = self.contexts(model, "test", min(samples, self.most), TEST)

        def metric(z: Tensor, x: Any) -> Tensor:
            return self.criterion.worth(model.head(z), x[-1])

        return Brought(model.deq.cell, train, test, metric, (mb.Broyden(), 300), self.slack)

    def contexts(self, model: Encoder, split: str, count: int, seed: int) -> Any:
        """Contexts of the equilibrium, with targets for a metric."""
        tokens, *mask, targets = self.criterion.draw(split, count, torch.Generator().manual_seed(seed))
        x = model.inject(tokens, *mask)
        return x._replace(y=targets) if isinstance(x, mb.Padded) else (x, targets)


TASKS = {
    "masked-encoder": Task(
        "PyTorch's transformer layer of width 128 made a deep equilibrium, as an encoder of lines of 12 to 64 characters, "
        "padded, a fifth of which it guesses", "accuracy", Lines(), (64, 128, 4, False),
        Training(epochs=30, batch=64, learning_rate=1e-3, warmup=0.03, pretrain=18, depth=6, least=2, weight_decay=0.01),
        0.005, 128,
    ),
    "wide-transformer": Task(
        "the same of width 256 on 128 characters, each of which sees those before it, as a language model",
        "−bits per character", Following(), (128, 256, 8, True),
        Training(epochs=36, batch=16, learning_rate=1e-3, warmup=0.03, pretrain=24, depth=5, least=2, weight_decay=0.01),
        0.005, 64, 360.0,
    ),
}  # fmt: skip
"""By name."""
