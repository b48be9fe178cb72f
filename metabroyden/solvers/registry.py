"""All solvers by name: classical and learned ones, and those of adjoint systems."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from metabroyden.solver import SolverBase

T = TypeVar("T")
_REGISTRY: dict[str, Any] = {}


def register(name: str, registry: dict[str, Any] = _REGISTRY, what: str = "solver") -> Callable[[T], T]:
    """Class decorator: makes a solver known to `get_solver` under a name; ValueError where that is taken.

    Of other things, `what` they are and their registry.
    """

    def add(thing: T) -> T:
        if name in registry:
            raise ValueError(f"a {what} named {name!r} is registered already: {registry[name].__name__}")
        registry[name] = thing
        return thing

    return add


def import_all(package: str, folders: list[str]) -> None:
    """Import the modules of a package, so that the solvers in them are registered."""
    for module in pkgutil.iter_modules(folders):
        importlib.import_module(f"{package}.{module.name}")


def solver_types(
    *, learned: bool | None = None, splitting: bool | None = None, adjoint: bool | None = None
) -> dict[str, Any]:
    """Classes of registered solvers by name; the filters are those of `list_solvers`."""

    def chosen(cls: type[SolverBase]) -> bool:
        facts = (learned, cls.is_learned), (splitting, bool(cls.required_methods)), (adjoint, cls.homogeneous)
        return all(wanted in (None, fact) for wanted, fact in facts)

    return {name: cls for name, cls in _REGISTRY.items() if chosen(cls)}


def list_solvers(
    *, learned: bool | None = None, splitting: bool | None = None, adjoint: bool | None = None
) -> list[str]:
    """Names of the registered solvers, in alphabetical order.

    Args:
        learned: True for learned solvers only, False for classical ones only.
        splitting: likewise for solvers that use methods of the cell beside f itself.
        adjoint: likewise for learned solvers of the adjoint systems of a backward pass.

    Returns:
        The names that `get_solver` takes.

    Examples:
        >>> "broyden" in list_solvers(learned=False), "broyden" in list_solvers(splitting=True)
        (True, False)
    """
    return sorted(solver_types(learned=learned, splitting=splitting, adjoint=adjoint))


def get_solver(name: str, **options: Any) -> Any:
    """The registered solver of this name with these options; a learned one is untrained.

    ValueError for an unknown name, which lists the known ones.

    Examples:
        >>> get_solver("picard", damping=0.5)
        Picard(damping=0.5)
    """
    if name not in _REGISTRY:
        words = ", ".join(list_solvers(splitting=False)), ", ".join(list_solvers(splitting=True))
        raise ValueError(f"unknown solver {name!r}: known are {words[0]}; for cells that offer their parts: {words[1]}")
    return _REGISTRY[name](**options)


def name_of(solver: Any) -> str | None:
    """The registered name of a solver's class; None for anything else, subclasses of registered classes too.

    Examples:
        >>> name_of(get_solver("picard"))
        'picard'
    """
    return next((name for name, cls in _REGISTRY.items() if cls is type(solver)), None)
