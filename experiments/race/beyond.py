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
"""Stands beside what `fit_solver` trained and did not return, see `mark`."""
Group = tuple[str, Sequence[Reduction]]


def groups(results: Path, at: float) -> list[Group]:
    """(heading, lines) to a tolerance of all that there are results of below results/."""
    made = {"strangers": _strangers, "workloads": _workloads, "cotrain": _co_trained}
    return [make(results / name, at) for name, make in made.items() if (results / name).is_dir()]


def mark(returned: Sequence[bool]) -> str:
    """What stands behind a name: `REFUSED` where half or more of the calls, one a seed, did not return what they trained."""
    return f" {REFUSED}" if returned and 2 * sum(returned) <= len(returned) else ""


def co_trained(place: Path, at: float) -> dict[str, list[Row]]:
    """By co-trained family, a row a seed with its ratios over the original's best and fastest, see `compared`."""
    rows = [row for _, found in report.runs_below(place, "*/rows.jsonl") for row in found]
    return {of[0]["family"]: compared(of, at) for of in grouped(rows, "family")}


def _strangers(place: Path, at: float) -> Group:
    rows = [row for _, found in report.runs_below(place, "held-*/rows.jsonl") for row in found]
    fits = chosen(rows, "fit", rtol=at)
    trained = [row for row in fits if row["trained"]]
    hopeless = f" ({len(fits) - len(trained)} more: nothing to gain)" if len(trained) < len(fits) else ""
    return f"strangers{hopeless}", _sorted(map(_stranger, trained))


def _stranger(row: Row) -> Reduction:
    ours, best = row["ours"], row["best"]
    seed = {"evaluations": ours["mean"] / best["mean"], "time": ours["time_over_fastest"]}
    return _line(row["name"], best, row["samples"], ours, [seed], [row["returned"] == "fitted"])


def _workloads(place: Path, at: float) -> Group:
    rows = read_rows(place / "rows.jsonl")

    def line(name: str) -> Reduction:
        of, (model, *_) = ratios(rows, name, at), chosen(rows, "model", name=name)
        best = {"name": of[0]["best"], **{key: mean(of, f"best_{key}") for key in ("median", "solved")}}
        ours = {key: mean(of, key) for key in ("median", "solved")}
        returned = [row["returned"] for row in chosen(rows, "fit", name=name)]
        return _line(name, best, model["samples"], ours, of, returned)

    return "workloads", _sorted(map(line, dict.fromkeys(row["name"] for row in rows)))


def _co_trained(place: Path, at: float) -> Group:
    def line(family: str, seeds: Sequence[Row]) -> Reduction:
        best = {**seeds[0]["rival"], "name": seeds[0]["rival"]["solver"]}
        ours = {key: float(np.mean([row["ours"][key] for row in seeds])) for key in ("median", "solved")}
        returned = [not row["model"]["refused"] for row in seeds]
        return _line(family, best, best["samples"], ours, seeds, returned)

    lines = (line(family, seeds) for family, seeds in co_trained(place, at).items())
    return "co-trained, over the solvers of the original", _sorted(lines)


def _line(name: str, best: Row, samples: int, ours: Row, seeds: Sequence[Row], returned: Sequence[bool]) -> Reduction:
    """A line of the figure; its intervals span the seeds. It is lost where fewer are solved, by a standard error."""
    label = f"{name}{mark(returned)} ({best['name']} {best['median']:.3g})"
    evaluations, time = (_span([row[key] for row in seeds]) for key in ("evaluations", "time"))
    note = f"{round(ours['median'], 1):g} ({ours['solved']:.0%})"
    lost = ours["solved"] < best["solved"] - standard_error(best["solved"], samples)
    return Reduction(label, evaluations, time, note, LOOKS[FLAGSHIP], lost)


def _span(values: Sequence[float]) -> Interval:
    """Mean, lowest and highest."""
    return Interval(float(np.mean(values)), min(values), max(values))


def _sorted(lines: Iterable[Reduction]) -> list[Reduction]:
    return sorted(lines, key=lambda line: line.evaluations.value)
