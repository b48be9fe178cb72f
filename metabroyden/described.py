"""Checks of what a file says of itself: plain values as JSON gives them, against annotated dataclasses."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)
"""What code raises that is given values it was not written for."""


class CheckpointError(ValueError):
    """A file that cannot be used; the message says which and why."""


def check(values: Any, record: type, path: Any, **hints: Any) -> None:
    """Compare a JSON object with a dataclass: `CheckpointError` where a field is missing or of another type.

    A field with a default may be missing, and other keys than the fields are left alone. A field of a tuple type wants a
    list, one of a dataclass type an object; floats are finite. `hints` are types of fields, by name, that take the place of
    their annotations; the path is for the message.
    """
    if not isinstance(values, dict):
        raise damaged(path, f"wanted an object with the fields of {record.__name__}, got {values!r:.80}")
    known = get_type_hints(record) | hints
    for field in fields(record):
        needed = field.default is MISSING and field.default_factory is MISSING
        if field.name in values:
            if not fits(values[field.name], known[field.name]):
                wanted = getattr(known[field.name], "__name__", known[field.name])
                raise damaged(path, f"{field.name} is {values[field.name]!r:.80}, wanted {wanted}")
        elif needed:
            raise damaged(path, f"{field.name} is missing")


def damaged(path: Any, why: object) -> CheckpointError:
    """The error that says so."""
    return CheckpointError(f"{path}: its description is damaged: {why}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value as JSON gives it is of an annotated type; a list counts as a tuple, a number that is whole as a float.

    Examples:
        >>> fits([1, 2.5], tuple[float, float]), fits(True, int), fits(math.nan, float), fits({"a": [1]}, dict[str, list])
        (True, False, False, True)
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_dataclass(hint):
        return isinstance(value, dict) and _has_fields(value, hint)
    if origin in _CONTAINERS:
        return _CONTAINERS[origin](value, inner)
    if getattr(hint, "_is_protocol", False):
        return False
    return isinstance(value, hint) and (isinstance(value, bool) is (hint is bool))


def _has_fields(value: dict[str, Any], record: Any) -> bool:
    hints = get_type_hints(record)
    return all(name in hints and fits(item, hints[name]) for name, item in value.items())


def _is_dict(value: Any, inner: tuple[Any, ...]) -> bool:
    return isinstance(value, dict) and all(fits(k, inner[0]) and fits(item, inner[1]) for k, item in value.items())


def _is_list(value: Any, inner: tuple[Any, ...]) -> bool:
    return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)


def _is_tuple(value: Any, inner: tuple[Any, ...]) -> bool:
    if inner[-1] is Ellipsis:
        return _is_list(value, inner)
    return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(fits, value, inner))


_CONTAINERS: dict[Any, Callable[[Any, tuple[Any, ...]], bool]] = {dict: _is_dict, list: _is_list, tuple: _is_tuple}


class Limits(TorchFunctionMode):
    """While it lasts, ValueError for code that makes more operations on tensors, or larger tensors, than it should.

    What a wrong size would take is refused before it is taken. `elements` are those of all tensors made.
    """

    def __init__(self, operations: int, elements: int) -> None:
        super().__init__()
        self.operations, self.elements = operations, elements

    @classmethod
    def like(cls, tensors: dict[str, Tensor]) -> Limits:
        """For a module of these weights, several times over: a constructor may throw some away."""
        return cls(10_000 + 200 * len(tensors), 2**24 + 16 * sum(value.numel() for value in tensors.values()))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations -= 1
        if func in _FACTORIES:
            self.elements -= _elements(args, kwargs) ** (2 if func is torch.eye else 1)
        if self.operations < 0 or self.elements < 0:
            raise ValueError("it describes many times what the file holds")
        return func(*args, **kwargs)


_FACTORIES = {torch.empty, torch.eye, torch.full, torch.ones, torch.rand, torch.randn, torch.zeros}


def _elements(args: Any, kwargs: Any) -> int:
    """Of the tensor that a factory makes: torch.ones(2, 3), torch.ones((2, 3)) or torch.ones(size=(2, 3))."""
    size = args[0] if args and not isinstance(args[0], int) else args or kwargs.get("size", ())
    return math.prod(size)
