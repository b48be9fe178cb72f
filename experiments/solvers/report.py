"""report.md and figures of the race of classical solvers, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import report
from experiments.bench.figures import line, log_ticks, panels, profiles, save
from experiments.bench.runner import Row
from experiments.bench.statistics import Field, Outcome, geometric, profile
from experiments.bench.tables import Table, chosen, grouped, listed

METHODS = ("Broyden", "Anderson", "Picard")
_PROFILED = ("Picard", "Anderson", "Broyden", "Newton", "torchdeq Picard", "torchdeq Anderson", "torchdeq Broyden",
             "scipy broyden1", "scipy hybr")  # fmt: skip
_WORK = ("tanh_symmetric_1.5", "power_flow_118", "h_equation_singular", "linear_expansive")


@report.of_rows("Classical solvers against their peers", "torchdeq", "xitorch", "scipy")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and its figures, from rows alone."""
    budget, batch, seeds = (described["config"][key] for key in ("budget", "batch", "seeds"))
    field = Field(chosen(rows, "solve"))
    figures = {"overhead": _overhead(rows), "performance_profiles": _profiles(field), "work_precision": _work(field)}
    drawn = {name: save(figure, folder / f"{name}.png") for name, figure in figures.items()}
    return [
        "Overhead is time outside f per call of f, measured with a stopwatch round f. Contestants take turns in one "
        "process; figures are medians over repeats, ratios medians of paired ratios. Evaluations are a sample's own, up "
        "to the first that measured the tolerance; a failed sample counts as the budget. torchdeq and xitorch stop when "
        "the worst sample is done; xitorch takes the whole batch for one system. torchdeq's solvers have its default "
        f"options; its Anderson's m = 6 iterates are our memory of 5 differences. At most {budget} evaluations; f in "
        "float32.",
        f"dense: batches of {batch}, 256 coordinates. conv: batches of {batch // 2}, 16×32×32. Weights of the given norm. "
        f"Evaluations on {seeds} batches, time on one of them.",
        means_table(rows), *(race_table(rows, method) for method in METHODS),
        listed("Where the time goes", chosen(rows, "anatomy"), [
            ("problem", "{problem}"), ("solver", "{solver}"), ("f", lambda row: f"{1e6 * row['f']:.0f} µs"),
            ("the solver's own arithmetic", lambda row: f"{1e6 * row['step']:.0f} µs"),
            ("driver", lambda row: f"{1e6 * row['driver']:.0f} µs"),
        ]),
        "Time outside f before the k-th call, on dense norm-3 cells (nothing converges, so that all samples are at work; "
        "batch 64, full memory, Anderson's 5), and by batch (memory 10) and memory (batch 64), once the memory is full:",
        drawn["overhead"], _limited_table(chosen(rows, "limited")),
        "The registered problems, float64, at most 200 evaluations (Jacobian products included). Broyden has full memory "
        "unless it says otherwise. scipy solves one sample at a time. The share of samples solved within so many times the "
        "evaluations of the best solver on it:",
        drawn["performance_profiles"], drawn["work_precision"], registry_table(field, 1e-6),
        _compiled(chosen(rows, "compiled")),
    ]  # fmt: skip


def race_table(rows: Sequence[Row], method: str) -> Table:
    """One method on every problem and tolerance, ours beside its peers."""
    return listed(f"Race: {method}", chosen(rows, "race", method=method), [
        ("problem", "{problem}"), ("rtol", "{rtol:g}"), ("solver", "{solver}"),
        ("evaluations: median / p90 / success", "{median:g} / {p90:g} / {success:.0%}"), ("calls", "{calls}"),
        ("total", lambda row: f"{1e3 * row['total']:.1f} ms"), ("in f", "{f_share:.0%}"),
        ("overhead", lambda row: f"{1e6 * row['overhead']:.0f} µs"), ("overhead ratio", "{ratio_overhead:.2f}×"),
        ("total ratio", "{ratio_total:.2f}×"),
    ])  # fmt: skip


def means_table(rows: Sequence[Row]) -> Table:
    """Each method against torchdeq's of the same name, over all problems and tolerances."""
    body = []
    for method in METHODS:
        theirs = {(row["problem"], row["rtol"]): row for row in chosen(rows, "race", method=method, solver="torchdeq")}
        ours = chosen(rows, "race", method=method, solver="ours")
        times = [row["ratio_total"] for row in ours if theirs[row["problem"], row["rtol"]]["f_share"] < 0.5]
        overhead = f"{geometric(row['ratio_overhead'] for row in ours):.2f}×"
        body.append([method, overhead, *([f"{geometric(times):.2f}×", f"{max(times):.2f}×"] if times else ["", ""])])
    head = ["geometric mean", "overhead", "total time where f is less than half of torchdeq's", "worst"]
    return Table("Against torchdeq's solver of the same name", head, body)


def _limited_table(rows: Sequence[Row]) -> Table:
    """Limited memory against full memory."""
    body = []
    for first, *more in grouped(rows, "norm", "rtol"):
        cells = [f"{row['kept'] / max(row['full'], 1):.1%} ({row['not_finite']})" for row in (first, *more)]
        body.append([f"{first['norm']:g}", f"{first['rtol']:g}", f"{first['full']} of {first['samples']}", *cells])
    words = (
        "Limited memory, symmetric cells: of the samples that Broyden with full memory solves within 200 evaluations, those "
        "that the solver with memory 10 solves within twice as many; in brackets samples whose last iterate was not finite"
    )
    return Table(
        words, ["norm", "rtol", "solved with full memory", *dict.fromkeys(row["solver"] for row in rows)], body
    )


def _compiled(rows: Sequence[Row]) -> Table:
    """The compiled fixed budget."""
    words = "A fixed budget, compiled: full batch, one graph, against `solve` with the same budget"
    return listed(words, rows, [
        ("problem", "{problem}"), ("solver", "{solver}"), ("evaluations", "{budget}"),
        ("compiling", "{compile_seconds:.0f} s"), ("compiled", lambda row: f"{1e3 * row['compiled']:.2f} ms"),
        ("solve", lambda row: f"{1e3 * row['solve']:.2f} ms"), ("ratio", "{ratio:.2f}×"),
        ("relative difference of z", "{difference:.1e}"),
    ])  # fmt: skip


def registry_table(field: Field, tolerance: float) -> Table:
    """Median evaluations and success on each registered problem."""

    def cell(solver: str, problem: str) -> str:
        one = field.must(problem, solver, tolerance)
        share = "" if one.success == 1 else f" ({one.success:.0%})"
        return f"{one.median:g}{share}" if one.success else "–"

    words = f"Median evaluations to {tolerance:g}; in brackets the share of samples solved, where not all"
    columns: list[tuple[str, Any]] = [(name, partial(cell, name)) for name in field.solvers()]
    return listed(words, field.families, [("problem", str), *columns])


def _overhead(rows: Sequence[Row]) -> Any:
    """Time outside f before each call of f, by batch and by memory."""

    def draw(place: Any, by: str) -> None:
        found = chosen(rows, "gap", by=by)
        for of in grouped(found, "solver"):
            micro = [1e6 * row["seconds"] for row in of]
            line(place, of[0]["solver"], [row["value"] for row in of], micro, marked=by != "step")
        place.set(yscale="log")
        if by != "step":
            log_ticks(place, sorted({row["value"] for row in found}))

    return panels(("step", "batch", "memory"), draw, ylabel="microseconds outside f per call", columns=3, size=(4.4, 4))


def _profiles(field: Field) -> Any:
    """Performance profiles over all samples of all problems."""
    factors = np.geomspace(1, 30, 200)

    def draw(place: Any, tolerance: float) -> None:
        pooled = {}
        for name in _PROFILED:
            found = [field.must(problem, name, tolerance) for problem in field.families]
            spent, solved = (np.hstack([one[part] for one in found]) for part in (0, 1))
            pooled[name] = Outcome(spent, solved, np.empty(0))
        profiles(place, factors, profile(pooled, factors))

    return panels((1e-3, 1e-6), draw, ylabel="share of samples solved", title="to {:g}", columns=2, size=(5, 4))


def _work(field: Field) -> Any:
    """Median evaluations against the tolerance reached, on four problems."""

    def draw(place: Any, problem: str) -> None:
        for name in _PROFILED if problem in field.families else ():
            found = [(field.must(problem, name, at), at) for at in field.tolerances]
            points = [(one.median, at) for one, at in found if one.success >= 0.5]
            line(place, name, *(zip(*points, strict=True) if points else ((), ())), marked=True)
        place.set(xscale="log", yscale="log")

    words = "evaluations of f (median; at least half solved)"
    return panels(_WORK, draw, words, "relative residual", columns=2, size=(4.8, 3.6))
