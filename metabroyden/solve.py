"""`solve`: the only solver loop. Stopping, counting, freezing, hand-over and the trace live here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metabroyden.problem import Ledger, Problem
from metabroyden.solution import Solution, SolveError, State, Status
from metabroyden.state import Packing, check_context, gather

if TYPE_CHECKING:
    from metabroyden.solvers.base import Solver

_COMPACT_AT = 0.7  # a solver's own memory is gathered once so small a share of its rows is still at work


@dataclass(frozen=True)
class Phase:
    """One stretch of a safeguarded solve.

    Attributes:
        solver: what does the stepping.
        origin: where the phase begins: "start" (z0) or "best" (the best iterate so far, at no evaluation).
        horizon: steps after which what has not converged is handed to the next phase; None: no limit.
        patience: evaluations without progress after which a sample is handed on; None: no limit.
        progress: the factor by which the best residual must fall to count as progress.
    """

    solver: Any
    origin: str = "start"
    horizon: int | None = None
    patience: int | None = None
    progress: float = 1.0


def solve(
    f: Callable[..., State],
    z0: State,
    context: Any = None,
    *,
    solver: Solver,
    rtol: float = 1e-3,
    atol: float = 0.0,
    max_nfe: int = 50,
    throw: bool = True,
) -> Solution:
    """Find z with f(z) = z, or f(z, context) = z, for every sample of a batch.

    Args:
        f: batch-first map; returns a tensor (or a tuple of tensors) shaped like z. Samples must not influence one
            another (no batch norm in training mode). With a context, f sees only the rows still active.
        z0: start, (B, ...) floating and finite, or a tuple of such tensors.
        context: any pytree of batch-first tensors; None where f takes z alone (then f sees the full batch always).
        solver: `Picard`, `Anderson`, `Broyden`, `Newton`, or a learned solver.
        rtol, atol: a sample has converged once ‖f(z)−z‖₂ ≤ atol + rtol·‖f(z)‖₂ (2-norms over all its coordinates).
        max_nfe: evaluations of f each sample may cost, Jacobian products and verification included.
        throw: raise `SolveError` when a sample fails; its `.solution` holds the result. Else look at `Solution.status`.

    Returns:
        A `Solution` of detached tensors: the solve runs under no_grad.

    Raises:
        ValueError, TypeError: bad input, naming what was given and what is wanted.
        SolveError: samples failed and throw is True.

    >>> import torch, metabroyden as mb
    >>> solution = mb.solve(torch.cos, torch.zeros(3, 1), solver=mb.Broyden(), rtol=1e-6)
    >>> bool(torch.allclose(solution.z, torch.full((3, 1), 0.739085), atol=1e-5)), int(solution.nfe.max()) < 10
    (True, True)
    """
    packing = Packing.of(z0)
    _check_options(f, solver, rtol, atol, max_nfe)
    with torch.no_grad():
        flat = packing.pack(z0).detach().clone()
        check_context(context, len(flat))
        guarded = getattr(solver, "safeguard", None) is not None
        ledger = Ledger(f, packing, flat, context, rtol=rtol, atol=atol, max_nfe=max_nfe, keep_g=guarded)
        driver = _Driver(ledger, solver)
        driver.run(flat)
        solution = Solution(
            z=packing.unpack(ledger.best_z),
            residual=ledger.best,
            nfe=torch.from_numpy(ledger.nfe),
            steps=torch.from_numpy(driver.steps),
            converged=ledger.converged,
            status=torch.from_numpy(driver.status),
            trace=ledger.trace(),
        )
    if throw and (driver.status != Status.CONVERGED).any():
        raise SolveError(solution.failures(), solution)
    return solution


def _check_options(f: Any, solver: Any, rtol: float, atol: float, max_nfe: int) -> None:
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    for name in ("start", "init", "step"):
        if isinstance(solver, type) or not callable(getattr(solver, name, None)):
            raise TypeError(f"solver must be an instance with start, init and step, such as Broyden(); got {solver!r}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    if isinstance(max_nfe, bool) or not isinstance(max_nfe, Integral) or max_nfe < 1:
        raise ValueError(f"max_nfe must be an integer of at least 1, got {max_nfe!r}")


class _Cohort:
    """Samples that are in the same phase and began it together, with their solver's state.

    `rows` are the samples the state covers, `live` (positions among them) those still at work; None: all of them.
    """

    def __init__(self, ledger: Ledger, plan: list[Phase], number: int, host: np.ndarray) -> None:
        self.ledger, self.plan, self.number = ledger, plan, number
        self.phase = plan[number]
        self.rows, self.live = ledger.rows(host), None
        self.problem = Problem(ledger, self.rows)
        self.z: Tensor
        self.g: Tensor | None = None
        self.state: Any = None
        self.steps = 0
        self.mark = np.full(len(host), np.nan)  # best residual when progress was last seen
        self.since = np.zeros(len(host), dtype=np.int64)  # evaluations since then
        ledger.phase[host] = number

    @property
    def live_host(self) -> np.ndarray:
        """Numbers of the samples still at work."""
        return self.rows.host if self.live is None else self.rows.host[self.live]

    def take_live(self, tensor: Tensor) -> Tensor:
        """The rows of a (R, ...) tensor that are still at work."""
        return tensor if self.problem.live_index is None else tensor.index_select(0, self.problem.live_index)

    def advance(self) -> tuple[Tensor, Tensor | None]:
        """The next iterate of every row, and its residual where the step has evaluated it already."""
        solver = self.phase.solver
        assert self.g is not None
        if self.state is None:
            self.state = solver.init(self.z, self.g, self.problem)
        step = solver.step(self.z, self.g, self.state, self.problem)
        self.state, self.steps = step.state, self.steps + 1
        return step.z, step.g

    def keep(self, mask: np.ndarray) -> None:
        """Go on with these of the live rows only; the solver's state follows once enough have gone."""
        if mask.all():
            return
        self.mark, self.since = self.mark[mask], self.since[mask]
        live = (np.arange(len(self.rows)) if self.live is None else self.live)[mask]
        if len(live) > _COMPACT_AT * len(self.rows):
            self.live = live
            self.problem = Problem(self.ledger, self.rows, live)
            return
        self.rows, self.live = self.ledger.rows(self.rows.host[live]), None
        index = torch.as_tensor(live, device=self.z.device)
        self.z = self.z.index_select(0, index)
        self.g = None if self.g is None else self.g.index_select(0, index)
        if self.state is not None:
            self.state = getattr(self.phase.solver, "gather", gather)(self.state, index)
        self.problem = Problem(self.ledger, self.rows)

    def stuck(self, best: np.ndarray) -> np.ndarray:
        """Which live rows have used up the phase's patience or its horizon."""
        fresh = ~(best >= self.phase.progress * self.mark)  # NaN marks: nothing seen yet
        self.mark = np.where(fresh, best, self.mark)
        self.since = np.where(fresh, 0, self.since + 1)
        if self.phase.horizon is not None and self.steps >= self.phase.horizon:
            return np.ones(len(best), dtype=bool)
        if self.phase.patience is None:
            return np.zeros(len(best), dtype=bool)
        return self.since >= self.phase.patience


class _Driver:
    """Runs the phases of one solve. A plain solver has one phase; a safeguarded one hands samples on (see `Phase`)."""

    def __init__(self, ledger: Ledger, solver: Solver) -> None:
        batch = len(ledger.nfe)
        self.ledger, self.solver = ledger, solver
        safeguard = getattr(solver, "safeguard", None)
        self.plan: list[Phase] = [Phase(solver)] if safeguard is None else safeguard.plan(solver)
        self.status = np.full(batch, int(Status.MAX_NFE), dtype=np.int64)
        self.steps = np.zeros(batch, dtype=np.int64)
        self.cohorts: list[_Cohort] = []

    def run(self, z0: Tensor) -> None:
        """Drive every sample to a status."""
        first = _Cohort(self.ledger, self.plan, 0, np.arange(len(z0)))
        first.z = first.phase.solver.start(z0, first.problem)
        if first.z.shape != z0.shape:
            raise ValueError(f"{self.solver!r}.start must return shape {tuple(z0.shape)}, got {tuple(first.z.shape)}")
        self.cohorts = [first]
        if self.ledger.nfe.any():  # start has looked at f: some samples may be done
            self._decide(first, torch.zeros(len(z0), dtype=torch.bool, device=z0.device))
        while self.cohorts:
            self._round()

    def _round(self) -> None:
        """One step of every cohort, one call of f for all the new iterates, one look at the outcome."""
        cohorts = list(self.cohorts)
        moved: list[Tensor] = []
        pending: list[_Cohort] = []
        for cohort in cohorts:
            z, still = cohort.z, None
            if cohort.g is not None:
                z, cohort_g = cohort.advance()
                self.steps[cohort.live_host] += 1
                eps = torch.finfo(z.dtype).eps
                still = torch.linalg.vector_norm(z - cohort.z, dim=1) <= eps * torch.linalg.vector_norm(cohort.z, dim=1)
                cohort.z, cohort.g = z, cohort_g
            if cohort.g is None:
                pending.append(cohort)
            moved.append(torch.zeros(len(z), dtype=torch.bool, device=z.device) if still is None else still)
        self._evaluate(pending)
        for cohort, still in zip(cohorts, moved, strict=True):
            self._decide(cohort, still)

    def _evaluate(self, cohorts: list[_Cohort]) -> None:
        """Call f once for the iterates of all these cohorts and hand each its residuals."""
        if not cohorts:
            return
        points = [cohort.take_live(cohort.z) for cohort in cohorts]
        if len(cohorts) == 1:
            parts = [self.ledger.evaluate(points[0], cohorts[0].problem.live_rows)]
        else:
            rows = self.ledger.rows(np.concatenate([cohort.live_host for cohort in cohorts]))
            parts = list(self.ledger.evaluate(torch.cat(points), rows).split([len(point) for point in points]))
        for cohort, g in zip(cohorts, parts, strict=True):
            index = cohort.problem.live_index
            cohort.g = g if index is None else torch.zeros_like(cohort.z).index_copy(0, index, g)

    def _decide(self, cohort: _Cohort, still: Tensor) -> None:
        """Freeze what is done, hand over what is stuck, keep the rest. The one host synchronisation of a step."""
        ledger = self.ledger
        rows = cohort.problem.live_rows
        columns = (ledger.converged, ledger.finite, ledger.best)
        picked = [column if rows.index is None else column[rows.index] for column in columns]
        seen = torch.stack([column.double() for column in (*picked, cohort.take_live(still))]).cpu().numpy()
        ledger.stamp()
        converged, finite, best, still_host = seen[0] > 0, seen[1] > 0, seen[2], seen[3] > 0
        host = rows.host
        last = cohort.number + 1 == len(self.plan)
        broken = ~finite | still_host
        if not last:
            broken |= cohort.stuck(best)
        spent = ledger.nfe[host] + getattr(cohort.phase.solver, "min_nfe", 1) > ledger.max_nfe
        self.status[host[~finite]] = Status.NON_FINITE
        self.status[host[finite & still_host]] = Status.STALLED
        self.status[host[finite & ~still_host]] = Status.MAX_NFE
        self.status[host[converged]] = Status.CONVERGED
        leaving = broken & ~converged
        if not last:
            going = leaving & (ledger.nfe[host] < ledger.max_nfe)
            self._hand_over(host[going], best[going], cohort.number + 1)
        cohort.keep(~(converged | leaving | spent))
        if len(cohort.live_host) == 0:
            self.cohorts.remove(cohort)

    def _hand_over(self, host: np.ndarray, best: np.ndarray, number: int) -> None:
        """New cohorts in phase `number`: from the best iterate, whose residual is known, or from z0 where there is none."""
        from_best = np.isfinite(best) if self.plan[number].origin == "best" else np.zeros(len(host), dtype=bool)
        for chosen in (from_best, ~from_best):
            if not chosen.any():
                continue
            cohort = _Cohort(self.ledger, self.plan, number, host[chosen])
            index = cohort.rows.index
            if chosen is from_best:
                best_z, best_g = self.ledger.best_z, self.ledger.best_g
                assert best_g is not None
                cohort.z, cohort.g = (best_z, best_g) if index is None else (best_z[index], best_g[index])
            else:
                cohort.z = self.ledger.z0 if index is None else self.ledger.z0[index]
                if self.ledger.origin is not None:
                    cohort.g = (self.ledger.origin if index is None else self.ledger.origin[index]) - cohort.z
            self.cohorts.append(cohort)
