"""`solve`: the only solver loop. It stops, freezes rows and hands them over; `Evaluator` counts and keeps the best."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metabroyden.chunk import LENGTH, Chunks, Made, check_backend, check_compilable
from metabroyden.evaluator import Evaluator, Rows, to_device, to_host
from metabroyden.function import Given, check_map, in_caller_mode, method_of, owner_of
from metabroyden.inverse import FinalInverse
from metabroyden.opaque import opaque
from metabroyden.problem import CountedProblem
from metabroyden.solution import Cell, Solution, SolveError, State, Status, Trace
from metabroyden.solver import Phase, SolverBase, Trail, as_solver, joined
from metabroyden.state import Packing, check_context

_COMPACT_AT = 0.7  # a solver's own memory is gathered once so small a share of its rows is still at work
_SAME = 16  # roundings by which the relative residual may change where z has stopped moving
_NONE = np.zeros(1, dtype=bool)  # no row, however many there are


@opaque
def solve(
    f: Cell,
    z0: State,
    context: Any = None,
    *,
    solver: SolverBase,
    rtol: float = 1e-3,
    atol: float = 0.0,
    max_nfe: int = 50,
    throw: bool = True,
    check_every: int = 1,
    f_dtype: torch.dtype | None = None,
    snapshots: Iterable[int] = (),
    keep_inverse: bool = False,
    trace: bool = True,
    compiled: bool | str = False,
) -> Solution:
    """Find z with f(z) = z, or f(z, context) = z, for every sample of a batch.

    Args:
        f: batch-first map; returns a tensor (or a tuple of tensors) shaped like z. Samples must not influence one
            another (no batch norm in training mode). With a context, f sees only the rows still active. It must change
            neither z nor its context, see `GuardedFunction` for how far that is checked.
        z0: start, (B, ...) floating and finite, or a tuple of such tensors. An empty batch has an empty solution.
        context: any pytree of batch-first tensors, dense or sparse COO, and plain values; a tensor that has no batch
            axis is marked, `Shared(tensor)`. None where f takes z alone (then f sees the full batch always).
        solver: `Picard`, `Anderson`, `Broyden`, `Newton`, or a learned solver.
        rtol: a sample has converged once ‖f(z)−z‖₂ ≤ atol + rtol·‖f(z)‖₂ (2-norms over all its coordinates).
        atol: absolute part of the same test.
        max_nfe: evaluations of f each sample may cost, Jacobian products and verification included.
        throw: raise `SolveError` when a sample fails; its `.solution` holds the result. Else look at `Solution.status`.
        check_every: steps between two looks at the outcome, each of which waits for the device. With more than one a
            sample may make up to check_every − 1 steps after it converged; their evaluations are counted, its result is
            the same. A learned solver's hand-over may come as much later, too.
        f_dtype: dtype that f is called in, torch.bfloat16 say; the context is the caller's to cast. Iterates, norms,
            the solver's memory and the context as a learned solver sees it are in z0's dtype. Rounding sets a floor
            under the residual: see tolerances from 1e-2.
        snapshots: rising numbers of evaluations; `Solution.snapshots` then holds each sample's best iterate once so
            many were spent (or the last there was). At the end of a step, where a step costs several.
        keep_inverse: keep what the solver knows of the inverse Jacobian, in `Solution.inverse`; copies its memory.
        trace: write down every evaluation, some 50 bytes for a sample and an evaluation; False: `Solution.trace` is
            empty.
        compiled: make the steps between two looks, calls of f included, as one graph of `torch.compile`: with inductor, or
            the backend of this name. A `check_every` of 1 then means 4. Results are those without it, to rounding. Graphs
            are made in the first solve, which takes a while, and kept as long as f and a learned solver live, so pass the
            same objects again: one for every chunk of the longest solve, whatever the number of rows, and another for a
            single row. What is left of the budget after the last whole chunk runs uncompiled, and so does all, with a
            warning, where compiling fails. For solvers whose steps cost a known number of evaluations (not `Newton`, no
            line search).

    Returns:
        A `Solution` of detached tensors, since the solve runs under no_grad.

    Raises:
        ValueError, TypeError: bad input, naming what was given and what is wanted.
        SolveError: samples failed and throw is True.

    Examples:
        >>> import torch, metabroyden as mb
        >>> solution = mb.solve(torch.cos, torch.zeros(3, 1), solver=mb.Broyden(), rtol=1e-6)
        >>> bool(torch.allclose(solution.z, torch.full((3, 1), 0.739085), atol=1e-5)), int(solution.nfe.max()) < 10
        (True, True)
    """
    packing = Packing.of(z0)
    solver = check_options(f, solver, rtol, atol, max_nfe, check_every, f_dtype)
    backend = _backend(compiled, solver)
    due = _rising(snapshots)
    device = (z0 if isinstance(z0, Tensor) else z0[0]).device.type
    as_called = in_caller_mode(f, device)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        flat = packing.pack(z0).detach().contiguous()
        if flat.is_inference():
            flat = flat.clone()
        check_context(context, len(flat), owner_of(f))
        if len(flat) == 0:
            return nothing(packing, flat, snapshots=len(due), keep_inverse=keep_inverse)
        options = {"rtol": rtol, "atol": atol, "max_nfe": max_nfe, "f_dtype": f_dtype, "trace": trace}
        options["keep_inverse"] = keep_inverse
        driver = _Driver(flat, packing, as_called, context, solver, check_every, **options)
        if backend is not None:
            driver.compile(solver, backend)
        driver.due, driver.inverse = due, FinalInverse(len(flat)) if keep_inverse else None
        with np.errstate(all="ignore"):
            solution = driver.solution()
    if throw and (driver.status != Status.CONVERGED).any():
        raise SolveError(solution.failures(), solution)
    return solution


def _backend(compiled: bool | str, solver: SolverBase) -> str | None:
    """The backend to compile with, if any. ValueError where there is none of this name, or the solver cannot be compiled."""
    backend = check_backend(compiled)
    for phase in solver.phases() if backend is not None else []:
        check_compilable("solve(..., compiled=...)", phase.solver)
    return backend


def _rising(snapshots: Iterable[int]) -> list[int]:
    """The numbers, of an iterator too; ValueError unless they are integers of at least 1 that rise."""
    due = list(snapshots)
    if any(isinstance(k, bool) or not isinstance(k, Integral) or k < 1 for k in due) or due != sorted(set(due)):
        raise ValueError(f"snapshots must be rising integers of at least 1, got {due!r}")
    return due


def nothing(packing: Packing, z: Tensor, *, snapshots: int = 0, keep_inverse: bool = False) -> Solution:
    """The solution for an empty batch, z (0, n): f is not called."""
    number, size = torch.zeros(0, dtype=torch.int64), z.new_zeros(0)
    kept = tuple(packing.unpack(z.clone()) for _ in range(snapshots))
    inverse = FinalInverse(0) if keep_inverse else None
    z, done = z.clone(), torch.zeros(0, dtype=torch.bool, device=z.device)
    none, seconds = z.new_zeros(0, 0), torch.zeros(0, dtype=torch.float64)
    trace = Trace(none, number.view(0, 0), seconds, number.view(0, 0).to(torch.int8), none.clone())
    return Solution(packing.unpack(z), size, number, number.clone(), done, number.clone(), trace, kept, inverse)


def check_methods(f: Any, solver: SolverBase) -> None:
    """TypeError where f lacks methods that a solver uses beside it."""
    wanted = solver.required_methods
    missing = [name for name in wanted if method_of(f, name) is None]
    if missing:
        raise TypeError(
            f"{type(solver).__name__} needs a cell with the methods {', '.join(wanted)}, such as MonotoneDense; "
            f"{type(f).__name__} has no {', '.join(missing)}"
        )


def check_options(
    f: Any, solver: Any, rtol: float, atol: float, max_nfe: int, check_every: int, f_dtype: torch.dtype | None
) -> SolverBase:
    """The solver, see `as_solver`. TypeError or ValueError for bad arguments, naming what was given and what is wanted."""
    check_map(f)
    solver = as_solver(solver)
    check_methods(f, solver)
    if f_dtype is not None and solver.required_methods:
        raise ValueError(f"{type(solver).__name__} uses parts of f, in its own precision: no f_dtype, got {f_dtype}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    for name, value in (("max_nfe", max_nfe), ("check_every", check_every)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if f_dtype is not None and not (isinstance(f_dtype, torch.dtype) and f_dtype.is_floating_point):
        raise ValueError(f"f_dtype must be a floating dtype such as torch.bfloat16, got {f_dtype!r}")
    return solver


def begin(solver: SolverBase, z0: Tensor, problem: Any) -> tuple[Tensor, Any, Tensor | None]:
    """(z, state, g) with which a solver begins at z0 (R, n).

    Its first iterate, the state and g still None; or, of a solver whose `start` returns a `Step`, all of it.
    """
    begun = solver.start(z0, problem)
    z, state, g = (begun, None, None) if isinstance(begun, Tensor) else begun
    if z.shape != z0.shape:
        raise ValueError(f"{solver!r}.start must return shape {tuple(z0.shape)}, got {tuple(z.shape)}")
    return z, state, g


class _Cohort:
    """Samples that are in the same phase and began it together, with their solver's state.

    `rows` are the samples the state covers, `live` (positions among them) those still at work; None: all of them.
    """

    def __init__(
        self, evaluator: Evaluator, plan: list[Phase], number: int, host: np.ndarray, chunks: Chunks | None
    ) -> None:
        self.evaluator, self.plan, self.number = evaluator, plan, number
        self.chunks, self.ahead = chunks, list[Made]()  # steps made, but not yet taken over
        self._given: tuple[Rows, Given] | None = None
        self.phase = plan[number]
        self.needs = self.phase.solver.min_nfe
        self.rows, self.live = evaluator.rows(host), None
        self.problem = CountedProblem(evaluator, self.rows)
        self.z: Tensor
        self.z_before: Tensor | None = None
        self.g: Tensor | None = None
        self.state: Any = None
        self.steps = 0
        self.mark = np.full(len(host), np.nan)  # smallest relative residual when progress was last seen
        self.since = np.zeros(len(host), dtype=np.int64)  # evaluations since then
        if number:
            evaluator.enter(host, number)

    @property
    def live_rows(self) -> Rows:
        return self.problem.live_rows

    def take_live(self, tensor: Tensor) -> Tensor:
        """The rows of a (R, ...) tensor that are still at work."""
        return tensor if self.problem.live_index is None else tensor.index_select(0, self.problem.live_index)

    def advance(self) -> Tensor | None:
        """Go to the next iterate, for every row; its residual where the step has evaluated it already."""
        solver, z = self.phase.solver, self.z
        version = z._version
        self.prepare()
        step = solver.step(z, self.g, self.state, self.problem)
        _check_unchanged(z, version, solver)
        self.z_before, self.z, self.g, self.state = z, step.z, step.g, step.state
        self.steps += 1
        return self.g

    def prepare(self) -> None:
        """See to it that there is a state, where a residual is known."""
        if self.state is None:
            self.state = self.phase.solver.init(self.z, self.g, self.problem)

    def run_ahead(self, number: int) -> None:
        """Make so many steps as one graph, for `follow`; none where that cannot be compiled."""
        chunks, rows = self.chunks, self.rows
        assert chunks is not None
        assert self.g is not None
        if self._given is None or self._given[0] is not rows:
            self._given = rows, chunks.given_to(rows)
        around, version = chunks.around(self.problem, rows, self._given[1], self.z), self.z._version
        made = chunks.run(self.phase.solver, self.z, self.g, self.state, around, number, self.number)
        _check_unchanged(self.z, version, self.phase.solver)
        if made is not None:
            self.ahead, self.state = made

    def follow(self) -> Tensor | None:
        """Take over the next of the steps made ahead, its evaluations counted; its residual if the step itself had it."""
        made = self.ahead.pop(0)
        for z, fz, g, norms in made.evaluated:
            self.evaluator.spend(self.rows)
            self.evaluator.write_down(z, fz, g, norms, self.rows)
        self.z_before, self.z, self.g = self.z, made.z, made.g
        self.steps += 1
        return made.g if made.measured else None

    def keep(self, mask: np.ndarray) -> None:
        """Go on with these of the live rows only; the solver's state follows once enough have gone."""
        if mask.all():
            return
        if self.ahead:
            raise RuntimeError(f"{self.phase.solver!r}: a step costs more evaluations than its min_nfe says")
        self.mark, self.since = self.mark[mask], self.since[mask]
        live = (np.arange(len(self.rows)) if self.live is None else self.live)[mask]
        if self.chunks is None and self.state != () and len(live) > _COMPACT_AT * len(self.rows):
            self.live = live
            self.problem = CountedProblem(self.evaluator, self.rows, live)
            return
        self.rows, self.live = self.evaluator.rows(self.rows.host[live]), None
        index = to_device(live, self.z.device)
        self.z = self.z.index_select(0, index)
        self.g = None if self.g is None else self.g.index_select(0, index)
        self.z_before = None
        if self.state is not None:
            self.state = self.phase.solver.gather(self.state, index)
        self.problem = CountedProblem(self.evaluator, self.rows)

    def export_inverse(self, mask: np.ndarray, out: FinalInverse) -> None:
        """Export what the solver knows of the inverse Jacobian of these of the live rows."""
        solver = self.phase.solver
        if not solver.has_inverse or self.state is None or not mask.any():
            return
        frozen = solver.inverse(self.state, self._places(mask))
        out.add(to_device(self.live_rows.host[mask], self.z.device), solver, frozen)

    def stationary(self) -> np.ndarray:
        """Which live rows have stopped moving: a step below rounding, ‖Δz‖ ≤ eps‖z‖. Looked at only where it may be so."""
        evaluator = self.evaluator
        if not evaluator.idle or self.z_before is None:
            return _NONE
        pick, eps = self.live_rows.pick, torch.finfo(self.z.dtype).eps
        # where z stays, the residual stays, but for rounding
        if not np.count_nonzero(np.abs(evaluator.residual[pick] - evaluator.residual_before[pick]) <= _SAME * eps):
            return _NONE
        moved = torch.linalg.vector_norm(self.z - self.z_before, dim=1)
        size = torch.linalg.vector_norm(self.z_before, dim=1)
        return to_host([self.take_live(moved <= eps * size)])[0] > 0

    def stagnated(self, lowest: np.ndarray, evaluations: int) -> np.ndarray:
        """Which live rows have used up the phase's patience or its horizon; `evaluations` since the last look."""
        fresh = ~(lowest >= self.phase.progress * self.mark)  # NaN marks: nothing seen yet
        self.mark = np.where(fresh, lowest, self.mark)
        self.since = np.where(fresh, 0, self.since + evaluations)
        phase = self.phase
        if phase.horizon is not None and self.steps >= phase.horizon:
            return np.ones(len(lowest), dtype=bool)
        late = np.zeros(len(lowest), dtype=bool) if phase.patience is None else self.since >= phase.patience
        if self.g is None or self.steps >= len(phase.envelope):  # its iterates have not been evaluated yet
            return late
        return late | (lowest > phase.envelope[self.steps])

    def trail(self, mask: np.ndarray) -> Trail:
        """The last iterates of these of the live rows; none of a solver that keeps none."""
        if self.state is None or self.g is None:
            return []
        index = self._places(mask)
        kept = self.phase.solver.trail(self.state, index)
        return [*kept, (self.z.index_select(0, index), self.g.index_select(0, index))] if kept else []

    def _places(self, mask: np.ndarray) -> Tensor:
        """Positions of these of the live rows among all rows."""
        places = np.flatnonzero(mask) if self.live is None else self.live[mask]
        return to_device(places, self.z.device)


def _check_unchanged(z: Tensor, version: int, solver: SolverBase) -> None:
    if z._version != version:
        raise ValueError(f"{solver!r}.step changed the iterate z in place: it must return a new one")


class _Waiting(NamedTuple):
    """Samples between two phases: which is next, whether from their best iterates or from z0, and what they came by."""

    number: int
    carries_on: bool
    host: np.ndarray
    trail: Trail


class _Driver:
    """Runs the phases of one solve. A plain solver has one phase; a safeguarded one hands samples on (see `Phase`)."""

    def __init__(
        self, z0: Tensor, packing: Packing, f: Any, context: Any, solver: SolverBase, check_every: int, **options: Any
    ) -> None:
        self.plan = solver.phases()
        self.evaluator = Evaluator(f, packing, z0, context, keep_g=len(self.plan) > 1, **options)
        self.check_every, self.unseen = check_every, 0
        self.status = np.full(len(z0), int(Status.MAX_NFE), dtype=np.int64)
        self.steps = np.zeros(len(z0), dtype=np.int64)
        self.cohorts: list[_Cohort] = []
        self.waiting: list[_Waiting] = []
        self.due: list[int] = []  # evaluations after which to keep the best iterates
        self.kept: list[Tensor] = []
        self.inverse: FinalInverse | None = None
        self._joint: tuple[list[Rows], Rows] | None = None
        self.chunks: Chunks | None = None

    def compile(self, solver: SolverBase, backend: str) -> None:
        """Make the steps between two looks as one graph from now on; `solver` is the whole one."""
        self.chunks = Chunks(self.evaluator, solver, backend)
        self.check_every = LENGTH if self.check_every == 1 else self.check_every

    def solution(self) -> Solution:
        """Drive every sample to a status; what came of it."""
        evaluator, z0 = self.evaluator, self.evaluator.z0
        first = _Cohort(evaluator, self.plan, 0, np.arange(len(z0)), self.chunks)
        first.z, first.state, first.g = begin(first.phase.solver, z0, first.problem)
        self.cohorts = [first]
        if evaluator.nfe.any():  # start has looked at f: some samples may be done
            self._check_convergence()
        if first.g is not None:
            self._keep_due()
        while self.cohorts:
            self._round()
        self.kept += [evaluator.best_z.clone() for _ in self.due]
        z, unpack = evaluator.best_z, evaluator.packing.unpack
        return Solution(
            z=unpack(z.clone() if z is z0 else z),
            residual=torch.from_numpy(evaluator.best_residual).to(z),
            nfe=torch.from_numpy(evaluator.nfe),
            steps=torch.from_numpy(self.steps),
            converged=torch.from_numpy(evaluator.converged).to(z.device),
            status=torch.from_numpy(self.status),
            trace=evaluator.trace(),
            snapshots=tuple(unpack(kept) for kept in self.kept),
            inverse=self.inverse,
        )

    def _round(self) -> None:
        """One step of every cohort, one call of f for all the new iterates; a look at the outcome when it is due."""
        self.evaluator.round += 1
        if self.chunks is not None and self.chunks.usable:
            self._run_ahead()
        for cohort in self.cohorts:
            if cohort.g is None and cohort.number:  # handed over, to begin at z0
                cohort.z, cohort.state, cohort.g = begin(cohort.phase.solver, cohort.z, cohort.problem)
            elif cohort.g is not None:
                measured = cohort.follow() if cohort.ahead else cohort.advance()
                self.steps[cohort.live_rows.pick] += 1
                if measured is not None:
                    self.evaluator.take(cohort.take_live(measured), cohort.live_rows)
        self._evaluate([cohort for cohort in self.cohorts if cohort.g is None])
        self.unseen += 1
        due = bool(self.due) and self.evaluator.nfe.max() >= self.due[0]
        ends = (cohort.phase.horizon == cohort.steps or self._spent(cohort).any() for cohort in self.cohorts)
        if due or self.unseen == self.check_every or any(ends):
            self._check_convergence()
        self._keep_due()

    def _run_ahead(self) -> None:
        """Make the steps up to the next look as one graph for each cohort, unless a budget or a horizon ends before."""
        if any(cohort.g is None or cohort.ahead for cohort in self.cohorts):
            return
        for cohort in self.cohorts:
            cohort.prepare()
        number, nfe = self.check_every - self.unseen, self.evaluator.nfe
        left = [(self.evaluator.max_nfe - nfe[c.rows.pick].max()) // c.needs for c in self.cohorts]
        left += [c.phase.horizon - c.steps for c in self.cohorts if c.phase.horizon is not None]
        if self.due:
            left.append((self.due[0] - nfe.max()) // max(cohort.needs for cohort in self.cohorts))
        if number <= min(left):
            for cohort in self.cohorts:
                cohort.run_ahead(number)

    def _keep_due(self) -> None:
        while self.due and self.evaluator.nfe.max() >= self.due[0]:
            self.kept.append(self.evaluator.best_z.clone())
            del self.due[0]

    def _spent(self, cohort: _Cohort) -> np.ndarray:
        """Which live rows cannot afford another step."""
        evaluator, left = self.evaluator, self.evaluator.max_nfe - cohort.needs
        if evaluator.most <= left:
            return _NONE
        return evaluator.nfe[cohort.live_rows.pick] > left

    def _evaluate(self, cohorts: list[_Cohort]) -> None:
        """Call f once for the iterates of all these cohorts and hand each its residuals."""
        if not cohorts:
            return
        if len(cohorts) == 1:
            cohorts[0].g = cohorts[0].problem.residual(cohorts[0].z)
            return
        rows = [cohort.live_rows for cohort in cohorts]
        if self._joint is None or self._joint[0] != rows:  # the same object while these are, to gather a context once
            self._joint = rows, self.evaluator.rows(np.concatenate([part.host for part in rows]))
        points = [cohort.take_live(cohort.z) for cohort in cohorts]
        found = self.evaluator.evaluate(torch.cat(points), self._joint[1]).split([len(point) for point in points])
        for cohort, g in zip(cohorts, found, strict=True):
            index = cohort.problem.live_index
            cohort.g = g if index is None else torch.zeros_like(cohort.z).index_copy(0, index, g)

    def _check_convergence(self) -> None:
        """See what has happened since the last look, and decide. The one host synchronisation."""
        self.evaluator.synchronize()
        for cohort in list(self.cohorts):
            self._decide(cohort)
        if self.waiting:
            self._enter()
        self.unseen = 0

    def _decide(self, cohort: _Cohort) -> None:
        """Freeze what is done, hand over what stagnates, keep the rest."""
        evaluator = self.evaluator
        stationary, spent = cohort.stationary(), self._spent(cohort)
        last = cohort.number + 1 == len(self.plan)
        rows = cohort.live_rows
        pick, host = rows.pick, rows.host
        stuck = _NONE if last else cohort.stagnated(evaluator.lowest[pick], self.unseen)
        if not (evaluator.news or any(map(np.count_nonzero, (spent, stationary, stuck)))):
            return
        converged, finite = evaluator.converged[pick], ~evaluator.broken[pick]
        broken = ~finite | stationary | stuck
        leaving = broken & ~converged
        gone = leaving | converged | spent
        if not np.count_nonzero(gone):
            return
        status = np.where(stationary, Status.STALLED, Status.MAX_NFE)
        status = np.where(finite, status, Status.NON_FINITE)
        self.status[pick] = np.where(converged, Status.CONVERGED, status)
        going = leaving & (evaluator.nfe[pick] < evaluator.max_nfe) if not last else np.zeros(len(host), dtype=bool)
        if self.inverse is not None:
            cohort.export_inverse(gone & ~going, self.inverse)
        if going.any():
            self._hand_over(cohort, going)
        cohort.keep(~gone)
        if len(cohort.live_rows) == 0:
            self.cohorts.remove(cohort)

    def _hand_over(self, cohort: _Cohort, mask: np.ndarray) -> None:
        """Let these of a cohort's live rows wait for the next phase: at the best iterate, whose g is known, or at z0."""
        host, number, evaluator = cohort.live_rows.host, cohort.number + 1, self.evaluator
        phase = self.plan[number]
        here = mask & (phase.origin == "best") & np.isfinite(evaluator.best[host])
        here &= evaluator.lowest[host] <= phase.enter_below
        if here.any():
            self.waiting.append(_Waiting(number, True, host[here], cohort.trail(here)))
        if (mask & ~here).any():
            later = (k for k in range(number, len(self.plan)) if self.plan[k].origin == "start")
            number = number if math.isinf(phase.enter_below) else next(later, number)
            self.waiting.append(_Waiting(number, False, host[mask & ~here], []))

    def _enter(self) -> None:
        """Let those who wait begin their phase, once no more are at work: every cohort costs time, waiting no evaluation.

        Nobody waits while snapshots are due, which are of all samples after so many evaluations.
        """
        at_work = sum(len(cohort.live_rows) for cohort in self.cohorts)
        if sum(len(one.host) for one in self.waiting) < at_work and not self.due:
            return
        groups: dict[tuple[int, bool, bool], list[_Waiting]] = {}
        for one in self.waiting:
            groups.setdefault((one.number, one.carries_on, bool(one.trail)), []).append(one)
        self.waiting = []
        for (number, carries_on, _), group in sorted(groups.items(), key=lambda item: item[0]):
            host = np.concatenate([one.host for one in group])
            if carries_on:
                self._carry_on(host, number, joined([one.trail for one in group]))
            else:
                self._begin_again(host, number)

    def _carry_on(self, host: np.ndarray, number: int, trail: Trail) -> None:
        """A new cohort in phase `number` from the best iterates of these samples."""
        made = _Cohort(self.evaluator, self.plan, number, host, self.chunks)
        index, best_z, best_g = made.rows.index, self.evaluator.best_z, self.evaluator.best_g
        assert best_g is not None
        # the whole batch: copies, since the best iterates may later be written in place
        pair = (best_z.clone(), best_g.clone()) if index is None else (best_z[index], best_g[index])
        made.z, made.g = pair
        if trail:
            made.state = made.phase.solver.resume(*pair, trail, made.problem)
        self.cohorts.append(made)

    def _begin_again(self, host: np.ndarray, number: int) -> None:
        """A new cohort in phase `number` from these samples' z0."""
        made = _Cohort(self.evaluator, self.plan, number, host, self.chunks)
        index, z0, g0 = made.rows.index, self.evaluator.z0, self.evaluator.g0
        made.z = z0 if index is None else z0[index]
        made.g = g0 if g0 is None or index is None else g0[index]
        self.cohorts.append(made)
