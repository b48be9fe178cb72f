"""Where the time of a whole batch goes: until half, 90% and all of it are solved, and what f and each learned part take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from experiments.bench.measure import Stamp
from experiments.bench.problems import HeldOut, packed
from experiments.bench.runner import Row
from experiments.bench.solvers import Contestant
from metabroyden.comparison.clock import laps
from metabroyden.comparison.tables import short
from metabroyden.evaluator import Evaluator
from metabroyden.problem import CountedProblem
from metabroyden.solution import Trace
from metabroyden.solve import begin
from metabroyden.state import Packing


def seconds_to(trace: Trace, tolerance: float) -> np.ndarray:
    """(B,) seconds until each sample's residual first reached the tolerance; infinite where it never did."""
    hit = (trace.residual <= tolerance).cpu().numpy()
    return np.where(hit, trace.seconds.numpy()[:, None], np.inf).min(axis=0, initial=np.inf)


def clock_rows(
    held: HeldOut, contestants: Sequence[Contestant], stamp: Stamp, *, tolerance: float, budget: int, repeats: int,
    reference: str,
) -> list[Row]:  # fmt: skip
    """Seconds until half, 90% and all of the batch had finished, in turns; medians, and ratios to the reference's.

    A failed sample finishes with the solve. "outside_f" is the share of the time that was not spent in f.
    """

    def lap(one: Contestant) -> tuple[float, ...]:
        found, taken = one.timed(held.f, held.z0, held.x, tolerance, budget)
        assert found.trace is not None
        done = np.sort(np.minimum(seconds_to(found.trace, tolerance), taken["total"]))
        return done[(len(done) - 1) // 2], done[int(np.ceil(0.9 * len(done))) - 1], taken["total"], taken["f"]

    every = laps({one.name: partial(lap, one) for one in contestants}, repeats)
    rows = []
    for one in contestants:
        *seconds, in_f = np.median(every[one.name], axis=0).tolist()
        ratios = np.median(every[one.name][:, :3] / every[reference][:, :3], axis=0).tolist()
        figures = {"seconds": seconds, "ratios": ratios, "outside_f": 1 - in_f / seconds[-1]}
        rows.append({"row": "clock", **stamp(one), "tolerance": tolerance, "batch": len(held), **short(figures)})
    return rows


@torch.no_grad()
def part_rows(held: HeldOut, learned: Sequence[Contestant], *, repeats: int) -> list[Row]:
    """What f, and each learned part, takes on the whole batch: medians in turns, and in evaluations of f."""
    flat = packed(held.z0)
    jobs: dict[tuple[str, str], Callable[[], Any]] = {("f", "f"): lambda: held.f(held.z0, held.x)}
    for one in learned:
        solver = one.solver
        evaluator = Evaluator(held.f, Packing.of(held.z0), flat, held.x, rtol=0.0, atol=0.0, max_nfe=10**9)
        problem = CountedProblem(evaluator, evaluator.rows(np.arange(len(flat))))
        z, state, g = begin(solver, flat, problem)
        g = problem.residual(z) if g is None else g
        state = solver.init(z, g, problem) if state is None else state
        jobs[one.name, "start"] = partial(solver.start, flat, problem)
        jobs[one.name, "init"] = partial(solver.init, z, g, problem)
        jobs[one.name, "step"] = partial(solver.step, z, g, state, problem)
    median = {job: float(np.median(seconds)) for job, seconds in laps(jobs, repeats).items()}
    return [
        {"row": "part", "solver": solver, "part": part, "batch": len(flat),
         **short({"seconds": value, "f_equivalents": value / median["f", "f"]})}
        for (solver, part), value in median.items()
    ]  # fmt: skip
