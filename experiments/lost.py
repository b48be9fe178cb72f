"""What being learned costs at an equal budget: samples that Broyden's method solves and a fitted solver does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import metabroyden as mb
from experiments.bench import report
from experiments.bench.options import Options
from experiments.bench.runner import Row, Run, known, read_rows, ticks
from experiments.bench.tables import Table
from metabroyden.zoo.testbed.base import KnownProblem
from metabroyden.zoo.testbed.cells import blas, conv

HEAD = ["cells", "budget", "samples", "Broyden solves", "fitted solves", "lost", "gained", "worst fit loses"]
_WIDTH, _CHANNELS, _SIDE = 64, 8, 8
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
    fits = [(kind, seed) for kind in config.kinds for seed in range(config.seeds)]
    with ticks("fitting and solving", len(fits), show=config.progress) as done:
        for kind, seed in fits:
            rows += job.unit(f"{kind}-seed{seed}", lambda: _fit(kind, seed, config))  # noqa: B023 (called at once)
            done(f"{kind}, seed {seed}")
    job.finish(rows, write)


def _fit(kind: str, seed: int, config: Lost) -> Iterator[Row]:
    """One solver, fitted to a cell, on all other cells of its kind."""
    problem = _cell(kind, config.contexts, _FITTED_NORM, seed)
    options: dict[str, Any] = {"steps": config.steps, "seed": seed, "rtol": config.rtol}
    solver = mb.fit_solver(problem.f, problem.context, **options, fallback=False, progress=False)
    for norm, other, problem in _others(kind, config):
        for budget in config.budgets:
            found = _counted(solver, problem, budget, config.rtol)
            yield {"kind": kind, "fitted": seed, "norm": norm, "cell": other, **found}


def _cell(kind: str, count: int, norm: float, seed: int, *, symmetric: bool = False, side: int = _SIDE) -> KnownProblem:
    options: dict[str, Any] = {"symmetric": symmetric, "seed": seed, "x_seed": seed + 1}
    if kind == "dense":
        return blas(count, _WIDTH, norm, **options)
    return conv(count, _CHANNELS, side, norm, **options)


def _others(kind: str, config: Lost) -> Iterator[tuple[float, int, KnownProblem]]:
    """(norm, number, problem); convolutional cells on two grids."""
    for norm in config.norms:
        for other in range(config.others):
            side = _SIDE + 4 * (other // 2 % 2)
            yield norm, other, _cell(kind, config.samples, norm, _FAR + other, symmetric=other % 2 == 1, side=side)


def _counted(solver: Any, problem: KnownProblem, budget: int, rtol: float) -> Row:
    options: dict[str, Any] = {"rtol": rtol, "max_nfe": budget, "throw": False}
    f, z0, x = problem.f, problem.z0, problem.context
    ours, theirs = (mb.solve(f, z0, x, solver=one, **options).converged for one in (solver, mb.Broyden()))
    counts = {"fitted_solves": ours, "broyden_solves": theirs, "lost": theirs & ~ours, "gained": ours & ~theirs}
    return {"budget": budget, "samples": len(ours), **{name: int(hit.sum()) for name, hit in counts.items()}}


def write(folder: Path) -> Path:
    """report.md, from rows alone."""
    rows, described = read_rows(folder / "rows.jsonl"), report.read_config(folder)
    groups = {"all": rows} | {
        kind: [row for row in rows if row["kind"] == kind] for kind in described["config"]["kinds"]
    }
    groups |= {f"norm {n:g}": [r for r in rows if r["norm"] == n] for n in sorted({row["norm"] for row in rows})}
    words = (
        "MetaBroyden solvers fitted by `fit_solver` to random cells of norm 1.5 solve problems of other random cells, to "
        f"{described['config']['rtol']:g}. Lost: of the samples that Broyden's method solves within the budget, the share "
        "that the fitted solver does not. Gained: the samples that only the fitted solver solves, as a share of the same."
    )
    body = [_line(n, b, g) for n, g in groups.items() for b in sorted({row["budget"] for row in rows})]
    title = "What being learned costs at an equal budget"
    return report.write(folder, title, [report.made_by(described), words, Table("", HEAD, body)])


def share(rows: Sequence[Row], key: str) -> float:
    """Of the samples that Broyden's method solves, those that a count of the rows is of."""
    return sum(row[key] for row in rows) / max(1, sum(row["broyden_solves"] for row in rows))


def _line(name: str, budget: int, rows: Sequence[Row]) -> list[str]:
    mine = [row for row in rows if row["budget"] == budget]
    samples = sum(row["samples"] for row in mine)
    fits = {(row["kind"], row["fitted"]) for row in mine}
    worst = max(share([row for row in mine if (row["kind"], row["fitted"]) == fit], "lost") for fit in fits)
    solves = [f"{sum(row[key] for row in mine) / samples:.1%}" for key in ("broyden_solves", "fitted_solves")]
    return [
        name,
        str(budget),
        str(samples),
        *solves,
        *(f"{share(mine, k):.1%}" for k in ("lost", "gained")),
        f"{worst:.1%}",
    ]
