"""The classical solvers against their peers: rows. Nothing here draws or judges.

A row is a JSON object with a key "row" that says what it tells:
  race      one solver on one problem to one tolerance: time, time in f, calls, evaluations, success, ratios to the peer
  gap       one solver: time outside f before the k-th call of f, or by batch or memory
  anatomy   one solver: where the time of a solve goes
  limited   Broyden with memory 10 against full memory
  compiled  a fixed budget, compiled, against `solve`
  sample    one solver on one sample of a registered problem: evaluations to each tolerance
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from experiments.bench.clock import Stopwatch
from experiments.bench.peers import ScipySolver, TorchDEQSolver, XitorchSolver, solve_state
from experiments.bench.tables import short
from metabroyden.fixed import FixedBudget
from metabroyden.solution import Trace
from metabroyden.solve import solve
from metabroyden.solvers import Anderson, Broyden, Picard
from metabroyden.zoo.testbed import KnownProblem, make_problem

Row = dict[str, Any]
Peer = TorchDEQSolver | XitorchSolver | ScipySolver


@dataclass(frozen=True)
class Run:
    """One timed solve. B samples."""

    total: float  # seconds
    in_f: float
    calls: int
    trace: Trace | None  # of a peer only where asked for: recording takes time
    gaps: np.ndarray  # (calls − 1,) seconds between calls of f

    @property
    def overhead(self) -> float:
        """Seconds outside f per call of f."""
        return (self.total - self.in_f) / self.calls


def run_ours(solver: Any, problem: KnownProblem, rtol: float, max_nfe: int) -> Run:
    """A solve by `solve`, timed."""
    moments: list[tuple[float, float]] = []

    def f(z: Any, x: Any) -> Any:
        start = time.perf_counter()
        value = problem.f(z, x)
        moments.append((start, time.perf_counter()))
        return value

    began = time.perf_counter()
    solution = solve(f, problem.z0, problem.context, solver=solver, rtol=rtol, max_nfe=max_nfe, throw=False)
    total = time.perf_counter() - began
    starts, ends = np.array(moments).T
    return Run(total, float((ends - starts).sum()), len(moments), solution.trace, starts[1:] - ends[:-1])


def run_peer(peer: Peer, problem: KnownProblem, rtol: float, max_nfe: int, *, keep: bool) -> Run:
    """A solve by a peer, on the flat state: recorded, or timed."""
    began = time.perf_counter()
    _, recorder = solve_state(peer, problem.f, problem.z0, problem.context, rtol, max_nfe, keep=keep)
    total = time.perf_counter() - began - recorder.excused
    return Run(total, recorder.f_seconds, recorder.count, recorder.trace() if keep else None, recorder.gaps)


def timed(solver: Any, problem: KnownProblem, rtol: float, max_nfe: int) -> Run:
    """A timed solve by whichever it is."""
    if isinstance(solver, Peer):
        return run_peer(solver, problem, rtol, max_nfe, keep=False)
    return run_ours(solver, problem, rtol, max_nfe)


def traced(solver: Any, problem: KnownProblem, rtol: float, max_nfe: int) -> Trace:
    """The trace of a solve by whichever it is."""
    if isinstance(solver, Peer):
        trace = run_peer(solver, problem, rtol, max_nfe, keep=True).trace
    else:
        trace = run_ours(solver, problem, rtol, max_nfe).trace
    assert trace is not None
    return trace


def race_rows(
    name: str,
    problems: Sequence[KnownProblem],
    contestants: dict[str, dict[str, Any]],
    *,
    rtol: float,
    budget: int,
    repeats: int,
    reference: str = "torchdeq",
) -> list[Row]:
    """Each method's contestants on a cell: evaluations on all the problems (batches of it), time on the first.

    Timed runs are interleaved; ratios are medians of paired ratios to the reference.
    """
    rows: list[Row] = []
    for method, entries in contestants.items():
        hits = {
            label: [traced(solver, problem, rtol, budget).evaluations_to(rtol, budget) for problem in problems]
            for label, solver in entries.items()
        }
        runs: dict[str, list[Run]] = {label: [] for label in entries}
        for _ in range(repeats):
            for label, solver in entries.items():
                runs[label].append(timed(solver, problems[0], rtol, budget))
        base = runs[reference]
        for label, found in runs.items():
            evaluations, reached = (np.concatenate(values) for values in zip(*hits[label], strict=True))
            pairs = list(zip(found, base, strict=True))
            rows.append(
                {
                    "row": "race",
                    "problem": name,
                    "rtol": rtol,
                    "method": method,
                    "solver": label,
                    "total": _median(run.total for run in found),
                    "f_share": _median(run.in_f / run.total for run in found),
                    "calls": found[0].calls,
                    "overhead": _median(run.overhead for run in found),
                    "median": float(np.median(evaluations)),
                    "p90": float(np.percentile(evaluations, 90)),
                    "worst": int(evaluations.max()),
                    "success": float(reached.mean()),
                    "samples": len(reached),
                    "ratio_overhead": _median(ours.overhead / theirs.overhead for ours, theirs in pairs),
                    "ratio_total": _median(ours.total / theirs.total for ours, theirs in pairs),
                }
            )
    return rows


def _gaps(problem: KnownProblem, entries: dict[str, Any], repeats: int, steps: int) -> dict[str, np.ndarray]:
    """Seconds between consecutive calls of f by solver: medians over repeats in turns, after one that warms up."""
    runs: dict[str, list[np.ndarray]] = {label: [] for label in entries}
    for _ in range(repeats + 1):
        for label, solver in entries.items():
            runs[label].append(timed(solver, problem, 0.0, steps).gaps)
    return {
        label: np.median(np.stack([gap[: min(map(len, gaps[1:]))] for gap in gaps[1:]]), axis=0)
        for label, gaps in runs.items()
    }


def gap_rows(batches: Iterable[int], memories: Iterable[int], *, repeats: int, steps: int = 60) -> list[Row]:
    """Time outside f per evaluation: by step with full memory, by batch, by memory; dense norm-3 cells, D = 256."""
    from metabroyden.zoo.testbed.cells import blas

    full = {
        "Broyden": Broyden(memory=steps),
        "torchdeq Broyden": TorchDEQSolver("broyden"),
        "Anderson": Anderson(memory=5),
        "torchdeq Anderson": TorchDEQSolver("anderson", (("m", 6),)),
        "Picard": Picard(),
        "torchdeq Picard": TorchDEQSolver("fixed_point_iter"),
    }
    rows = [
        {"row": "gap", "by": "step", "value": k + 2, "solver": label, "seconds": short(float(gap))}
        for label, middle in _gaps(blas(64, 256, 3.0), full, repeats, steps).items()
        for k, gap in enumerate(middle)
    ]

    def add(what: str, value: int, problem: KnownProblem, entries: dict[str, Any], skip: int) -> None:
        for label, middle in _gaps(problem, entries, repeats, steps).items():
            seconds = short(float(np.median(middle[min(skip, len(middle) - 1) :])))
            rows.append({"row": "gap", "by": what, "value": value, "solver": label, "seconds": seconds})

    for batch in batches:
        entries = full | {
            "Broyden": Broyden(memory=10),
            "torchdeq Broyden": TorchDEQSolver("broyden", (("LBFGS_thres", 10),)),
        }
        add("batch", batch, blas(batch, 256, 3.0), entries, 11)
    for memory in memories:
        entries = {
            "Broyden": Broyden(memory=memory),
            "torchdeq Broyden": TorchDEQSolver("broyden", (("LBFGS_thres", memory),)),
            "Anderson": Anderson(memory=memory),
            "torchdeq Anderson": TorchDEQSolver("anderson", (("m", memory + 1),)),
        }
        add("memory", memory, blas(64, 256, 3.0), entries, memory + 2)
    return rows


def anatomy_rows(name: str, problem: KnownProblem, *, rtol: float, budget: int, repeats: int) -> list[Row]:
    """Where the time of a solve goes: f, the solver's own arithmetic, the driver; per call of f, medians."""
    rows: list[Row] = []
    for label, solver in (("Picard", Picard()), ("Anderson", Anderson(memory=5)), ("Broyden", Broyden(memory=budget))):
        parts = []
        for _ in range(repeats + 1):
            watch = Stopwatch(torch.device("cpu"))
            run = run_ours(watch.of_solver(solver), problem, rtol, budget)
            step = watch.solver
            parts.append(np.array([run.in_f, step, run.total - run.in_f - step]) / run.calls)
        f, step, driver = np.median(np.stack(parts[1:]), axis=0)
        rows.append(
            {
                "row": "anatomy",
                "problem": name,
                "solver": label,
                "f": short(float(f)),
                "step": short(float(step)),
                "driver": short(float(driver)),
            }
        )
    return rows


def limited_rows(*, rtols: Iterable[float], seeds: int, memory: int = 10, budget: int = 200) -> list[Row]:
    """On symmetric cells: of the samples that full memory solves, how many limited memory solves within twice as many."""
    from metabroyden.zoo.testbed.cells import blas

    rows: list[Row] = []
    for norm in (0.95, 1.5, 3.0):
        for rtol in rtols:
            entries: dict[str, tuple[Any, int]] = {
                "Broyden": (Broyden(memory=memory), 2 * budget),
                "bad Broyden": (Broyden(memory=memory, kind="bad"), 2 * budget),
                "torchdeq Broyden": (TorchDEQSolver("broyden", (("LBFGS_thres", memory),)), 2 * budget),
            }
            counts: dict[str, list[np.ndarray]] = {label: [] for label in entries}
            for seed in range(seeds):
                problem = blas(64, 256, norm, symmetric=True, seed=seed)
                full = traced(Broyden(memory=budget), problem, rtol, budget)
                spent, solved = full.evaluations_to(rtol, budget)
                for label, (solver, allowed) in entries.items():
                    trace = traced(solver, problem, rtol, allowed)
                    taken, reached = trace.evaluations_to(rtol, allowed)
                    not_finite = (
                        ~torch.isfinite(trace.residual[-1]).numpy() if "torchdeq" in label else ~reached & False
                    )
                    counts[label].append(np.stack([solved, reached & solved & (taken <= 2 * spent), not_finite]))
            for label, found in counts.items():
                solved, kept, not_finite = np.concatenate(found, axis=1)
                rows.append(
                    {
                        "row": "limited",
                        "norm": norm,
                        "rtol": rtol,
                        "solver": label,
                        "memory": memory,
                        "full": int(solved.sum()),
                        "kept": int(kept.sum()),
                        "not_finite": int(not_finite.sum()),
                        "samples": len(solved),
                    }
                )
    return rows


def compiled_rows(problem: KnownProblem, name: str, *, budget: int, repeats: int) -> list[Row]:
    """A fixed budget, compiled, against `solve` with the same budget; interleaved medians, and the compiler's time."""
    rows: list[Row] = []
    for label, solver in (("Picard", Picard()), ("Anderson", Anderson(memory=5)), ("Broyden", Broyden(memory=budget))):
        fixed = FixedBudget(problem.f, solver, max_nfe=budget, rtol=0.0)
        found = fixed(problem.z0, problem.context)
        usual = solve(problem.f, problem.z0, problem.context, solver=solver, rtol=0.0, max_nfe=budget, throw=False)
        assert isinstance(found.z, Tensor)
        assert isinstance(usual.z, Tensor)
        difference = float((found.z - usual.z).norm() / usual.z.norm())
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            fixed(problem.z0, problem.context)
            middle = time.perf_counter()
            solve(problem.f, problem.z0, problem.context, solver=solver, rtol=0.0, max_nfe=budget, throw=False)
            times.append((middle - began, time.perf_counter() - middle))
        compiled, eager = np.median(np.array(times), axis=0)
        rows.append(
            {
                "row": "compiled",
                "problem": name,
                "solver": label,
                "budget": budget,
                "compile_seconds": short(fixed.compile_seconds),
                "compiled": short(float(compiled)),
                "solve": short(float(eager)),
                "ratio": short(float(np.median([a / b for a, b in times]))),
                "difference": short(difference),
            }
        )
    return rows


def registry_rows(
    names: Iterable[str], solvers: dict[str, Any], *, tolerances: Iterable[float], budget: int, batch: int
) -> list[Row]:
    """Every solver on every sample of the registered problems, in float64: evaluations to each tolerance."""
    tolerances = sorted(tolerances, reverse=True)
    rows: list[Row] = []
    for name in names:
        problem = make_problem(name, batch=batch, seed=1)
        for label, solver in solvers.items():
            for sample, trace in enumerate(_traces(solver, problem, tolerances[-1], budget, batch)):
                hits = {f"{tolerance:g}": trace.evaluations_to(tolerance, budget) for tolerance in tolerances}
                rows.append(
                    {
                        "row": "sample",
                        "problem": name,
                        "solver": label,
                        "sample": sample,
                        "nfe": {key: int(spent[0]) for key, (spent, _) in hits.items()},
                        "reached": {key: bool(reached[0]) for key, (_, reached) in hits.items()},
                    }
                )
    return rows


def _traces(solver: Any, problem: KnownProblem, rtol: float, budget: int, batch: int) -> list[Trace]:
    """A trace a sample. scipy knows no batch: it solves one sample after the other."""
    if isinstance(solver, ScipySolver):
        take = lambda i: pytree.tree_map(lambda leaf: leaf[i : i + 1], (problem.z0, problem.context))  # noqa: E731
        alone = [replace(problem, z0=z0, context=x, star=None) for z0, x in map(take, range(batch))]
        return [traced(solver, one, rtol, budget) for one in alone]
    trace = traced(solver, problem, rtol, budget)
    return [
        Trace(trace.residual[:, i : i + 1], trace.nfe[:, i : i + 1], trace.seconds, trace.phase[:, i : i + 1])
        for i in range(batch)
    ]


def _median(values: Iterable[float]) -> float:
    return short(float(np.median(list(values))))
