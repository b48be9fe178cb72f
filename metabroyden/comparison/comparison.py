"""What solvers did on the same problems: a table, figures, files."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from metabroyden.comparison import figures
from metabroyden.comparison.report import Folded, Picture, Section, write, write_page
from metabroyden.comparison.statistics import (
    BEST,
    FASTEST,
    NOTHING,
    Field,
    Interval,
    Outcome,
    able,
    standard_error,
)
from metabroyden.comparison.tables import Row, Table, chosen, inline, listed, text_table
from metabroyden.storage import atomic_write

SCHEMA = 1
_TITLE = "Root finders compared"


class Comparison:
    """Solvers on the same held-out problems, made by `mb.compare` and by `mb.fit_solver(…, return_report=True)`.

    In every median, percentile and mean a sample that was not solved counts as the whole budget; the share solved stands
    beside it. The best classical solver has the smallest median of evaluations among the classical ones whose share solved
    is within one standard error of the highest; the fastest has the smallest time among the same.

    `print(comparison)` prints the tables, in at most 100 columns where names are of usual length; a notebook shows them.

    Args:
        rows: measurements, see `metabroyden.comparison.measure`.
        solvers: by name, the solvers that ran.
        methods: by name, the registered names of their classes, which choose the colours.
        title: of figures and reports.
        about: sentences on how the comparison was made.

    Attributes:
        rows: the measurements.
        solvers: by name; empty where the comparison was read from a file.
        title: of figures and reports.
        tolerances: relative residuals that were solved to, the loosest first.
        budget: evaluations of f that a sample was allowed.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        solvers: Mapping[str, Any] | None = None,
        methods: Mapping[str, str | None] | None = None,
        title: str = "",
        about: str = "",
    ) -> None:
        self.rows, self.solvers, self.title, self.about = list(rows), dict(solvers or {}), title, about
        self._field = Field(self.rows)
        self.tolerances, self.budget = self._field.tolerances, self._field.budget
        known = methods or {}
        self.methods = {name: known.get(name) for name in self._field.solvers()}

    @property
    def names(self) -> list[str]:
        """The solvers, in the order in which they were given."""
        return list(self.methods)

    @property
    def samples(self) -> int:
        """How many problems there are."""
        return self.outcome(self.names[0]).evaluations.shape[1]

    @property
    def metric(self) -> bool:
        """Whether a metric was measured."""
        return bool(chosen(self.rows, "depth"))

    @property
    def timed(self) -> bool:
        """Whether solves were timed."""
        return self.outcome(self.names[0]).seconds.size > 0

    def outcome(self, name: str, rtol: float | None = None) -> Outcome:
        """Evaluations, success and seconds of a solver to a tolerance (default: the tightest).

        Raises:
            ValueError: no such solver or tolerance.
        """
        at = self._at(rtol)
        found = self._field.outcome(self._name, name, at)
        if found is None:
            raise ValueError(f"no solver {name!r} in this comparison: there are {', '.join(self.names)}")
        return found

    def best_classical(self, rtol: float | None = None) -> str:
        """Name of the best classical solver."""
        return self._field.named(self._name, BEST, self._at(rtol))

    def fastest_classical(self, rtol: float | None = None) -> str:
        """Name of the fastest classical solver.

        Raises:
            ValueError: the comparison was made with rounds=0.
        """
        self._must_be_timed()
        return self._field.named(self._name, FASTEST, self._at(rtol))

    def table(self, rtol: float | None = None) -> Table:
        """A row a solver: evaluations, share solved, time, ratios to the best and to the fastest classical solver."""
        at = self._at(rtol)
        columns: list[tuple[str, Callable[[Row], str]]] = [
            ("solver", lambda row: row["solver"]),
            ("median", lambda row: f"{row['median']:g}"),
            ("90%", lambda row: f"{round(row['p90'], 1):g}"),
            ("mean", lambda row: f"{row['mean']:.1f}"),
            ("solved", lambda row: f"{row['solved']:.1%}{'' if self._counts(row['solver'], at) else ' †'}"),
            ("time", lambda row: _milliseconds(row["milliseconds"])),
            ("vs best", lambda row: _ratio(row, "evaluations_over_best", "best")),
            ("vs fastest", lambda row: _ratio(row, "time_over_fastest", "fastest")),
            ("elsewhere", lambda row: "" if row["elsewhere"] is None else f"{row['elsewhere']:.1%}"),
            ("metric", lambda row: "" if row["metric"] is None else f"{row['metric']:.4g}"),
        ]
        words = f"{self.samples} problems to {at:g}, at most {self.budget} evaluations each"
        whole = listed(words, self.numbers(at), columns)
        filled = [any(cells) for cells in zip(*whole.body, strict=True)]
        head, *body = (
            [cell for cell, kept in zip(row, filled, strict=True) if kept] for row in (whole.head, *whole.body)
        )
        return Table(words, head, body)

    def _counts(self, name: str, at: float) -> bool:
        """Whether a solver is not a classical one that solves too few to be called the best or the fastest."""
        classical = {one: self.outcome(one, at) for one in self._field.solvers(self._name, "classical")}
        return name not in classical or name in able(classical)

    def numbers(self, rtol: float | None = None) -> list[Row]:
        """The table's numbers, a dict a solver and tolerance.

        `elsewhere`, `metric` and ratios are None where there are none. There is no ratio of evaluations where neither the
        solver nor the best classical one solves half of the problems: the medians are then the budget.
        """
        return [self._numbers(name, at) for at in self._some(rtol) for name in self.names]

    def _numbers(self, name: str, at: float) -> Row:
        one, best = self.outcome(name, at), self.best_classical(at)
        (kind, *_) = self._solves(name, at)
        fastest = self.fastest_classical(at) if self.timed else None
        time = None if fastest is None else self._field.ratio(self._name, name, fastest, at, time=True).value
        return {
            "solver": name, "kind": kind["kind"], "options": kind["options"], "rtol": at, "budget": self.budget,
            "samples": self.samples, "median": one.median, "p90": one.p90, "mean": one.mean, "solved": one.success,
            "milliseconds": 1e3 * _seconds(one) if self.timed else None, "best_classical": best,
            "evaluations_over_best": _known(self._over_best(name, at).value), "fastest_classical": fastest,
            "time_over_fastest": time, "elsewhere": self._mean(name, at, "elsewhere"),
            "metric": self._mean(name, at, "score"),
        }  # fmt: skip

    def _over_best(self, name: str, at: float) -> Interval:
        """Ratio of evaluations to the best classical solver; NaN where neither solves half: both medians are the budget."""
        best = self.best_classical(at)
        known = max(self.outcome(one, at).success for one in (name, best)) >= 0.5
        return self._field.ratio(self._name, name, best, at) if known else NOTHING

    def __str__(self) -> str:
        """The tables as text, and below them how they were made and how to read them."""
        notes = [textwrap.fill(words, _WIDTH) for words in self._notes]
        return "\n\n".join([text_table(self.table(at)) for at in self.tolerances] + notes)

    @property
    def _notes(self) -> list[str]:
        """Paragraphs below the tables: how they were made, and how to read them."""
        times = (
            " time: of all problems. vs fastest: over the fastest one's, paired within rounds." if self.timed else ""
        )
        which = "the classical solvers that solve as many as any, within a standard error (not those marked †)"
        chosen_among = "Both are" if self.timed else "The best is"
        legend = (
            "A sample that was not solved counts as the whole budget. vs best: median of evaluations over the best "
            f"classical solver's.{times} Below 1 is less. {chosen_among} chosen among {which}. elsewhere: of the problems "
            "solved, those whose solution is another one than that of the classical solver that solves most."
        )
        return [self.about, legend] if self.about else [legend]

    def __repr__(self) -> str:
        """Names and sizes."""
        return f"Comparison of {', '.join(self.names)} on {self.samples} problems"

    def _repr_html_(self) -> str:
        """The tables, in a notebook."""
        tables = (self.table(at) for at in self.tolerances)
        shown = [f"<h4>{inline(table.words)}</h4>{table.html()}" for table in tables]
        return "".join([*shown, *(f"<p>{inline(words)}</p>" for words in self._notes)])

    def show(self) -> None:
        """Print the tables."""
        print(self)

    def to_csv(self, path: str | Path | None = None) -> str:
        """The numbers of all tables as CSV, a line a solver and tolerance; written to `path` where one is given."""
        text, rows = io.StringIO(), self.numbers()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return _kept(text.getvalue(), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """All measurements, sample by sample, as JSON, which `from_json` reads; written to `path` where one is given."""
        rows = _finite(self.rows)
        whole = {"schema": SCHEMA, "title": self.title, "about": self.about, "methods": self.methods, "rows": rows}
        return _kept(json.dumps(whole, separators=(",", ":"), allow_nan=False) + "\n", path)

    @classmethod
    def from_json(cls, source: str | Path) -> Comparison:
        """The comparison that `to_json` wrote: from its file, or from its text. The solvers themselves are not in it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: what is there is no comparison.
        """
        given = str(source)
        raw = given.encode() if given.lstrip().startswith("{") else Path(source).read_bytes()
        try:
            whole = json.loads(raw)
            schema, *found = (whole[key] for key in ("schema", "rows", "methods", "title", "about"))
            if schema != SCHEMA:
                raise ValueError(f"it has schema {schema!r}, and this version reads {SCHEMA}")
            rows, methods, title, about = found
            made = Comparison(rows, methods=methods, title=title, about=about)
            made.numbers()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{given[:80]} is no comparison as Comparison.to_json of this version writes it: "
                f"{type(error).__name__}, {error}"
            ) from error
        return made

    def plot_reduction(self, ax: Any = None, *, rtol: float | None = None) -> Any:
        """Evaluations over the best classical solver's and time over the fastest one's, with 95% intervals.

        Left of 1 is fewer, or faster. On the right stand the median of evaluations, the share solved and the ratio of times;
        what is worse than the classical solver that it is measured by is red. So is a solver that finds other solutions more
        often than any classical one, with the share of these ("elsewhere").

        Args:
            ax: matplotlib axes to draw on; default new ones.
            rtol: one tolerance; default all of them.

        Returns:
            The axes.
        """
        place = figures.own_axes(ax, (_WIDE, self._height(self._some(rtol))))
        groups = [(self._rivals(at), list(self._reductions(at))) for at in self._some(rtol)]
        figures.reductions(place, groups)
        return self._titled(place)

    def _rivals(self, at: float) -> str:
        best = self.best_classical(at)
        fastest = self.fastest_classical(at) if self.timed else None
        if fastest in (None, best):
            return f"to {at:g} (1× is {best})"
        return f"to {at:g} (1× is {best} in evaluations, {fastest} in time)"

    def _reductions(self, at: float) -> Iterable[figures.Reduction]:
        best, fastest = self.best_classical(at), self.fastest_classical(at) if self.timed else ""
        for name in self.names:
            one = self.outcome(name, at)
            time = self._field.ratio(self._name, name, fastest, at, time=True) if self.timed else NOTHING
            away = self._strays(name, at)
            note = f"{one.median:g} ({one.success:.0%}{f', {away:.0%} elsewhere' if away else ''})"
            yield figures.Reduction(
                name, self._over_best(name, at), time, note, self._looks[name],
                lost=bool(away) or one.success < self.outcome(best, at).success - one.error,
            )  # fmt: skip

    def _strays(self, name: str, at: float) -> float:
        """Share of solutions elsewhere, where it is clearly larger than any classical solver's; else 0.

        Clearly is by a standard error, and by one in a hundred.
        """
        rivals = [other for other in self._field.solvers(self._name, "classical") if other != name]
        shares = [share for other in rivals if (share := self._mean(other, at, "elsewhere")) is not None]
        ours = self._mean(name, at, "elsewhere")
        if ours is None or not shares:
            return 0.0
        shared = sum(value is not None for row in self._solves(name, at) for value in row["elsewhere"])
        return ours if ours > max(shares) + max(0.01, standard_error(max(shares), shared)) else 0.0

    def plot_residual(self, ax: Any = None, *, by: str = "evaluations") -> Any:
        """The smallest relative residual so far: its median over samples, and the middle half of them (up to eight solvers).

        A curve ends where the samples have converged. Dotted lines are the tolerances.

        Args:
            ax: matplotlib axes to draw on; default new ones.
            by: "evaluations" of f, or "time" in milliseconds of a whole batch (the median alone).

        Returns:
            The axes.

        Raises:
            ValueError: another word for `by`.
        """
        if by not in ("evaluations", "time"):
            raise ValueError(f"by must be 'evaluations' or 'time', got {by!r}")
        place, end = figures.own_axes(ax), self.tolerances[-1]
        for number, row in enumerate(chosen(self.rows, "curve")):
            marks = {"marker": self._looks[row["solver"]][2], "markersize": 4, "markevery": (number % _APART, _APART)}
            style = {**self._style(row["solver"]), **marks, "zorder": 2.5 if row["kind"] == "learned" else 2}
            if by == "time":
                times = {"median": row["by_time"]}
                figures.converging(place, [1e3 * at for at in row["seconds"]], times, end, style)
            else:
                curve = {part: row[part] for part in ("median", "low", "high")}
                shown = curve if figures.bands(len(self.names)) else {"median": row["median"]}
                figures.converging(place, row["evaluations"], shown, end, style)
        words = "evaluations of f" if by == "evaluations" else "milliseconds, one batch"
        place.set_xlabel(words, fontsize=9.5)
        place.set_ylabel("relative residual, smallest so far", fontsize=9.5)
        place.set_yscale("log")
        for at in self.tolerances:
            place.axhline(at, color="#777777", linewidth=0.8, linestyle=":", zorder=1)
        figures.key(place)
        return self._titled(place)

    def plot_time(self, ax: Any = None, *, rtol: float | None = None) -> Any:
        """Milliseconds that the whole set of problems takes: inside f, and outside of it (paler).

        Args:
            ax: matplotlib axes to draw on; default new ones.
            rtol: one tolerance; default all of them.

        Returns:
            The axes.

        Raises:
            ValueError: the comparison was made with rounds=0.
        """
        self._must_be_timed()
        place = figures.own_axes(ax, (_WIDE, self._height(self._some(rtol))))
        groups = [(f"to {at:g}", [self._times(name, at) for name in self.names]) for at in self._some(rtol)]
        figures.times(place, groups)
        return self._titled(place)

    def _must_be_timed(self) -> None:
        if not self.timed:
            raise ValueError("nothing was timed: compare with rounds=1 or more")

    def _times(self, name: str, at: float) -> figures.Time:
        one, laps = self.outcome(name, at), [lap for row in self._solves(name, at) for lap in row["seconds"]]
        parts = [lap["f"] / lap["total"] for lap in laps if lap["f"] is not None]
        share = float(np.median(parts)) if parts else 1.0
        milliseconds = 1e3 * _seconds(one)
        words = f"{_milliseconds(milliseconds)}, {one.success:.0%} solved"
        return figures.Time(name, milliseconds, share, words, self._looks[name])

    def plot_metric(self, ax: Any = None) -> Any:
        """The mean of the metric after so many evaluations of f.

        Args:
            ax: matplotlib axes to draw on; default new ones.

        Returns:
            The axes.

        Raises:
            ValueError: no metric was given.
        """
        if not self.metric:
            raise ValueError("no metric was measured: compare with metric=, a function (z, x) → numbers")
        place = figures.own_axes(ax)
        for name in self.names:
            rows = chosen(self.rows, "depth", solver=name)
            if rows:
                style = {**self._style(name), "marker": self._looks[name][2], "markersize": 3.5}
                place.plot([row["evaluations"] for row in rows], [_number(row["score"]) for row in rows], **style)
        figures.log_ticks(place, [tick for tick in (1, 2, 3, 5, 10, 20, 30, 60, 100) if tick <= self.budget])
        place.set_xlabel("evaluations of f allowed", fontsize=9.5)
        place.set_ylabel("metric, mean over the problems", fontsize=9.5)
        figures.key(place)
        return self._titled(place)

    def save(self, folder: str | Path) -> Path:
        """Write report.md, report.html (one file), the figures as PNG and PDF, table.csv and comparison.json.

        Without matplotlib there are no figures, and a warning says so.

        Args:
            folder: is made where it does not exist; files of these names in it are replaced.

        Returns:
            The path of report.html.

        Raises:
            NotADirectoryError: a file is there.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file: give a folder to save in")
        self.to_csv(folder / "table.csv")
        self.to_json(folder / "comparison.json")
        tables = [self.table(at) for at in self.tolerances]
        title = " ".join(self.title.split()) or _TITLE
        sections: list[Section] = ["\n\n".join(self._notes), *tables, *self._figures(folder)]
        options = listed("", self.numbers(self.tolerances[-1]), [("solver", "{solver}"), ("options", "`{options}`")])
        write(folder, title, [*sections, "## Options of the solvers", options])
        return write_page(folder, title, [*sections, Folded("Options of the solvers", [options])])

    def _figures(self, folder: Path) -> list[Section]:
        if importlib.util.find_spec("matplotlib") is None:
            words = "there are no figures: matplotlib is not installed (pip install matplotlib)"
            warnings.warn(words, stacklevel=3)
            return []
        return ["## Figures", *(Picture(self._drawn(folder, name), words) for name, words in self._pictures())]

    def _pictures(self) -> list[tuple[str, str]]:
        half = ", and the middle half of them" if figures.bands(len(self.names)) else ""
        times, paces = (
            (" and time (hollow) over the fastest one's", ", and the ratio of times") if self.timed else ("", "")
        )
        found = [
            ("reduction", f"Evaluations (filled) over the best classical solver's{times}, with 95% intervals: left of 1 is "
             f"less. Beside them the median of evaluations and the share solved{paces}: red where it is "
             "worse, or where the solutions are others than classical solvers find (elsewhere)."),
            ("residual", f"Smallest relative residual so far: median over the problems{half}. A curve ends where the "
             "problems have converged; dotted lines are the tolerances."),
        ]  # fmt: skip
        if self.timed:
            found.append(("time", "Time for all problems, inside f and outside of it (paler)."))
        return [*found, ("metric", "The metric after so many evaluations of f.")] if self.metric else found

    def _drawn(self, folder: Path, name: str) -> Path:
        tall = 3.8 if name in ("residual", "metric") else self._height(self.tolerances)
        figure, (place,) = figures.grid(1, 1, (_WIDE, tall))
        place.tick_params(labelsize=8.5)
        getattr(self, f"plot_{name}")(ax=place)
        return figures.save(figure, folder / f"{name}.png")

    def _height(self, tolerances: Sequence[float]) -> float:
        """Inches of a figure with a line for each solver and tolerance."""
        return 1.2 + 0.28 * (1 + len(self.names)) * len(tolerances)

    @property
    def _name(self) -> str:
        return self._field.families[0]

    @cached_property
    def _looks(self) -> dict[str, figures.Look]:
        return figures.assign(self.methods)

    def _style(self, name: str) -> Row:
        colour, line, _ = self._looks[name]
        return {"color": colour, "linestyle": line, "linewidth": 1.6, "label": figures.plain(name)}

    def _titled(self, place: Any) -> Any:
        if self.title:
            figures.title(place, self.title)
        return place

    def _some(self, rtol: float | None) -> list[float]:
        return self.tolerances if rtol is None else [self._at(rtol)]

    def _at(self, rtol: float | None) -> float:
        if rtol is None:
            return self.tolerances[-1]
        near = [at for at in self.tolerances if isinstance(rtol, Real) and math.isclose(at, rtol, rel_tol=1e-6)]
        if not near:
            there = ", ".join(f"{at:g}" for at in self.tolerances)
            raise ValueError(
                f"nothing was solved to {f'{rtol:g}' if isinstance(rtol, Real) else repr(rtol)}: there are {there}"
            )
        return near[0]

    def _solves(self, name: str, at: float) -> list[Row]:
        return self._field.of("solve", self._name, name, tolerance=at)

    def _mean(self, name: str, at: float, key: str) -> float | None:
        """The mean over samples of what the solves have under a key; None where they have nothing."""
        values = [value for row in self._solves(name, at) for value in row.get(key, ()) if value is not None]
        return float(np.mean(values)) if values else None


_WIDE = 5.8
"""Inches of figures."""
_APART = 5
"""Points of a curve from one mark to the next."""
_WIDTH = 100
"""Columns of what is printed below tables."""


def _seconds(one: Outcome) -> float:
    """Of all blocks: the median over rounds, in the mean over seeds."""
    return float(np.median(one.seconds.sum(axis=1), axis=1).mean())


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} ms" if value < 999.5 else f"{value / 1000:.3g} s"


def _ratio(row: Row, key: str, which: str) -> str:
    """A ratio; at the solver that it is to, which that is."""
    value = row[key]
    there = value is not None and np.isfinite(value)
    if row["solver"] == row[f"{which}_classical"]:
        return f"1 ({which})" if there else f"({which})"
    return f"{value:.2f}" if there else ""


def _finite(tree: Any) -> Any:
    """Rows with None for numbers that JSON cannot hold."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _kept(text: str, path: str | Path | None) -> str:
    if path is not None:
        atomic_write(path, text)
    return text
