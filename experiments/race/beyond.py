"""What the race's first figure shows below the families: strangers, workloads and co-trained models, from their own rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from experiments.bench import report
from experiments.bench.runner import Row, read_rows
from experiments.cotrain.report import compared
from experiments.workloads.report import ratios
from metabroyden.comparison.figures import FLAGSHIP, LOOKS, Reduction
from metabroyden.comparison.statistics import Interval, standard_error
from metabroyden.comparison.tables import chosen, grouped, mean

REFUSED = "†"
"""Stands beside what `fit_solver` trained and did not return, with most seeds."""
Group = tuple[str, Sequence[Reduction]]


def groups(results: Path, at: float) -> list[Group]:
    """(heading, lines) to a tolerance of all that there are results of below results/."""
    made = {
        "strangers": lambda place: _strangers(place, at),
        "workloads": lambda place: _workloads(place, at),
        "cotrain": lambda place: _co_trained(place, at),
    }
    return [make(results / name) for name, make in made.items() if (results / name).is_dir()]


def _strangers(place: Path, at: float) -> Group:
    rows = [row for _, found in report.runs_below(place, "held-*/rows.jsonl") for row in found]
    fits = chosen(rows, "fit", rtol=at)
    trained = [row for row in fits if row["trained"]]
    hopeless = f" ({len(fits) - len(trained)} more: nothing to gain)" if len(trained) < len(fits) else ""
    return f"strangers{hopeless}", _sorted(map(_stranger, trained))


def _stranger(row: Row) -> Reduction:
    ours, best = row["ours"], row["best"]
    lost = ours["solved"] < best["solved"] - standard_error(best["solved"], row["samples"])
    seed = {"evaluations": ours["mean"] / best["mean"], "time": ours["time_over_fastest"]}
    return _line(row["name"], best, row["returned"] == "fitted", [seed], ours, lost=lost)


def _workloads(place: Path, at: float) -> Group:
    rows = read_rows(place / "rows.jsonl")

    def line(name: str) -> Reduction:
        of = ratios(rows, name, at)
        returned = [row["returned"] for row in chosen(rows, "fit", name=name)]
        best = {"name": of[0]["best"], "median": mean(of, "best_median")}
        most = mean(of, "best_solved")
        lost = mean(of, "solved") < most - standard_error(most, chosen(rows, "model", name=name)[0]["samples"])
        ours = {key: mean(of, key) for key in ("median", "solved")}
        return _line(name, best, 2 * sum(returned) > len(returned), of, ours, lost=lost)

    return "workloads", _sorted(map(line, dict.fromkeys(row["name"] for row in rows)))


def _co_trained(place: Path, at: float) -> Group:
    rows = [row for _, found in report.runs_below(place, "*/rows.jsonl") for row in found]

    def line(of: Sequence[Row]) -> Reduction:
        seeds = compared(of, at)
        rival = seeds[0]["rival"]
        ours = {key: float(np.mean([row["ours"][key] for row in seeds])) for key in ("median", "solved")}
        lost = ours["solved"] < rival["solved"] - rival["error"]
        kept = 2 * sum(row["model"]["refused"] for row in seeds) < len(seeds)
        return _line(of[0]["family"], {**rival, "name": rival["solver"]}, kept, seeds, ours, lost=lost)

    return "co-trained, over the solvers of the original", _sorted(map(line, grouped(rows, "family")))


def _line(name: str, best: Row, returned: bool, seeds: Sequence[Row], ours: Row, *, lost: bool) -> Reduction:
    """A line of the figure; its intervals span the seeds."""
    label = f"{name}{'' if returned else f' {REFUSED}'} ({best['name']} {best['median']:.3g})"
    evaluations, time = (_span([row[key] for row in seeds]) for key in ("evaluations", "time"))
    note = f"{round(ours['median'], 1):g} ({ours['solved']:.0%})"
    return Reduction(label, evaluations, time, note, LOOKS[FLAGSHIP], lost)


def _span(values: Sequence[float]) -> Interval:
    """Mean, lowest and highest."""
    return Interval(float(np.mean(values)), min(values), max(values))


def _sorted(lines: Iterable[Reduction]) -> list[Reduction]:
    return sorted(lines, key=lambda line: line.evaluations.value)
