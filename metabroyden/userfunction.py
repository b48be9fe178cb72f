"""One's own DEQ by the name of a function, MODULE:FUNCTION: a map f and its contexts."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from metabroyden.meta.fit import contexts_of
from metabroyden.meta.target import target_of
from metabroyden.meta.tasks import count, row_bytes, rows, sampled

KEPT = 5
"""Of contexts that FUNCTION returns in one piece, every `KEPT`-th is kept from the fit."""
LEAST = 15
"""Samples that such contexts must have."""
RETURNS = (
    "(f, x), or a dict with the keys f, x (or x_train and x_test), and where they are needed z0, layout, conditioning, "
    "metric"
)


@dataclass(frozen=True)
class UserProblem:
    """What FUNCTION returns, its contexts split.

    Attributes:
        f: as for `fit_solver`: a map f(z, x), a `DEQ`, or a model with one DEQ in it.
        x_train: contexts to fit and to tune on, one pytree, samples first; None where FUNCTION has none.
        x_test: other contexts, for comparisons alone; None where FUNCTION has none.
        z0: x → start, as for `fit_solver`.
        layout: as for `fit_solver`.
        conditioning: as for `fit_solver`.
        metric: (z, x) → how good states are for the task, higher being better: a tensor (B,), or the mean.
        file: where FUNCTION is written, or None.
    """

    f: Any
    x_train: Any = None
    x_test: Any = None
    z0: Callable[[Any], Any] | None = None
    layout: str | None = None
    conditioning: str = "auto"
    metric: Callable[[Any, Any], Any] | None = None
    file: Path | None = None


def load_problem(name: str) -> UserProblem:
    """What the function called MODULE:FUNCTION returns.

    MODULE is a dotted name that can be imported from the current folder, or the path of a file that ends in .py. FUNCTION
    takes no arguments and returns (f, x), or a dict (or a named tuple) with the names of `UserProblem`. Contexts are
    whatever `fit_solver` takes, batches of a `DataLoader` too. Instead of x_train
    and x_test it may give x: then every fifth sample, by position, is x_test, save what equals a sample of x_train, and
    the others are x_train. Random numbers are seeded before MODULE is imported, so that each call gets the same ones.

    Args:
        name: MODULE:FUNCTION.

    Raises:
        ValueError: there is no such function, or it returns something else. What MODULE or FUNCTION raise goes through.
    """
    module_name, _, function_name = name.rpartition(":")
    relative = module_name.startswith(".") and not module_name.endswith(".py")
    if not module_name or relative or not function_name.isidentifier():
        raise ValueError(f"wanted MODULE:FUNCTION, as mymodel.py:problem or package.module:problem, got {name!r}")
    _seed()
    module = _module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        there = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise ValueError(f"{module_name} has no function {function_name!r}: it has {', '.join(there) or 'none'}")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"{name} must be a function without arguments: {error}") from None
    file = getattr(module, "__file__", None)
    return _problem(function(), name, None if file is None else Path(file))


def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (what a user's function may draw from)
    random.seed(0)


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        return _module_at(Path(name))
    _search(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # an import inside of the module
        raise ValueError(
            f"no module {name!r} can be imported from {Path.cwd()}: give a dotted name, or the path of a .py file"
        ) from None


def _module_at(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    path = path.resolve()
    _search(path.parent)  # what lies beside it can be imported, as by `python FILE`
    taken = path.stem in sys.modules
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _problem(found: Any, name: str, file: Path | None) -> UserProblem:
    """What a function returned, checked."""
    if isinstance(found, tuple) and hasattr(found, "_asdict"):
        found = found._asdict()
    elif isinstance(found, tuple) and len(found) == 2:
        found = {"f": found[0], "x": found[1]}
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} must return {RETURNS}; got {type(found).__name__}")
    given = dict(found)
    known = ["f", "x", *(item.name for item in fields(UserProblem) if item.name not in ("f", "file"))]
    if unknown := [str(key) for key in given if key not in known]:
        raise ValueError(f"{name} returns {', '.join(unknown)}, which nobody reads: known are {', '.join(known)}")
    if not callable(given.get("f")):
        raise ValueError(f"{name} must return {RETURNS}; f is {type(given.get('f')).__name__}, which cannot be called")
    parts = [key for key in ("x", "x_train", "x_test") if given.get(key) is not None]
    if not parts or "x" in parts[:-1]:
        got = ", ".join(parts) or "none"
        raise ValueError(f"{name} must return contexts, either x or x_train and x_test; got {got}")
    target = target_of(given["f"])
    given |= {key: contexts_of(given[key], target) for key in parts}
    if (whole := given.pop("x", None)) is not None:
        given["x_train"], given["x_test"] = kept_apart(whole, name)
    return UserProblem(**given, file=file)


def kept_apart(x: Any, name: str = "x") -> tuple[Any, Any]:
    """(the other samples, every fifth sample) of contexts; of the latter none that equals one of the former.

    ValueError where they are no pytree of tensors with the samples first, or too few.
    """
    leaves = sampled(x)
    if not leaves or leaves[0].dim() < 1 or len({len(leaf) for leaf in leaves}) > 1 or len(leaves[0]) < LEAST:
        what = [tuple(leaf.shape) for leaf in leaves] or type(x).__name__
        raise ValueError(
            f"the contexts x of {name} must be a tensor, a pytree of them or an iterable of batches, with at least {LEAST} "
            f"samples first, to be split; got {what}"
        )
    number = torch.arange(count(x), device="cpu")
    held = number % KEPT == KEPT - 1
    keys = _keys(x)
    seen = {keys[i] for i in number[~held].tolist()}
    fresh = [i for i in number[held].tolist() if keys[i] not in seen]
    if not fresh:
        raise ValueError(f"the contexts x of {name} are all alike: none is left to compare solvers on")
    return rows(x, number[~held]), rows(x, torch.tensor(fresh))


def shared_samples(x_train: Any, x_test: Any) -> int:
    """How many samples of x_test are in x_train, to the last bit."""
    seen = set(_keys(x_train))
    return sum(key in seen for key in _keys(x_test))


def digest(x: Any) -> str:
    """Sixteen hex digits of the samples of contexts, in their order."""
    return hashlib.blake2b(b"".join(_keys(x)), digest_size=8).hexdigest()


def _keys(x: Any) -> list[bytes]:
    """A hash of each sample."""
    found = [hashlib.blake2b(digest_size=16) for _ in range(count(x))]
    for leaf in sampled(x):
        for key, row in zip(found, row_bytes(leaf), strict=True):
            key.update(row.tobytes())
    return [key.digest() for key in found]
