"""What being learned costs at an equal budget: samples that Broyden's method solves and a fitted solver does not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

import metabroyden as mb
from experiments.legacy import lost_report
from experiments.legacy.provenance import command_line, plain, provenance, results_folder, write_results
from metabroyden.meta.progress import progress_bar
from metabroyden.zoo.testbed.base import KnownProblem
from metabroyden.zoo.testbed.cells import blas, conv

_PLACES = ("results", "progress")
_WIDTH, _CHANNELS, _SIDE = 64, 8, 8
_FITTED_NORM = 1.5
_FAR = 100  # seeds from here on are those of f's that nothing was fitted to


@dataclass(frozen=True)
class Lost:
    """Fit MetaBroyden to random cells, solve with it on other ones, and count what only Broyden's method solves."""

    kinds: tuple[str, ...] = ("dense", "conv")
    """Cells, each with solvers of its own: dense ones of 64 units, convolutional ones of 8 channels."""
    seeds: int = 3
    """Cells of a kind that a solver is fitted to."""
    contexts: int = 400
    """Contexts to fit to."""
    steps: int = 200
    """Outer steps of a fit, at most."""
    norms: tuple[float, ...] = (0.9, 1.2, 1.5, 2.0, 3.0)
    """Spectral norms of the other cells."""
    others: int = 4
    """Other cells of each kind and norm, every second one symmetric."""
    samples: int = 64
    """Samples of each."""
    budgets: tuple[int, ...] = (60, 120)
    """Evaluations a sample."""
    rtol: float = 1e-3
    """Tolerance."""
    results: Path = Path("results/lost")
    """Where results go; those of a run with other settings than these to a trial- folder in it."""
    progress: bool = True
    """Show a bar."""


def run(config: Lost) -> None:
    """The whole job, a few minutes; it is not gone on with where it was interrupted."""
    began, rows = time.perf_counter(), []
    with progress_bar("fitting and solving", len(config.kinds) * config.seeds, show=config.progress) as bar:
        for number, (kind, seed) in enumerate((kind, seed) for kind in config.kinds for seed in range(config.seeds)):
            solver = _fitted(kind, seed, config)
            for norm, other, problem in _others(kind, config):
                found = {"kind": kind, "fitted": seed, "norm": norm, "cell": other}
                rows += [{**found, **_counted(solver, problem, budget, config.rtol)} for budget in config.budgets]
            if bar is not None:
                bar(number + 1, f"{kind}, seed {seed}")
    described = {
        "command": command_line("lost", config, _PLACES),
        "config": plain(config),
        "seconds": round(time.perf_counter() - began),
        "provenance": provenance(),
    }
    folder = results_folder(config.results, config, _PLACES)
    write_results(folder, rows, described)
    Console().print(Markdown(lost_report.write(folder).read_text()))


def _cell(kind: str, count: int, norm: float, seed: int, *, symmetric: bool = False, side: int = _SIDE) -> KnownProblem:
    if kind == "dense":
        return blas(count, _WIDTH, norm, symmetric=symmetric, seed=seed, x_seed=seed + 1)
    if kind == "conv":
        return conv(count, _CHANNELS, side, norm, symmetric=symmetric, seed=seed, x_seed=seed + 1)
    raise ValueError(f"kinds must be of dense, conv; got {kind!r}")


def _fitted(kind: str, seed: int, config: Lost) -> Any:
    problem = _cell(kind, config.contexts, _FITTED_NORM, seed)
    options: dict[str, Any] = {"steps": config.steps, "seed": seed, "rtol": config.rtol}
    return mb.fit_solver(problem.f, problem.context, **options, fallback=False, progress=False)


def _others(kind: str, config: Lost) -> Iterator[tuple[float, int, KnownProblem]]:
    """(norm, number, problem) of cells that no solver was fitted to; convolutional ones on two grids."""
    for norm in config.norms:
        for other in range(config.others):
            side = _SIDE + 4 * (other // 2 % 2)
            yield norm, other, _cell(kind, config.samples, norm, _FAR + other, symmetric=other % 2 == 1, side=side)


def _counted(solver: Any, problem: KnownProblem, budget: int, rtol: float) -> dict[str, Any]:
    options: dict[str, Any] = {"rtol": rtol, "max_nfe": budget, "throw": False}
    ours, theirs = (
        mb.solve(problem.f, problem.z0, problem.context, solver=one, **options).converged
        for one in (solver, mb.Broyden())
    )
    counts = {"fitted_solves": ours, "broyden_solves": theirs, "lost": theirs & ~ours, "gained": ours & ~theirs}
    return {"budget": budget, "samples": len(ours), **{name: int(hit.sum()) for name, hit in counts.items()}}
