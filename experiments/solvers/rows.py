"""The classical solvers against their peers: rows. Nothing here draws or judges.

A row is a JSON object with a key "row" that says what it tells:
  race      one solver on one problem to one tolerance: time, time in f, calls, evaluations, success, ratios to the peer
  gap       one solver: time outside f before the k-th call of f, or by batch or memory
  anatomy   one solver: where the time of a solve goes
  limited   Broyden with memory 10 against full memory
  compiled  a fixed budget, compiled, against `solve`
  solve     one solver on samples of a registered problem, as `bench.measure` has it
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from experiments.bench.clock import laps
from experiments.bench.measure import Rules, measure, timed_solve
from experiments.bench.peers import ScipySolver, TorchDEQSolver, solve_state
from experiments.bench.problems import of_known
from experiments.bench.runner import Row
from experiments.bench.solvers import contestant
from experiments.bench.tables import short
from metabroyden.fixed import FixedBudget
from metabroyden.solution import Trace
from metabroyden.solve import solve
from metabroyden.solvers import Anderson, Broyden, Picard
from metabroyden.zoo.testbed import KnownProblem, make_problem
from metabroyden.zoo.testbed.cells import blas

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


def timed(solver: Any, problem: KnownProblem, rtol: float, budget: int) -> tuple[float, float, np.ndarray]:
    """(seconds, seconds in f, seconds between its calls) of a solve, by `solve` or by a peer."""
    moments: list[tuple[float, float]] = []

    def f(z: Any, x: Any) -> Any:
        start = time.perf_counter()
        value = problem.f(z, x)
        moments.append((start, time.perf_counter()))
        return value

    began, excused = time.perf_counter(), 0.0
    if hasattr(solver, "solve"):
        excused = solve_state(solver, f, problem.z0, problem.context, rtol, budget, keep=False)[1].excused
    else:
        solve(f, problem.z0, problem.context, solver=solver, rtol=rtol, max_nfe=budget, throw=False)
    total = time.perf_counter() - began - excused
    starts, ends = np.array(moments).T
    return total, float((ends - starts).sum()), starts[1:] - ends[:-1]


def _lap(solver: Any, problem: KnownProblem, rtol: float, budget: int) -> tuple[float, float, int]:
    total, in_f, gaps = timed(solver, problem, rtol, budget)
    return total, in_f, len(gaps) + 1


def _gaps(solver: Any, problem: KnownProblem, steps: int) -> tuple[float, ...]:
    return tuple(timed(solver, problem, 0.0, steps)[2])


def traced(solver: Any, problem: KnownProblem, rtol: float, budget: int) -> Trace:
    """The trace of a solve by whichever it is."""
    found, _ = timed_solve(contestant("", solver), problem.f, problem.z0, problem.context, rtol, budget)
    assert found.trace is not None
    return found.trace


def race_rows(
    name: str, problems: Sequence[KnownProblem], contestants: Mapping[str, Mapping[str, Any]], *, rtol: float, budget: int,
    repeats: int, reference: str = "torchdeq",
) -> Iterator[Row]:  # fmt: skip
    """Each method's contestants on a cell: evaluations on all the problems (batches of it), time on the first.

    Timed runs are interleaved; ratios are medians of paired ratios to the reference.
    """
    for method, entries in contestants.items():
        jobs = {label: partial(_lap, solver, problems[0], rtol, budget) for label, solver in entries.items()}
        every = laps(jobs, repeats)
        over = {label: (of[:, 0] - of[:, 1]) / of[:, 2] for label, of in every.items()}  # seconds outside f per call
        for label, solver in entries.items():
            hits = [traced(solver, problem, rtol, budget).evaluations_to(rtol, budget) for problem in problems]
            evaluations, reached = (np.concatenate(values) for values in zip(*hits, strict=True))
            total, in_f, calls = every[label].T
            medians = {
                "total": total, "f_share": in_f / total, "overhead": over[label], "median": evaluations,
                "ratio_overhead": over[label] / over[reference], "ratio_total": total / every[reference][:, 0],
            }  # fmt: skip
            yield {
                "row": "race", "problem": name, "rtol": rtol, "method": method, "solver": label, "calls": int(calls[0]),
                "p90": float(np.percentile(evaluations, 90)), "success": float(reached.mean()), "samples": len(reached),
                **short({key: float(np.median(values)) for key, values in medians.items()}),
            }  # fmt: skip


def gap_rows(batches: Iterable[int], memories: Iterable[int], *, repeats: int, steps: int = 60) -> Iterator[Row]:
    """Time outside f per evaluation: by step with full memory, by batch, by memory; dense norm-3 cells, D = 256."""

    def entries(memory: int | None, window: int = 5) -> dict[str, Any]:
        limit = () if memory is None else (("LBFGS_thres", memory),)
        return {
            "Broyden": Broyden(memory=memory or steps), "torchdeq Broyden": TorchDEQSolver("broyden", limit),
            "Anderson": Anderson(memory=window), "torchdeq Anderson": TorchDEQSolver("anderson", (("m", window + 1),)),
        }  # fmt: skip

    plain = {"Picard": Picard(), "torchdeq Picard": TorchDEQSolver("fixed_point_iter")}

    def rows(by: str, value: int | None, batch: int, solvers: dict[str, Any], skip: int) -> Iterator[Row]:
        problem = blas(batch, 256, 3.0)
        jobs = {label: partial(_gaps, solver, problem, steps) for label, solver in solvers.items()}
        for label, gaps in laps(jobs, repeats).items():
            middle = np.median(gaps, axis=0)
            late = [float(np.median(middle[min(skip, len(middle) - 1) :]))]
            for at, seconds in enumerate(middle.tolist() if value is None else late):
                place = {"by": by, "value": at + 2 if value is None else value, "solver": label}
                yield {"row": "gap", **place, "seconds": short(seconds)}

    yield from rows("step", None, 64, entries(None) | plain, 0)
    for batch in batches:
        yield from rows("batch", batch, batch, entries(10) | plain, 11)
    for memory in memories:
        yield from rows("memory", memory, 64, entries(memory, memory), memory + 2)


def _usual(budget: int) -> dict[str, Any]:
    return {"Picard": Picard(), "Anderson": Anderson(memory=5), "Broyden": Broyden(memory=budget)}


def anatomy_rows(name: str, problem: KnownProblem, *, rtol: float, budget: int, repeats: int) -> Iterator[Row]:
    """Where the time of a solve goes: f, the solver's own arithmetic, the driver; per call of f, medians."""

    def parts(solver: Any) -> tuple[float, ...]:
        held = problem.f, problem.z0, problem.context
        found, taken = timed_solve(contestant("", solver), *held, rtol, budget)
        assert found.trace is not None
        return tuple(taken[key] / len(found.trace.nfe) for key in ("f", "solver", "bookkeeping"))

    for label, found in laps(
        {label: partial(parts, solver) for label, solver in _usual(budget).items()}, repeats
    ).items():
        medians = dict(zip(("f", "step", "driver"), np.median(found, axis=0).tolist(), strict=True))
        yield {"row": "anatomy", "problem": name, "solver": label, **short(medians)}


def limited_rows(*, rtols: Sequence[float], seeds: int, memory: int = 10, budget: int = 200) -> Iterator[Row]:
    """On symmetric cells: of the samples that full memory solves, how many limited memory solves within twice as many."""
    entries = {
        "Broyden": Broyden(memory=memory),
        "bad Broyden": Broyden(memory=memory, kind="bad"),
        "torchdeq Broyden": TorchDEQSolver("broyden", (("LBFGS_thres", memory),)),
    }
    for norm, rtol in ((norm, rtol) for norm in (0.95, 1.5, 3.0) for rtol in rtols):
        counts: dict[str, list[np.ndarray]] = {label: [] for label in entries}
        for seed in range(seeds):
            problem = blas(64, 256, norm, symmetric=True, seed=seed)
            spent, solved = traced(Broyden(memory=budget), problem, rtol, budget).evaluations_to(rtol, budget)
            for label, solver in entries.items():
                trace = traced(solver, problem, rtol, 2 * budget)
                taken, reached = trace.evaluations_to(rtol, 2 * budget)
                broken = ~torch.isfinite(trace.residual[-1]).numpy() & ("torchdeq" in label)
                counts[label].append(np.stack([solved, reached & solved & (taken <= 2 * spent), broken]))
        for label, found in counts.items():
            full, kept, broken = np.concatenate(found, axis=1).sum(axis=1).tolist()
            figures = {"full": full, "kept": kept, "not_finite": broken, "samples": seeds * 64}
            yield {"row": "limited", "norm": norm, "rtol": rtol, "solver": label, "memory": memory, **figures}


def compiled_rows(problem: KnownProblem, name: str, *, budget: int, repeats: int) -> Iterator[Row]:
    """A fixed budget, compiled, against `solve` with the same budget; interleaved medians, and the compiler's time."""
    given = problem.z0, problem.context
    for label, solver in _usual(budget).items():
        fixed = FixedBudget(problem.f, solver, max_nfe=budget, rtol=0.0)
        usual = partial(solve, problem.f, *given, solver=solver, rtol=0.0, max_nfe=budget, throw=False)
        found, wanted = fixed(*given).z, usual().z
        assert isinstance(found, torch.Tensor)
        assert isinstance(wanted, torch.Tensor)
        seconds = laps({"compiled": partial(fixed, *given), "solve": usual}, repeats)
        figures = {key: float(np.median(values)) for key, values in seconds.items()}
        figures |= {"ratio": float(np.median(seconds["compiled"] / seconds["solve"]))}
        figures |= {
            "compile_seconds": fixed.compile_seconds,
            "difference": float((found - wanted).norm() / wanted.norm()),
        }
        yield {"row": "compiled", "problem": name, "solver": label, "budget": budget, **short(figures)}


def registry_rows(name: str, solvers: Mapping[str, Any], *, budget: int, batch: int) -> Iterator[Row]:
    """Every solver on samples of a registered problem, in float64, to each of `TOLERANCES`."""
    held = of_known(make_problem(name, batch=batch, seed=1), name)
    for label, solver in solvers.items():
        block = 1 if isinstance(solver, ScipySolver) else batch  # scipy knows no batch
        found = measure(held, [contestant(label, solver)], Rules(TOLERANCES, budget, block))
        yield from (row for row in found if row["row"] == "solve")
