"""The deep equilibrium layer: a cell, a solver and a gradient mode."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metabroyden.function import method_of
from metabroyden.gradients import Implicit, JacobianFree
from metabroyden.gradients.base import GradientMode, parts_of
from metabroyden.gradients.transforms import refuse, transform_of
from metabroyden.learned.fingerprint import FingerprintWatch
from metabroyden.learned.tolerance import fitted_rtol, tighter
from metabroyden.nn.dropout import stochastic_layers
from metabroyden.nn.pin import pin
from metabroyden.opaque import opaque
from metabroyden.padded import values_of
from metabroyden.shared import bare
from metabroyden.solution import Cell, Solution, State
from metabroyden.solve import check_options, solve
from metabroyden.solver import as_solver
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import AugmentedContext

_ROUNDINGS = 8  # no warning of a residual of so few roundings
_HALF = (torch.float16, torch.bfloat16)

Hook = Callable[[Cell, Any, State], None]
"""Called with the map f that was solved (weights and masks pinned), its context and the equilibrium with its graph."""
Observer = Callable[[str, Solution], None]
"""Called with "forward" or "backward" and what that solve found."""


class DEQ(nn.Module):
    """z = deq(x) with z = cell(z, x): the fixed point of a cell as a layer.

    After each call `last_solution` tells what the solve cost. After a backward pass `last_backward_solution` tells what the
    adjoint cost. Samples that fail keep their best iterate, and a warning says so.

    Through one call the cell is one map: parametrized weights (`normalise`) are computed once and `VariationalDropout` draws
    one mask a sample. Ordinary dropout or batch norm in training mode brings one warning.

    Threads may share a layer: each has its own map and its own gradients. `last_solution` and `last_backward_solution` are
    those of the call that ended last.

    In half precision (`deq.bfloat16()`, a state of that dtype) only the cell computes in it. The solve runs in float32, with
    rtol at least four roundings of the half type, and the result has the dtype of z0. `deq.to(...)` moves learned solvers
    too, in at least float32, although their weights are neither parameters nor state of the layer.

    A solve does not support `torch.vmap`, `torch.func` and forward-mode AD: a RuntimeError names the alternative.
    `torch.compile` breaks the graph around it.

    Args:
        cell: any callable `f(z, x)`, batch first, samples independent of one another: a module, a function, a method, a
            `functools.partial`, a compiled one. A module becomes a submodule of the layer. Tensors that another callable
            reads, a module's method or a partial of one too, get their gradients but are not parameters of the layer.
        solver: any of our solvers, learned ones included (default `Broyden()`); may be reassigned at any time.
        backward: gradient mode (default `Implicit()`; `Phantom`, `JacobianFree`, `Unroll`); used only where gradients
            are enabled.
        rtol: as in `solve`; so are atol and max_nfe.
        warn: warn when samples fail, forward or backward: once for each status, and again when twice the share fails. And,
            once, of a learned solver that was fitted to a tolerance more than 30 times as large as rtol.

    Attributes:
        hooks: list of functions `hook(f, context, z)`, called with each equilibrium that gets gradients (see `Hook`).
        observers: list of functions `observer(direction, solution)`, called after every solve, with gradients or not
            (see `Observer`); `metabroyden.integrations.SolveMonitor` makes figures for a log of them.

    Raises:
        TypeError, ValueError: a bad cell, solver, gradient mode or tolerance.

    Examples:
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
    solver: Any
    _fingerprints: FingerprintWatch
    _tolerance_told: bool

    def __init__(
        self,
        cell: Cell,
        *,
        solver: Any = None,
        backward: GradientMode | None = None,
        rtol: float = 1e-3,
        atol: float = 0.0,
        max_nfe: int = 50,
        warn: bool = True,
    ) -> None:
        super().__init__()
        self.cell: Any = cell
        self.solver = Broyden() if solver is None else solver
        self.backward_mode: Any = Implicit() if backward is None else backward
        check_options(cell, self.solver, rtol, atol, max_nfe, 1, None)
        if not isinstance(self.backward_mode, GradientMode):
            raise TypeError(f"backward must be a gradient mode such as Implicit(), got {backward!r}")
        self.rtol, self.atol, self.max_nfe = rtol, atol, max_nfe
        self.hooks: list[Hook] = []
        self.observers: list[Observer] = []
        self.last_solution: Solution | None = None
        self.last_backward_solution: Solution | None = None
        self._warn, self._layers_checked = warn, not warn
        self._forward_failures, self._backward_failures = _Failures(warn), _Failures(warn)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "solver":  # nn.Module would register a learned solver, to be trained and saved with the model
            self.__dict__.update(solver=value, _fingerprints=FingerprintWatch(), _tolerance_told=False)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Any, z0: State | None = None) -> State:
        """The equilibrium for the context x (a pytree of batch-first tensors), shaped like the state.

        z0 defaults to `cell.initial_state(x)` where the cell has one, else to zeros like x. ValueError where neither
        is possible, or where the cell's first call fails at zeros like x.
        """
        return self._equilibrium(x, z0, ())[-1]

    def states(self, x: Any, after: Sequence[int], z0: State | None = None) -> list[State]:
        """The iterates after so many evaluations, then the equilibrium: for a loss over the way to it.

        The equilibrium has the gradients of the layer's mode. The iterates before it have Jacobian-free ones (one step
        each), as in sparse fixed-point correction (Bai et al. 2022). See `fixed_point_correction`.

        Args:
            x: context, as in `forward`.
            after: rising numbers of evaluations.
            z0: start, as in `forward`.

        Returns:
            len(after) + 1 states.
        """
        return self._equilibrium(x, z0, after)

    @opaque
    def _equilibrium(self, x: Any, z0: State | None, after: Sequence[int]) -> list[State]:
        if z0 is None:
            z0 = initial_state(self.cell, x)
        self._warn_of_layers()
        mode, graph = self.backward_mode, torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        transform = transform_of(x, z0, tensors=_tensors_of(self.cell))
        unrolled = graph and mode.replaces_solve
        if transform is not None and not unrolled:
            refuse(transform)
        start, dtype = z0, parts_of(z0)[0].dtype
        half = dtype if dtype in _HALF else None
        rtol = self.rtol
        if half is not None:
            z0, rtol = _cast(z0, torch.float32), max(rtol, 4 * torch.finfo(half).eps)
        with default_start(self.cell, start, x, "call deq(x, z0)"):
            f, context = pin(self.cell, x, z0, dtype=half)
            if unrolled:
                if after:
                    raise ValueError(f"{mode!r} has no solve whose iterates could be given")
                z, self.last_solution = mode.run(f, z0, context, rtol=rtol, atol=self.atol)
                self._tell("forward", self.last_solution)
                return _cast([z], half)
            solution = self._solve(
                f, z0, context, after, rtol=rtol, f_dtype=half, keep_inverse=graph and mode.wants_inverse
            )
        if not graph:
            return _cast([*solution.snapshots, solution.z], half)
        early = [JacobianFree().attach(f, replace(solution, z=z), context) for z in solution.snapshots]
        z = mode.attach(f, solution, context, self._note_backward)
        for hook in self.hooks:
            hook(f, context, z)
        return _cast([*early, z], half)

    def _solve(self, f: Any, z0: State, context: Any, after: Sequence[int], **options: Any) -> Solution:
        """Solve; note what it cost, and warn of what failed."""
        self._fingerprints.check(self.solver, self.cell)
        words = None if self._tolerance_told or self.atol else tighter(fitted_rtol(self.solver), options["rtol"])
        if words is not None and self._warn:
            self._tolerance_told = True
            warnings.warn(f"DEQ: {type(self.solver).__name__} {words} (said once)", stacklevel=7)
        if options["keep_inverse"] and not as_solver(self.solver).has_inverse:
            raise ValueError(
                f"{self.backward_mode!r} needs a forward solver with an inverse Jacobian, Broyden or GroupedLSTM; got "
                f"{self.solver!r:.80}"
            )
        options |= {"solver": self.solver, "atol": self.atol, "max_nfe": self.max_nfe, "snapshots": after}
        solution = solve(f, z0, context, throw=False, **options)
        self.last_solution = replace(solution, inverse=None)
        self._tell("forward", self.last_solution)
        if self._forward_failures.news(solution):
            warnings.warn(f"DEQ: {solution.failures()} (said again if it gets worse; see last_solution)", stacklevel=7)
        return solution

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As every module's; learned solvers, forward and backward, move too, in at least float32."""
        for solver in (*_modules_in(self.solver), *_modules_in(self.backward_mode)):
            _move(solver, fn)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Without last solutions, hooks and observers, for copies and `torch.save`."""
        forgotten: dict[str, Any] = {
            "last_solution": None,
            "last_backward_solution": None,
            "hooks": [],
            "observers": [],
        }
        return {**super().__getstate__(), **forgotten}

    def _warn_of_layers(self) -> None:
        if self._layers_checked or not isinstance(self.cell, nn.Module):
            return
        reasons = stochastic_layers(self.cell)
        if reasons:
            self._layers_checked = True
            warnings.warn(f"DEQ: {'; '.join(reasons)} (said once)", stacklevel=7)

    def _tell(self, direction: str, solution: Solution | None) -> None:
        if solution is not None:
            for observer in tuple(self.observers):
                observer(direction, solution)

    def _note_backward(self, solution: Solution) -> None:
        self.last_backward_solution = solution
        self._tell("backward", solution)
        if self._backward_failures.news(solution):
            warnings.warn(
                f"DEQ, backward: {solution.failures()} (said again if it gets worse; see last_backward_solution)",
                stacklevel=2,
            )


class _Failures:
    """Failures that a warning has told of: a status is news the first time, and where its share has doubled since."""

    def __init__(self, warn: bool) -> None:
        self._warn = warn
        self._shares: dict[int, float] = {}

    def news(self, solution: Solution) -> bool:
        """Whether samples missed the tolerance, by more than rounding, in a way that was not told of yet."""
        if not self._warn:
            return False
        at_rounding = solution.residual <= _ROUNDINGS * torch.finfo(solution.residual.dtype).eps
        failed = ~(solution.converged | at_rounding).cpu()
        new = False
        for status, count in zip(*solution.status[failed].unique(return_counts=True), strict=True):
            share = float(count) / len(failed)
            if share >= 2 * self._shares.get(int(status), 0.0):
                self._shares[int(status)], new = share, True
        return new


def _tensors_of(cell: Any) -> Iterable[Tensor]:
    return itertools.chain(cell.parameters(), cell.buffers()) if isinstance(cell, nn.Module) else ()


def _cast(states: Any, dtype: torch.dtype | None) -> Any:
    """States in this dtype; None: as they are."""
    return states if dtype is None else pytree.tree_map(lambda part: part.to(dtype), states)


def _modules_in(thing: Any) -> list[nn.Module]:
    """The modules that a solver or a gradient mode is, or has as its settings."""
    if isinstance(thing, nn.Module):
        return [thing]
    settings = vars(thing).values() if is_dataclass(thing) and not isinstance(thing, type) else ()
    return [module for value in settings for module in _modules_in(value)]


def _move(solver: nn.Module, move: Callable[[Tensor], Tensor]) -> None:
    """Move a solver where `move` takes tensors of its kind."""
    first = next(itertools.chain(solver.parameters(), solver.buffers()), None)
    if first is None:
        return
    moved = move(first.new_empty(1))  # not of its own tensors: some moves forget the values
    solver.to(moved.device, torch.float32 if moved.dtype in _HALF else moved.dtype)


def initial_state(cell: Any, x: Any) -> State:
    """`cell.initial_state(x)` where the cell has one, else zeros like x; ValueError where neither is possible."""
    maker = getattr(cell, "initial_state", None)
    if maker is not None:
        return maker(bare(x))
    like = values_of(x)
    if isinstance(like, Tensor) and like.is_floating_point():
        return torch.zeros_like(like)
    given = f"{x.dtype}" if isinstance(x, Tensor) else f"type {type(x).__name__}"
    raise ValueError(
        f"DEQ cannot guess the shape of the state from a context of {given}: "
        "give z0, or give the cell a method initial_state(x)"
    )


@contextmanager
def default_start(f: Any, z0: State, x: Any, remedy: str = "give z0=, a map x → start") -> Iterator[None]:
    """While it lasts, what f raises at its first call from the default start, zeros like x, is raised with a word on z0.

    Args:
        f: the map, or the cell.
        z0: where the solve starts.
        x: its context.
        remedy: how to give another start.

    Raises:
        ValueError: f has no method `initial_state`, z0 is zeros like x, and f fails there.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if not isinstance(z0, Tensor) or not _is_default(f, z0, x) or not _fails(f, z0, x):
            raise
        shape, what = tuple(z0.shape), " ".join(str(error).split()) or "no message"
        raise ValueError(
            f"f failed at the default start, zeros like x of shape {shape} ({type(error).__name__}: {what}): if the state "
            f"has another shape {remedy}, or give f a method initial_state(x)"
        ) from error


def _is_default(f: Any, z0: State, x: Any) -> bool:
    """Whether z0 is zeros like x, and f names no start of its own."""
    x = x.context if isinstance(x, AugmentedContext) else x
    if method_of(f, "initial_state") is not None or not isinstance(z0, Tensor) or not isinstance(x, Tensor):
        return False
    return z0.shape == x.shape and not bool(z0.any())


def _fails(f: Any, z0: State, x: Any) -> bool:
    """Whether one call of f raises."""
    try:
        with torch.no_grad():
            f(z0, x)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return True
    return False
