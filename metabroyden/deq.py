"""The deep equilibrium layer: a cell, a solver and a gradient mode."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.gradients import Implicit, JacobianFree
from metabroyden.gradients.base import parts_of
from metabroyden.gradients.transforms import refuse, transform_of
from metabroyden.learned.fingerprint import FingerprintWatch
from metabroyden.nn.dropout import stochastic_layers
from metabroyden.nn.pin import pin
from metabroyden.opaque import opaque
from metabroyden.shared import bare
from metabroyden.solution import Solution, State
from metabroyden.solve import check_options, solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import like

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
        warn: say when samples fail, forward or backward: once for each reason, and again when twice the share fails.

    After each call `last_solution` tells what the solve cost, and `last_backward_solution`, after a backward pass, what
    the adjoint cost. Samples that fail keep their best iterate, and a warning says so.

    Through one call the cell is one map: parametrized weights (`normalise`) are computed once, `VariationalDropout` draws
    one mask a sample, and ordinary dropout or batch norm in training mode brings a warning, once.

    Threads may share a layer: each has its own map and its own gradients. The attributes `last_solution` and
    `last_backward_solution` are those of whichever call ended last.

    In half precision (`deq.bfloat16()`, a state of that dtype) the cell alone computes in it: the state is solved for in
    float32, to no smaller rtol than four roundings, and returned in the dtype of z0. `deq.to(...)` takes learned solvers
    along, in at least float32, though their weights are neither parameters nor state of the layer.

    A solve cannot be taken through `torch.vmap`, `torch.func` or forward-mode AD: a RuntimeError names the way out.
    `torch.compile` leaves it as it is, between two graphs.

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

    solves_its_cell = True  # see `check_map`

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
        self._warned_restless = not warn
        self._said, self._said_backward = _Failures(warn), _Failures(warn)
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

    @opaque
    def _equilibrium(self, x: Any, z0: State | None, after: Sequence[int]) -> list[State]:
        if z0 is None:
            z0 = initial_state(self.cell, x)
        self._watch_layers()
        mode, graph = self.backward_mode, torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        transform = transform_of(x, z0, tensors=itertools.chain(self.cell.parameters(), self.cell.buffers()))
        if transform is not None and not (graph and hasattr(mode, "run")):
            refuse(transform)
        dtype, z0 = _in_single(z0)
        f, context = pin(self.cell, x, z0, dtype=dtype)
        rtol = self.rtol if dtype is None else max(self.rtol, 4 * torch.finfo(dtype).eps)
        if graph and hasattr(mode, "run"):
            if after:
                raise ValueError(f"{mode!r} has no solve whose iterates could be given")
            z, self.last_solution = mode.run(f, z0, context, rtol=rtol, atol=self.atol)
            return _cast([z], dtype)
        solution = self._solution(f, z0, context, after, rtol=rtol, f_dtype=dtype, graph=graph)
        if not graph:
            return _cast([*solution.snapshots, solution.z], dtype)
        early = [JacobianFree().attach(f, replace(solution, z=z), context) for z in solution.snapshots]
        z = mode.attach(f, solution, context, self._note_backward)
        if self.observer is not None:
            self.observer(f, context, z)
        return _cast([*early, z], dtype)

    def _solution(
        self, f: Any, z0: State, context: Any, after: Sequence[int], *, graph: bool, **options: Any
    ) -> Solution:
        """Solve; note what it cost, and warn of what failed."""
        self._watch.check(self.solver, self.cell)
        reuse = graph and getattr(self.backward_mode, "wants_inverse", False)
        if reuse and getattr(self.solver, "inverse", None) is None:
            raise ValueError(
                f"{self.backward_mode!r} needs a forward solver with an inverse Jacobian, Broyden or GroupedLSTM; got "
                f"{self.solver!r:.80}"
            )
        solution = solve(
            f,
            z0,
            context,
            solver=self.solver,
            atol=self.atol,
            max_nfe=self.max_nfe,
            throw=False,
            snapshots=after,
            keep_inverse=reuse,
            **options,
        )
        self.last_solution = replace(solution, inverse=None)
        if self._said.news(solution):
            warnings.warn(f"DEQ: {solution.failures()} (said again if it gets worse; see last_solution)", stacklevel=7)
        return solution

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As every module's: learned solvers, forward and backward, go along, in at least float32."""
        for solver in (*_modules_in(self.solver), *_modules_in(self.backward_mode)):
            _take_along(solver, fn)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last calls cost and who watches, for copies and `torch.save`."""
        return {**super().__getstate__(), "last_solution": None, "last_backward_solution": None, "observer": None}

    def _watch_layers(self) -> None:
        if self._warned_restless:
            return
        reasons = stochastic_layers(self.cell)
        if reasons:
            self._warned_restless = True
            warnings.warn(f"DEQ: {'; '.join(reasons)} (said once)", stacklevel=7)

    def _note_backward(self, solution: Solution) -> None:
        self.last_backward_solution = solution
        if self._said_backward.news(solution):
            warnings.warn(
                f"DEQ, backward: {solution.failures()} (said again if it gets worse; see last_backward_solution)",
                stacklevel=2,
            )


class _Failures:
    """Which failures a warning has told of: a status is news the first time, and where its share has doubled since."""

    def __init__(self, warn: bool) -> None:
        self._warn = warn
        self._shares: dict[int, float] = {}

    def news(self, solution: Solution) -> bool:
        """Whether samples missed the tolerance, by more than rounding, in a way that was not told of yet."""
        if not self._warn:
            return False
        at_rounding = solution.residual <= _ROUNDINGS * torch.finfo(solution.residual.dtype).eps
        short = ~(solution.converged | at_rounding).cpu()
        new = False
        for status, count in zip(*solution.status[short].unique(return_counts=True), strict=True):
            share = float(count) / len(short)
            if share >= 2 * self._shares.get(int(status), 0.0):
                self._shares[int(status)], new = share, True
        return new


def _in_single(z: State) -> tuple[torch.dtype | None, State]:
    """(half-precision dtype that f is to be called in, the state in float32); (None, the state) where it is not half."""
    dtype = parts_of(z)[0].dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return None, z
    return dtype, like((part.float() for part in parts_of(z)), type(z))


def _cast(states: list[State], dtype: torch.dtype | None) -> list[State]:
    """The states in this dtype; None: as they are."""
    if dtype is None:
        return states
    return [like((part.to(dtype) for part in parts_of(z)), type(z)) for z in states]


def _modules_in(thing: Any) -> list[nn.Module]:
    """The modules that a solver or a gradient mode is, or has as its settings."""
    if isinstance(thing, nn.Module):
        return [thing]
    settings = vars(thing).values() if is_dataclass(thing) and not isinstance(thing, type) else ()
    return [module for value in settings for module in _modules_in(value)]


def _take_along(solver: nn.Module, move: Callable[[Tensor], Tensor]) -> None:
    """Move a solver where `move` takes tensors of its kind."""
    like = next(itertools.chain(solver.parameters(), solver.buffers()), None)
    if like is None:
        return
    moved = move(like.new_empty(1))  # not of its own tensors: some moves forget the values
    half = moved.dtype in (torch.float16, torch.bfloat16)
    solver.to(moved.device, torch.float32 if half else moved.dtype)


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
