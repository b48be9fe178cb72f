"""What being learned costs at an equal budget: samples that Broyden's method solves and a fitted solver does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import metabroyden as mb
from experiments.bench import report
from experiments.bench.options import Options
from experiments.bench.runner import Row, Run, known
from metabroyden.comparison.tables import grouped, listed
from metabroyden.progress import ticks
from metabroyden.zoo.testbed.base import KnownProblem
from metabroyden.zoo.testbed.cells import blas, conv

_FITTED_NORM = 1.5
_FAR = 100  # seeds of cells that nothing was fitted to


@dataclass(frozen=True)
class Lost(Options, command="lost"):
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


def run(config: Lost) -> None:
    """The whole job, a few minutes. Interrupted, it goes on with the next fit."""
    known("kinds", config.kinds, ("dense", "conv"))
    job, rows = Run(config), []
    fits = list(product(config.kinds, range(config.seeds)))
    with ticks("fitting and solving", len(fits), show=config.progress) as done:
        for kind, seed in fits:
            rows += job.unit(f"{kind}-seed{seed}", lambda: _fit(kind, seed, config))  # noqa: B023 (called at once)
            done(f"{kind}, seed {seed}")
    job.finish(rows, write)


def _fit(kind: str, seed: int, config: Lost) -> Iterator[Row]:
    """One solver, fitted to a cell, on all other cells of its kind; convolutional ones on two grids."""
    problem = _cell(kind, config.contexts, _FITTED_NORM, seed, symmetric=False, side=8)
    options: dict[str, Any] = {"steps": config.steps, "seed": seed, "rtol": config.rtol}
    solver = mb.fit_solver(problem.f, problem.context, **options, fallback=False, progress=False)
    for norm, other in product(config.norms, range(config.others)):
        side = 8 + 4 * (other // 2 % 2)
        problem = _cell(kind, config.samples, norm, _FAR + other, symmetric=other % 2 == 1, side=side)
        for budget in config.budgets:
            options = {"rtol": config.rtol, "max_nfe": budget, "throw": False}
            found = (
                mb.solve(problem.f, problem.z0, problem.context, solver=one, **options)
                for one in (solver, mb.Broyden())
            )
            ours, theirs = (one.converged for one in found)
            hits = {"fitted_solves": ours, "broyden_solves": theirs, "lost": theirs & ~ours, "gained": ours & ~theirs}
            counts = {name: int(hit.sum()) for name, hit in hits.items()}
            where = {"kind": kind, "fitted": seed, "norm": norm, "cell": other, "budget": budget, "samples": len(ours)}
            yield {**where, **counts}


def _cell(kind: str, count: int, norm: float, seed: int, *, symmetric: bool, side: int) -> KnownProblem:
    options: dict[str, Any] = {"symmetric": symmetric, "seed": seed, "x_seed": seed + 1}
    return blas(count, 64, norm, **options) if kind == "dense" else conv(count, 8, side, norm, **options)


@report.of_rows("What being learned costs at an equal budget")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md, from rows alone."""
    groups = {"all": rows, **{of[0]["kind"]: of for of in grouped(rows, "kind")}}
    groups |= {f"norm {of[0]['norm']:g}": of for of in grouped(rows, "norm")}
    words = (
        f"MetaBroyden solvers fitted by `fit_solver` to random cells of norm {_FITTED_NORM} solve problems of other random "
        f"cells, to {described['config']['rtol']:g}. Lost: of the samples that Broyden's method solves within the budget, "
        "the share that the fitted solver does not. Gained: the samples that only the fitted solver solves, as a share of "
        "the same."
    )

    def part(key: str, of: str) -> Callable[[tuple[str, list[Row]]], str]:
        return lambda line: f"{share(line[1], key, of):.1%}"

    lines = [(name, of) for name, rows in groups.items() for of in grouped(rows, "budget")]
    table = listed("", lines, [
        ("cells", lambda line: line[0]),
        ("budget", lambda line: line[1][0]["budget"]),
        ("samples", lambda line: sum(row["samples"] for row in line[1])),
        ("Broyden solves", part("broyden_solves", "samples")),
        ("fitted solves", part("fitted_solves", "samples")),
        ("lost", part("lost", "broyden_solves")),
        ("gained", part("gained", "broyden_solves")),
        ("worst fit loses", lambda line: f"{max(share(fit, 'lost') for fit in grouped(line[1], 'kind', 'fitted')):.1%}"),
    ])  # fmt: skip
    return [words, table]


def share(rows: Sequence[Row], key: str, of: str = "broyden_solves") -> float:
    """A count of the rows as a share of another one, of the samples that Broyden's method solves unless it is named."""
    return sum(row[key] for row in rows) / max(1, sum(row[of] for row in rows))
