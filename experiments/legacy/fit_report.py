"""results/fit/report.md: what `fit_solver` returned on trained families, from rows alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.bench.runner import read_rows, row_files
from experiments.legacy.report import table
from metabroyden.storage import atomic_write

HEAD = ["", "rtol", "fitted, mean", "solved", "fewest evaluations", "fastest", "time over that", "returned", "training"]


def write(folder: Path) -> Path:
    """Write report.md over all runs in a folder."""
    runs = [
        (read_rows(path)[0], json.loads((path.parent / "config.json").read_text()))
        for path in row_files(folder, "*/rows.jsonl")
    ]
    sections = [
        "# fit_solver on trained families",
        "One call each, with its defaults; the comparison that it makes of its own accord, on problems that chose nothing. "
        "Mean evaluations (a failure counts twice the budget) and share solved of the fitted solver, of the classical one "
        "that needs fewest, of the fastest of those that solve as many; the fitted one's time over that one's, median of "
        "paired solves. The fitted solver is returned where it solves no fewer, needs fewer evaluations and less time.",
        table(HEAD, [_cells(row) for row, _ in runs]),
        *(f"- `{described['command']}`, commit {described['provenance']['commit']}" for _, described in runs),
    ]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def _cells(row: dict[str, Any]) -> list[str]:
    solvers = row["solvers"]
    ours, others = solvers["metabroyden"], {name: one for name, one in solvers.items() if name != "metabroyden"}
    fewest = min(others, key=lambda name: others[name]["mean_evaluations"])
    best = row["best_classical"]
    return [
        f"{row['family']}, seed {row['seed']}",
        f"{row['rtol']:g}",
        f"{ours['mean_evaluations']:.1f}, {row['solver']}",
        f"{ours['success']:.1%}",
        f"{others[fewest]['mean_evaluations']:.1f} ({others[fewest]['success']:.1%}) {fewest}",
        f"{others[best]['mean_evaluations']:.1f} ({others[best]['success']:.1%}) {best}",
        f"{others[best]['fitted_over_this']:.2f}×",
        best if row["failed_criteria"] else "**the fitted one**",
        f"{row['training'].get('cpu_seconds', row['training']['seconds']):.0f} s",
    ]
