"""The experiments by name: (config type, run)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments import digits, drop_in, solvers

EXPERIMENTS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "digits": (digits.Digits, digits.run),
    "drop-in": (drop_in.DropIn, drop_in.run),
    "solvers": (solvers.Solvers, solvers.run),
}
