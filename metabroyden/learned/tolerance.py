"""The tolerance that a solver was fitted to, and a word where a much smaller one is asked for."""

from __future__ import annotations

from typing import Any

TIGHTER = 30.0
"""Times smaller than fitted to: a tolerance that brings a warning."""


def fitted_rtol(solver: Any) -> float | None:
    """The relative tolerance that a learned solver was judged at; None where that is not known."""
    summary = getattr(solver, "summary", None) or {}
    found = summary.get("held_out", {}).get("rtol") or summary.get("meta_training", {}).get("validation_rtol")
    return float(found) if isinstance(found, int | float) else None


def tighter(fitted: float | None, asked: float) -> str | None:
    """What to say of a solver that was fitted to a tolerance and is asked for another; None where that is near enough.

    Args:
        fitted: see `fitted_rtol`.
        asked: relative tolerance of a solve; 0 means as far as the budget goes.
    """
    if fitted is None or not 0 < asked < fitted / TIGHTER:
        return None
    return (
        f"was fitted to a tolerance of {fitted:g}, and this DEQ asks for {asked:g}: it gains less there than was "
        f"measured; fit it with rtol={asked:g}"
    )
