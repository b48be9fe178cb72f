"""Solvers on problems that they were not trained on: rows, a table, a grid. The last two solve nothing.

A row is a JSON object with key "row" = "transfer": one solver on the held-out contexts of one problem: `part` of the report,
`trained` on what, `tested` on what, evaluations by sample to `tolerance` (the budget where it was not reached).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.legacy.equilibria import HeldOut, Row
from experiments.legacy.plots import new_axes, save_figure
from experiments.legacy.report import table
from metabroyden.solve import solve

TOLERANCE = 1e-2
BROYDEN = "Broyden"


@torch.no_grad()
def transfer_row(
    part: str,
    name: str,
    solver: Any,
    trained: str,
    tested: str,
    held: HeldOut,
    *,
    budget: int,
    tolerance: float = TOLERANCE,
) -> Row:
    """One solver on one problem."""
    nfe: list[int] = []
    reached: list[bool] = []
    for z0, x, _ in held.chunks():
        found = solve(held.f, z0, x, solver=solver, rtol=tolerance, max_nfe=budget, throw=False)
        spent, hit = found.trace.evaluations_to(tolerance, budget)
        nfe += spent.tolist()
        reached += hit.tolist()
    return {
        "row": "transfer",
        "part": part,
        "solver": name,
        "trained": trained,
        "tested": tested,
        "tolerance": tolerance,
        "budget": budget,
        "nfe": nfe,
        "reached": reached,
    }


def median(row: Row) -> float:
    """Median evaluations, a failure counting as the budget."""
    return float(np.median(row["nfe"]))


class Transfer:
    """Rows of one part, and what is read off them."""

    def __init__(self, rows: Sequence[Row], part: str) -> None:
        self.rows = [row for row in rows if row["row"] == "transfer" and row["part"] == part]
        self.solvers = list(dict.fromkeys(row["solver"] for row in self.rows))
        self.problems = list(dict.fromkeys(row["tested"] for row in self.rows))

    def of(self, solver: str, problem: str) -> Row | None:
        """The row of a solver on a problem."""
        found = [row for row in self.rows if row["solver"] == solver and row["tested"] == problem]
        return found[0] if found else None

    def ratio(self, solver: str, problem: str, against: str = BROYDEN) -> float:
        """Of medians; NaN where there is none, or where the other does not get half of the samples there."""
        ours, theirs = self.of(solver, problem), self.of(against, problem)
        if ours is None or theirs is None or np.mean(theirs["reached"]) < 0.5:
            return float("nan")
        return median(ours) / median(theirs)

    def mean(self, solver: str, against: str = BROYDEN) -> float:
        """Geometric mean of the ratios over the problems that there are."""
        ratios = np.array([self.ratio(solver, problem, against) for problem in self.problems])
        return float(np.exp(np.nanmean(np.log(ratios)))) if np.isfinite(ratios).any() else float("nan")

    def table(self) -> str:
        """Medians (success) and ratios to Broyden by problem; geometric means last."""
        body = []
        for problem in self.problems:
            cells = []
            for solver in self.solvers:
                row, ratio = self.of(solver, problem), self.ratio(solver, problem)
                words = "" if row is None else f"{median(row):g} ({100 * np.mean(row['reached']):.0f}%)"
                cells.append(f"{words} {ratio:.2f}×" if np.isfinite(ratio) and solver != BROYDEN else words)
            body.append([problem, *cells])
        means = [f"{self.mean(solver):.2f}×" if np.isfinite(self.mean(solver)) else "" for solver in self.solvers]
        body.append(["geometric mean", *means])
        return table(["", *self.solvers], body)


def grid(rows: Sequence[Row], path: Path) -> Path:
    """Trained on (rows) against tested on (columns): ratio to Broyden's evaluations, of all learned solvers."""
    learned = [row for row in rows if row["row"] == "transfer" and row["trained"] != "—"]
    names = list(dict.fromkeys(f"{row['solver']}: {row['trained']}" for row in learned))
    problems = list(dict.fromkeys(row["tested"] for row in learned))
    values = np.full((len(names), len(problems)), np.nan)
    for row in learned:
        ratio = Transfer(rows, row["part"]).ratio(row["solver"], row["tested"])
        values[names.index(f"{row['solver']}: {row['trained']}"), problems.index(row["tested"])] = ratio
    figure, axes = new_axes(max(6.4, 0.45 * len(problems) + 3))
    axes.grid(visible=False)
    shown = axes.imshow(values, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto")
    axes.set_xticks(range(len(problems)), problems, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "white" if abs(value - 1) > 0.75 else "black"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink)
    axes.set_title("evaluations to 1e-2 over Broyden's (blue: fewer)", fontsize=9)
    figure.colorbar(shown, ax=axes, fraction=0.03)
    return save_figure(figure, path)
