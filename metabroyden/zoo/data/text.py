"""Tokenised texts in splits, and the segments that models read them in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Unit = Literal["character", "word"]

UNKNOWN = "<unk>"

# A word with its inner apostrophes, an elision that begins with one, a dash, a line's end, or any other mark.
_ELISIONS = "tis|twas|twere|twill|twould|t|em|gainst|mongst|scape|faith"
_WORD = re.compile(rf"(?<!\w)'(?:{_ELISIONS})\b|\w+(?:'\w+)*|-{{2,}}|\n|[^\w\s]", re.IGNORECASE)


def words_of(text: str) -> list[str]:
    """Words, marks and line ends of a text, in order; other white space is gone.

    Examples:
        >>> words_of("Stand, ho!\\nWho's there--'tis he.")
        ['Stand', ',', 'ho', '!', '\\n', "Who's", 'there', '--', "'tis", 'he', '.']
    """
    return _WORD.findall(text)


@dataclass(frozen=True)
class TextSplit:
    """Whole works one after another: `tokens` (N,) int64, the works' `titles`, and where each begins, `starts`."""

    tokens: Tensor
    titles: tuple[str, ...]
    starts: tuple[int, ...]

    def streams(self, batch: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """The split once, as `batch` parallel streams in consecutive segments: (tokens, targets), each (batch, length).

        Row b of one segment goes on where row b of the one before ended, so that memory can be carried along; targets are
        the tokens that follow. Streams run over the ends of works. Fewer than batch·length tokens at the end are dropped.

        Raises ValueError where the split is too short for one segment.
        """
        _positive(batch=batch, length=length)
        segments = (len(self.tokens) - 1) // batch // length
        if segments < 1:
            raise ValueError(
                f"{batch} streams of {length} tokens need {batch * length + 1}, the split has {len(self.tokens)}"
            )
        return self._segments(torch.arange(batch) * (segments * length), length, segments)

    def random_streams(
        self, batch: int, length: int, segments: int, generator: torch.Generator
    ) -> list[tuple[Tensor, Tensor]]:
        """`batch` streams from random places, `segments` consecutive segments each, for training; see `streams`.

        The same state of the generator (on the CPU) gives the same streams. Raises ValueError where the split is too short.
        """
        _positive(batch=batch, length=length, segments=segments)
        reach = segments * length
        places = len(self.tokens) - reach
        if places < 1:
            raise ValueError(
                f"{segments} segments of {length} tokens need {reach + 1}, the split has {len(self.tokens)}"
            )
        return self._segments(torch.randint(places, (batch,), generator=generator), length, segments)

    def _segments(self, offsets: Tensor, length: int, segments: int) -> list[tuple[Tensor, Tensor]]:
        places = (offsets[:, None] + torch.arange(segments * length)).to(self.tokens.device)
        read, follow = self.tokens[places], self.tokens[places + 1]
        return list(zip(read.split(length, dim=1), follow.split(length, dim=1), strict=True))


@dataclass(frozen=True)
class TextData:
    """Disjoint train, validation and test splits over one vocabulary.

    Attributes:
        vocabulary: the symbols (characters, or words), by token. Words have `UNKNOWN` at token 0.
        unit: "character" or "word".
    """

    train: TextSplit
    validation: TextSplit
    test: TextSplit
    vocabulary: tuple[str, ...]
    unit: str

    def encode(self, text: str) -> Tensor:
        """The tokens (N,) int64 of a text; words outside the vocabulary become `UNKNOWN`.

        Raises ValueError that names the characters the vocabulary does not have.
        """
        encode = _encode_characters if self.unit == "character" else _encode_words
        return encode(text, self.vocabulary)

    def decode(self, tokens: Tensor | Iterable[int]) -> str:
        """The text of tokens: for characters the inverse of `encode`; words with spaces where English has them."""
        numbers = [int(token) for token in tokens]
        wrong = sorted({token for token in numbers if not 0 <= token < len(self.vocabulary)})
        if wrong:
            raise ValueError(f"tokens must lie in 0…{len(self.vocabulary) - 1}, got {wrong[:5]}")
        symbols = [self.vocabulary[token] for token in numbers]
        return "".join(symbols) if self.unit == "character" else _join(symbols)


def split_works(
    works: Mapping[str, str],
    *,
    validation: Collection[str],
    test: Collection[str],
    unit: Unit = "character",
    words: int = 5000,
) -> TextData:
    """Texts by title as `TextData`, split by work; what is not held out trains, in the order given.

    Of unit "character" the vocabulary is every character of the training works, sorted; of unit "word" their `words` most
    frequent words (see `words_of`; ties in alphabetical order), after `UNKNOWN`. ValueError for a title not among the works
    or held out twice, no training work, an unknown unit, or a held-out character that no training work has.
    """
    held_out = [*validation, *test]
    strange = [title for title in held_out if title not in works]
    if strange:
        raise ValueError(f"held out but not among the works: {', '.join(strange)}; there are {', '.join(works)}")
    if len(set(held_out)) < len(held_out):
        raise ValueError(f"validation and test must not overlap, got {', '.join(held_out)}")
    train = [title for title in works if title not in held_out]
    if not (train and validation and test):
        raise ValueError(f"each split needs a work, got {len(train)}, {len(validation)} and {len(test)}")
    if unit == "character":
        vocabulary = tuple(sorted(set().union(*(works[title] for title in train))))
    elif unit == "word":
        _positive(words=words)
        counts = Counter(word for title in train for word in words_of(works[title]))
        vocabulary = (UNKNOWN, *sorted(counts, key=lambda word: (-counts[word], word))[:words])
    else:
        raise ValueError(f'unit must be "character" or "word", got {unit!r}')
    encode = _encode_characters if unit == "character" else _encode_words

    def join(titles: Iterable[str]) -> TextSplit:
        titles = tuple(titles)
        parts = [encode(works[title], vocabulary) for title in titles]
        starts = np.cumsum([0, *map(len, parts)])[:-1]
        return TextSplit(torch.cat(parts), titles, tuple(int(start) for start in starts))

    return TextData(join(train), join(validation), join(test), vocabulary, unit)


def package_folder(name: str, wanted: str) -> Path:
    """Where a package of texts is installed, without importing it; ImportError that begins with `wanted` if nowhere."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{wanted} (it is not installed)")
    return Path(spec.submodule_search_locations[0])


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _encode_characters(text: str, vocabulary: tuple[str, ...]) -> Tensor:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    table = np.full(max([*map(ord, vocabulary), int(codes.max(initial=0))]) + 1, -1, dtype=np.int64)
    table[[ord(symbol) for symbol in vocabulary]] = np.arange(len(vocabulary))
    tokens = table[codes]
    if (tokens < 0).any():
        strange = "".join(sorted(set(text) - set(vocabulary)))
        raise ValueError(f"the vocabulary has no {strange!r}, only {''.join(vocabulary)!r}")
    return torch.from_numpy(tokens)


def _encode_words(text: str, vocabulary: tuple[str, ...]) -> Tensor:
    numbers = {word: token for token, word in enumerate(vocabulary)}
    return torch.tensor([numbers.get(word, 0) for word in words_of(text)], dtype=torch.int64)


_NO_SPACE_BEFORE = frozenset(".,;:!?)]\n'-") | {"--"}
_NO_SPACE_AFTER = frozenset("([\n'-\\") | {"--"}


def _join(symbols: list[str]) -> str:
    parts = symbols[:1]
    for before, symbol in pairwise(symbols):
        parts += [symbol] if symbol in _NO_SPACE_BEFORE or before in _NO_SPACE_AFTER else [" ", symbol]
    return "".join(parts)
