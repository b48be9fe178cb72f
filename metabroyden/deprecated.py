"""Old names and what took their place. Each still works, with a `DeprecationWarning` that says the new one."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

WORDS = {
    "nd": "vector",
    "nchw": "image",
    "scales": "pyramid",
    "f0": "initial_value",
    "native": "input",
    "table": "schedule",
}
"""Values of options."""
OPTIONS = {
    "context": "conditioning",
    "initializer": "initializer_width",
    "gated": "learned_steps",
    "rows": "schedule_length",
    "weighing": "coefficients",
}
"""Options of learned solvers."""


def current(word: str, names: dict[str, str] = WORDS, stacklevel: int = 3) -> str:
    """The word that is used today, with a warning where another was given."""
    if word not in names:
        return word
    warnings.warn(f"{word!r} is now called {names[word]!r}", DeprecationWarning, stacklevel=stacklevel)
    return names[word]


HEADERS = {"slimmed": "to_half"}
"""Keys of a file's description, as schema 1 has them."""
ABSENT: dict[str, dict[str, Any]] = {
    "coordinatewise": {"preprocessing": "scaled"},
    "meta-broyden": {"coefficients": "lstm"},
    "meta-splitting": {"coefficients": "lstm"},
}
"""Options that files of schema 1 may leave out, with what they then mean."""
_COEFFICIENTS = {
    "table.direct": "coefficients.step_size",
    "table.onward": "coefficients.momentum",
    "table.gates": "coefficients.gates",
    "channel": "coefficients.channel",
    **{f"lstm.{name}": f"coefficients.lstm.{name}" for name in ("weight", "bias", "readout", "offset")},
}
WEIGHTS = {"meta-broyden": _COEFFICIENTS, "meta-splitting": _COEFFICIENTS}
"""Names of a solver's weights."""


def from_schema_1(tensors: dict[str, Tensor], header: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file of schema 1 holds, as one of schema 2 would hold it."""
    header = {HEADERS.get(key, key): value for key, value in header.items()} | {"schema": 2}
    kind, name = header["kind"].split("/")
    config = header.get("config")
    if kind == "solver" and isinstance(config, dict):
        renamed = {OPTIONS.get(key, key): _word(value) for key, value in config.items()}
        header["config"] = ABSENT.get(name, {}) | renamed
        tensors = {WEIGHTS.get(name, {}).get(key, key): value for key, value in tensors.items()}
    return tensors, header


def _word(value: Any) -> Any:
    return WORDS.get(value, value) if isinstance(value, str) else value
