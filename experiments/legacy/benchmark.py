"""Runs solvers on one DEQ's fixed-point problems under the rules of honest cost; what comes out are rows.

A row is a JSON object with a key "row" that says what it tells:
  sample  one solver on one sample: evaluations to each tolerance (budget where not reached), status, distance to z*
  curve   one solver: quantiles of the residual after k evaluations
  accuracy  one solver: accuracy at a budget of k evaluations
  clock   one solver: wall-clock to a tolerance, interleaved with the others, and its ratio to the reference
  path    one solver: median residual against wall-clock
  part    one part of a solver: its time in seconds and in f-equivalents
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.bench.peers import TorchDEQSolver
from experiments.legacy.metrics import residual_after, residual_by_time, seconds_to, short
from experiments.legacy.stopwatch import Stopwatch
from metabroyden.evaluator import Evaluator
from metabroyden.problem import CountedProblem
from metabroyden.solution import Status, Trace
from metabroyden.solve import begin, solve
from metabroyden.solvers import Anderson, Broyden, Picard
from metabroyden.solvers.tuning import tune
from metabroyden.state import Packing

Row = dict[str, Any]
Cell = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problems:
    """The problems a benchmark runs on: f, starts and contexts; how to read a state as a class, and the right classes."""

    f: Cell
    z0: Tensor
    x: Tensor
    classify: Callable[[Tensor], Tensor]
    labels: Tensor


def run_solver(solver: Any, problems: Problems, rtol: float, max_nfe: int) -> tuple[Tensor, Trace, np.ndarray]:
    """(z, trace, status (B,)) of one solve, by `solve` or by a peer's own loop (whose status is read off its trace)."""
    if isinstance(solver, TorchDEQSolver):
        z, trace = solver.run(problems.f, problems.z0, problems.x, rtol, max_nfe)
        _, reached = trace.evaluations_to(rtol, max_nfe)
        return z, trace, np.where(reached, Status.CONVERGED, Status.MAX_NFE)
    solution = solve(problems.f, problems.z0, problems.x, solver=solver, rtol=rtol, max_nfe=max_nfe, throw=False)
    assert isinstance(solution.z, Tensor)
    return solution.z, solution.trace, solution.status.numpy()


def sample_rows(
    name: str, solver: Any, problems: Problems, *, tolerances: Iterable[float], budget: int, star: Tensor, known: Tensor
) -> list[Row]:
    """One row a sample, and the residual curve. `star` is the float64 equilibrium, `known` (B,) where it was found."""
    tolerances = sorted(tolerances, reverse=True)
    z, trace, status = run_solver(solver, problems, tolerances[-1], budget)
    hits = {tolerance: trace.evaluations_to(tolerance, budget) for tolerance in tolerances}
    distance = (z.double() - star).flatten(1).norm(dim=1) / star.flatten(1).norm(dim=1)
    predicted = problems.classify(z).argmax(dim=1)
    wanted = problems.classify(star.to(z.dtype)).argmax(dim=1)
    best = residual_after(trace, budget)
    rows: list[Row] = [
        {
            "row": "sample",
            "solver": name,
            "sample": index,
            "nfe": {f"{tolerance:g}": int(hits[tolerance][0][index]) for tolerance in tolerances},
            "reached": {f"{tolerance:g}": bool(hits[tolerance][1][index]) for tolerance in tolerances},
            "residual": float(f"{best[-1, index]:.4g}"),
            "status": Status(int(status[index])).name.lower(),
            "handed_over": bool((trace.phase[:, index] > 0).any()),
            "correct": bool(predicted[index] == problems.labels[index]),
            "distance": float(f"{distance[index]:.4g}") if bool(known[index]) else None,
            "agrees": bool(predicted[index] == wanted[index]) if bool(known[index]) else None,
        }
        for index in range(len(z))
    ]
    low, middle, high = np.quantile(best, [0.25, 0.5, 0.75], axis=1, method="nearest")
    rows += [
        {
            "row": "curve",
            "solver": name,
            "nfe": k + 1,
            "residual": [float(f"{value[k]:.4g}") for value in (low, middle, high)],
        }
        for k in range(budget)
        if np.isfinite(high[k])
    ]
    return rows


def accuracy_rows(name: str, solver: Any, problems: Problems, *, budgets: Iterable[int], rtol: float) -> list[Row]:
    """Accuracy when the solver may spend so many evaluations and no more."""
    rows: list[Row] = []
    for budget in budgets:
        z, _, _ = run_solver(solver, problems, rtol, budget)
        correct = (problems.classify(z).argmax(dim=1) == problems.labels).float().mean()
        rows.append({"row": "accuracy", "solver": name, "nfe": budget, "accuracy": round(float(correct), 5)})
    return rows


def clock_rows(
    solvers: dict[str, Any], problems: Problems, *, rtol: float, budget: int, repeats: int, reference: str
) -> list[Row]:
    """Wall-clock to rtol for the whole batch: interleaved repeats in this process, medians, ratios to the reference.

    Three readings: until half, until 90% and until all of the batch had finished (a failed sample finishes with the
    solve), and the share of the solve that was spent outside f.
    """
    watch = Stopwatch(torch.device("cpu"))
    timed: Any = watch.of_f(problems.f)
    clocked = Problems(timed, problems.z0, problems.x, problems.classify, problems.labels)
    readings: dict[str, list[list[float]]] = {name: [] for name in solvers}
    paths: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in solvers}
    known = {name: run_solver(solver, problems, rtol, budget)[1] for name, solver in solvers.items()}  # and warm up
    for _ in range(repeats):
        for name, solver in solvers.items():
            watch.clear()
            began = time.perf_counter()
            if isinstance(solver, TorchDEQSolver):  # recording takes time: the residuals are those of the warm-up
                seconds = solver.clock(timed, problems.z0, problems.x, rtol, budget)
                total = time.perf_counter() - began
                trace = replace(known[name], seconds=seconds)
            else:
                _, trace, _ = run_solver(solver, clocked, rtol, budget)
                total = time.perf_counter() - began
            done = np.sort(np.minimum(seconds_to(trace, rtol), total))
            half, most = done[(len(done) - 1) // 2], done[int(np.ceil(0.9 * len(done))) - 1]
            readings[name].append([half, most, total, watch.f, len(trace.seconds)])
            paths[name].append(residual_by_time(trace))
    rows: list[Row] = []
    middle = {name: np.median(np.array(values), axis=0) for name, values in readings.items()}
    for name, values in middle.items():
        pairs = np.array(readings[name])[:, :3] / np.array(readings[reference])[:, :3]
        ratios = np.median(pairs, axis=0)
        rows.append(
            {
                "row": "clock",
                "solver": name,
                "rtol": rtol,
                "batch": len(problems.z0),
                "repeats": repeats,
                "half": values[0],
                "most": values[1],
                "all": values[2],
                "outside_f": 1 - values[3] / values[2],
                "outside_per_call": (values[2] - values[3]) / values[4],
                "ratio_half": ratios[0],
                "ratio_most": ratios[1],
                "ratio_all": ratios[2],
            }
        )
        seconds = np.median(np.stack([path[0] for path in paths[name]]), axis=0)
        residual = paths[name][0][1]
        rows.append(
            {"row": "path", "solver": name, "rtol": rtol, "seconds": seconds.tolist(), "residual": residual.tolist()}
        )
    return [{key: short(value) for key, value in row.items()} for row in rows]


@torch.no_grad()
def part_rows(solvers: dict[str, Any], problems: Problems, *, repeats: int) -> list[Row]:
    """What f, and each learned part, costs on the whole batch: interleaved medians, and in f-equivalents."""
    flat = problems.z0.flatten(1)
    jobs: dict[tuple[str, str], Callable[[], Any]] = {("f", "f"): lambda: problems.f(problems.z0, problems.x)}
    for name, solver in solvers.items():
        evaluator = Evaluator(problems.f, Packing.of(problems.z0), flat, problems.x, rtol=0.0, atol=0.0, max_nfe=10**9)
        problem = CountedProblem(evaluator, evaluator.rows(np.arange(len(flat))))
        z, state, g = begin(solver, flat, problem)
        g = problem.residual(z) if g is None else g
        state = solver.init(z, g, problem) if state is None else state
        jobs[name, "start"] = partial(solver.start, flat, problem)
        jobs[name, "init"] = partial(solver.init, z, g, problem)
        jobs[name, "step"] = partial(solver.step, z, g, state, problem)
    times: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
    for _ in range(repeats + 1):
        for job, call in jobs.items():
            began = time.perf_counter()
            call()
            times[job].append(time.perf_counter() - began)
    median = {job: float(np.median(values[1:])) for job, values in times.items()}
    return [
        {
            "row": "part",
            "solver": job[0],
            "part": job[1],
            "batch": len(flat),
            "seconds": short(value),
            "f_equivalents": short(value / median["f", "f"]),
        }
        for job, value in median.items()
    ]


def tune_classical(problems: Problems, *, budget: int, tolerances: tuple[float, ...]) -> dict[str, tuple[Any, float]]:
    """The best Picard, Anderson and Broyden of a grid, with their scores (see `tune`), on validation problems."""
    grids: dict[str, list[Any]] = {
        "picard": [Picard(damping) for damping in (0.7, 0.85, 1.0, 1.15, 1.3, 1.45, 1.6, 1.75, 1.9)],
        "anderson": [
            Anderson(memory, damping, ridge)
            for memory, damping, ridge in itertools.product((5, 8, 12), (1.0, 1.5, 2.0), (1e-8, 1e-2, 1e-1))
        ],
        "broyden": [
            Broyden(memory, damping) for memory, damping in itertools.product((10, 20, 60), (0.7, 0.85, 1.0, 1.15, 1.3))
        ],
    }
    return {
        name: tune(grid, problems.f, problems.z0, problems.x, tolerances=tolerances, max_nfe=budget)[0]
        for name, grid in grids.items()
    }


def reference_equilibrium(
    f: Cell, z0: Tensor, x: Tensor, starts: Iterable[Tensor] = (), *, rtol: float = 1e-9, max_nfe: int = 600
) -> tuple[Tensor, Tensor]:
    """(z*, known): float64 equilibria to rtol from z0, where that fails from the other starts; known (B,) where found.

    f must be a float64 cell.
    """
    z, x = z0.double(), x.double()
    known = torch.zeros(len(z), dtype=torch.bool)
    for start in (z, *(start.double() for start in starts)):
        todo = (~known).nonzero().squeeze(1)
        if len(todo) == 0:
            break
        for solver in (Broyden(memory=200), Anderson(memory=10, ridge=1e-12)):
            found = solve(f, start[todo], x[todo], solver=solver, rtol=rtol, max_nfe=max_nfe, throw=False)
            assert isinstance(found.z, Tensor)
            z = z.index_copy(0, todo, found.z)
            known = known.index_copy(0, todo, found.converged)
            todo = todo[~found.converged]
            if len(todo) == 0:
                break
    return z, known
