"""The race itself: solves → rows. Nothing here draws or judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.bench.peers import solve_state
from experiments.legacy.equilibria import HeldOut
from experiments.legacy.memory import LiveBytes
from experiments.legacy.meta_rows import packed, states_at
from experiments.legacy.metrics import residual_after, residual_by_time, short
from experiments.legacy.race.contestants import Contestant
from experiments.legacy.race.schema import LETTERS, Row
from experiments.legacy.stopwatch import Stopwatch, now
from metabroyden.gradients.base import parts_of
from metabroyden.solution import State, Status, Trace
from metabroyden.solve import solve
from metabroyden.solvers.clock import turns
from metabroyden.state import gather


@dataclass(frozen=True)
class Rules:
    """What is the same for all contestants.

    Attributes:
        tolerances: each with a solve of its own. clocked: those with `rounds` timed rounds; the others have one.
        budget: evaluations a sample. block: samples solved as one batch. weighed: whether memory is measured.
    """

    tolerances: tuple[float, ...]
    clocked: tuple[float, ...]
    budget: int
    block: int
    rounds: int
    weighed: bool = True


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
    settled = None if held.predict is None else held.predict(states_at(star, held))
    traces: dict[str, list[Trace]] = {one.key: [] for one in contestants}
    for number, index in enumerate(torch.arange(len(held), device=held.device).split(rules.block)):
        z0, x = gather(held.z0, index), gather(held.x, index)
        predicted = None if settled is None else settled[index]
        for tolerance in rules.tolerances:
            # what is found warms up what is timed
            found = {one.key: _solved(one, held.f, z0, x, tolerance, rules.budget)[0] for one in contestants}
            seconds: dict[str, list[Row]] = {one.key: [] for one in contestants}
            by_key, keys = {one.key: one for one in contestants}, [one.key for one in contestants]
            first = number * rules.rounds % len(keys)
            for key in turns([*keys[first:], *keys[:first]], rules.rounds if tolerance in rules.clocked else 1):
                seconds[key].append(_solved(by_key[key], held.f, z0, x, tolerance, rules.budget, keep=False)[1])
            for one in contestants:
                result = found[one.key]
                whole = _finite(result.z)
                if tolerance == rules.tolerances[-1] and result.trace is not None:
                    traces[one.key].append(result.trace)
                weighed = rules.weighed and number == 0 and tolerance == rules.clocked[-1]
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
                        "distance": _distance(result.z, star[index], known[index] & whole),
                        "score": _numbers(held.judge(result.z, index).where(whole, torch.nan).tolist()),
                        "agrees": _agreement(held, result.z, predicted, known[index] & whole),
                        "handed_over": result.handed_over,
                        "seconds": short(seconds[one.key]),
                        "peak_bytes": _peak(one, held.f, z0, x, tolerance, rules.budget) if weighed else None,
                    }
                )
            done()
    return rows + [{"row": "curve", **stamp(one), **_curve(traces[one.key], rules.budget)} for one in contestants]


def curve_rows(
    contestants: Sequence[Contestant],
    held: HeldOut,
    count: int,
    tolerance: float,
    rules: Rules,
    stamp: Callable[[Contestant], Row],
) -> list[Row]:
    """Residual curves to a budget of their own, on the first `count` problems."""
    index = torch.arange(min(count, len(held)), device=held.device)
    z0, x = gather(held.z0, index), gather(held.x, index)
    rows = []
    for one in contestants:
        trace = _solved(one, held.f, z0, x, tolerance, rules.budget)[0].trace
        assert trace is not None, "recorded, unless told otherwise"
        rows.append({"row": "curve", **stamp(one), **_curve([trace], rules.budget)})
    return rows


def _solved(
    one: Contestant, f: Any, z0: State, x: Any, tolerance: float, budget: int, *, keep: bool = True
) -> tuple[_Found, Row]:
    """A solve, and where its time went. keep: False where only the time is wanted (a peer is not recorded then)."""
    if one.peer:
        return _solved_by_peer(one.solver, f, z0, x, tolerance, budget, keep=keep)
    watch = Stopwatch(_device(z0))
    watched = watch.device.type == "cpu"  # on a GPU a look at the clock waits for the device
    f, solver = (watch.of_f(f), watch.of_solver(one.solver)) if watched else (f, one.solver)
    began = now(watch.device)
    solution = solve(f, z0, x, solver=solver, rtol=tolerance, max_nfe=budget, throw=False)
    total = now(watch.device) - began
    apart = watched and not getattr(one.solver, "parts", ())
    taken = {
        "total": total,
        "f": watch.f if apart else None,
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
    device = _device(z0)
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
    return parts_of(z)[0].device


def _numbers(values: list[float]) -> list[float | None]:
    """To four digits; None for what is no number."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


def unknown(held: HeldOut) -> tuple[Tensor, Tensor]:
    """(z*, known) for `solve_rows` where no equilibrium is known."""
    return torch.zeros_like(packed(held.z0), dtype=torch.float64), torch.zeros(
        len(held), dtype=torch.bool, device=held.device
    )


def _flat(z: State) -> Tensor:
    """(B, n) of a state that a peer may have broken: `packed` wants finite ones."""
    return torch.cat([part.flatten(1) for part in parts_of(z)], dim=1)


def _finite(z: State) -> Tensor:
    """(B,) samples whose state is finite."""
    return _flat(z).isfinite().all(dim=1)


def _distance(z: State, star: Tensor, known: Tensor) -> list[float | None]:
    apart = (_flat(z).double() - star).norm(dim=1) / star.norm(dim=1)
    return [
        float(f"{value:.3g}") if there else None for value, there in zip(apart.tolist(), known.tolist(), strict=True)
    ]


def _agreement(held: HeldOut, z: State, settled: Tensor | None, known: Tensor) -> list[float | None]:
    """By sample, the share of predictions that are the settled ones; None where the equilibrium is not known."""
    if held.predict is None or settled is None:
        return [None for _ in known]
    same = (held.predict(z) == settled).float().reshape(len(known), -1).mean(dim=1)
    return [float(f"{v:.4g}") if there else None for v, there in zip(same.tolist(), known.tolist(), strict=True)]


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


@torch.no_grad()
def path_rows(
    contestants: Sequence[Contestant], held: HeldOut, star: Tensor, rules: Rules, stamp: Callable[[Contestant], Row]
) -> list[Row]:
    """Iterates of solvers that call f, on the first sample to 1e-4, in the plane of their two principal components.

    star (N, n): its first row is the origin.
    """
    index = torch.zeros(1, dtype=torch.long, device=held.device)
    z0, x = gather(held.z0, index), gather(held.x, index)
    paths, residuals = [], []
    for one in contestants:
        visited: list[Tensor] = []

        def f(z: State, context: Any, seen: list[Tensor] = visited) -> State:
            seen.append(packed(z)[0].double())
            return held.f(z, context)

        found = solve(f, z0, x, solver=one.solver, rtol=1e-4, max_nfe=rules.budget, throw=False)
        paths.append(torch.stack(visited) - star[0])
        residuals.append(_numbers(found.trace.residual[: len(visited), 0].tolist()))
    plane = torch.linalg.svd(torch.cat(paths), full_matrices=False)[2][:2]
    rows = []
    for one, path, residual in zip(contestants, paths, residuals, strict=True):
        along, across = (path @ plane.T).T.tolist()
        rows.append({"row": "path", **stamp(one), "along": short(along), "across": short(across), "residual": residual})
    return rows


def pace_rows(
    solves: Sequence[tuple[Contestant, int, bool]], held: HeldOut, rules: Rules, stamp: Callable[[Contestant], Row]
) -> list[Row]:
    """Time of solves of the first block that stop after so many evaluations, whatever the residual; in turns.

    solves: contestant, evaluations, and whether they are enough for the task.
    """
    index = torch.arange(min(rules.block, len(held)), device=held.device)
    z0, x = gather(held.z0, index), gather(held.x, index)
    by_key = {f"{one.key} {count}": (one, count) for one, count, _ in solves}
    seconds: dict[str, list[float]] = {key: [] for key in by_key}
    for key in turns(list(by_key), rules.rounds + 1):
        one, count = by_key[key]
        seconds[key].append(_solved(one, held.f, z0, x, 0.0, count, keep=False)[1]["total"])
    return [
        {
            "row": "pace",
            **stamp(one),
            "evaluations": count,
            "enough": enough,
            "seconds": short(seconds[f"{one.key} {count}"][1:]),
        }
        for one, count, enough in solves
    ]
