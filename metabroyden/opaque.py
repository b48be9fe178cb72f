"""Functions that `torch.compile` runs as they are: a loop that decides on values has no graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_REASON = "a solve decides on the way how long it goes on; only mb.FixedBudget can be a part of one graph"


def opaque(function: F) -> F:
    """Decorate a function that is to run uncompiled, with all that it calls, within what is compiled.

    `torch.compile` makes one graph of what comes before it and one of what comes after; with `fullgraph=True` it says
    why not. RuntimeError under `torch.export`.
    """

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            exporting = getattr(torch.compiler, "is_exporting", None)  # since 2.7
            if exporting is not None and exporting():
                raise RuntimeError(f"torch.export cannot take {function.__qualname__}: {_REASON}")
            return _uncompiled(function, arguments, options)
        return function(*arguments, **options)

    return run  # type: ignore[return-value]


def _uncompiled(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    # here and not as a decorator: it imports the compiler, which takes seconds
    return torch.compiler.disable(function)(*arguments, **options)


_uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]
_uncompiled._torchdynamo_disable_msg = _REASON  # type: ignore[attr-defined]
