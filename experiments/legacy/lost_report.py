"""results/lost/report.md: samples that Broyden's method solves and a fitted solver does not, from rows alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench.runner import read_rows
from experiments.legacy.report import made_by, table
from metabroyden.storage import atomic_write

HEAD = ["cells", "budget", "samples", "Broyden solves", "fitted solves", "lost", "gained", "worst fit loses"]


def write(folder: Path) -> Path:
    """Write report.md from rows and config.json."""
    rows = read_rows(folder / "rows.jsonl")
    described = json.loads((folder / "config.json").read_text())
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    norms = sorted({row["norm"] for row in rows})
    whole = [("all", rows), *((kind, [row for row in rows if row["kind"] == kind]) for kind in kinds)]
    by_norm = [(f"norm {norm:g}", [row for row in rows if row["norm"] == norm]) for norm in norms]
    sections = [
        "# What being learned costs at an equal budget",
        made_by(described["command"], described["provenance"]),
        "MetaBroyden solvers fitted by `fit_solver` to random cells of norm 1.5 solve problems of other random cells, to "
        f"{described['config']['rtol']:g}. Lost: of the samples that Broyden's method solves within the budget, the share "
        "that the fitted solver does not. Gained: the samples that only the fitted solver solves, as a share of the same.",
        table(HEAD, [line for name, some in (*whole, *by_norm) for line in _lines(name, some)]),
    ]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def share(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Of the samples that Broyden's method solves, those that a count of the rows is of."""
    return sum(row[key] for row in rows) / max(1, sum(row["broyden_solves"] for row in rows))


def _lines(name: str, rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    lines = []
    for budget in sorted({row["budget"] for row in rows}):
        mine = [row for row in rows if row["budget"] == budget]
        samples = sum(row["samples"] for row in mine)
        fits = {(row["kind"], row["fitted"]) for row in mine}
        worst = max(share([row for row in mine if (row["kind"], row["fitted"]) == fit], "lost") for fit in fits)
        solves = [f"{sum(row[key] for row in mine) / samples:.1%}" for key in ("broyden_solves", "fitted_solves")]
        found = [f"{share(mine, key):.1%}" for key in ("lost", "gained")]
        lines.append([name, str(budget), str(samples), *solves, *found, f"{worst:.1%}"])
    return lines
