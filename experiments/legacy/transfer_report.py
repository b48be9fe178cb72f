"""results/generalise/report.md and its figure, from rows alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from experiments.bench.runner import read_rows
from experiments.legacy.report import made_by
from experiments.legacy.transfer import BROYDEN, Transfer, grid
from metabroyden.storage import atomic_write

_PARTS = {
    "families unseen": "Families never seen",
    "families seen": "Families whose weights along training were trained on (test contexts)",
    "widths": "Random cells of many widths, never seen",
    "weights unseen": "Later weights of a known DEQ, no adaptation",
    "weights seen": "Weights that were trained on (test contexts)",
    "seeds unseen": "Another seed of a known DEQ, no adaptation",
    "seeds seen": "Seeds that were trained on (test contexts)",
}


def write(folder: Path) -> Path:
    """Write report.md and transfer.png beside the rows of a folder."""
    rows = read_rows(folder / "rows.jsonl")
    described = json.loads((folder / "config.json").read_text())
    figure = grid(rows, folder / "transfer.png")
    sections = [
        "# Generalisation",
        made_by(described["command"], described["provenance"]),
        "Median evaluations to 1e-2 on held-out test contexts (share of them solved within "
        f"{described['config']['budget']}), ratio to Broyden's with full memory. A failure counts as the budget; where "
        "Broyden does not get half of the samples there, no ratio. Tuned: damping, memory and ridge by grid on "
        "validation contexts of the very family.",
        f"![{figure.stem}]({figure.name})",
    ]
    for part, title in _PARTS.items():
        found = Transfer(rows, part)
        if found.rows:
            sections += [f"## {title}", found.table()]
        if found.rows and part == "families unseen":
            sections.append(_verdict(found))
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def _verdict(found: Transfer) -> str:
    """Mean and worst case of the universal solver, and against the tuned classical ones."""
    ratios = {problem: found.ratio("universal", problem) for problem in found.problems}
    known = {problem: ratio for problem, ratio in ratios.items() if np.isfinite(ratio)}
    if not known:
        return "No family on which half of the samples are solved."
    worst = max(known, key=lambda problem: known[problem])
    lower = [
        problem
        for problem in found.problems
        if np.mean(_reached(found, "universal", problem)) < np.mean(_reached(found, BROYDEN, problem))
    ]
    mean = found.mean("universal")
    words = f"Universal over Broyden: {mean:.2f}× in geometric mean, at most {known[worst]:.2f}× ({worst})"
    if "tuned Anderson" in found.solvers:
        words += f"; over Anderson tuned on each family {found.mean('universal', 'tuned Anderson'):.2f}×"
    return f"{words}. Success lower than Broyden's on: {', '.join(lower) or 'none'}."


def _reached(found: Transfer, solver: str, problem: str) -> list[bool]:
    row = found.of(solver, problem)
    assert row is not None
    return row["reached"]
