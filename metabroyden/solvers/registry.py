"""The classical solvers by name. Contract tests, experiments and checkpoints iterate over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

C = TypeVar("C", bound=type)
SOLVERS: dict[str, type] = {}
"""Solvers of any f."""
SPLITTING: dict[str, type] = {}
"""Solvers that use parts of f, and work for cells that have them only."""


def register(name: str) -> Callable[[C], C]:
    """Class decorator: makes a solver known under a name, in `SOLVERS` or, if it names `parts` of f, in `SPLITTING`."""

    def add(cls: C) -> C:
        known = SOLVERS | SPLITTING
        if name in known:
            raise ValueError(f"a solver named {name!r} is registered already: {known[name].__name__}")
        (SPLITTING if getattr(cls, "parts", ()) else SOLVERS)[name] = cls
        return cls

    return add


def name_of(solver: Any) -> str | None:
    """The registered name of a classical solver; None for anything else.

    >>> name_of(make_solver("picard"))
    'picard'
    """
    return next((name for name, cls in (SOLVERS | SPLITTING).items() if cls is type(solver)), None)


def make_solver(name: str, **options: Any) -> Any:
    """The registered classical solver of this name with these options.

    >>> make_solver("picard", damping=0.5)
    Picard(damping=0.5)
    """
    known = SOLVERS | SPLITTING
    if name not in known:
        words = ", ".join(sorted(SOLVERS)), ", ".join(sorted(SPLITTING))
        raise ValueError(f"unknown solver {name!r}: known are {words[0]}; for cells that offer their parts: {words[1]}")
    return known[name](**options)
