"""Old names and what took their place. Each still works, with a `DeprecationWarning` that says the new one."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
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
    "refuse": "fallback",
    "score": "metric",
    "burst": "warmup_steps",
    "budget_seconds": "seconds",
    "return_above": "rollback_above",
    "return_after": "rollback_after",
    "returns": "max_rollbacks",
}
"""Options of learned solvers, of `fit_solver` and of meta-training."""
PUBLIC = {
    "KeepUp": "CoTrainer",
    "KeepUpConfig": "CoTrainConfig",
    "OnlineMetaTrainer": "CoTrainer",
    "OnlineConfig": "CoTrainConfig",
    "Started": "LearnedStart",
    "make_solver": "get_solver",
    "pretrained": "list_pretrained",
}
"""Names in `metabroyden`."""
MEMBERS = {"transposed": "rmatvec", "parts": "required_methods"}
"""Members of a user's own solver; beside them, `safeguard.plan(solver)` is now its method `phases`."""
PRETRAINED = {"digits-conv": "conv-digits"}
"""Solvers that come with the package."""
REGISTRIES: dict[str, dict[str, bool]] = {
    "SOLVERS": {"learned": False, "splitting": False},
    "SPLITTING": {"learned": False, "splitting": True},
    "LEARNED": {"learned": True, "splitting": False, "adjoint": False},
    "LEARNED_SPLITTING": {"learned": True, "splitting": True},
}
"""Dictionaries in `metabroyden`, by the options of `list_solvers` that took their place."""
MODULES = {
    "metabroyden.data": "metabroyden.zoo.data",
    "metabroyden.ledger": "metabroyden.evaluator",
    "metabroyden.models": "metabroyden.zoo.models",
    "metabroyden.testbed": "metabroyden.zoo.testbed",
    "metabroyden.training": "metabroyden.nn",
}
"""Import paths, and those below them."""


def warn(old: str, new: str) -> None:
    """Say that something is called otherwise now, at the first line that is not ours."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "metabroyden",
        "importlib",
    ):
        level += not frame.f_globals["__name__"].startswith("importlib")  # which `warnings` does not count either
        frame = frame.f_back
    warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=level)


def current(word: str, names: dict[str, str] = WORDS) -> str:
    """The word that is used today, with a warning where another was given."""
    if word not in names:
        return word
    warn(repr(word), repr(names[word]))
    return names[word]


def old_options(function: F) -> F:
    """Decorator: keywords of `OPTIONS` are taken for those of today; a TypeError for unknown ones says what may be meant."""
    parameters = inspect.signature(function).parameters.values()
    known = None if any(one.kind is one.VAR_KEYWORD for one in parameters) else [one.name for one in parameters]

    @functools.wraps(function)
    def called(*values: Any, **options: Any) -> Any:
        named: dict[str, Any] = {}
        for given, value in options.items():
            old = given in OPTIONS and (known is None or OPTIONS[given] in known)
            if old and OPTIONS[given] in options:
                raise TypeError(f"{function.__name__} got both {given}= and {OPTIONS[given]}=, which are one option")
            name = current(given, OPTIONS) if old else given
            if known is not None and name not in known:
                raise TypeError(f"{function.__name__} takes no {name}=: {_meant(name, known)}")
            named[name] = value
        return function(*values, **named)

    return called  # type: ignore[return-value]


_ELSEWHERE = {"tol": "rtol", "max_iter": "max_nfe", "maxiter": "max_nfe", "threshold": "max_nfe", "lr": "learning_rate",
              "epochs": "steps", "x0": "z0"}  # fmt: skip
"""What other libraries call options."""


def _meant(name: str, known: list[str]) -> str:
    near = [_ELSEWHERE[name]] if _ELSEWHERE.get(name) in known else difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}=?" if near else f"it takes {', '.join(known)}"


class OldOptions(type):
    """Metaclass of configs: keywords of `OPTIONS` are taken for those of today."""

    def __call__(cls, *values: Any, **options: Any) -> Any:
        """The instance."""
        return old_options(super().__call__)(*values, **options)


def public(name: str, namespace: dict[str, Any]) -> Any:
    """What a module's `__getattr__` returns for an old public name; AttributeError for any other."""
    if name in PUBLIC:
        warn(f"metabroyden.{name}", f"metabroyden.{PUBLIC[name]}")
        return namespace[PUBLIC[name]]
    if name in REGISTRIES:
        options = ", ".join(f"{key}={value}" for key, value in REGISTRIES[name].items())
        warn(f"metabroyden.{name}", f"metabroyden.list_solvers({options})")
        return namespace["solvers"].registry.solver_types(**REGISTRIES[name])
    raise AttributeError(f"module 'metabroyden' has no attribute {name!r}")


class _Moved(MetaPathFinder, Loader):
    """Imports a module of an old path from the new one, as the same module object."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if ".".join(fullname.split(".")[:2]) in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        old = ".".join(spec.name.split(".")[:2])
        new = spec.name.replace(old, MODULES[old], 1)
        warn(spec.name, new)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, _Moved())  # before the finder of the path that the moved package has

HEADERS = {"slimmed": "to_half"}  # keys of a file's description, as schema 1 has them
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
"""Names of a solver's weights in files of schema 1."""


def from_schema_1(tensors: dict[str, Tensor], header: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file of schema 1 holds, as one of schema 2 would hold it."""
    header = {HEADERS.get(key, key): value for key, value in header.items()} | {"schema": 2}
    kind, name = header["kind"].split("/")
    config = header.get("config")
    if kind == "solver" and isinstance(config, dict):
        words = {key: WORDS.get(value, value) if isinstance(value, str) else value for key, value in config.items()}
        renamed = {OPTIONS.get(key, key): value for key, value in words.items()}
        header["config"] = ABSENT.get(name, {}) | renamed
        tensors = {WEIGHTS.get(name, {}).get(key, key): value for key, value in tensors.items()}
    return tensors, header
