"""What every model round a cell has in common: inputs → context → equilibrium → logits."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor, nn

from metabroyden.deq import DEQ
from metabroyden.solution import State


class EquilibriumModel(nn.Module):
    """inputs → inject → DEQ → classify → logits.

    Subclasses give `kind`, `inject` and `classify`. `deq` may be replaced by another map from a context to a state with a
    `cell`, such as the unrolled twins of `metabroyden.models.twins`: all else stays as it is.

    Args:
        config: a frozen dataclass of plain values, the model's only argument beside `deq_options`. It has a method
            `narrowed(width)`: the same model with a state of another width, any positive one, rounded to what fits.
        cell: the cell f(z, x).
        deq_options: of `DEQ`.
    """

    kind: ClassVar[str]

    def __init__(self, config: Any, cell: nn.Module, **deq_options: Any) -> None:
        super().__init__()
        self.config = config
        self.deq: Any = DEQ(cell, **deq_options)

    @property
    def cell(self) -> nn.Module:
        """The cell f(z, x)."""
        return self.deq.cell

    def inject(self, inputs: Tensor) -> Any:
        """The context x of the fixed-point problem: a pytree of batch-first tensors."""
        raise NotImplementedError

    def classify(self, z: State) -> Tensor:
        """Logits of a state, classes last."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of inputs (batch first), through a solve."""
        return self.classify(self.deq(self.inject(inputs)))

    def describe(self) -> dict[str, Any]:
        """What a checkpoint needs to build the model again."""
        return asdict(self.config)


class LanguageModel(EquilibriumModel):
    """Tokens (B, T) → logits (B, T, vocabulary) of the tokens that follow; nothing looks ahead.

    Long texts go through in segments: what `remember` keeps of one equilibrium is the memory of the next segment, with no
    gradient through it (Dai et al., Transformer-XL, ACL 2019; TrellisNet's history repackaging, Bai et al., ICLR 2019).
    """

    def inject(self, inputs: Tensor, memory: Tensor | None = None) -> Any:
        """The context of tokens (B, T): injection and memory; None: the memory of a text's beginning, zeros."""
        raise NotImplementedError

    def remember(self, z: Tensor, memory: Tensor | None = None) -> Tensor:
        """The memory for the next segment, detached, given this segment's equilibrium and the memory it had."""
        raise NotImplementedError

    def forward(self, inputs: Tensor, memory: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocabulary) of tokens (B, T), through a solve."""
        return self.classify(self.deq(self.inject(inputs, memory)))
