"""The classical solvers by name. Contract tests, experiments and checkpoints iterate over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

C = TypeVar("C", bound=type)
SOLVERS: dict[str, type] = {}


def register(name: str) -> Callable[[C], C]:
    """Class decorator: makes a solver known under a name."""

    def add(cls: C) -> C:
        if name in SOLVERS:
            raise ValueError(f"a solver named {name!r} is registered already: {SOLVERS[name].__name__}")
        SOLVERS[name] = cls
        return cls

    return add


def make_solver(name: str, **options: Any) -> Any:
    """The registered classical solver of this name with these options.

    >>> make_solver("picard", damping=0.5)
    Picard(damping=0.5)
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}: known are {', '.join(sorted(SOLVERS))}")
    return SOLVERS[name](**options)
