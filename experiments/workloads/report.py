"""The report of the workloads: report.md and its figure, from rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import report
from experiments.bench.runner import Row
from experiments.workloads.rows import OURS
from experiments.workloads.suite import WORKLOADS
from metabroyden.comparison import figures
from metabroyden.comparison.figures import FLAGSHIP
from metabroyden.comparison.tables import Table, chosen, grouped, listed, mean

DEPTH = 10
"""Evaluations after which the metric is in the table."""
RIVAL = "tuned Anderson"
WORDS = """\
Each model is handed to `fit_solver` as its owner has it, once a seed, with the defaults (pictures: `seconds=240`, the
wide transformer: 360), to 1e-3; what it fitted then runs beside tuned classical solvers on problems that no fit saw.
Ratios: mean evaluations over those of the best classical solver, time over the fastest one's; means over the seeds, in
brackets the worst. A sample that is not solved counts as the budget."""
TASKS = f"""\
The task's metric after {DEPTH} evaluations and at the equilibrium; how many fits were returned, and their seconds; mean
evaluations to 1e-3 before and after the places are renumbered."""
EQUAL = """\
At equal worth: the fewest evaluations after which the mean metric is that at the equilibrium, but for 0.005 of accuracy
or of bits, 0.01 of puzzles or 0.02 dB, in each seed; and the learned solver's evaluations and time over each one's.
deepinv's loops are its own."""


@report.of_rows("Workloads")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and its figure."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    models = "\n".join(f"- **{name}**: {WORKLOADS[name].words}." for name in names)
    tables = [
        _costs(rows, tolerance) for tolerance in sorted({row["rtol"] for row in chosen(rows, "cost")}, reverse=True)
    ]
    return [
        WORDS,
        models,
        *tables,
        TASKS,
        _tasks(rows),
        EQUAL,
        *(_equal(rows, name) for name in names),
        _figure(rows, names, folder),
        *(pictures(rows, name, folder) for name in names if chosen(rows, "picture", name=name)),
    ]


def ratios(rows: Sequence[Row], name: str, tolerance: float) -> list[Row]:
    """By seed, what the learned solver needs, and over the best and the fastest classical solver."""
    found = []
    for of in grouped(chosen(rows, "cost", name=name, rtol=tolerance), "seed"):
        by_name = {row["solver"]: row for row in of}
        ours = by_name[OURS]
        best = by_name[ours["best_classical"]]
        found.append({
            "mean": ours["mean"], "median": ours["median"], "solved": ours["solved"], "elsewhere": ours["elsewhere"],
            "best": best["solver"], "best_mean": best["mean"], "best_median": best["median"],
            "best_solved": best["solved"], "evaluations": ours["mean"] / best["mean"], "p90": ours["p90"] / best["p90"],
            "time": ours["time_over_fastest"], "fastest": ours["fastest_classical"], "seed": ours["seed"],
        })  # fmt: skip
    return found


def _costs(rows: Sequence[Row], tolerance: float) -> Table:
    names = list(dict.fromkeys(row["name"] for row in rows))
    return listed(f"To {tolerance:g}", [(name, ratios(rows, name, tolerance)) for name in names], [
        ("", lambda of: of[0]),
        ("learned", lambda of: _cost(of[1], "")),
        ("best classical", lambda of: f"{_cost(of[1], 'best_')} {of[1][0]['best']}"),
        ("evaluations", lambda of: _worst(of[1], "evaluations")),
        ("90%", lambda of: _worst(of[1], "p90")),
        ("time", lambda of: _worst(of[1], "time")),
        ("elsewhere", lambda of: f"{mean(of[1], 'elsewhere'):.1%}" if of[1][0]["elsewhere"] is not None else ""),
    ])  # fmt: skip


def _cost(of: Sequence[Row], who: str) -> str:
    return f"{mean(of, f'{who}mean'):.1f} ({mean(of, f'{who}solved'):.1%})"


def _worst(of: Sequence[Row], key: str) -> str:
    return f"{mean(of, key):.2f} ({max(row[key] for row in of):.2f})"


def _tasks(rows: Sequence[Row]) -> Table:
    def after(name: str, solver: str) -> str:
        return f"{mean(chosen(rows, 'depth', name=name, solver=solver, evaluations=DEPTH), 'score'):.4f}"

    def fits(name: str) -> list[Row]:
        return chosen(rows, "fit", name=name)

    def order(name: str) -> str:
        both = [mean(fits(name), key) for key in ("numbered", "renumbered") if key in fits(name)[0]]
        return ", ".join(f"{value:.2f}" for value in both)

    names = list(dict.fromkeys(row["name"] for row in rows))
    return listed("The task", names, [
        ("", lambda name: name),
        ("metric", lambda name: WORKLOADS[name].measure),
        ("learned", lambda name: after(name, OURS)),
        (RIVAL, lambda name: after(name, RIVAL)),
        ("equilibrium", lambda name: f"{chosen(rows, 'model', name=name)[0]['equilibrium']:.4f}"),
        ("returned", lambda name: f"{sum(row['returned'] for row in fits(name))} of {len(fits(name))}"),
        ("seconds", lambda name: f"{mean(fits(name), 'seconds'):.0f}"),
        ("f, ms", lambda name: f"{mean(chosen(rows, 'model', name=name), 'f_milliseconds'):.2f}"),
        ("numbered, renumbered", order),
    ])  # fmt: skip


def _equal(rows: Sequence[Row], name: str) -> Table:
    found = grouped(chosen(rows, "equal", name=name), "solver")
    ours = next(of for of in found if of[0]["solver"] == OURS)

    def over(of: Sequence[Row], key: Callable[[Row], float]) -> str:
        pairs = [
            (one, other) for one, other in zip(ours, of, strict=True) if one["evaluations"] and other["evaluations"]
        ]
        return f"{np.mean([key(one) / key(other) for one, other in pairs]):.2f}" if pairs else ""

    return listed(name, found, [
        ("solver", lambda of: of[0]["solver"]),
        ("evaluations", lambda of: ", ".join(str(row["evaluations"] or "none") for row in of)),
        ("learned over it", lambda of: over(of, lambda row: row["evaluations"])),
        ("in time", lambda of: over(of, lambda row: float(np.median(row["seconds"])))),
    ])  # fmt: skip


def _figure(rows: Sequence[Row], names: Sequence[str], folder: Path) -> report.Picture:
    def draw(place: Any, name: str) -> None:
        for of in grouped(chosen(rows, "depth", name=name), "solver"):
            by_depth = grouped(of, "evaluations")
            scores = np.array([mean(each, "score") for each in by_depth])
            solver = of[0]["solver"]
            shown = {**figures.look(FLAGSHIP if solver == OURS else solver), "label": solver}
            place.plot([each[0]["evaluations"] for each in by_depth], scores, **shown)
        place.axhline(chosen(rows, "model", name=name)[0]["equilibrium"], color="#333333", linewidth=0.8, linestyle=":")
        place.set_xscale("log")

    figure = figures.panels(names, draw, "evaluations of f", "metric", columns=2, size=(4.2, 2.8))
    return report.Picture(
        figures.save(figure, folder / "depth.png"),
        "The task's metric by evaluations of f: means over test problems and seeds; dotted, at the equilibrium.",
    )


def pictures(rows: Sequence[Row], name: str, folder: Path) -> report.Picture:
    """The first test problem after so many evaluations, a solver in each column; beside them what there is to be seen."""
    found = chosen(rows, "picture", name=name, seed=0)
    beside = [row for row in found if row["evaluations"] is None]
    classical = {row["solver"] for row in chosen(rows, "cost", name=name)} - {OURS, RIVAL}
    columns = [
        beside,
        *grouped([row for row in found if row["evaluations"] and row["solver"] not in classical], "solver"),
    ]
    lines = max(map(len, columns))
    figure, places = figures.grid(lines * len(columns), len(columns), (1.45, 1.75))
    for place in places:
        place.axis("off")
    for number, column in enumerate(columns):
        for place, row in zip(places[number :: len(columns)], column, strict=False):
            place.imshow(np.array(row["pixels"]), cmap="gray", vmin=0, vmax=255)
            after = "" if row["evaluations"] is None else f"{row['evaluations']}: "
            score = "" if row["score"] is None else f"{after}{row['score']:.2f}"
            title = row["solver"].replace(", ", ",\n")
            place.set_title(f"{title}\n{score}", fontsize=7)
    return report.Picture(
        figures.save(figure, folder / f"{name}.png"),
        f"{name}: the first test picture after so many evaluations, and its metric.",
    )
