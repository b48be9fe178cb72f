"""What a solver is. A solver is a frozen config; its state travels in and out of `step` as a NamedTuple.

State fields are tensors with the rows first (so that the driver can gather them) or plain ints common to all rows.
R rows, n coordinates; g = f(z) − z throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metabroyden.deprecated import MEMBERS, warn
from metabroyden.problem import Problem
from metabroyden.state import gather

Trail = list[tuple[Tensor, Tensor]]
"""Iterates (R, n), each with its residual g = f(z) − z (R, n)."""


def joined(trails: list[Trail]) -> Trail:
    """One trail of the rows of several; in front of a shorter one its first iterate is repeated, which tells nothing."""
    longest = max(map(len, trails))
    full = [[trail[0]] * (longest - len(trail)) + trail for trail in trails if trail]
    return [
        (torch.cat([z for z, _ in points]), torch.cat([g for _, g in points])) for points in zip(*full, strict=True)
    ]


class Step(NamedTuple):
    """What a step returns: the next iterate (R, n), the solver's state, and g at z where the step evaluated it."""

    z: Tensor
    state: Any
    g: Tensor | None = None


class SolverBase:
    """Base class of solvers: subclasses define `step`, and replace the defaults that do not fit them.

    A step must not change z or g in place. `solve` also takes an object without this base class that has `start`, `init`
    and `step` (see `as_solver`).

    Attributes:
        min_nfe: evaluations of f that a step needs.
        fixed_cost: whether a step costs a number of evaluations known beforehand.
        required_methods: names of methods that f must have, for `Problem.method` and `Problem.elementwise`.
        has_inverse: whether `inverse` and `rmatvec` are defined.
        homogeneous: whether a learned step scales with the problem, sign included, as adjoint systems require.
        is_learned: whether the solver has trained weights.
    """

    min_nfe: int = 1
    fixed_cost: bool = True
    required_methods: tuple[str, ...] = ()
    has_inverse: bool = False
    homogeneous: bool = False
    is_learned: bool = False

    def start(self, z0: Tensor, problem: Problem) -> Tensor | Step:
        """The first iterate, (R, n): z0 itself unless a solver has a start of its own.

        Or a first step, which has evaluated its iterate, so that its g is known: `init` is not called then. It counts among
        a solve's evaluations, not among its steps.
        """
        return z0

    def init(self, z: Tensor, g: Tensor, problem: Problem) -> Any:
        """The state before the first step, z and g of shape (R, n): none, unless a solver has one."""
        return ()

    def resume(self, z: Tensor, g: Tensor, trail: Trail, problem: Problem) -> Any:
        """The state before the first step where this solver takes over at z from one that leaves this trail, see `trail`.

        As `init` gives it, unless a solver has a use for the trail.
        """
        return self.init(z, g, problem)

    def trail(self, state: Any, index: Tensor) -> Trail:
        """The last iterates of the rows `index` with their residuals, oldest first, for the solver that takes over.

        None, unless a solver keeps them.
        """
        return []

    def step(self, z: Tensor, g: Tensor, state: Any, problem: Problem) -> Step:
        """The next iterate from z and its residual g."""
        raise NotImplementedError

    def gather(self, state: Any, index: Tensor) -> Any:
        """The rows `index` of a state."""
        return gather(state, index)

    def inverse(self, state: Any, index: Tensor) -> Any:
        """What `rmatvec` needs to know of the rows `index`: a pytree of tensors with the rows first."""
        raise NotImplementedError

    def rmatvec(self, w: Tensor, inverse: Any) -> Tensor:
        """Bᵀw for w (R, n), B the solver's approximation of (J − I)⁻¹, with what `inverse` returned."""
        raise NotImplementedError

    def phases(self) -> list[Phase]:
        """The stretches of a solve: one for a plain solver; a safeguarded one hands samples on."""
        return [Phase(self)]


@dataclass(frozen=True)
class Phase:
    """One stretch of a safeguarded solve.

    Attributes:
        solver: what does the stepping.
        origin: where the phase begins: "start" (z0) or "best" (the best iterate so far, at no evaluation).
        enter_below: of a phase that begins at the best iterate: where that one's relative residual is above this, the
            sample goes on to the next phase that begins at z0.
        horizon: steps after which what has not converged is handed to the next phase; None: no limit.
        envelope: largest relative residuals (see `progress`), after 0, 1, … steps, with which a sample may stay.
        patience: evaluations without progress after which a sample is handed on; None: no limit.
        progress: the factor by which the smallest relative residual must fall to count as progress. (Not ‖f(z) − z‖, by
            which the best iterate is chosen: where z vanishes, that falls for ever without getting nearer to a solution.)
    """

    solver: Any
    origin: str = "start"
    enter_below: float = math.inf
    horizon: int | None = None
    patience: int | None = None
    progress: float = 1.0
    envelope: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "solver", as_solver(self.solver))


class _Adapter(SolverBase):
    """A solver without our base class: its own members where it has them, else the defaults."""

    def __init__(self, solver: Any) -> None:
        self.solver = solver
        self.has_inverse = hasattr(solver, "inverse")
        for name in vars(SolverBase):
            if not name.startswith("_") and hasattr(solver, name):
                setattr(self, name, getattr(solver, name))
        for old, new in MEMBERS.items():
            if hasattr(solver, old) and not hasattr(solver, new):
                warn(f"{old} of a solver", new)
                setattr(self, new, getattr(solver, old))
        if getattr(solver, "safeguard", None) is not None and not hasattr(solver, "phases"):
            warn("safeguard.plan of a solver", "phases")
            self.phases = lambda: solver.safeguard.plan(solver)  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return repr(self.solver)


def as_solver(solver: Any) -> SolverBase:
    """The solver itself, or one with the defaults of `SolverBase` around an object that has `start`, `init` and `step`.

    TypeError for anything else.
    """
    if isinstance(solver, SolverBase):
        return solver
    if isinstance(solver, type) or not all(callable(getattr(solver, name, None)) for name in ("start", "init", "step")):
        raise TypeError(f"solver must be an instance with start, init and step, such as Broyden(); got {solver!r}")
    return _Adapter(solver)
