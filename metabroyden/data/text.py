"""Tokenised texts in splits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TextSplit:
    """Whole works one after another: `tokens` (N,) int64, the works' `titles`, and where each begins, `starts`."""

    tokens: Tensor
    titles: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class TextData:
    """Disjoint train, validation and test splits over one vocabulary.

    Attributes:
        vocabulary: the symbols (characters, or words), by token.
        unit: "character" or "word".
    """

    train: TextSplit
    validation: TextSplit
    test: TextSplit
    vocabulary: tuple[str, ...]
    unit: str
