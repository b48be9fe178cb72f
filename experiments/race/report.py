"""results/race/report.md and report.html, from rows alone: per-family figures first, means after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import report
from experiments.bench.figures import FLAGSHIP
from experiments.bench.statistics import HEADLINE, NOTHING, Field, Interval, Outcome, alone, geometric, paired, ratio
from experiments.bench.tables import Table, by_name, markdown, middle, number
from experiments.race import figures
from experiments.race.schema import PARTS, read
from metabroyden.compare import FAR

SHOWN = (1e-2, 1e-3)
BUDGETS = (10, 20, 40, 60)
TORCHDEQ = ("torchdeq Broyden", "tuned torchdeq Broyden", "torchdeq Anderson", "tuned torchdeq Anderson")
Column = tuple[str, Callable[[str], object]]


def write(folder: Path) -> Path:
    """Write report.md and report.html beside rows/ and config.json; ValueError where there are no rows."""
    rows = read(folder / "rows")
    solved = {row["part"] for row in rows if row["row"] == "solve"}
    # what was trained anew has one seed
    fields = {
        part: Field([row for row in rows if part != "ablation" or not row["seed"]], part)
        for part in PARTS
        if part in solved or part == "families"
    }
    field, described = fields["families"], report.read_config(folder)
    far = [row for row in rows if row["part"] == "horizon"]
    drawn = figures.write_all(fields, far, folder / "figures")
    lead = (
        "Rules: `results/race/PROTOCOL.md`. Rows: [rows/](rows/), as [schema.json](schema.json) says. Median evaluations "
        "over held-out samples (share of them solved), a failure counting the whole budget of "
        f"{field.budget}; ratios with 95% bootstrap intervals over samples and seeds."
    )
    tables = [*race_tables(field), *beside(fields)]
    report.write_page(folder, "The race", [f"Made by `{described['command']}`.", lead, *drawn, *tables])
    made = report.made_by(described, "torchdeq")
    more = f"{lead} Sortable and zoomable: [report.html](report.html)."
    return report.write(folder, "The race", [made, more, *drawn, *tables])


@dataclass(frozen=True)
class At:
    """A field at one tolerance, with MetaBroyden held against rivals; cells of tables."""

    field: Field
    tolerance: float

    def spent(self, family: str, solver: str = FLAGSHIP) -> str:
        """Median evaluations (share solved); nothing where it did not run."""
        found = self.field.outcome(family, solver, self.tolerance)
        return "" if found is None else str(found)

    def must(self, family: str, solver: str = FLAGSHIP) -> Outcome:
        """How a solver did that ran."""
        return self.field.must(family, solver, self.tolerance)

    def best(self, family: str) -> str:
        """The best classical solver."""
        return self.field.best(family, self.tolerance)

    def fastest(self, family: str) -> str:
        """The fastest classical solver."""
        return self.field.fastest(family, self.tolerance)

    def rivals(self, family: str) -> tuple[Outcome, Outcome]:
        """MetaBroyden and the best classical solver."""
        return self.must(family), self.must(family, self.best(family))

    def ratio(self, family: str, rival: str, *, time: bool = False) -> Interval:
        """MetaBroyden's evaluations, or time, over a rival's; NaN where that did not run."""
        if self.field.outcome(family, rival, self.tolerance) is None:
            return NOTHING
        return self.field.ratio(family, FLAGSHIP, rival, self.tolerance, time=time)


def flagship(field: Field) -> list[str]:
    """Families on which MetaBroyden ran."""
    return [family for family in field.families if FLAGSHIP in field.solvers(family)]


def race_tables(field: Field) -> list[Table]:
    """All tables of the race itself."""
    views = [At(field, tolerance) for tolerance in SHOWN]
    tables = [*map(main_table, views), means_table(field), *(every_solver(field, view.tolerance) for view in views)]
    tables += [_success(field), _budgets(views), _paired(views), _equilibria(field), _time(views[1]), _metric(field)]
    return [*tables, _leak(field), _horizon(field)]


def beside(fields: Mapping[str, Field]) -> list[Table]:
    """Tables of what is run beside the race, as far as there are rows."""
    words = {
        "outside": ("Outside of what the families' solvers were trained and tuned on", "problem"),
        "transfer": ("Solvers of other families that fit its states", "family"),
        "ablation": ("MetaBroyden, seed 0, without its pieces", "family"),
        "hyper-deq": ("silva-networks' HyperDEQ, stopped by our rule", "family"),
    }
    tables = []
    for part, (title, corner) in words.items():
        if part in fields:
            tables += [_transfer(fields, at) for at in SHOWN] if part == "transfer" else []
            tables += [every_solver(fields[part], at, title, corner) for at in SHOWN]
    return [*tables, *([_times_of(fields["hyper-deq"], "HyperDEQ")] if "hyper-deq" in fields else [])]


def comparison(ours: Field, theirs: Field) -> str:
    """What differs between two runs: the ratios whose interval excludes one, and samples that only one of them solves.

    Raises:
        ValueError: If the runs share nothing, or hold different samples or budgets.
    """
    if ours.budget != theirs.budget:
        raise ValueError(f"runs can be compared at the same budget, got {ours.budget} and {theirs.budget}")
    shared = [
        (family, solver, at) for family in ours.families for solver in ours.solvers(family) for at in ours.tolerances
    ]
    shared = [place for place in shared if theirs.outcome(*place) is not None]
    body = [row for place in shared if (row := _differing(place, ours.must(*place), theirs.must(*place)))]
    count = len(shared)
    if not count:
        raise ValueError("the two runs have no family and solver in common")
    head = ["family", "solver", "tolerance", "evaluations, first over second", "only one solves"]
    words = f"{count} pairs of a family, a solver and a tolerance; {len(body)} differ."
    return words + ("\n\n" + markdown(head, body) if body else "")


def _differing(place: tuple[str, str, float], one: Outcome, other: Outcome) -> list[str]:
    """A row of the comparison; empty where nothing differs."""
    sizes = [side.evaluations.shape[1] for side in (one, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"runs can be compared on the same samples; {place[0]} has {sizes[0]} and {sizes[1]}")
    found, (won, lost) = ratio(one, other), alone(one, other)
    differs = not found.low <= 1 <= found.high or won != lost
    return [place[0], place[1], f"{place[2]:g}", f"{found}", f"{won} : {lost}"] if differs else []


def main_table(at: At) -> Table:
    """MetaBroyden against the best and fastest classical solver, Broyden's method and torchdeq's, by family."""
    headline, peer = at.field.headline(at.tolerance), TORCHDEQ[0]
    columns: list[Column] = [
        ("family", lambda family: f"**{family}**" if family in headline else family),
        ("MetaBroyden", at.spent),
        ("best classical", lambda family: f"{at.spent(family, at.best(family))} {at.best(family)}"),
        ("ratio", lambda family: f"{at.ratio(family, at.best(family))}"),
        ("Broyden", lambda family: at.spent(family, "Broyden")),
        ("ratio", lambda family: f"{at.ratio(family, 'Broyden')}"),
        ("fastest classical", at.fastest),
        ("time", lambda family: f"{at.ratio(family, at.fastest(family), time=True)}"),
        ("torchdeq Broyden", lambda family: at.spent(family, peer)),
        ("ratio", lambda family: f"{at.ratio(family, peer)}"),
        ("time", lambda family: f"{at.ratio(family, peer, time=True)}"),
    ]
    words = f"To {at.tolerance:g}, by family (bold: the best classical solver needs {HEADLINE} or more on validation)"
    return by_name(words, flagship(at.field), columns)


def means_table(field: Field) -> Table:
    """Geometric means of the ratios over headline families and over all."""
    figures, body = ["evaluations", "time"], []
    for at in (At(field, tolerance) for tolerance in SHOWN):
        rivals: list[tuple[str, Any, Any]] = [("the best, the fastest classical", at.best, at.fastest)]
        rivals += [(name, name, name) for name in ("Broyden", *TORCHDEQ, "hyper-anderson", "grouped", "universal")]
        for words, fewest, quickest in rivals:
            row = [words, f"{at.tolerance:g}"]
            for chosen in (field.headline(at.tolerance), field.families):
                ran = [family for family in chosen if callable(fewest) or fewest in field.solvers(family)]
                among = [family for family in ran if family in flagship(field)]
                count = field.mean_ratio(among, FLAGSHIP, fewest, at.tolerance)
                time = field.mean_ratio(among, FLAGSHIP, quickest, at.tolerance, time=True)
                row += [str(len(among)), f"{count}", f"{time}"]
            body.append(row)
    head = ["MetaBroyden over", "tolerance", "headline families", *figures, "all families", *figures]
    return Table("Geometric means over families", head, body)


def every_solver(field: Field, tolerance: float, words: str = "Every solver", corner: str = "family") -> Table:
    """Median evaluations and success of all solvers."""
    at = At(field, tolerance)
    columns: list[Column] = [(name, partial(at.spent, solver=name)) for name in field.solvers()]
    return by_name(f"{words}: to {tolerance:g}", field.families, [(corner, str), *columns])


def _transfer(fields: Mapping[str, Field], tolerance: float) -> Table:
    names, problems, values = figures.transferred(fields, tolerance)
    body = [[problem, *map(number, column)] for problem, column in zip(problems, values.T, strict=True)]
    words = "Transfer: evaluations over those of the best classical solver tuned on the family's own inputs, to"
    return Table(
        f"{words} {tolerance:g}", ["problem", *(f"MetaBroyden, {name}" for name in names[:2]), *names[2:]], body
    )


def _both(field: Field, cell: Callable[[At], list[Column]], words: str, before: Sequence[Column] = ()) -> Table:
    """By family, the columns of both tolerances, whose names end in the tolerance."""
    columns = [(f"{head}, {at:g}", of) for at in SHOWN for head, of in cell(At(field, at))]
    return by_name(words, flagship(field), [("family", str), *before, *columns])


def _times_of(field: Field, rival: str) -> Table:
    def columns(at: At) -> list[Column]:
        return [
            ("evaluations", lambda family: f"{at.ratio(family, rival)}"),
            ("time", lambda family: f"{at.ratio(family, rival, time=True)}"),
        ]

    return _both(field, columns, f"MetaBroyden over {rival}")


def _success(field: Field) -> Table:
    def cell(tolerance: float, family: str) -> str:
        every = field.outcomes(family, tolerance, "classical")
        top = max(every, key=lambda name: every[name].success)
        ours = field.must(family, FLAGSHIP, tolerance).success
        mark = "**" if ours > every[top].success else ""
        return f"{mark}{ours:.1%}{mark} / {every[top].success:.1%} {top}"

    columns: list[Column] = [(f"{at:g}", partial(cell, at)) for at in field.tolerances]
    words = f"Share solved in {field.budget} evaluations: MetaBroyden / the best of the classical ones"
    return by_name(words, flagship(field), [("family", str), *columns])


def _budgets(views: Sequence[At]) -> Table:
    def cell(at: At, budget: int, family: str) -> str:
        return " / ".join(f"{one.within(budget):.0%}" for one in at.rivals(family))

    columns: list[Column] = [
        (f"{budget}, to {at.tolerance:g}", partial(cell, at, budget)) for at in views for budget in BUDGETS
    ]
    words = "Share solved by budget: MetaBroyden / the best classical"
    return by_name(words, flagship(views[0].field), [("family", str), *columns])


def _paired(views: Sequence[At]) -> Table:
    def columns(at: At) -> list[Column]:
        @cache
        def found(family: str) -> tuple[Interval, int, int]:
            return paired(*at.rivals(family))

        return [
            ("evaluations", lambda family: f"{found(family)[0]:.1f}"),
            ("only one solves", lambda family: "{} : {}".format(*found(family)[1:])),
        ]

    words = "Paired by sample: MetaBroyden minus the best classical; samples that only it, that only the other solves"
    return _both(views[0].field, columns, words)


def _equilibria(field: Field) -> Table:
    def star(family: str) -> Any:
        return field.of("star", family, "float64")[0]

    def columns(at: At) -> list[Column]:
        def each(cell: Callable[[str, str], str]) -> Callable[[str], str]:
            return lambda family: " / ".join(cell(family, name) for name in (FLAGSHIP, at.best(family)))

        def farther(family: str) -> str:
            ours, theirs = (_distances(at, family, name) for name in (FLAGSHIP, at.best(family)))
            both = np.isfinite(ours) & np.isfinite(theirs)
            return f"{float((ours > 3 * theirs)[both].mean()) if both.any() else float('nan'):.1%}"

        scores = each(lambda family, name: f"{_mean(at, family, name, 'score'):.4f}")
        return [
            ("distance", each(lambda family, name: f"{np.nanmedian(_distances(at, family, name)):.1e}")),
            ("farther", farther),
            ("elsewhere", each(lambda family, name: f"{_elsewhere(at, family, name):.1%}")),
            ("score", lambda family: f"{scores(family)} / {np.mean(star(family)['score']):.4f}"),
            ("agree", each(lambda family, name: f"{_mean(at, family, name, 'agrees'):.1%}")),
        ]

    words = (
        "The same equilibrium: median distance to the float64 one, MetaBroyden / the best classical; share of samples that "
        "both solve where it is more than three times farther; share of what either solves that is more than "
        f"{FAR:g} tolerances away and stays so when solved to less; score of both and at the float64 equilibrium; "
        "predictions of both that are the float64 equilibrium's"
    )
    known = ("known", lambda family: f"{star(family)['known']} of {star(family)['samples']}")
    return _both(field, columns, words, [known])


def _lists(at: At, family: str, solver: str, key: str, tolerance: float | None = None) -> np.ndarray:
    """(S, N) values by sample; NaN for None."""
    seeds: dict[Any, list[float]] = {}
    rows = at.field.of("solve", family, solver, tolerance=at.tolerance if tolerance is None else tolerance)
    for row in sorted(rows, key=lambda row: row["block"]):
        seeds.setdefault(row["seed"], []).extend(row[key])
    return np.array(list(seeds.values()), dtype=float)


def _distances(at: At, family: str, solver: str) -> np.ndarray:
    """(N,) means over seeds of the distances of samples that all of them solve; NaN for the others."""
    solved = at.must(family, solver).solved.all(axis=0)
    return np.where(solved, _lists(at, family, solver, "distance").mean(axis=0), np.nan)


def _elsewhere(at: At, family: str, solver: str) -> float:
    """Share of the samples solved that are far from the float64 equilibrium, and stay so when solved to less.

    On an ill-conditioned problem the same solver comes nearer with a smaller tolerance, at another equilibrium it does not.
    """
    apart = _lists(at, family, solver, "distance")
    known = at.must(family, solver).solved & np.isfinite(apart)
    for tighter in at.field.tolerances:
        if tighter < at.tolerance and at.field.outcome(family, solver, tighter) is not None:
            apart = np.fmin(apart, _lists(at, family, solver, "distance", tighter))
    return float((apart[known] > FAR * at.tolerance).mean()) if known.any() else float("nan")


def _mean(at: At, family: str, solver: str, key: str) -> float:
    values = _lists(at, family, solver, key)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _time(at: At) -> Table:
    body = []
    for family in flagship(at.field):
        for name in dict.fromkeys((FLAGSHIP, at.best(family), at.fastest(family), TORCHDEQ[0])):
            rows = at.field.of("solve", family, name, tolerance=at.tolerance)
            laps = [lap for row in rows for lap in row["seconds"]]
            if laps:
                parts = [1e3 * middle(lap[key] for lap in laps) for key in ("total", "f", "solver", "bookkeeping")]
                peak = max((row["peak_bytes"] or 0) for row in rows)
                body.append([family, name, *(number(part, ".1f") for part in parts), f"{peak / 1e6:.1f}"])
    words = (
        "Where the time of a block goes, to 1e-3 (medians; f apart from a solver that calls f alone), and peak memory"
    )
    return Table(words, ["family", "solver", "ms", "f", "solver", "bookkeeping", "peak MB"], body)


def _metric(field: Field) -> Table:
    body, ratios = [], {}
    for family in flagship(field):
        (star,) = field.of("star", family, "float64")
        ours = field.of("pace", family, FLAGSHIP, enough=True)
        classical = [
            row for name in field.solvers(family, "classical") for row in field.of("pace", family, name, enough=True)
        ]
        row = [family, f"{np.mean(star['score']):.4f}", " ".join(str(one["evaluations"]) for one in ours), "", ""]
        if classical:
            fewest = min(classical, key=lambda one: one["evaluations"])
            row[3] = f"{fewest['evaluations']} {fewest['solver']}"
        if classical and ours:
            quick = min(classical, key=lambda one: float(np.median(one["seconds"])))
            laps = [a / b for one in ours for a, b in zip(one["seconds"], quick["seconds"], strict=True)]
            ratios[family] = float(np.median(laps))
            row[4] = f"{ratios[family]:.2f}× {quick['solver']}"
        body.append(row)
    for name, among in (("headline families (1e-2)", field.headline(1e-2)), ("all families", field.families)):
        found = [ratios[family] for family in among if family in ratios]
        mean = f"{geometric(found):.2f}×" if found else ""
        body.append([f"geometric mean, {len(found)} of {len(among)} {name}", "", "", "", mean])
    head = ["family", "score at z*", "MetaBroyden, evaluations", "fewest classical", "time over the fastest such"]
    words = (
        "Evaluations from which on the mean score stays within 0.5 points or 0.01 bits of the equilibrium's (one number a "
        "seed), and the time of so many"
    )
    return Table(words, head, body)


def _leak(field: Field) -> Table:
    body = []
    for family in field.families:
        for name in field.solvers(family):
            rows = [field.of("leak", family, name, tolerance=tolerance) for tolerance in SHOWN]
            if all(rows):
                cells = [
                    f"{middle(r['mean'] for r in found):.1e} / {max(r['most'] for r in found):.1e}" for found in rows
                ]
                body.append([family, name, *cells])
    head = ["family", "solver", *(f"{tolerance:g}, mean / most" for tolerance in SHOWN)]
    return Table("Leak: bits by which earlier predictions change when the last eight tokens do", head, body)


def _horizon(field: Field) -> Table:
    body = []
    for family in field.families:
        for name in field.solvers(family, "learned"):
            for tolerance in (1e-3, 1e-4):
                rows = field.of("horizon", family, name, tolerance=tolerance)
                if rows:
                    total = {
                        key: sum(row[key] for row in rows)
                        for key in ("samples", "fallback", "lost", "broken", "triggered")
                    }
                    counts = [str(total[key]) for key in ("fallback", "lost", "broken")]
                    steps, handed = (
                        str(max(row["steps"] for row in rows)),
                        f"{total['triggered'] / total['samples']:.1%}",
                    )
                    body.append([family, name, f"{tolerance:g}", steps, *counts, handed])
    head = ["family", "solver", "tolerance", "evaluations", "fallback solves", "lost", "with what was spent before",
            "handed over"]  # fmt: skip
    words = (
        "Four times past the trained horizon, all seeds: samples that the fallback solves and the learned solver loses"
    )
    return Table(words, head, body)
