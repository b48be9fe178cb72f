"""Two deep equilibrium models as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.convert.readout import Readout
from metabroyden.deq import DEQ, initial_state
from metabroyden.gradients import Implicit
from metabroyden.gradients.base import parts_of
from metabroyden.solution import State
from metabroyden.solver import SolverBase
from metabroyden.solvers.broyden import Broyden


class PairCell(nn.Module):
    """f((z₁, z₂), x) = (f₁(z₁, x), f₂(z₂, between(y₁))), y₁ the first's output in z₁.

    Where a state is a tuple itself, the pair's is the flat tuple of all their tensors.
    Bai, Kolter & Koltun, Deep Equilibrium Models, NeurIPS 2019, theorem 2: stacking DEQs adds nothing to a single one.
    Arguments are as for `compose`; the cells are shared, not copied.
    """

    def __init__(self, first: DEQ | Readout, second: DEQ | Readout, between: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.first, self.second, self.between = _deq(first).cell, _deq(second).cell, between
        self._reads = isinstance(first, Readout), isinstance(second, Readout)
        self._split: tuple[int, bool, bool] | None = None  # tensors of z₁; whether z₁ and z₂ are bare tensors

    def initial_state(self, x: Any) -> tuple[Tensor, ...]:
        """The first's initial state for x, and the second's for what the first puts out there."""
        with torch.no_grad():
            z1 = initial_state(self.first, x)
            z2 = initial_state(self.second, self._context(z1))
        self._split = len(parts_of(z1)), isinstance(z1, Tensor), isinstance(z2, Tensor)
        return (*parts_of(z1), *parts_of(z2))

    def forward(self, z: tuple[Tensor, ...], x: Any) -> tuple[Tensor, ...]:
        """f(z, x), shaped like z."""
        if self._split is None:  # z0 was given by hand
            self.initial_state(x)
        z1, z2 = self.states(z)
        return (*parts_of(self.first(z1, x)), *parts_of(self.second(z2, self._context(z1))))

    def states(self, z: tuple[Tensor, ...]) -> tuple[State, State]:
        """The states (z₁, z₂) of the two cells, as each takes its own."""
        assert self._split is not None
        count, *single = self._split
        z1, z2 = z[:count], z[count:]
        return (z1[0] if single[0] else z1), (z2[0] if single[1] else z2)

    def output(self, z: tuple[Tensor, ...]) -> State:
        """The second's output in a state."""
        z2 = self.states(z)[1]
        return self.second.output(z2) if self._reads[1] else z2

    def _context(self, z1: State) -> Any:
        """What the second takes as its context where the first is at z₁."""
        y1 = self.first.output(z1) if self._reads[0] else z1
        return y1 if self.between is None else self.between(y1)


class ComposedDEQ(Readout):
    """Two DEQs solved, and differentiated, as one; made by `compose`.

    `deq(x)` gives the states of both, `cell` is a `PairCell`.
    """


def compose(
    first: DEQ | Readout, second: DEQ | Readout, *, between: Callable[..., Any] | None = None, **deq_options: Any
) -> ComposedDEQ:
    """One DEQ with the output and the gradients of second(between(first(x))), see `PairCell`; the parameters are shared.

    One solve finds both states together. Tolerances hold for the joint state, so that a second state much smaller than the
    first wants a tighter rtol.

    Args:
        first: a `DEQ`, whose output is its state, or what `to_deq` or `compose` made.
        second: the same, reading the first one's output.
        between: maps the first's output to the second's context, samples apart; a module's parameters are trained too.
        deq_options: of `DEQ`. Defaults: the smaller rtol (of a DEQ beside a converted network, the DEQ's) and atol, the sum
            of their max_nfe; their solver and gradient mode where they agree, else `Broyden()` and `Implicit()`. A learned
            solver, fitted to another f, is never taken over.

    Returns:
        A module; its `deq` is the `DEQ` of both states.

    Raises:
        TypeError: an argument of another kind.

    Examples:
        >>> import torch, metabroyden as mb
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> head = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Softplus())
        >>> both, x = mb.compose(mb.to_deq(net), mb.to_deq(head)), torch.randn(5, 3)
        >>> bool(torch.allclose(both(x), head(net(x)), atol=1e-5))
        True
    """
    for name, given in (("first", first), ("second", second)):
        if not isinstance(given, (DEQ, Readout)):
            raise TypeError(f"{name} must be a DEQ, or what to_deq or compose made, got {type(given).__name__}")
    if between is not None and not callable(between):
        raise TypeError(f"between must be callable or None, got {type(between).__name__}")
    one, two = _deq(first), _deq(second)
    solver, rtol = _agreed(one, two, Broyden())
    defaults = {
        "solver": solver,
        "backward": _backward(one.backward_mode, two.backward_mode),
        "rtol": rtol,
        "atol": min(one.atol, two.atol),
        "max_nfe": one.max_nfe + two.max_nfe,
    }
    return ComposedDEQ(PairCell(first, second, between), **defaults | deq_options)


def _deq(given: DEQ | Readout) -> DEQ:
    return given.deq if isinstance(given, Readout) else given


def _agreed(one: Any, two: Any, otherwise: Any) -> tuple[Any, float]:
    """(solver, rtol) of two that have both. Unless they share a classical solver, rtol 0 is not taken over: only
    substitution along a stack reaches it."""
    if isinstance(one.solver, SolverBase) and not one.solver.is_learned and one.solver == two.solver:
        return one.solver, min(one.rtol, two.rtol)
    return otherwise, min(rtol for rtol in (one.rtol, two.rtol) if rtol > 0)


def _backward(one: Any, two: Any) -> Any:
    """The gradient mode of the pair: theirs where they agree, implicit with the tighter tolerance and both budgets."""
    if not (isinstance(one, Implicit) and isinstance(two, Implicit)):
        return one if one == two else Implicit()
    solver, rtol = _agreed(one, two, Implicit().solver)
    return dataclasses.replace(one, solver=solver, rtol=rtol, max_nfe=one.max_nfe + two.max_nfe)
