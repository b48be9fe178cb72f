"""Folders that Hugging Face's Hub takes as they are, without its packages: config.json, model.safetensors, README.md.

config.json is the readable copy of what model.safetensors says of itself (see `checkpoint`); what has no weights is
config.json alone. README.md is the model card that the Hub shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metabroyden.described import MISFITS, CheckpointError
from metabroyden.storage import atomic_write

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_GENERATED = "<!-- Written by save_pretrained, and written anew by the next unless this line is removed. -->"


def write_folder(folder: str | Path, described: str, weights: bytes | None, card: str) -> Path:
    """Write a folder; each file atomically, config.json last, so that an interrupted save leaves no folder that loads.

    Args:
        folder: is made where it is missing. Other files in it stay.
        described: the description, a JSON object.
        weights: the content of model.safetensors. None: that file is removed.
        card: text of the model card. A card without our line "Written by save_pretrained" stays as it is.

    Returns:
        The folder.

    Raises:
        NotADirectoryError: there is a file of that name.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, wanted the name of a folder")
    if weights is None:
        (folder / WEIGHTS).unlink(missing_ok=True)
    else:
        atomic_write(folder / WEIGHTS, weights)
    if not (folder / CARD).exists() or _GENERATED in (folder / CARD).read_text(encoding="utf-8", errors="replace"):
        atomic_write(folder / CARD, card)
    atomic_write(folder / CONFIG, json.dumps(json.loads(described), indent=2, sort_keys=True) + "\n")
    return folder


def described_by(folder: Path) -> str:
    """The text of a folder's config.json; `CheckpointError` where it is missing or not one that `write_folder` wrote."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: it is no folder that save_pretrained wrote, or not all of it")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
    except MISFITS as error:
        raise CheckpointError(f"{path} holds no readable JSON: {error}") from error
    if not isinstance(found, dict) or not {"schema", "kind"} <= found.keys():
        raise CheckpointError(f"{path} is not one that metabroyden wrote: it has no schema and kind")
    return text


def agree(one: str, other: str) -> bool:
    """Whether two descriptions say the same, whatever the order of their keys and the space between them."""
    try:
        return len({json.dumps(json.loads(text), sort_keys=True) for text in (one, other)}) == 1
    except MISFITS:
        return False


def model_card(title: str, intent: str, facts: dict[str, Any], code: str) -> str:
    """The text of a model card.

    Args:
        title: its heading.
        intent: a sentence below it.
        facts: rows of a table. Those that are neither text nor a number are left out.
        code: Python that loads the folder.
    """
    rows = [
        f"| {name.replace('_', ' ')} | {value} |"
        for name, value in facts.items()
        if isinstance(value, str | int | float)
    ]
    head = [
        "---",
        "library_name: metabroyden",
        "tags:",
        "- deep-equilibrium-models",
        "- fixed-point",
        "---",
        _GENERATED,
    ]
    table = ["| | |", "| --- | --- |", *rows]
    return "\n".join([*head, "", f"# {title}", "", intent, "", *table, "", "```python", code, "```", ""])
