"""What runs of `python -m experiments meta` found, read from their rows: medians, ratios, times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.runner import read_rows, row_files

Row = dict[str, Any]
CLASSICAL = "classical"
SPLITTING = ("Peaceman-Rachford", "forward-backward")
"""Classical solvers that take the parts of a monotone cell instead of f."""
BEST, HARD, CALLING = "the best classical", "the same, where it needs 12 or more", "the best that calls f alone"
MARKED = "the best classical, on families marked †"
"""Rivals of the summary beside learned solvers."""
LEARNED = (
    "meta-broyden",
    "grouped",
    "coordinatewise",
    "hyper-anderson",
    "neural-fixed-point",
    "gated-secant",
    "meta-learner",
    "started-broyden",
    "started-anderson",
)
"""Learned solvers in the order in which reports name them."""


class MetaResults:
    """Rows of one family: those of each learned solver by seed, and those of the classical ones.

    Attributes:
        name: the family. runs: (rows, config.json) by folder name.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.runs: dict[str, tuple[list[Row], dict[str, Any]]] = {}
        for path in row_files(folder, "*/rows.jsonl"):
            self.runs[path.parent.name] = read_rows(path), json.loads((path.parent / "config.json").read_text())

    def of(self, kind: str, solver: str, **wanted: Any) -> list[Row]:
        """Rows of a kind of one solver, one a seed."""
        return [
            row
            for rows, _ in self.runs.values()
            for row in rows
            if row["row"] == kind
            and row.get("solver", row.get("way")) == solver
            and all(row.get(key) == value for key, value in wanted.items())
        ]

    @property
    def learned(self) -> list[str]:
        """Learned solvers that there are, the flagship first."""
        names = {described["config"]["solver"] for _, described in self.runs.values()} - {CLASSICAL}
        return sorted(names, key=lambda name: LEARNED.index(name) if name in LEARNED else len(LEARNED))

    @property
    def classical(self) -> list[str]:
        """Classical solvers that there are."""
        rows = self.runs.get(CLASSICAL, ([], {}))[0]
        return list(dict.fromkeys(row["solver"] for row in rows if row["row"] == "solve"))

    @property
    def tolerances(self) -> list[float]:
        """Of the solves, the loosest first."""
        return sorted({row["tolerance"] for rows, _ in self.runs.values() for row in rows if row["row"] == "solve"})[
            ::-1
        ]

    def spent(self, solver: str, tolerance: float) -> tuple[list[float], float]:
        """(median evaluations of each seed, infinite where half of the samples failed; success over all seeds).

        Of an even number of samples the upper one in the middle: nothing is interpolated between a number and a failure.
        """
        rows = self.of("solve", solver, tolerance=tolerance)
        spent = [np.where(row["reached"], row["nfe"], np.inf) for row in rows]
        medians = [float(np.quantile(values, 0.5, method="higher")) for values in spent]
        return medians, float(np.mean([np.mean(row["reached"]) for row in rows]))

    def best(self, tolerance: float, but: Sequence[str] = ()) -> str:
        """The classical solver with the fewest evaluations, median and then mean, a failure counting as the budget."""
        names = [name for name in self.classical if name not in but]
        mean = {name: np.mean(self.of("solve", name, tolerance=tolerance)[0]["nfe"]) for name in names}
        return min(mean, key=lambda name: (self.spent(name, tolerance)[0][0], mean[name]))

    def check(self) -> None:
        """ValueError where runs differ in what they may spend or in how many problems they saw."""
        seen = {
            (row["budget"], len(row["nfe"])): name
            for name, (rows, _) in self.runs.items()
            for row in rows
            if row["row"] == "solve"
        }
        if len(seen) > 1:
            words = "; ".join(
                f"{name}: budget {budget}, {samples} problems" for (budget, samples), name in seen.items()
            )
            raise ValueError(f"the runs of {self.name} cannot stand beside one another: {words}")

    def described(self, solver: str) -> list[dict[str, Any]]:
        """config.json of each seed."""
        return [described for _, described in self.runs.values() if described["config"]["solver"] == solver]

    def star(self) -> Row:
        """The row of the family's equilibria; ValueError where no run has one."""
        for rows, _ in self.runs.values():
            for row in rows:
                if row["row"] == "star":
                    return row
        raise ValueError(f"the runs of {self.name} have no row of kind star: measure one of them again")

    def splits(self, name: str) -> bool:
        """Whether a learned solver steps on Peaceman–Rachford's map here: it uses the resolvent instead of f."""
        return any(described["recipe"].get("kind") == "meta-splitting" for described in self.described(name))

    def ratio(self, name: str, rival: str, tolerance: float) -> float | None:
        """Evaluations of a learned solver over a rival's, a median that failed being the budget; None where the rival's own
        median did, or where there is no such figure. rival: another learned solver, or `BEST`, `HARD`, `CALLING`, which
        is for learned solvers that call f alone, too, or `MARKED`, for those that do not."""
        if name not in self.learned or tolerance not in self.tolerances:
            return None
        if rival in (CALLING, MARKED) and self.splits(name) != (rival == MARKED):
            return None
        least = 12 if rival == HARD else 0
        if rival in (BEST, HARD, CALLING, MARKED):
            but = SPLITTING if rival == CALLING else ()
            if not set(self.classical) - set(but):
                return None
            rival = self.best(tolerance, but)
        elif rival not in self.learned:
            return None
        ours, theirs = (np.array(self.spent(one, tolerance)[0]) for one in (name, rival))
        if not np.isfinite(theirs).all() or theirs.mean() < least:
            return None
        budget = self.of("solve", name, tolerance=tolerance)[0]["budget"]
        return float(np.minimum(ours, budget).mean() / theirs.mean())

    def outside(self, name: str, tolerance: float) -> float:
        """Time of a learned solver's solves that is not f's, over f's; NaN where not taken, or where parts of f are used."""
        ours = [clock[name] for clock in self.clocks(name, tolerance) if clock[name]["in_f"]]
        shares = [np.median(np.array(row["total"]) / np.array(row["in_f"])) for row in ours]
        return float(np.mean(shares)) - 1 if shares else np.nan

    def clocks(self, name: str, tolerance: float) -> list[dict[str, Row]]:
        """Of each run of a learned solver its clock rows by solver."""
        runs = [rows for rows, described in self.runs.values() if described["config"]["solver"] == name]
        clocks = [
            {row["solver"]: row for row in rows if row["row"] == "clock" and row["tolerance"] == tolerance}
            for rows in runs
        ]
        return [clock for clock in clocks if set(clock) - {name}]

    def clock_ratios(self, name: str, tolerance: float) -> list[tuple[float, Row]]:
        """By run, (time over that of the fastest classical solver that solves as many, its row); infinite where half failed.

        As many: within 2% of the share solved, of the learned solver's or of the best classical one's."""
        found = []
        for clock in self.clocks(name, tolerance):
            ours, rivals = clock[name], [row for rival, row in clock.items() if rival != name]
            enough = min(ours["reached"], max(row["reached"] for row in rivals)) - 0.02
            fastest = min(
                (row for row in rivals if row["reached"] >= enough), key=lambda row: float(np.median(row["total"]))
            )
            ratio = float(np.median(np.array(ours["total"]) / np.array(fastest["total"])))
            found.append((ratio if ours["reached"] >= 0.5 else np.inf, fastest))
        return found

    def clock_mean(self, name: str, tolerance: float) -> float:
        """Mean over seeds of the `clock_ratios`; infinite where half failed in one, NaN where there are none."""
        ratios = [ratio for ratio, _ in self.clock_ratios(name, tolerance)]
        return float(np.mean(ratios)) if ratios else np.nan


def totals(rows: Sequence[Row], *keys: str) -> list[int]:
    """Counts of all seeds together."""
    return [sum(row[key] for row in rows) for key in keys]
