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
from experiments.bench.runner import Row, Run, publish, sha256, show
from metabroyden.comparison.tables import listed
from metabroyden.zoo.models.criteria import Images


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
    wanted = "wanted a family of images, whose contexts are single tensors"
    if not isinstance(criterion, Images):
        raise ValueError(f"{wanted}; {config.family} is one of texts")
    with torch.no_grad():
        x = model.inject(criterion.data.train.images[: config.contexts])
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{wanted}; those of {config.family} are {len(x)}")
    options: dict[str, Any] = {name: getattr(config, name) for name in ("rtol", "steps", "seed", "progress")}
    solver = mb.fit_solver(model.cell, x, **options, fallback=False)
    training = {key: value for key, value in solver.summary.items() if key in ("steps", "seconds", "cpu_seconds")}
    row = {"family": config.family, "seed": config.seed, "solver": type(solver).__name__, "contexts": len(x)}
    return {**row, "training": training, **solver.summary["held_out"]}


def write(folder: Path) -> Path:
    """report.md over all runs in a folder, from rows alone."""
    runs = report.runs_below(folder, "*/rows.jsonl")
    columns: list[Any] = [
        ("", "{family}, seed {seed}"),
        ("rtol", "{rtol:g}"),
        ("fitted, mean", "{ours[mean_evaluations]:.1f}, {solver}"),
        ("solved", "{ours[success]:.1%}"),
        ("fewest evaluations", "{fewest[mean_evaluations]:.1f} ({fewest[success]:.1%}) {fewest[name]}"),
        ("fastest", "{best[mean_evaluations]:.1f} ({best[success]:.1%}) {best[name]}"),
        ("time over that", "{best[fitted_over_this]:.2f}×"),
        ("returned", "{returned}"),
        ("training", lambda row: f"{row['training'].get('cpu_seconds', row['training']['seconds']):.0f} s"),
    ]
    sections: list[report.Section] = [
        "One call each, with its defaults; the comparison that it makes of its own accord, on problems that chose nothing. "
        "Mean evaluations (a failure counts as the budget) and share solved of the fitted solver, of the classical one "
        "that needs fewest, of the fastest of those that solve as many; the fitted one's time over that one's, median of "
        "paired solves. The fitted solver is returned where it solves no fewer, needs fewer evaluations and less time.",
        listed("", [_against(row) for _, (row,) in runs], columns),
        *(f"- `{described['command']}`, commit {described['provenance']['commit']}" for described, _ in runs),
    ]
    return report.write(folder, "fit_solver on trained families", sections)


def _against(row: Row) -> Row:
    """A row with the fitted solver, the classical one of the fewest evaluations and the fastest beside it."""
    rivals = [{**found, "name": name} for name, found in row["solvers"].items() if name != "metabroyden"]
    fewest = min(rivals, key=lambda one: one["mean_evaluations"])
    (best,) = (one for one in rivals if one["name"] == row["best_classical"])
    returned = best["name"] if row["failed_criteria"] else "**the fitted one**"
    return {**row, "ours": row["solvers"]["metabroyden"], "fewest": fewest, "best": best, "returned": returned}
