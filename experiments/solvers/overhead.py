"""The classical solvers against their peers: time outside f, evaluations, success. Rows; nothing here draws or judges.

A row is a JSON object with a key "row" that says what it tells:
  race      one solver on one problem to one tolerance: time, time in f, calls, evaluations, success, ratios to the peer
  gap       one solver: time outside f before the k-th call of f, or by batch or memory
  price     one solver, in `solve` or with a fixed budget: time from one call of f to the next, over the time of f alone
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.bench import runner
from experiments.bench.peers import TorchDEQSolver, solve_state
from experiments.bench.runner import Row
from experiments.solvers.rows import traced
from metabroyden.comparison.clock import laps
from metabroyden.comparison.tables import short
from metabroyden.fixed import FixedBudget
from metabroyden.learned import MetaBroyden
from metabroyden.learned.layout import Layout
from metabroyden.solve import solve
from metabroyden.solvers import Anderson, Broyden, Picard
from metabroyden.zoo.models.conv import ConvCell
from metabroyden.zoo.testbed import KnownProblem
from metabroyden.zoo.testbed.cells import blas


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


def price_rows(*, repeats: int, batch: int = 128, budget: int = 14) -> Iterator[Row]:
    """What an evaluation costs in times of f alone: a residual convolutional cell, 16 channels, 8 × 8 pixels, one thread.

    Of the evaluations of a solve the fastest tenth counts, which other work on the machine hardly disturbs; medians over the
    rounds. The weights are random, the learned solver is not trained.
    """
    shape = (16, 8, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cell, x, z0 = ConvCell(16, 32).requires_grad_(False), torch.randn(batch, *shape), torch.zeros(batch, *shape)
        learned = MetaBroyden(layout=Layout("image", shape)).requires_grad_(False)
    moments: list[tuple[float, float]] = []

    def f(z: Tensor, x: Tensor) -> Tensor:
        began = time.perf_counter()
        value = cell(z, x)
        moments.append((began, time.perf_counter()))
        return value

    def alone() -> None:
        z = z0
        for _ in range(budget):
            z = f(z, x)

    def reading(run: Any) -> tuple[float, float]:
        moments.clear()
        run()
        starts, ends = np.array(moments).T
        return float(np.quantile(ends - starts, 0.1)), float(np.quantile(starts[1:] - ends[:-1], 0.1))

    jobs: dict[tuple[str, str], Any] = {("", "f alone"): alone}
    options: dict[str, Any] = {"rtol": 0.0, "max_nfe": budget}
    for label, solver in {"Picard": Picard(), "Anderson": Anderson(), "Broyden": Broyden(), "learned": learned}.items():
        jobs[label, "fixed"] = partial(FixedBudget(f, solver, compiled=False, **options), z0, x)
        for trace in (False, True):
            how = "solve, trace" if trace else "solve"
            jobs[label, how] = partial(solve, f, z0, x, solver=solver, throw=False, trace=trace, **options)
    with runner.threads(1):
        found = laps({key: partial(reading, job) for key, job in jobs.items()}, repeats)
    in_f = float(np.median(found.pop(("", "f alone"))[:, 0]))
    for (label, how), of in found.items():
        yield {"row": "price", "solver": label, "how": how, **short({"f": in_f, "outside": float(np.median(of[:, 1]))})}
