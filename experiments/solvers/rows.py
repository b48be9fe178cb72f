"""The classical solvers against their peers: where time goes, what is solved. Rows; nothing here draws or judges.

A row is a JSON object with a key "row" that says what it tells (`overhead` has others):
  anatomy   one solver: where the time of a solve goes
  limited   Broyden with memory 10 against full memory
  compiled  a fixed budget, compiled, against `solve`
  solve     one solver on samples of a registered problem, as `bench.measure` has it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from experiments.bench.measure import Rules, measure
from experiments.bench.peers import ScipySolver, TorchDEQSolver
from experiments.bench.problems import of_known
from experiments.bench.runner import Row
from experiments.bench.solvers import contestant
from metabroyden.comparison.clock import laps
from metabroyden.comparison.tables import chosen, short
from metabroyden.fixed import FixedBudget
from metabroyden.solution import Trace
from metabroyden.solve import solve
from metabroyden.solvers import Anderson, Broyden, Picard
from metabroyden.zoo.testbed import KnownProblem, make_problem
from metabroyden.zoo.testbed.cells import blas

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


def _usual(budget: int) -> dict[str, Any]:
    return {"Picard": Picard(), "Anderson": Anderson(memory=5), "Broyden": Broyden(memory=budget)}


def traced(solver: Any, problem: KnownProblem, rtol: float, budget: int) -> Trace:
    """The trace of a solve by whichever it is."""
    found, _ = contestant("", solver).timed(problem.f, problem.z0, problem.context, rtol, budget)
    assert found.trace is not None
    return found.trace


def anatomy_rows(name: str, problem: KnownProblem, *, rtol: float, budget: int, repeats: int) -> Iterator[Row]:
    """Where the time of a solve goes: f, the solver's own arithmetic, the driver; per call of f, medians."""

    def parts(solver: Any) -> tuple[float, ...]:
        held = problem.f, problem.z0, problem.context
        found, taken = contestant("", solver).timed(*held, rtol, budget)
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
        yield from chosen(found, "solve")
