"""report.md and figures of the race of classical solvers, from rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import report
from experiments.bench.figures import axes, colour, grid, line, log_ticks, profiles, save
from experiments.bench.runner import Row, read_rows
from experiments.bench.statistics import Outcome, geometric, profile
from experiments.bench.tables import Table, pivot

_PROFILED = (
    "Picard",
    "Anderson",
    "Broyden",
    "Newton",
    "torchdeq Picard",
    "torchdeq Anderson",
    "torchdeq Broyden",
    "scipy broyden1",
    "scipy hybr",
)


def write(folder: Path) -> Path:
    """Write report.md and its figures into the folder, from its rows."""
    rows, described = read_rows(folder / "rows.jsonl"), report.read_config(folder)
    budget, batch, seeds = (described["config"][key] for key in ("budget", "batch", "seeds"))
    words = (
        "Overhead is time outside f per call of f, measured with a stopwatch round f. Contestants take turns in one "
        "process; figures are medians over repeats, ratios medians of paired ratios. Evaluations are a sample's own, up "
        "to the first that measured the tolerance; a failed sample counts as the budget. torchdeq and xitorch stop when "
        "the worst sample is done; xitorch takes the whole batch for one system. torchdeq's solvers have its default "
        f"options; its Anderson's m = 6 iterates are our memory of 5 differences. At most {budget} evaluations; f in "
        "float32.\n\n"
        f"dense: batches of {batch}, 256 coordinates. conv: batches of {batch // 2}, 16×32×32. Weights of the given norm. "
        f"Evaluations on {seeds} batches, time on one of them."
    )
    figures = {"anatomy": _anatomy, "overhead_by_history": _history, "overhead_by_size": _size,
               "performance_profiles": _profiles, "work_precision": _work}  # fmt: skip
    drawn = {name: save(draw(rows), folder / f"{name}.png") for name, draw in figures.items()}
    sections: list[report.Section] = [
        report.made_by(described, "torchdeq", "xitorch", "scipy"), words,
        means_table(rows), *(race_table(rows, method) for method in ("Broyden", "Anderson", "Picard")),
        drawn["anatomy"], anatomy_table(rows),
        "Time outside f before the k-th call, on dense norm-3 cells (nothing converges, so that all samples are at work):",
        drawn["overhead_by_history"], "and by batch (memory 10) and memory (batch 64), once the memory is full:",
        drawn["overhead_by_size"], limited_table(_of(rows, "limited")),
        "The registered problems, float64, at most 200 evaluations (Jacobian products included). Broyden has full memory "
        "unless it says otherwise. scipy solves one sample at a time. The share of samples solved within so many times the "
        "evaluations of the best solver on it:",
        drawn["performance_profiles"], drawn["work_precision"], registry_table(rows, "1e-06"), compiled_table(rows),
    ]  # fmt: skip
    return report.write(folder, "Classical solvers against their peers", sections)


def _of(rows: Iterable[Row], kind: str, **wanted: Any) -> list[Row]:
    return [row for row in rows if row["row"] == kind and all(row[key] == value for key, value in wanted.items())]


def race_table(rows: Sequence[Row], method: str) -> Table:
    """One method on every problem and tolerance, ours beside its peers."""
    body = [
        [
            row["problem"],
            f"{row['rtol']:g}",
            row["solver"],
            f"{row['median']:g} / {row['p90']:g} / {100 * row['success']:.0f}%",
            str(row["calls"]),
            f"{1e3 * row['total']:.1f} ms",
            f"{100 * row['f_share']:.0f}%",
            f"{1e6 * row['overhead']:.0f} µs",
            f"{row['ratio_overhead']:.2f}×",
            f"{row['ratio_total']:.2f}×",
        ]
        for row in _of(rows, "race", method=method)
    ]
    header = ["problem", "rtol", "solver", "evaluations: median / p90 / success", "calls", "total", "in f", "overhead"]
    return Table(f"Race: {method}", [*header, "overhead ratio", "total ratio"], body)


def means_table(rows: Sequence[Row]) -> Table:
    """Each method against torchdeq's of the same name, over all problems and tolerances."""
    body = []
    for method in ("Broyden", "Anderson", "Picard"):
        theirs = {(row["problem"], row["rtol"]): row for row in _of(rows, "race", method=method, solver="torchdeq")}
        ours = _of(rows, "race", method=method, solver="ours")
        light = [row for row in ours if theirs[row["problem"], row["rtol"]]["f_share"] < 0.5]
        times = [row["ratio_total"] for row in light]
        overhead = f"{geometric(row['ratio_overhead'] for row in ours):.2f}×"
        body.append([method, overhead, *([f"{geometric(times):.2f}×", f"{max(times):.2f}×"] if times else ["", ""])])
    head = ["geometric mean", "overhead", "total time where f is less than half of torchdeq's", "worst"]
    return Table("Against torchdeq's solver of the same name", head, body)


def anatomy_table(rows: Sequence[Row]) -> Table:
    """f, the solver's arithmetic, the driver, per call of f."""
    body = []
    for row in _of(rows, "anatomy"):
        cells = [f"{1e6 * row[part]:.0f} µs" for part in ("f", "step", "driver")]
        body.append([row["problem"], row["solver"], *cells])
    return Table("Where the time goes", ["problem", "solver", "f", "the solver's own arithmetic", "driver"], body)


def limited_table(rows: Sequence[Row]) -> Table:
    """Limited memory against full memory."""
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    body = []
    for norm, rtol in dict.fromkeys((row["norm"], row["rtol"]) for row in rows):
        found = {row["solver"]: row for row in rows if (row["norm"], row["rtol"]) == (norm, rtol)}
        first = found[solvers[0]]
        cells = [
            f"{100 * found[name]['kept'] / max(found[name]['full'], 1):.1f}% ({found[name]['not_finite']})"
            for name in solvers
        ]
        body.append([f"{norm:g}", f"{rtol:g}", f"{first['full']} of {first['samples']}", *cells])
    words = (
        "Limited memory, symmetric cells: of the samples that Broyden with full memory solves within 200 evaluations, those "
        "that the solver with memory 10 solves within twice as many; in brackets samples whose last iterate was not finite"
    )
    return Table(words, ["norm", "rtol", "solved with full memory", *solvers], body)


def registry_table(rows: Sequence[Row], tolerance: str) -> Table:
    """Median evaluations and success on each registered problem."""

    def cell(found: list[Row]) -> str:
        reached = np.mean([row["reached"][tolerance] for row in found])
        spent = np.median([row["nfe"][tolerance] for row in found])
        return "–" if reached == 0 else f"{spent:g}" + ("" if reached == 1 else f" ({100 * reached:.0f}%)")

    words = f"Median evaluations to {float(tolerance):g}; in brackets the share of samples solved, where not all"
    samples = _of(rows, "sample")
    return pivot(words, samples, lambda row: row["problem"], lambda row: row["solver"], cell, corner="problem")


def compiled_table(rows: Sequence[Row]) -> Table:
    """The compiled fixed budget."""
    body = [
        [
            row["problem"],
            row["solver"],
            str(row["budget"]),
            f"{row['compile_seconds']:.0f} s",
            f"{1e3 * row['compiled']:.2f} ms",
            f"{1e3 * row['solve']:.2f} ms",
            f"{row['ratio']:.2f}×",
            f"{row['difference']:.1e}",
        ]
        for row in _of(rows, "compiled")
    ]
    header = ["problem", "solver", "evaluations", "compiling", "compiled", "solve", "ratio", "relative difference of z"]
    return Table("A fixed budget, compiled: full batch, one graph, against `solve` with the same budget", header, body)


def _history(rows: Sequence[Row]) -> Any:
    """Time outside f before each call of f."""
    figure, place = axes(xlabel="call of f", ylabel="microseconds outside f before it", yscale="log")
    _gaps(place, _of(rows, "gap", by="step"))
    place.legend(frameon=False, fontsize=8, ncols=2)
    place.set_title("Overhead by step: batch 64, 256 coordinates, full memory (Anderson: 5)", fontsize=10)
    return figure


def _size(rows: Sequence[Row]) -> Any:
    """Time outside f by batch and by memory."""
    figure, places = grid(2, 2, (4.8, 4.0))
    for place, by in zip(places, ("batch", "memory"), strict=True):
        found = _of(rows, "gap", by=by)
        _gaps(place, found, marked=True)
        log_ticks(place, sorted({row["value"] for row in found}))
        place.set(xlabel=by, yscale="log")
    places[0].set_ylabel("microseconds outside f per call")
    places[0].legend(frameon=False, fontsize=8)
    return figure


def _gaps(place: Any, found: Sequence[Row], *, marked: bool = False) -> None:
    for solver in dict.fromkeys(row["solver"] for row in found):
        points = [(row["value"], 1e6 * row["seconds"]) for row in found if row["solver"] == solver]
        line(place, solver, *zip(*points, strict=True), marked=marked)


def _anatomy(rows: Sequence[Row]) -> Any:
    """Stacked bars: f, arithmetic, driver."""
    found = _of(rows, "anatomy")
    problems = list(dict.fromkeys(row["problem"] for row in found))
    figure, places = grid(len(problems), len(problems), (4.6, 3.8))
    parts = (("f", "f", "#999999"), ("step", "solver's arithmetic", colour("Broyden")), ("driver", "driver", "#E69F00"))
    for place, problem in zip(places, problems, strict=True):
        chosen = [row for row in found if row["problem"] == problem]
        bottom = np.zeros(len(chosen))
        for part, words, ink in parts:
            height = np.array([1e6 * row[part] for row in chosen])
            place.bar([row["solver"] for row in chosen], height, bottom=bottom, color=ink, label=words, width=0.6)
            bottom += height
        place.set_title(problem, fontsize=10)
    places[0].set_ylabel("microseconds per call of f")
    places[0].legend(frameon=False, fontsize=8)
    return figure


def _outcomes(rows: Sequence[Row], tolerance: str) -> dict[str, Outcome]:
    """Of the profiled solvers, on all samples of all problems."""
    found: dict[str, list[Row]] = {name: _of(rows, "sample", solver=name) for name in _PROFILED}
    flat = {
        name: {
            "evaluations": [row["nfe"][tolerance] for row in of],
            "reached": [row["reached"][tolerance] for row in of],
        }
        for name, of in found.items()
        if of
    }
    return {name: Outcome.of([row]) for name, row in flat.items()}


def _profiles(rows: Sequence[Row], tolerances: Sequence[str] = ("0.001", "1e-06")) -> Any:
    """Performance profiles over all samples of all problems."""
    figure, places = grid(len(tolerances), len(tolerances), (5.0, 4.0))
    factors = np.geomspace(1, 30, 200)
    for place, tolerance in zip(places, tolerances, strict=True):
        profiles(place, factors, profile(_outcomes(rows, tolerance), factors))
        place.set_title(f"to {float(tolerance):g}", fontsize=10)
    places[0].set_ylabel("share of samples solved")
    places[-1].legend(frameon=False, fontsize=7.5, loc="lower right")
    return figure


def _work(
    rows: Sequence[Row],
    problems: Sequence[str] = ("tanh_symmetric_1.5", "power_flow_118", "h_equation_singular", "linear_expansive"),
) -> Any:
    """Median evaluations against the tolerance reached, on four problems."""
    figure, places = grid(4, 2, (4.8, 3.6))
    for place, problem in zip(places, problems, strict=True):
        chosen = _of(rows, "sample", problem=problem)
        by_tolerance = {float(at): _outcomes(chosen, at) for at in (chosen[0]["nfe"] if chosen else ())}
        for name in _PROFILED:
            found = {at: one[name] for at, one in by_tolerance.items() if name in one}
            points = [(one.median, at) for at, one in found.items() if one.success >= 0.5]
            if points:
                line(place, name, *zip(*points, strict=True), marked=True)
        place.set(title=problem, xscale="log", yscale="log", xlabel="evaluations of f (median; at least half solved)")
    places[0].set_ylabel("relative residual")
    places[0].legend(frameon=False, fontsize=7)
    return figure
