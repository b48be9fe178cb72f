"""What every model round a cell has in common: inputs → context → equilibrium → logits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from metabroyden.deq import DEQ
from metabroyden.described import CheckpointError
from metabroyden.zoo.models.stem import TokenStem


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model: plain values, which a checkpoint stores."""

    width_field: ClassVar[str] = "width"

    def narrowed(self, width: int) -> Self:
        """The same model with a state of another width, any positive one, rounded to what fits."""
        return replace(self, **{self.width_field: width})


@dataclass(frozen=True, kw_only=True)
class ImageConfig(ModelConfig):
    """What classifiers of images share: channels and side of an image, and the number of classes."""

    image_channels: int = 1
    side: int = 8
    classes: int = 10


@dataclass(frozen=True)
class LanguageConfig(ModelConfig):
    """What language models share: the vocabulary's size, and the sizes of their `TokenStem`."""

    vocabulary: int = 64
    embedding: int = 64
    stem: str = "linear"
    reach: int = 4
    rows: int = 4096
    recent: int = 0

    def make_stem(self, channels: int) -> TokenStem:
        """The stem of a cell whose injection has 4·channels."""
        sizes = (self.vocabulary, self.embedding, channels, 4 * channels)
        return TokenStem(*sizes, self.stem, reach=self.reach, rows=self.rows, recent=self.recent)


class EquilibriumModel(nn.Module):
    """inputs → inject → DEQ → classify → logits.

    Subclasses give `stem` and `head`, or methods of their own in place of `inject` and `classify`, and name themselves in
    their bases, `class Own(EquilibriumModel, kind="own", config=OwnConfig)`: so `load_model` knows them. `deq` may be
    replaced by another map from a context to a state with a `cell`, such as the twins of `metabroyden.zoo.models.twins`.

    A subclass takes its config, the model's only argument beside `deq_options` (of `DEQ`), and gives the cell f(z, x).
    """

    kind: ClassVar[str]
    config_type: ClassVar[type[ModelConfig]]
    stem: nn.Module
    head: nn.Module

    def __init_subclass__(cls, *, kind: str | None = None, config: type[ModelConfig] = ModelConfig) -> None:
        super().__init_subclass__()
        if kind is not None:
            cls.kind, cls.config_type = kind, config
            MODELS[kind] = cls

    def __init__(self, config: ModelConfig, cell: nn.Module, **deq_options: Any) -> None:
        super().__init__()
        self.config: Any = config
        self.deq: Any = DEQ(cell, **deq_options)

    @property
    def cell(self) -> nn.Module:
        """The cell f(z, x)."""
        return self.deq.cell

    def inject(self, inputs: Tensor) -> Any:
        """The context x of the fixed-point problem: a pytree of batch-first tensors."""
        return self.stem(inputs)

    def classify(self, z: Any) -> Tensor:
        """Logits of a state, classes last."""
        return self.head(z)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of inputs (batch first), through a solve."""
        return self.classify(self.deq(self.inject(inputs)))

    def describe(self) -> dict[str, Any]:
        """What a checkpoint needs to build the model again."""
        return asdict(self.config)

    def save_pretrained(self, folder: str | Path, summary: dict[str, Any] | None = None) -> Path:
        """Write the model as a folder in Hugging Face's convention, without its solver; returns the folder.

        config.json, model.safetensors and a model card, README.md. `summary` is kept beside the config.
        """
        from metabroyden.zoo.models.fit import save_pretrained

        return save_pretrained(self, folder, summary)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **deq_options: Any) -> Self:
        """The model of this class in a folder or file; `deq_options` as in `load_model`.

        `CheckpointError` where it is of another class; else as `load_model`.
        """
        from metabroyden.zoo.models.fit import load_model

        model = load_model(folder, **deq_options)
        if not isinstance(model, cls):
            raise CheckpointError(f"{folder} holds a {type(model).__name__}, wanted a {cls.__name__}")
        return model


MODELS: dict[str, type[EquilibriumModel]] = {}
"""Models by kind."""


class Memory(NamedTuple):
    """What a segment leaves to the next; zeros, and −1, where the text had not begun."""

    states: Tensor  # the last ones of its equilibrium, (B, channels, M) or (B, M, channels) as the cell's layout has it
    tokens: Tensor  # the last ones (B, R) that the stem looks back at


class LanguageModel(EquilibriumModel):
    """Tokens (B, T) → logits (B, T, vocabulary) of the tokens that follow; nothing looks ahead.

    Long texts go through in segments: what `remember` keeps of one is the memory of the next, with no gradient through it
    (Dai et al., Transformer-XL, ACL 2019; TrellisNet's history repackaging, Bai et al., ICLR 2019). The context is
    (injection, states of the memory).

    Subclasses give `stem`, `head`, `channels` and `remembered`.
    """

    stem: TokenStem
    channels: int
    """Of the state."""
    remembered: int
    """Tokens whose states are remembered, M."""

    def inject(self, inputs: Tensor, memory: Memory | None = None) -> tuple[Tensor, Tensor]:
        """The context of tokens (B, T); no memory is that of a text's beginning.

        ValueError for what are no tokens, or a memory of other shapes.
        """
        states, tokens = self._before(inputs, memory)
        injection = self.stem(inputs, tokens)
        return (injection if self._time == 1 else injection.transpose(1, 2)), states

    def beginning(self, batch: int) -> Memory:
        """The memory of a text's beginning."""
        like = self.stem.linear.weight
        shape = (batch, self.remembered, self.channels) if self._time == 1 else (batch, self.channels, self.remembered)
        return Memory(like.new_zeros(shape), like.new_full((batch, self.stem.back), -1, dtype=torch.long))

    def remember(self, z: Tensor, inputs: Tensor, memory: Memory | None = None) -> Memory:
        """The memory for the next segment, detached, given this segment's equilibrium, its tokens and the memory it had.

        ValueError where these do not belong together.
        """
        before, length = self._before(inputs, memory), inputs.shape[1]
        if (len(z), z.shape[self._time]) != inputs.shape:
            raise ValueError(f"an equilibrium of {tuple(z.shape)} is not that of tokens {tuple(inputs.shape)}")
        states = torch.cat([before.states, z.detach()], dim=self._time)
        tokens = torch.cat([before.tokens, inputs], dim=1)
        # from the front, since a memory may be of no tokens
        return Memory(states.narrow(self._time, length, self.remembered), tokens[:, length:])

    def _before(self, inputs: Tensor, memory: Memory | None) -> Memory:
        """The memory, or that of a text's beginning; ValueError where it is not for these inputs."""
        blank = self.beginning(len(inputs) if inputs.ndim else 0)
        if memory is None:
            return blank
        wanted, given = ([(tuple(part.shape), part.dtype) for part in parts] for parts in (blank, memory))
        if given != wanted:
            raise ValueError(f"memory must be states and tokens of {wanted} for these inputs, got {given}")
        return Memory(*memory)

    @property
    def _time(self) -> int:
        return 2 if self.cell.layout == "nct" else 1

    def forward(self, inputs: Tensor, memory: Memory | None = None) -> Tensor:
        """Logits (B, T, vocabulary) of tokens (B, T), through a solve."""
        return self.classify(self.deq(self.inject(inputs, memory)))
