"""Chunks of a solve's steps as one compiled graph, for `solve(..., compiled=True)`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metabroyden.evaluator import Evaluator, Rows
from metabroyden.function import Given, GuardedFunction, cell_of, owner_of
from metabroyden.problem import CountedProblem, Problem, seen_context
from metabroyden.shared import is_shared
from metabroyden.solver import SolverBase

LENGTH = 4
"""Steps of a chunk where `check_every` is not given."""


class Evaluated(NamedTuple):
    """One evaluation of f in a chunk."""

    z: Tensor  # (R, n)
    fz: Tensor  # (R, n)
    g: Tensor  # (R, n)
    norms: Tensor  # (2, R) ‖g‖, ‖f(z)‖


class Made(NamedTuple):
    """One step of a chunk."""

    z: Tensor  # (R, n)
    g: Tensor  # (R, n)
    measured: bool  # whether the step itself evaluated f at z
    evaluated: list[Evaluated]


class Surroundings(NamedTuple):
    """What the steps of a chunk see of the solve. A graph takes from it only what they use."""

    function: GuardedFunction
    given: Given
    context: Any  # as a solver sees it
    steps_left: int
    keep_inverse: bool
    hands_over: bool
    z0: Tensor  # (B, n)
    g0: Tensor | None  # (B, n)
    rows: Tensor | None  # (R,) the rows at work; None: the whole batch
    whole: Tensor | None  # (B, n) what f without a context sees of the rows that have stopped
    image: Tensor | None  # (R, n) f at the iterate that the chunk begins with


class ChunkProblem(Problem):
    """The problem of a chunk: evaluations are kept in order, to be counted and judged once the graph has run."""

    def __init__(self, around: Surroundings, z: Tensor) -> None:
        self._around, self._last = around, (z, around.image)
        self.shape = around.function.packing.shape
        self.keep_inverse, self.hands_over = around.keep_inverse, around.hands_over
        self.evaluated: list[Evaluated] = []

    @property
    def context(self) -> Any:
        """See `Problem`."""
        return self._around.context

    @property
    def steps_left(self) -> int:  # type: ignore[override]
        """See `Problem`."""
        return self._around.steps_left - len(self.evaluated)

    def origin(self) -> Tensor:
        """See `Problem`."""
        around = self._around
        if around.g0 is None:
            raise RuntimeError("a step asks for f(z0), which neither start nor init has asked for")
        origin = around.z0 + around.g0
        return origin if around.rows is None else origin.index_select(0, around.rows)

    def image(self, z: Tensor, g: Tensor) -> Tensor:
        """See `Problem`."""
        point, image = self._last
        return image.clone() if point is z and image is not None else z + g

    def residual(self, z: Tensor, among: Any = None) -> Tensor:
        """See `Problem`."""
        around = self._around
        if around.whole is None or around.rows is None:
            fz = around.function(z, around.given).clone()  # f may write its next value where it wrote this one
        else:
            fz = around.function(around.whole.index_copy(0, around.rows, z)).index_select(0, around.rows)
        g = fz - z
        norms = torch.stack([torch.linalg.vector_norm(g, dim=1), torch.linalg.vector_norm(fz, dim=1)])
        self.evaluated.append(Evaluated(z, fz, g, norms))
        self._last = z, fz
        return g


def _steps(
    solver: SolverBase, z: Tensor, g: Tensor, state: Any, around: Surroundings, number: int
) -> tuple[list[Made], Any]:
    """The next `number` steps from z with its residual g, and the solver's state after them."""
    problem, made = ChunkProblem(around, z), []
    for _ in range(number):
        before = len(problem.evaluated)
        step = solver.step(z, g, state, problem)
        z, state, measured = step.z, step.state, step.g is not None
        g = step.g if step.g is not None else problem.residual(z)
        made.append(Made(z, g, measured, problem.evaluated[before:]))
    return made, state


class _Graphs(dict[Any, Callable[..., Any]]):
    """The compiled chunks of one f and one solver."""

    usable = True  # until something cannot be compiled


# by what owns f, then by the solver: nothing here keeps either
_KNOWN: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Any, _Graphs]]] = WeakKeyDictionary()


def _graphs_of(f: Any, solver: Any, backend: str) -> _Graphs:
    """The graphs made so far; solvers that are compared by value share theirs."""
    by_value = is_dataclass(solver)
    solver = getattr(solver, "solver", solver) if not by_value and not solver.is_learned else solver
    key = backend, getattr(cell_of(f), "__qualname__", ""), repr(solver) if by_value else ""
    try:
        of_f = _KNOWN.setdefault(owner_of(f), WeakKeyDictionary())
        return of_f.setdefault(type(solver) if by_value else solver, {}).setdefault(key, _Graphs())
    except TypeError:  # no weak references to f or the solver
        return _Graphs()


class Chunks:
    """Runs the chunks of one solve.

    What is compiled is kept as long as f and a learned solver live: a graph for each phase, for each number of steps made
    before (where the solver's state has that) and for each shape of a sample. It serves any number of rows but one; a
    single row has a graph of its own.

    Args:
        evaluator: of the solve.
        solver: as it was given to `solve`.
        backend: of `torch.compile`.
    """

    def __init__(self, evaluator: Evaluator, solver: SolverBase, backend: str) -> None:
        self._evaluator, self._backend = evaluator, backend
        self._graphs = _graphs_of(evaluator.f, solver, backend)
        self._function = GuardedFunction(evaluator.f, evaluator.packing, f_dtype=evaluator.f_dtype, guarded=False)

    @property
    def usable(self) -> bool:
        """Whether what was to be compiled could be."""
        return self._graphs.usable

    def given_to(self, rows: Rows) -> Given:
        """What f is given beside the state of these rows, in tensors whose number of rows may change."""
        given = self._evaluator.given_to(rows)
        if given.context is None:
            return given
        # other tensors of the same memory: the caller's keep no mark
        alias = lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf  # noqa: E731
        context = pytree.tree_map(alias, given.context, is_leaf=is_shared)
        _mark(context)
        return Given(context)

    def run(
        self, solver: SolverBase, z: Tensor, g: Tensor, state: Any, around: Surroundings, number: int, phase: int
    ) -> tuple[list[Made], Any] | None:
        """`_steps`, compiled, in the phase of this number; None, with a warning, where that does not work."""
        leaves = pytree.tree_leaves(state)
        _mark((z, g, leaves, around.rows, around.image, around.whole))
        # a graph holds for these shapes and for the numbers in the state, such as the steps made
        key = phase, number, tuple(map(_kind, [z, *around.given.tensors, *leaves]))
        arguments = solver, z, g, state, around, number
        found = _attempt(self._graphs[key], arguments) if key in self._graphs else None
        if not isinstance(found, tuple):  # new, or of too many kinds otherwise: from nothing
            graph = self._graphs[key] = _compiled(self._backend)
            found = _attempt(graph, arguments)
        if isinstance(found, tuple):
            return found
        self._graphs.usable = False
        self._graphs.clear()
        text = f"solve runs uncompiled: {type(found).__name__}: {str(found)[:200]}"
        warnings.warn(text, stacklevel=8)  # at the caller of `solve`
        return None

    def around(self, problem: CountedProblem, rows: Rows, given: Given, z: Tensor) -> Surroundings:
        """What the steps from z on see."""
        evaluator, whole, last = self._evaluator, rows.index is not None and given.context is None, None
        if evaluator.last is not None and evaluator.last[0] is z:
            last = evaluator.last[1]
        return Surroundings(
            function=self._function,
            given=given,
            context=seen_context(given.context, z),
            steps_left=problem.steps_left,
            keep_inverse=problem.keep_inverse,
            hands_over=problem.hands_over,
            z0=evaluator.z0,
            g0=evaluator.g0,
            rows=rows.index,
            whole=evaluator.best_z if whole else None,
            image=last,
        )


def _compiled(backend: str) -> Callable[..., Any]:
    """`_steps` compiled, from code of its own: what torch compiles of one code is limited in number, and goes as a whole."""
    function = FunctionType(_steps.__code__.replace(), _steps.__globals__)
    finalize(function, torch._dynamo.eval_frame.reset_code, function.__code__).atexit = False
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)


def _attempt(graph: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[list[Made], Any] | Exception:
    """What a graph makes, or why it cannot; what f itself raises, it raises again when it is run as it stands."""
    try:
        return graph(*arguments)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        return error


def _kind(leaf: Any) -> Any:
    """What of a leaf of a state a graph is made for."""
    if isinstance(leaf, Tensor):  # the first axis is that of rows
        return leaf.shape[1:], leaf.dtype
    return leaf if isinstance(leaf, (bool, int, float)) else type(leaf)


def _mark(tree: Any) -> None:
    """Tell the compiler that the number of rows of these tensors may change."""
    for leaf in pytree.tree_leaves(tree, is_leaf=is_shared):
        if isinstance(leaf, Tensor) and leaf.dim():
            torch._dynamo.maybe_mark_dynamic(leaf, 0)


def check_compilable(name: str, solver: SolverBase) -> None:
    """ValueError, in the name of who compiles, for a solver whose steps cannot be made without a look at values."""
    if solver.required_methods:
        raise ValueError(f"{name} evaluates f as a whole, and {solver!r} uses parts of it")
    if not solver.fixed_cost:
        raise ValueError(
            f"{name} needs a solver whose steps cost a known number of evaluations; {solver!r} decides on the way"
        )


def check_backend(compiled: Any) -> str | None:
    """The backend of `torch.compile` that is asked for; None: none. ValueError for what names none."""
    if compiled is False:
        return None
    if compiled is True:
        return "inductor"
    known = torch.compiler.list_backends(exclude_tags=()) if isinstance(compiled, str) else []
    if compiled not in known:
        raise ValueError(
            f"compiled must be True, False or the name of a backend of torch.compile, such as 'aot_eager', got {compiled!r}"
        )
    return str(compiled)
