"""What a known problem is, and the registry of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metabroyden.solution import Cell, State
from metabroyden.solvers import registry

Maker = Callable[[torch.dtype, int, int], "KnownProblem"]
PROBLEMS: dict[str, Maker] = {}
_CLASSICAL = ("picard", "anderson", "broyden", "newton")
ALL_OPEN = dict.fromkeys(_CLASSICAL, "open")
ALL_FAIL = dict.fromkeys(_CLASSICAL, "fails")


@dataclass(frozen=True)
class KnownProblem:
    """f(z, context) with its start, its answer, and what a correct solver does on it. B samples.

    Attributes:
        f: as `metabroyden.solve` takes it, with z0 and context.
        correct: a sentence: what a correct solver does.
        star: the fixed points, shaped like z0; None where there are none, or none is singled out.
        rtol: what to ask for in float64, as max_nfe.
        expects: outcome by solver name ("picard", "anderson", "broyden", "newton"): "solves" all samples to rtol,
            "fails" on all of them and says so, or "open". Solvers that are not named: "solves".
        distance: largest relative distance ‖z − z*‖ / ‖z*‖ of a solved sample.
        contractive: f is a contraction near the paths of all solvers, so that rounding does not change them.
    """

    f: Cell
    z0: State
    context: Any
    correct: str
    star: State | None = None
    rtol: float = 1e-8
    max_nfe: int = 200
    expects: Mapping[str, str] = field(default_factory=dict)
    distance: float = 1e-6
    contractive: bool = False

    def expected(self, solver: str) -> str:
        """The outcome expected of a solver."""
        return self.expects.get(solver, "solves")


register = partial(registry.register, registry=PROBLEMS, what="problem")
"""Decorator: makes the maker of a problem known under a name."""


def make_problem(name: str, *, dtype: torch.dtype = torch.float64, batch: int = 8, seed: int = 0) -> KnownProblem:
    """The registered problem of this name, with so many samples; ValueError for an unknown one.

    Examples:
        >>> import metabroyden as mb
        >>> problem = make_problem("linear_normal")
        >>> solution = mb.solve(problem.f, problem.z0, problem.context, solver=mb.Broyden(), rtol=problem.rtol)
        >>> bool(torch.allclose(solution.z, problem.star))
        True
    """
    if name not in PROBLEMS:
        raise ValueError(f"unknown problem {name!r}: known are {', '.join(PROBLEMS)}")
    return PROBLEMS[name](dtype, batch, seed)


def generator(seed: int) -> torch.Generator:
    """A seeded generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def distance(z: Tensor, star: Tensor) -> Tensor:
    """(B,) relative distance ‖z − z*‖ / ‖z*‖, in float64."""
    star = star.double()
    return (z.double() - star).flatten(1).norm(dim=1) / star.flatten(1).norm(dim=1)
