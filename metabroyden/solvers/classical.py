"""The best classical solvers on validation problems: what a learned one is held against."""

from __future__ import annotations

import itertools
from typing import Any

from metabroyden.function import method_of
from metabroyden.solution import Cell, State
from metabroyden.solvers.anderson import Anderson
from metabroyden.solvers.broyden import Broyden
from metabroyden.solvers.picard import Picard
from metabroyden.solvers.splitting import ForwardBackward, PeacemanRachford
from metabroyden.solvers.tuning import tune


def tuned_solvers(
    f: Cell, z0: State, context: Any = None, *, budget: int, tolerances: tuple[float, ...] = (1e-2, 1e-3)
) -> dict[str, Any]:
    """The best Picard, Anderson and Broyden of the `grids`; f, z0 and context as for `solve`, the rest as for `tune`."""
    return {
        name: tune(grid, f, z0, context, tolerances=tolerances, max_nfe=budget)[0][0]
        for name, grid in grids(budget).items()
    }


def grids(budget: int) -> dict[str, list[Any]]:
    """The options that are tried."""
    return {
        "tuned Picard": [Picard(damping) for damping in (0.1, 0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.6)],
        "tuned Anderson": [
            Anderson(memory, damping, ridge)
            for memory, damping, ridge in itertools.product((5, 10), (0.25, 0.7, 1.0, 1.5), (1e-8, 1e-2))
        ],
        "tuned Broyden": [Broyden(budget, damping) for damping in (0.12, 0.25, 0.5, 0.7, 0.85, 1.0, 1.15)],
    }


def splitting_solvers(
    f: Cell, z0: State, context: Any = None, *, budget: int, tolerances: tuple[float, ...] = (1e-2, 1e-3)
) -> dict[str, Any]:
    """Tuned forward–backward (with a margin) and Peaceman–Rachford, where f offers its parts; none where it does not."""
    options: dict[str, Any] = {"tolerances": tolerances, "max_nfe": budget}
    found: dict[str, Any] = {}
    if offers(f, ForwardBackward):
        found["forward-backward"] = ForwardBackward.tuned(f, z0, context, margin=0.75, **options)
    if offers(f, PeacemanRachford):
        found["Peaceman-Rachford"] = PeacemanRachford.tuned(f, z0, context, **options)
    return found


def offers(f: Any, solver: Any) -> bool:
    """Whether f has the methods that a solver (or a class of them) uses beside it."""
    return all(method_of(f, name) is not None for name in solver.required_methods)
