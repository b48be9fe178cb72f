"""`fit_solver` with its defaults on a trained family's cell: is its solver returned, or refused, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import metabroyden as mb
from experiments.bench import report
from experiments.bench.options import OnFamily, Seeded
from experiments.bench.problems import Family
from experiments.bench.runner import Row, Run, publish, read_rows, row_files, sha256, show
from experiments.bench.tables import Table
from metabroyden.zoo.models.criteria import Images

HEAD = ["", "rtol", "fitted, mean", "solved", "fewest evaluations", "fastest", "time over that", "returned", "training"]


@dataclass(frozen=True)
class Fit(Seeded, OnFamily, command="fit"):
    """Fit a root finder to a family of images by one call of fit_solver; the comparison it makes goes to the report."""

    rtol: float = 1e-3
    """Tolerance at which solvers are judged."""
    contexts: int = 2000
    """Training images given to it, at most."""
    steps: int | None = None
    """Outer steps, at most; None: fit_solver's own number."""


def run(config: Fit) -> None:
    """One call, and the report over all that there are."""
    family = Family(config.family, config.models)
    always = f"--family {config.family} --rtol {config.rtol:g} --seed {config.seed}"
    free = ("family", "rtol", "seed", "models")
    job = Run(config, free=free, shared=("models",), inputs=(family.path,), always=always)
    rows = job.unit("fit", lambda: [fitted(config, family)])
    folder = job.folder / f"{config.family}-{config.rtol:g}-seed{config.seed}"
    publish(folder, rows, job.described(model_sha256=sha256(family.path)))
    show(write(job.folder))


def fitted(config: Fit, family: Family) -> Row:
    """What fit_solver found."""
    model, criterion = family.model(), family.criterion
    if not isinstance(criterion, Images):
        raise ValueError(
            f"wanted a family of images, whose contexts are single tensors; {config.family} is one of texts"
        )
    with torch.no_grad():
        x = model.inject(criterion.data.train.images[: config.contexts])
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"wanted a family whose contexts are single tensors; those of {config.family} are {len(x)}")
    options: dict[str, Any] = {
        "rtol": config.rtol,
        "steps": config.steps,
        "seed": config.seed,
        "progress": config.progress,
    }
    solver = mb.fit_solver(model.cell, x, **options, fallback=False)
    training = {key: value for key, value in solver.summary.items() if key in ("steps", "seconds", "cpu_seconds")}
    row = {"family": config.family, "seed": config.seed, "solver": type(solver).__name__, "contexts": len(x)}
    return {**row, "training": training, **solver.summary["held_out"]}


def write(folder: Path) -> Path:
    """report.md over all runs in a folder, from rows alone."""
    files = row_files(folder, "*/rows.jsonl")
    runs = [report.read_config(path.parent) for path in files]
    sections: list[report.Section] = [
        "One call each, with its defaults; the comparison that it makes of its own accord, on problems that chose nothing. "
        "Mean evaluations (a failure counts as the budget) and share solved of the fitted solver, of the classical one "
        "that needs fewest, of the fastest of those that solve as many; the fitted one's time over that one's, median of "
        "paired solves. The fitted solver is returned where it solves no fewer, needs fewer evaluations and less time.",
        Table("", HEAD, [_cells(read_rows(path)[0]) for path in files]),
        *(f"- `{described['command']}`, commit {described['provenance']['commit']}" for described in runs),
    ]
    return report.write(folder, "fit_solver on trained families", sections)


def _cells(row: Row) -> list[str]:
    solvers = dict(row["solvers"])
    ours, best = solvers.pop("metabroyden"), row["best_classical"]
    fewest = min(solvers, key=lambda name: solvers[name]["mean_evaluations"])
    rivals = [f"{solvers[n]['mean_evaluations']:.1f} ({solvers[n]['success']:.1%}) {n}" for n in (fewest, best)]
    return [
        f"{row['family']}, seed {row['seed']}",
        f"{row['rtol']:g}",
        f"{ours['mean_evaluations']:.1f}, {row['solver']}",
        f"{ours['success']:.1%}",
        *rivals,
        f"{solvers[best]['fitted_over_this']:.2f}×",
        best if row["failed_criteria"] else "**the fitted one**",
        f"{row['training'].get('cpu_seconds', row['training']['seconds']):.0f} s",
    ]
