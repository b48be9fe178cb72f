"""report.md and figures of the race of classical solvers, from rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import report
from experiments.bench.runner import Row
from metabroyden.comparison.figures import line, log_ticks, panels, save
from metabroyden.comparison.statistics import Outcome, geometric
from metabroyden.comparison.tables import Table, chosen, grouped, listed, pivot

METHODS = ("Broyden", "Anderson", "Picard")


@report.of_rows("Classical solvers against their peers", "torchdeq", "xitorch", "scipy")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and its figures, from rows alone."""
    return [
        means_table(rows), *(race_table(rows, method) for method in METHODS), _anatomy(chosen(rows, "anatomy")),
        _prices(chosen(rows, "price")),
        save(_overhead(rows), folder / "overhead.png"), _limited_table(chosen(rows, "limited")),
        _registry(chosen(rows, "solve", tolerance=1e-6)), _compiled(chosen(rows, "compiled")),
    ]  # fmt: skip


def _micro(key: str) -> Callable[[Row], str]:
    return lambda row: f"{1e6 * row[key]:.0f} µs"


def race_table(rows: Sequence[Row], method: str) -> Table:
    """One method on every problem and tolerance, ours beside its peers."""
    return listed(f"Race: {method}", chosen(rows, "race", method=method), [
        ("problem", "{problem}"), ("rtol", "{rtol:g}"), ("solver", "{solver}"),
        ("evaluations: median / p90 / success", "{median:g} / {p90:g} / {success:.0%}"), ("calls", "{calls}"),
        ("total", lambda row: f"{1e3 * row['total']:.1f} ms"), ("in f", "{f_share:.0%}"),
        ("overhead", _micro("overhead")), ("overhead ratio", "{ratio_overhead:.2f}×"),
        ("total ratio", "{ratio_total:.2f}×"),
    ])  # fmt: skip


def means_table(rows: Sequence[Row]) -> Table:
    """Each method against torchdeq's of the same name, over all problems and tolerances."""

    def ratios(method: str, key: str, f_share: float = np.inf) -> list[float]:
        theirs = chosen(rows, "race", method=method, solver="torchdeq")
        light = {(row["problem"], row["rtol"]) for row in theirs if row["f_share"] < f_share}
        ours = chosen(rows, "race", method=method, solver="ours")
        return [row[key] for row in ours if (row["problem"], row["rtol"]) in light]

    def total(of: Callable[[list[float]], float]) -> Callable[[str], str]:
        return lambda method: f"{of(found):.2f}×" if (found := ratios(method, "ratio_total", 0.5)) else ""

    return listed("Against torchdeq's solver of the same name", METHODS, [
        ("geometric mean", str), ("overhead", lambda method: f"{geometric(ratios(method, 'ratio_overhead')):.2f}×"),
        ("total time where f is less than half of torchdeq's", total(geometric)), ("worst", total(max)),
    ])  # fmt: skip


def _anatomy(rows: Sequence[Row]) -> Table:
    """Time per call of f."""
    parts = {"f": "f", "the solver's own arithmetic": "step", "driver": "driver"}
    columns: list[tuple[str, Any]] = [(head, _micro(key)) for head, key in parts.items()]
    return listed(
        "Where the time goes, per call of f", rows, [("problem", "{problem}"), ("solver", "{solver}"), *columns]
    )


def _prices(rows: Sequence[Row]) -> Table:
    """An evaluation in a solve over f alone."""
    words = "Time from one call of f to the next, in times of f: residual convolutional cell, 128 inputs, one thread"
    return pivot(
        words, rows, "{solver}", "{how}", lambda of: f"{1 + of[0]['outside'] / of[0]['f']:.2f}", corner="solver"
    )


def _limited_table(rows: Sequence[Row]) -> Table:
    """Limited memory against full memory."""

    def kept(number: int) -> Callable[[list[Row]], str]:
        return lambda of: f"{of[number]['kept'] / max(of[number]['full'], 1):.1%} ({of[number]['not_finite']})"

    names = dict.fromkeys(row["solver"] for row in rows)
    return listed("Limited memory, symmetric cells", grouped(rows, "norm", "rtol"), [
        ("norm", "{norm:g}"), ("rtol", "{rtol:g}"), ("solved with full memory", "{full} of {samples}"),
        *((name, kept(number)) for number, name in enumerate(names)),
    ])  # fmt: skip


def _compiled(rows: Sequence[Row]) -> Table:
    """The compiled fixed budget."""
    words = "A fixed budget, compiled: full batch, one graph, against `solve` with the same budget"
    return listed(words, rows, [
        ("problem", "{problem}"), ("solver", "{solver}"), ("evaluations", "{budget}"),
        ("compiling", "{compile_seconds:.0f} s"), ("compiled", lambda row: f"{1e3 * row['compiled']:.2f} ms"),
        ("solve", lambda row: f"{1e3 * row['solve']:.2f} ms"), ("ratio", "{ratio:.2f}×"),
        ("relative difference of z", "{difference:.1e}"),
    ])  # fmt: skip


def _registry(rows: Sequence[Row]) -> Table:
    """Median evaluations and success on each registered problem."""

    def cell(found: list[Row]) -> str:
        one = Outcome.of(found)
        share = "" if one.success == 1 else f" ({one.success:.0%})"
        return f"{one.median:g}{share}" if one.success else "–"

    words = "Median evaluations to 1e-06; in brackets the share of samples solved, where not all"
    return pivot(words, rows, "{family}", "{solver}", cell, corner="problem")


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
