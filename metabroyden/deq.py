"""The deep equilibrium layer: a cell, a solver and a gradient mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.gradients import Implicit, JacobianFree
from metabroyden.learned.fingerprint import FingerprintWatch
from metabroyden.shared import bare
from metabroyden.solution import Solution, State
from metabroyden.solve import check_options, solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.training.dropout import restless
from metabroyden.training.pin import pin

_ROUNDINGS = 8  # a residual of so many is as good as none

Observer = Callable[[Callable[..., State], Any, State], None]
"""Called with the map f that was solved (weights and masks pinned), its context and the equilibrium with its graph."""


class DEQ(nn.Module):
    """z = deq(x) with z = cell(z, x): the fixed point of a cell as a layer.

    Args:
        cell: module `f(z, x)`, batch first, samples independent of one another.
        solver: any of our solvers, learned ones included (default `Broyden()`); may be reassigned at any time.
        backward: gradient mode (default `Implicit()`; `Phantom`, `JacobianFree`, `Unroll`); used only where gradients are
            enabled.
        rtol, atol, max_nfe: as in `solve`.
        warn: say once when samples fail, forward or backward.

    After each call `last_solution` tells what the solve cost, and `last_backward_solution`, after a backward pass, what
    the adjoint cost. Samples that fail keep their best iterate; the first time that happens a warning says so.

    Through one call the cell is one map: parametrized weights (`normalise`) are computed once, `VariationalDropout` draws
    one mask a sample, and an ordinary dropout layer in training mode brings a warning, once.

    >>> import torch, metabroyden as mb
    >>> class Cell(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.w = torch.nn.Parameter(0.5 * torch.eye(4))
    ...     def forward(self, z, x):
    ...         return torch.tanh(z @ self.w + x)
    >>> deq = mb.DEQ(Cell(), rtol=1e-5)
    >>> z = deq(torch.ones(2, 4))
    >>> bool(deq.last_solution.converged.all())
    True
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: Any = None,
        backward: Any = None,
        rtol: float = 1e-3,
        atol: float = 0.0,
        max_nfe: int = 50,
        warn: bool = True,
    ) -> None:
        super().__init__()
        self.cell = cell
        # A learned solver is a module, but no part of the model: its weights must not be trained or saved with it.
        self._solver = [Broyden() if solver is None else solver]
        self.backward_mode = Implicit() if backward is None else backward
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be a module f(z, x), got {type(cell).__name__}")
        check_options(cell, self.solver, rtol, atol, max_nfe, 1, None)
        known = any(callable(getattr(self.backward_mode, name, None)) for name in ("attach", "run"))
        if isinstance(self.backward_mode, type) or not known:
            raise TypeError(f"backward must be a gradient mode such as Implicit(), got {backward!r}")
        self.rtol, self.atol, self.max_nfe = rtol, atol, max_nfe
        self.last_solution: Solution | None = None
        self.last_backward_solution: Solution | None = None
        self._warned = self._warned_backward = self._warned_restless = not warn
        self._watch = FingerprintWatch()
        self.observer: Observer | None = None  # told of each equilibrium that gets gradients

    @property
    def solver(self) -> Any:
        """The root finder of the forward pass."""
        return self._solver[0]

    @solver.setter
    def solver(self, solver: Any) -> None:
        self._solver = [solver]
        self._watch = FingerprintWatch()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "solver":  # nn.Module would take a learned solver for a child of its own, past the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Any, z0: State | None = None) -> State:
        """The equilibrium for the context x (a pytree of batch-first tensors), shaped like the state.

        z0 defaults to `cell.initial_state(x)` where the cell has one, else to zeros like x. ValueError where neither
        is possible.
        """
        return self._equilibrium(x, z0, ())[-1]

    def states(self, x: Any, after: Sequence[int], z0: State | None = None) -> list[State]:
        """The iterates after so many evaluations (rising), then the equilibrium: for a loss over the way to it.

        The equilibrium has the gradients of the layer's mode, the iterates before it Jacobian-free ones (one step each),
        as in sparse fixed-point correction (Bai et al. 2022). See `fixed_point_correction`.
        """
        return self._equilibrium(x, z0, after)

    def _equilibrium(self, x: Any, z0: State | None, after: Sequence[int]) -> list[State]:
        if z0 is None:
            z0 = initial_state(self.cell, x)
        self._watch_dropout()
        mode, graph = self.backward_mode, torch.is_grad_enabled()
        f, context = pin(self.cell, x, z0)
        if graph and hasattr(mode, "run"):
            if after:
                raise ValueError(f"{mode!r} has no solve whose iterates could be given")
            z, self.last_solution = mode.run(f, z0, context, rtol=self.rtol, atol=self.atol)
            return [z]
        self._watch.check(self.solver, self.cell)
        reuse = graph and getattr(mode, "wants_inverse", False)
        if reuse and getattr(self.solver, "inverse", None) is None:
            raise ValueError(
                f"{mode!r} needs a forward solver with an inverse Jacobian, Broyden or GroupedLSTM; got {self.solver!r:.80}"
            )
        solution = solve(
            f,
            z0,
            context,
            solver=self.solver,
            rtol=self.rtol,
            atol=self.atol,
            max_nfe=self.max_nfe,
            throw=False,
            snapshots=after,
            keep_inverse=reuse,
        )
        self.last_solution = replace(solution, inverse=None)
        if not self._warned and _fell_short(solution):
            self._warned = True
            warnings.warn(f"DEQ: {solution.failures()} (said once; see last_solution)", stacklevel=5)
        if not graph:
            return [*solution.snapshots, solution.z]
        early = [JacobianFree().attach(f, replace(solution, z=z), context) for z in solution.snapshots]
        z = mode.attach(f, solution, context, self._note_backward)
        if self.observer is not None:
            self.observer(f, context, z)
        return [*early, z]

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last calls cost and who watches, for copies and `torch.save`."""
        return {**super().__getstate__(), "last_solution": None, "last_backward_solution": None, "observer": None}

    def _watch_dropout(self) -> None:
        if self._warned_restless:
            return
        names = restless(self.cell)
        if names:
            self._warned_restless = True
            warnings.warn(
                f"DEQ: {', '.join(names)} drops or learns anew at every evaluation, so that the cell has no fixed point to "
                "find; use VariationalDropout or normalise (said once)",
                stacklevel=5,
            )

    def _note_backward(self, solution: Solution) -> None:
        self.last_backward_solution = solution
        if not self._warned_backward and _fell_short(solution):
            self._warned_backward = True
            warnings.warn(f"DEQ, backward: {solution.failures()} (said once; see last_backward_solution)", stacklevel=2)


def _fell_short(solution: Solution) -> bool:
    """Whether a sample missed the tolerance by more than rounding."""
    at_rounding = solution.residual <= _ROUNDINGS * torch.finfo(solution.residual.dtype).eps
    return not bool((solution.converged | at_rounding).all())


def initial_state(cell: nn.Module, x: Any) -> State:
    """`cell.initial_state(x)` where the cell has one, else zeros like x; ValueError where neither is possible."""
    maker = getattr(cell, "initial_state", None)
    if maker is not None:
        return maker(bare(x))
    if isinstance(x, Tensor) and x.is_floating_point():
        return torch.zeros_like(x)
    raise ValueError(
        f"DEQ cannot guess the shape of the state from a context of type {type(x).__name__}: "
        "give z0, or give the cell a method initial_state(x)"
    )
