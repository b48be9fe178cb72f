"""Solves → rows. One function measures; everything else here is a different question asked of the same problems.

Rows say what they are under the key "row":
  solve    one solver on one block of samples to one tolerance: by sample evaluations (the budget where it failed), smallest
           residual, status, distance to the float64 equilibrium, score, agreement of predictions; seconds of whole solves
  curve    quartiles over samples of the smallest residual so far, by evaluations; its median by time
  depth    the task's mean score after so many evaluations
  pace     seconds of solves that stop after so many evaluations
  horizon  a learned solver against its own fallback, far beyond the steps that it was trained on
  leak     how far a language model's earlier predictions move when later tokens are replaced
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.bench.clock import LiveBytes, Stopwatch, laps, now
from experiments.bench.peers import solve_state
from experiments.bench.problems import HeldOut, bits_of
from experiments.bench.runner import Row, ticks
from experiments.bench.solvers import Contestant
from experiments.bench.tables import short
from metabroyden.deq import DEQ
from metabroyden.gradients.base import parts_of
from metabroyden.solution import State, Status, Trace, relative_residual
from metabroyden.solve import solve
from metabroyden.solvers.clock import turns
from metabroyden.zoo.models.criteria import NextToken, device_of
from metabroyden.zoo.tasks import second_half, text_windows

LETTERS = {Status.CONVERGED: "C", Status.MAX_NFE: "B", Status.NON_FINITE: "N", Status.STALLED: "S"}
"""Of a sample's status, in a row: converged, budget, not finite, stalled."""
Stamp = Callable[[Contestant], Row]
"""What every row of a contestant begins with."""


@dataclass(frozen=True)
class Rules:
    """What is the same for all contestants."""

    tolerances: tuple[float, ...]  # each with a solve of its own
    budget: int = 60  # evaluations a sample
    block: int = 64  # samples solved as one batch
    rounds: int = 0  # timed ones of a block to the clocked tolerances; to the others one, or none where this is zero
    clocked: tuple[float, ...] | None = None  # all, where None
    weighed: bool = False  # whether memory is measured, in the first block to the last clocked tolerance

    def rounds_to(self, tolerance: float) -> int:
        """Timed rounds to a tolerance."""
        return self.rounds if self.clocked is None or tolerance in self.clocked else min(self.rounds, 1)


def stamp_of(held: HeldOut, **more: Any) -> Stamp:
    """The usual stamp: problem set, solver, kind, seed, and what is the same for all."""
    return lambda one: {**more, "family": held.name, "solver": one.name, "kind": one.kind, "seed": one.seed}


def measure(
    held: HeldOut, contestants: Sequence[Contestant], rules: Rules, stamp: Stamp | None = None, *, progress: bool = False,
) -> list[Row]:  # fmt: skip
    """Every contestant on every block of problems to every tolerance, in turns; a residual curve of each at the end.

    Args:
        held: the problems; distances and agreement are measured where their equilibria are known.
        contestants: who runs.
        rules: tolerances, budget, rounds.
        stamp: what every row of a contestant begins with; default `stamp_of(held)`.
        progress: show a bar.

    Returns:
        Rows "solve", and a row "curve" of each contestant to the last tolerance.
    """
    stamp, rows = stamp or stamp_of(held), []
    traces: dict[str, list[Trace]] = {one.key: [] for one in contestants}
    predicted = None if held.star is None or held.predict is None else held.predict(held.states(held.star))
    blocks = list(torch.arange(len(held), device=held.device).split(rules.block))
    with ticks(held.name, len(blocks) * len(rules.tolerances), show=progress) as done:
        for number, index in enumerate(blocks):
            for tolerance in rules.tolerances:
                block = _Block(held, index, number, tolerance, rules)
                # what is found warms up what is timed
                found = {one.key: block.run(one)[0] for one in contestants}
                seconds = block.timed(contestants)
                for one in contestants:
                    result = found[one.key]
                    if tolerance == rules.tolerances[-1] and result.trace is not None:
                        traces[one.key].append(result.trace)
                    rows.append({"row": "solve", **stamp(one), **block.row(one, result, predicted, seconds[one.key])})
                done()
    return rows + [{"row": "curve", **stamp(one), **_curve(traces[one.key], rules.budget)} for one in contestants]


@dataclass(frozen=True)
class _Found:
    z: State
    evaluations: np.ndarray
    residual: list[float]
    status: str
    handed_over: int
    trace: Trace | None


@dataclass(frozen=True)
class _Block:
    """Samples that are solved as one batch to one tolerance."""

    held: HeldOut
    index: Tensor
    number: int
    tolerance: float
    rules: Rules

    @cached_property
    def problem(self) -> tuple[State, Any]:
        return self.held.take(self.index)

    def run(self, one: Contestant, *, keep: bool = True) -> tuple[_Found, Row]:
        return timed_solve(one, self.held.f, *self.problem, self.tolerance, self.rules.budget, keep=keep)

    def timed(self, contestants: Sequence[Contestant]) -> dict[str, list[Row]]:
        """Seconds of the rounds of each; in every block another one goes first."""
        rounds, seconds = self.rules.rounds_to(self.tolerance), {one.key: list[Row]() for one in contestants}
        first = self.number * self.rules.rounds % len(contestants)
        for one in turns([*contestants[first:], *contestants[:first]], rounds):
            seconds[one.key].append(self.run(one, keep=False)[1])
        return seconds

    def row(self, one: Contestant, found: _Found, predicted: Any, seconds: list[Row]) -> Row:
        held, index, whole = self.held, self.index, _flat(found.z).isfinite().all(dim=1)
        known = whole & (torch.zeros_like(whole) if held.known is None else held.known[index])
        agrees = distance = torch.full((len(index),), torch.nan)
        if held.star is not None:
            distance = (_flat(found.z).double() - held.star[index]).norm(dim=1) / held.star[index].norm(dim=1)
        if held.predict is not None and predicted is not None:
            agrees = (held.predict(found.z) == predicted[index]).float().reshape(len(index), -1).mean(dim=1)
        clocked = self.rules.clocked or self.rules.tolerances
        weighed = self.rules.weighed and self.number == 0 and self.tolerance == clocked[-1]
        return {
            "options": one.options, "tolerance": self.tolerance, "budget": self.rules.budget, "block": self.number,
            "evaluations": found.evaluations.tolist(), "residual": _numbers(found.residual), "status": found.status,
            "distance": _numbers(_where(distance, known), 3), "score": _numbers(_where(held.judge(found.z, index), whole)),
            "agrees": _numbers(_where(agrees, known)), "handed_over": found.handed_over, "seconds": short(seconds),
            "peak_bytes": self._peak(one) if weighed else None,
        }  # fmt: skip

    def _peak(self, one: Contestant) -> int:
        """Bytes of tensors alive at once in a solve beyond those that were there before it (on a GPU: the allocator's)."""
        device = self.held.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self.run(one, keep=False)
            return torch.cuda.max_memory_allocated(device) - before
        with LiveBytes() as live:
            self.run(one, keep=False)  # weights and contexts are seen, and stay
            before = live.now
            live.mark()
            self.run(one, keep=False)
            return live.peak - before


def timed_solve(
    one: Contestant, f: Any, z0: State, x: Any, tolerance: float, budget: int, *, keep: bool = True
) -> tuple[_Found, Row]:
    """A solve, and where its time went. keep: False where only the time is wanted (a peer is not recorded then)."""
    if one.peer:
        return _solved_by_peer(one.solver, f, z0, x, tolerance, budget, keep=keep)
    watch = Stopwatch(parts_of(z0)[0].device)
    watched = watch.device.type == "cpu"  # on a GPU a look at the clock waits for the device
    f, solver = (watch.of_f(f), watch.of_solver(one.solver)) if watched else (f, one.solver)
    began = now(watch.device)
    solution = solve(f, z0, x, solver=solver, rtol=tolerance, max_nfe=budget, throw=False)
    total = now(watch.device) - began
    taken = {
        "total": total,
        "f": watch.f if watched and not one.parts else None,
        "solver": watch.solver if watched else total,
        "bookkeeping": total - watch.f - watch.solver if watched else 0.0,
    }
    status = "".join(LETTERS[Status(value)] for value in solution.status.tolist())
    evaluations = np.where(solution.converged.cpu().numpy(), solution.nfe.numpy(), budget)
    handed = int((solution.trace.phase > 0).any(dim=0).sum())
    return _Found(solution.z, evaluations, solution.residual.tolist(), status, handed, solution.trace), taken


def _solved_by_peer(
    solver: Any, f: Any, z0: State, x: Any, tolerance: float, budget: int, *, keep: bool
) -> tuple[_Found, Row]:
    device = parts_of(z0)[0].device
    began = now(device)
    z, recorder = solve_state(solver, f, z0, x, tolerance, budget, keep=keep)
    total = now(device) - began - recorder.excused
    in_f = recorder.f_seconds if device.type == "cpu" else None
    taken = {"total": total, "f": in_f, "solver": total - (in_f or 0.0), "bookkeeping": 0.0}
    if not keep:
        return _Found(z0, np.empty(0), [], "", 0, None), taken
    trace = recorder.trace()
    evaluations, reached = trace.evaluations_to(tolerance, budget)
    smallest = trace.residual.nan_to_num(torch.inf).min(dim=0).values.tolist()
    finite = torch.isfinite(trace.residual[-1]).tolist()
    letters = ["C" if hit else "B" if whole else "N" for hit, whole in zip(reached, finite, strict=True)]
    return _Found(z, evaluations, smallest, "".join(letters), 0, trace), taken


def _flat(z: State) -> Tensor:
    """(B, n) of a state that a peer may have broken: `packed` wants finite ones."""
    return torch.cat([part.flatten(1) for part in parts_of(z)], dim=1)


def _where(values: Tensor, there: Tensor) -> list[float]:
    return values.where(there.to(values.device), torch.nan).tolist()


def _numbers(values: list[float], digits: int = 4) -> list[float | None]:
    """To so many digits; None for what is no number."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]


def residual_after(trace: Trace, budget: int) -> np.ndarray:
    """(budget, B): the smallest residual each sample had seen after 1, 2, … evaluations; infinite before its first."""
    residual, nfe = np.nan_to_num(trace.residual.cpu().numpy(), nan=np.inf), trace.nfe.numpy()
    best = np.full((budget + 1, residual.shape[1]), np.inf)
    columns = np.arange(residual.shape[1])
    for value, spent in zip(residual, np.minimum(nfe, budget), strict=True):
        best[spent, columns] = np.minimum(best[spent, columns], value)
    best[0] = np.inf  # rows of the trace in which the sample took no part carry nfe 0
    return np.minimum.accumulate(best[1:], axis=0)


def residual_by_time(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """(seconds (K,), median over samples of the smallest residual seen by then (K,))."""
    residual = np.nan_to_num(trace.residual.cpu().numpy(), nan=np.inf)
    return trace.seconds.numpy(), np.median(np.minimum.accumulate(residual, axis=0), axis=1)


def _curve(traces: Sequence[Trace], budget: int) -> Row:
    """Quartiles of the residual by evaluations over all blocks; by time, of the first block."""
    best = np.concatenate([residual_after(trace, budget) for trace in traces], axis=1)
    low, median, high = np.quantile(best, [0.25, 0.5, 0.75], axis=1, method="nearest")
    seen = np.flatnonzero(np.isfinite(high))
    seconds, by_time = residual_by_time(traces[0])
    there = np.isfinite(by_time)
    bands = {"low": low[seen].tolist(), "median": median[seen].tolist(), "high": high[seen].tolist()}
    times = {"seconds": seconds[there].tolist(), "by_time": by_time[there].tolist()}
    return {"evaluations": (seen + 1).tolist(), **short({**bands, **times})}


@torch.no_grad()
def depth_rows(held: HeldOut, solver: Any, depths: Sequence[int]) -> list[Row]:
    """Mean score, its error against the last, and quartiles of the residual after k evaluations; no stamp.

    A solver's state after k evaluations is the best that it has seen; without a solver it is the k-th of z ← f(z).
    """
    found: dict[int, list[tuple[Tensor, Tensor]]] = {k: [] for k in depths}
    for z0, x, index in held.chunks():
        for k, z in zip(depths, _states(held.f, z0, x, solver, depths), strict=True):
            found[k].append((held.judge(z, index).cpu(), _residual(held.f, z, x).cpu()))
    by_depth = {k: [torch.cat(parts) for parts in zip(*found[k], strict=True)] for k in depths}
    rows = []
    for k, (score, residual) in by_depth.items():
        over = score - by_depth[depths[-1]][0]
        quartiles = torch.quantile(residual, torch.tensor([0.25, 0.5, 0.75]), interpolation="nearest")
        rows.append({
            "row": "depth", "evaluations": k, "score": float(score.mean()), "over_last": float(over.mean()),
            "over_last_error": float(over.std() / len(over) ** 0.5), "residual": quartiles.tolist(),
        })  # fmt: skip
    return short(rows)


def _states(f: Callable[..., State], z0: State, x: Any, solver: Any, depths: Sequence[int]) -> list[State]:
    if solver is not None:
        found = solve(f, z0, x, solver=solver, rtol=0.0, max_nfe=depths[-1] + 1, throw=False, snapshots=depths)
        return list(found.snapshots)
    states, z = [], z0
    for k in range(1, depths[-1] + 1):
        z = f(z, x)
        states += [z] if k in depths else []
    return states


def _residual(f: Callable[..., State], z: State, x: Any) -> Tensor:
    """(B,) ‖f(z) − z‖ / ‖f(z)‖."""
    return relative_residual(_flat(z), _flat(f(z, x))).nan_to_num(torch.inf, torch.inf)


def pace_rows(held: HeldOut, solves: Sequence[tuple[Contestant, int, bool]], rules: Rules, stamp: Stamp) -> list[Row]:
    """Time of solves of the first block that stop after so many evaluations, whatever the residual; in turns.

    solves: contestant, evaluations, and whether they are enough for the task.
    """
    z0, x = held.take(torch.arange(min(rules.block, len(held)), device=held.device))

    def lap(one: Contestant, count: int) -> float:
        return timed_solve(one, held.f, z0, x, 0.0, count, keep=False)[1]["total"]

    seconds = laps({(one.key, count): partial(lap, one, count) for one, count, _ in solves}, rules.rounds)
    return [
        {"row": "pace", **stamp(one), "evaluations": count, "enough": enough,
         "seconds": short(seconds[one.key, count].tolist())}
        for one, count, enough in solves
    ]  # fmt: skip


@torch.no_grad()
def horizon_rows(
    held: HeldOut, one: Contestant, stamp: Stamp, *, steps: int, tolerances: Iterable[float] = (1e-3, 1e-4)
) -> list[Row]:
    """A learned solver against its own fallback, `steps` evaluations each: the safeguard's promise, counted.

    The promise is that with max_nfe plus what was spent before the fallback began, it does not fail where that converges.
    """
    rows, (fallback, phase) = [], one.solver.fallback()
    for tolerance in tolerances:
        counts = dict.fromkeys(("fallback", "learned", "lost", "broken", "triggered"), 0)
        for z0, x, _ in held.chunks():
            ours = solve(held.f, z0, x, solver=one.solver, rtol=tolerance, max_nfe=4 * steps, throw=False)
            theirs = solve(held.f, z0, x, solver=fallback, rtol=tolerance, max_nfe=steps, throw=False)
            nfe, hit = ours.trace.evaluations_to(tolerance, 4 * steps)
            # all of them where it never entered the phase
            before = np.where((ours.trace.phase < phase).numpy(), ours.trace.nfe.numpy(), 0).max(axis=0)
            converged, learned = theirs.converged.cpu().numpy(), hit & (nfe <= steps)
            found = {
                "fallback": converged, "learned": learned, "lost": converged & ~learned,
                "broken": converged & ~(hit & (nfe <= steps + before)),
                "triggered": (ours.trace.phase > 0).any(dim=0).numpy(),
            }  # fmt: skip
            counts = {key: count + int(found[key].sum()) for key, count in counts.items()}
        about = {"tolerance": tolerance, "steps": steps, "samples": len(held)}
        rows.append({"row": "horizon", **stamp(one), **about, **counts})
    return rows


@contextmanager
def solved_to(model: Any, rtol: float | None) -> Iterator[None]:
    """The model's DEQ, where it has one and a tolerance is given, solving to that, with evaluations enough."""
    if rtol is None or not isinstance(model.deq, DEQ):
        yield
        return
    before = model.deq.rtol, model.deq.max_nfe
    model.deq.rtol, model.deq.max_nfe = rtol, 100
    try:
        yield
    finally:
        model.deq.rtol, model.deq.max_nfe = before


@torch.no_grad()
def leak_rows(
    model: Any, criterion: NextToken, stamp: Row, *, tolerances: Iterable[float], windows: int = 24, last: int = 8
) -> list[Row]:
    """By how many bits the predictions of a segment's tokens change when the last few are replaced, at each tolerance.

    Those before are asked alone: a causal model's equilibrium has no change there, a solve that stops before may.
    """
    length = criterion.length
    tokens, targets = (part[:windows] for part in text_windows(criterion.data, "test", length, model.stem.back))
    tokens, targets = tokens.to(device_of(model)), targets.to(device_of(model))
    changed = tokens.clone()
    changed[:, -last:] = (changed[:, -last:] + 1) % len(criterion.data.vocabulary)
    rows = []
    for tolerance in tolerances:
        with solved_to(model, tolerance):
            solved = (model.deq(second_half(model, read, length)) for read in (tokens, changed))
            before, after = (bits_of(model.classify(z), targets) for z in solved)
        bits = (after - before)[:, :-last].abs()
        rows.append(
            {"row": "leak", **stamp, "tolerance": tolerance, "mean": float(bits.mean()), "most": float(bits.max())}
        )
    return short(rows)
