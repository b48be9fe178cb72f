"""The race itself: solves → rows. Nothing here draws or judges."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metabroyden.evaluation.equilibria import HeldOut
from metabroyden.evaluation.memory import LiveBytes
from metabroyden.evaluation.meta_rows import packed
from metabroyden.evaluation.metrics import residual_after, residual_by_time, short
from metabroyden.evaluation.race.contestants import Contestant
from metabroyden.evaluation.race.schema import LETTERS, Row
from metabroyden.evaluation.stopwatch import Stopwatch, now
from metabroyden.solution import State, Status, Trace
from metabroyden.solve import solve
from metabroyden.solvers.clock import turns
from metabroyden.state import Packing, gather


@dataclass(frozen=True)
class Rules:
    """What is the same for all contestants.

    Attributes:
        tolerances: each with a solve of its own. clocked: those with `rounds` timed rounds; the others have one.
        budget: evaluations a sample. block: samples solved as one batch.
    """

    tolerances: tuple[float, ...]
    clocked: tuple[float, ...]
    budget: int
    block: int
    rounds: int


@dataclass(frozen=True)
class _Found:
    z: State
    evaluations: np.ndarray
    residual: list[float]
    status: str
    handed_over: int
    trace: Trace | None


def solve_rows(
    contestants: Sequence[Contestant],
    held: HeldOut,
    star: Tensor,
    known: Tensor,
    rules: Rules,
    stamp: Callable[[Contestant], Row],
    done: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Every contestant on every block to every tolerance, in turns.

    star (N, n): float64 equilibria, known (N,) where they were found. stamp: what every row of a contestant begins with.
    done: called after each block and tolerance.
    """
    rows = []
    traces: dict[str, list[Trace]] = {one.key: [] for one in contestants}
    for number, index in enumerate(torch.arange(len(held), device=held.device).split(rules.block)):
        z0, x = gather(held.z0, index), gather(held.x, index)
        for tolerance in rules.tolerances:
            found: dict[str, _Found] = {}
            seconds: dict[str, list[Row]] = {one.key: [] for one in contestants}
            laps = rules.rounds if tolerance in rules.clocked else 0
            for one in contestants:
                found[one.key], taken = _solved(one, held.f, z0, x, tolerance, rules.budget)
                if not laps:
                    seconds[one.key].append(taken)
            by_key = {one.key: one for one in contestants}
            for key in turns(list(by_key), laps):
                seconds[key].append(_solved(by_key[key], held.f, z0, x, tolerance, rules.budget, keep=False)[1])
            for one in contestants:
                result = found[one.key]
                if tolerance == rules.tolerances[-1] and result.trace is not None:
                    traces[one.key].append(result.trace)
                weighed = number == 0 and tolerance == rules.clocked[-1]
                rows.append(
                    {
                        "row": "solve",
                        **stamp(one),
                        "options": one.options,
                        "tolerance": tolerance,
                        "budget": rules.budget,
                        "block": number,
                        "evaluations": result.evaluations.tolist(),
                        "residual": _numbers(result.residual),
                        "status": result.status,
                        "distance": _distance(result.z, star[index], known[index]),
                        "score": _numbers(held.judge(result.z, index).tolist()),
                        "handed_over": result.handed_over,
                        "seconds": short(seconds[one.key]),
                        "peak_bytes": _peak(one, held.f, z0, x, tolerance, rules.budget) if weighed else None,
                    }
                )
            done()
    return rows + [{"row": "curve", **stamp(one), **_curve(traces[one.key], rules.budget)} for one in contestants]


def _solved(
    one: Contestant, f: Any, z0: State, x: Any, tolerance: float, budget: int, *, keep: bool = True
) -> tuple[_Found, Row]:
    """A solve, and where its time went. keep: False where only the time is wanted (a peer is not recorded then)."""
    if one.peer:
        return _solved_by_peer(one.solver, f, z0, x, tolerance, budget, keep=keep)
    watch = Stopwatch(_device(z0))
    began = now(watch.device)
    solution = solve(
        watch.of_f(f), z0, x, solver=watch.of_solver(one.solver), rtol=tolerance, max_nfe=budget, throw=False
    )
    total = now(watch.device) - began
    apart = not getattr(one.solver, "parts", ())
    taken = {
        "total": total,
        "f": watch.f if apart else None,
        "solver": watch.solver if apart else watch.solver + watch.f,
        "bookkeeping": total - watch.f - watch.solver,
    }
    status = "".join(LETTERS[Status(value)] for value in solution.status.tolist())
    evaluations = np.where(solution.converged.cpu().numpy(), solution.nfe.numpy(), budget)
    handed = int((solution.trace.phase > 0).any(dim=0).sum())
    return _Found(solution.z, evaluations, solution.residual.tolist(), status, handed, solution.trace), taken


def _solved_by_peer(
    solver: Any, f: Any, z0: State, x: Any, tolerance: float, budget: int, *, keep: bool
) -> tuple[_Found, Row]:
    packing = Packing.of(z0)
    began = time.perf_counter()
    z, recorder = solver.solve(
        lambda flat: packing.pack(f(packing.unpack(flat), x)), packing.pack(z0), tolerance, budget, keep=keep
    )
    total = time.perf_counter() - began - recorder.excused
    rest = total - recorder.f_seconds
    taken = {"total": total, "f": recorder.f_seconds, "solver": rest, "bookkeeping": 0.0}
    if not keep:
        return _Found(z0, np.empty(0), [], "", 0, None), taken
    trace = recorder.trace()
    evaluations, reached = trace.evaluations_to(tolerance, budget)
    smallest = trace.residual.nan_to_num(torch.inf).min(dim=0).values.tolist()
    finite = torch.isfinite(trace.residual[-1]).tolist()
    letters = ["C" if hit else "B" if whole else "N" for hit, whole in zip(reached, finite, strict=True)]
    return _Found(packing.unpack(z), evaluations, smallest, "".join(letters), 0, trace), taken


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


def _device(z: State) -> torch.device:
    return z.device if isinstance(z, Tensor) else z[0].device


def _numbers(values: list[float]) -> list[float | None]:
    """To four digits; None for what is no number."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


def _distance(z: State, star: Tensor, known: Tensor) -> list[float | None]:
    apart = (packed(z).double() - star).norm(dim=1) / star.norm(dim=1)
    return [
        float(f"{value:.3g}") if there else None for value, there in zip(apart.tolist(), known.tolist(), strict=True)
    ]


def _peak(one: Contestant, f: Any, z0: State, x: Any, tolerance: float, budget: int) -> int:
    """Bytes of tensors alive at once in a solve beyond those that were there before it (on a GPU: the allocator's)."""
    device = _device(z0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _solved(one, f, z0, x, tolerance, budget, keep=False)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        _solved(one, f, z0, x, tolerance, budget, keep=False)  # weights and contexts are seen, and stay
        before = live.now
        live.mark()
        _solved(one, f, z0, x, tolerance, budget, keep=False)
        return live.peak - before


def pace_rows(
    contestants: Sequence[tuple[Contestant, int]], held: HeldOut, rules: Rules, stamp: Callable[[Contestant], Row]
) -> list[Row]:
    """Time of solves of the first block that stop after so many evaluations, whatever the residual; in turns."""
    index = torch.arange(min(rules.block, len(held)), device=held.device)
    z0, x = gather(held.z0, index), gather(held.x, index)
    by_key = {one.key: (one, count) for one, count in contestants}
    seconds: dict[str, list[float]] = {key: [] for key in by_key}
    for key in turns(list(by_key), rules.rounds + 1):
        one, count = by_key[key]
        seconds[key].append(_solved(one, held.f, z0, x, 0.0, count, keep=False)[1]["total"])
    return [
        {"row": "pace", **stamp(one), "evaluations": count, "seconds": short(seconds[one.key][1:])}
        for one, count in contestants
    ]
