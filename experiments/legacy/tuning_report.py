"""results/meta/hyper-anderson-tuning.md: configurations of one learned solver on validation problems, from rows alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.runner import read_rows, row_files
from experiments.legacy.report import made_by, table
from metabroyden.storage import atomic_write

Row = dict[str, Any]
TOLERANCES = ("0.01", "0.001")


def score(row: Row) -> float:
    """Mean over samples and tolerances of log(evaluations), a failure counting as twice the budget: as classical solvers
    are tuned."""
    logs = [np.log(np.where(row["reached"][t], row["nfe"][t], 2 * row["budget"])).mean() for t in TOLERANCES]
    return float(np.mean(logs))


def write(folder: Path, path: Path) -> Path:
    """Write the report over all families in a folder: rows in family.jsonl, how they were made in family.json."""
    sections = [
        "# HyperAnderson: configurations on validation problems",
        "Each trained for as many solver iterations, on the same batches; the weights kept are those that did best on "
        "validation. Sorted by the mean of log(evaluations) to 1e-2 and 1e-3, a failure counting as twice the budget. A "
        "median is of all problems, those that fail being infinite: a dash. The test split was not read.",
    ]
    for rows_path in row_files(folder):
        rows = sorted(read_rows(rows_path), key=score)
        family = rows_path.name.partition(".")[0]
        described = json.loads((folder / f"{family}.json").read_text())
        sections += [f"## {family}", _table(rows), made_by(described["command"], described["provenance"])]
    return atomic_write(path, "\n\n".join(sections) + "\n")


def _table(rows: list[Row]) -> str:
    body = []
    for row in rows:
        recipe = row["recipe"]
        steps = f"{recipe['steps']} × {recipe['unroll']}"
        cells = [_spent(row, tolerance) for tolerance in TOLERANCES]
        body.append([row["solver"], f"{np.exp(score(row)):.2f}", *cells, steps, f"{row['seconds']:.0f} s"])
    head = ["", "geometric mean", *(f"to {float(tolerance):g}: median, mean (solved)" for tolerance in TOLERANCES)]
    return table([*head, "training", "took"], body)


def _spent(row: Row, tolerance: str) -> str:
    reached, nfe = np.array(row["reached"][tolerance]), np.array(row["nfe"][tolerance])
    median = np.quantile(np.where(reached, nfe, np.inf), 0.5, method="higher")
    words = f"{median:g}" if np.isfinite(median) else "—"
    return f"{words}, {np.where(reached, nfe, row['budget']).mean():.1f} ({100 * reached.mean():.1f}%)"
