"""Configurations of HyperAnderson that `python -m experiments tune-hyper` tries."""

from __future__ import annotations

from typing import Any

from experiments.configs.recipes import RECIPES

_USUAL: dict[str, Any] = {**RECIPES["hyper-anderson"], "memory": 5, "gram": False, "hidden": 32}
_CHANGES: dict[str, dict[str, Any]] = {
    **{f"m = {m}" + ", Gram" * gram: {"memory": m, "gram": gram} for m in (3, 5, 8) for gram in (False, True)},
    **{f"rate {rate:g}": {"learning_rate": rate} for rate in (3e-4, 3e-3)},
    "unroll 14": {"unroll": 14},
    "hidden 64": {"hidden": 64},
    "published initialisation": {"zero_output": False},
}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{loss}, {name}": {**_USUAL, "objective": objective, **change}
    for loss, objective in {"published loss": "hyper", "log residual": "residual"}.items()
    for name, change in _CHANGES.items()
}
"""Losses × memory × Gram matrix, and of either loss with m = 5 what else may matter, one change at a time."""


def overrides(name: str, iterations: int) -> dict[str, Any]:
    """The recipe of a variant that spends so many solver iterations."""
    return {**VARIANTS[name], "steps": max(1, round(iterations / VARIANTS[name]["unroll"]))}
