"""results/race/report.md and report.html, from rows alone: per-family figures first, means after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import report
from experiments.bench.runner import Row
from experiments.cotrain.report import overall
from experiments.race import beyond, figures, robustness
from experiments.race.schema import PARTS, read
from metabroyden.comparison.figures import FLAGSHIP, label
from metabroyden.comparison.measure import FAR
from metabroyden.comparison.statistics import BEST, FASTEST, HEADLINE, Field, Outcome, alone, geometric, paired, ratio
from metabroyden.comparison.tables import Table, chosen, listed, markdown, middle, number, pivot

SHOWN = (1e-2, 1e-3)
TORCHDEQ = ("torchdeq Broyden", "tuned torchdeq Broyden", "torchdeq Anderson", "tuned torchdeq Anderson")
BESIDE = {
    "outside": ("Other inputs than those that solvers were trained and tuned on, and wrong weights", "problem"),
    "hyper-deq": ("silva-networks' HyperDEQ, stopped by our rule", "family"),
}
"""Parts beside the race itself: what their tables tell, and what stands in their first column."""
DETAILS = f"""\
MetaBroyden / the best classical solver: share solved (of the classical ones the largest), and in so many evaluations;
evaluations paired by sample; samples that only one solves; distance to the float64 equilibrium; share of samples more than
three times farther than the classical solver's; share more than {FAR:g} tolerances away that stays so when solved to less;
score, and that at the equilibrium; predictions that are the equilibrium's."""


def write(folder: Path, results: Path | None = None) -> Path:
    """Write report.md, report.html and figures beside rows/ and config.json; ValueError where there are no rows.

    results: the folder of all results, of which strangers, workloads and co-trained models stand in the first figure; None:
    the race alone.
    """
    rows, described = read(folder / "rows"), report.read_config(folder)
    solved = {row["part"] for row in rows if row["row"] == "solve"} | {"families"}
    parts = {part: Field(rows, part) for part in PARTS if part in solved}
    field, outside = parts["families"], parts.get("outside")
    drawn = figures.write_all(field, folder / "figures", results)
    lead = (
        "Rules: `results/race/PROTOCOL.md`. Rows: [rows/](rows/), as [schema.json](schema.json) says. Median evaluations "
        "over held-out samples (share of them solved), a failure counting the whole budget of "
        f"{field.budget}; ratios with 95% bootstrap intervals over samples and seeds. Bold: headline families, whose best "
        f'classical solver needs {HEADLINE} evaluations or more on validation. "returned": of the calls of `fit_solver`.'
    )
    tables: list[report.Section] = [means_table(field, results), *(main_table(field, at) for at in SHOWN)]
    tables += [robustness.table(field, outside, SHOWN[-1]), robustness.WORDS]
    robust = [robustness.table(field, outside, at) for at in SHOWN[:-1]]
    beside = [every_solver(parts[part], at, *BESIDE[part]) for part in BESIDE if part in parts for at in SHOWN]
    beside += [_over_table(parts["hyper-deq"], "HyperDEQ")] if "hyper-deq" in parts else []
    appendices: list[report.Section] = [
        report.Folded("Family by family", [_family(field, name) for name in field.families]),
        report.Folded("Details by tolerance", [*robust, DETAILS, *(_details(field, at) for at in field.tolerances)]),
        report.Folded("Metric, leaks", [_metric(field), _leaks(field)]),
        *([report.Folded("Other inputs, another library", beside)] if beside else []),
    ]
    made = f"Made by `{described['command']}`."
    report.write_page(folder, "The race", [drawn[0], made, lead, *tables, "## Figures", *drawn[1:], *appendices])
    more = f"{lead} Sortable and zoomable: [report.html](report.html)."
    made = report.made_by(described, "torchdeq")
    return report.write(folder, "The race", [drawn[0], made, more, *tables, "## Figures", *drawn[1:], *appendices])


def main_table(field: Field, at: float) -> Table:
    """MetaBroyden against the best and fastest classical solver and torchdeq's Broyden, by family."""

    def spent(solver: str) -> Callable[[str], str]:
        return lambda family: field.shown(family, solver, at)

    headline, peer, over = field.headline(at), TORCHDEQ[0], partial(_over, field, at)
    return listed(f"To {at:g}, by family", field.ran(FLAGSHIP), [
        ("family", lambda family: f"**{family}**" if family in headline else family),
        ("MetaBroyden", spent(FLAGSHIP)),
        (BEST, lambda family: f"{field.shown(family, BEST, at)} {field.named(family, BEST, at)}"),
        ("ratio", over(BEST)),
        (FASTEST, lambda family: field.named(family, FASTEST, at)),
        ("time", over(FASTEST, time=True)),
        ("returned", partial(_returned, field)),
        (peer, spent(peer)),
        ("time", over(peer, time=True)),
    ])  # fmt: skip


def _over(field: Field, at: float, rival: str, **options: Any) -> Callable[[str], str]:
    """A column: MetaBroyden's evaluations, or its time, over those of a rival."""
    return lambda family: f"{field.ratio(family, FLAGSHIP, rival, at, **options)}"


def _returned(field: Field, family: str) -> str:
    """Of the calls of `fit_solver`, how many returned what they had trained."""
    fits = field.of("training", family, FLAGSHIP)
    return f"{sum(row['returned'] for row in fits)} of {len(fits)}"


def means_table(field: Field, results: Path | None = None) -> Table:
    """Geometric means of the ratios over headline families and over all; co-trained, over the original's solvers."""
    names = ("Broyden", *TORCHDEQ, "hyper-anderson", "grouped", "universal")
    rivals = {"the best, the fastest classical": (BEST, FASTEST), **{name: (name, name) for name in names}}

    def cells(families: list[str], at: float, fewest: str, quickest: str) -> list[str]:
        ran = [family for family in families if field.ratio(family, FLAGSHIP, fewest, at).value > 0]
        mean = partial(field.mean_ratio, ran, FLAGSHIP, tolerance=at)
        return [str(len(ran)), f"{mean(fewest)}", f"{mean(quickest, time=True)}"]

    body = [
        [words, f"{at:g}", *cells(field.headline(at), at, *over), *cells(field.families, at, *over)]
        for at in SHOWN
        for words, over in rivals.items()
    ]
    body += [
        _over_seeds("the best, the fastest classical: what calls returned", field, at, _kept(field, at)) for at in SHOWN
    ]
    body += [row for at in SHOWN if results for row in _co_trained(field, results, at)]
    figures = ["evaluations", "time"]
    head = ["MetaBroyden over", "tolerance", "headline families", *figures, "all families", *figures]
    return Table("Geometric means over families", head, body)


def _over_seeds(words: str, field: Field, at: float, found: Mapping[str, Sequence[Row]]) -> list[str]:
    """A line of means over families, of ratios that each has a row a seed of."""

    def cells(families: list[str]) -> list[str]:
        among = [found[family] for family in families if family in found]
        return [str(len(among)), *(number(overall(among, key)) if among else "" for key in ("evaluations", "time"))]

    return [words, f"{at:g}", *cells(field.headline(at)), *cells(field.families)]


def _kept(field: Field, at: float) -> dict[str, list[Row]]:
    """By family, for the call of each seed: evaluations over the best and time over the fastest classical solver, of what it
    returned, its own solver or the fastest classical one."""
    found = {}
    for family in field.ran(FLAGSHIP):
        ours, best, usual = (field.must(family, solver, at) for solver in (FLAGSHIP, BEST, FASTEST))
        spent = np.median(ours.evaluations, axis=1)
        time = np.median(ours.seconds / np.median(usual.seconds, axis=0), axis=(1, 2))
        calls = sorted(field.of("training", family, FLAGSHIP), key=itemgetter("seed"))
        both = [
            (a, b) if row["returned"] else (usual.median, 1.0) for row, a, b in zip(calls, spent, time, strict=True)
        ]
        found[family] = [{"evaluations": of / best.median, "time": share} for of, share in both]
    return found


def _co_trained(field: Field, results: Path, at: float) -> list[list[str]]:
    """One line, of the families that were co-trained; none where there are none."""
    found = beyond.co_trained(results / "cotrain", at)
    return [_over_seeds("co-trained: the original's best, its fastest", field, at, found)] if found else []


def every_solver(field: Field, at: float, words: str, corner: str) -> Table:
    """Median evaluations and success of all solvers."""
    cells = itemgetter("family"), itemgetter("solver"), lambda rows: str(Outcome.of(rows))
    return pivot(f"{words}: to {at:g}", chosen(field.rows, "solve", tolerance=at), *cells, corner=corner)


def _over_table(field: Field, rival: str) -> Table:
    kinds: dict[str, Any] = {"evaluations": {}, "time": {"time": True}}
    cells = [(f"{head}, {at:g}", _over(field, at, rival, **of)) for at in SHOWN for head, of in kinds.items()]
    return listed(f"MetaBroyden over {rival}", field.families, [("family", str), *cells])


def _details(field: Field, at: float) -> Table:
    def both(cell: Callable[[str, str], float], spec: str) -> Callable[[str], str]:
        return lambda family: " / ".join(f"{cell(family, solver):{spec}}" for solver in (FLAGSHIP, BEST))

    def within(budget: int) -> Callable[[str], str]:
        return both(lambda family, solver: field.must(family, solver, at).within(budget), ".0%")

    def outcomes(family: str) -> list[Outcome]:
        return [field.must(family, solver, at) for solver in (FLAGSHIP, BEST)]

    def success(family: str) -> str:
        every, ours = field.outcomes(family, at, "classical"), field.must(family, FLAGSHIP, at).success
        top = max(every, key=lambda name: every[name].success)
        mark = "**" if ours > every[top].success else ""
        return f"{mark}{ours:.1%}{mark} / {every[top].success:.1%} {top}"

    def farther(family: str) -> str:
        ours, theirs = (apart(field, family, solver, at) for solver in (FLAGSHIP, BEST))
        return f"{_mean(np.where(np.isfinite(ours + theirs), ours > 3 * theirs, np.nan)):.1%}"

    star = {row["family"]: row for row in chosen(field.rows, "star")}
    return listed(f"Details, to {at:g}", field.ran(FLAGSHIP), [
        ("family", str),
        ("solved", success),
        *((f"in {budget}", within(budget)) for budget in (10, 20, 40, 60)),
        ("paired", lambda family: f"{paired(*outcomes(family))[0]:.1f}"),
        ("only one", lambda family: "{} : {}".format(*alone(*outcomes(family)))),
        ("known", lambda family: "{known} of {samples}".format_map(star[family])),
        ("distance", both(lambda family, solver: _mean(apart(field, family, solver, at), np.median), ".1e")),
        ("farther", farther),
        ("elsewhere", both(partial(robustness.elsewhere, field, at), ".1%")),
        ("score", both(lambda family, solver: _mean(field.samples(family, solver, at, "score")), ".4f")),
        ("at z*", lambda family: f"{np.mean(star[family]['score']):.4f}"),
        ("agree", both(lambda family, solver: _mean(field.samples(family, solver, at, "agrees")), ".1%")),
    ])  # fmt: skip


def apart(field: Field, family: str, solver: str, at: float) -> np.ndarray:
    """(N,) means over seeds of the distances of samples that all of them solve; NaN for the others."""
    solved = field.must(family, solver, at).solved.all(axis=0)
    return np.where(solved, field.samples(family, solver, at, "distance").mean(axis=0), np.nan)


def _mean(values: np.ndarray, of: Any = np.mean) -> float:
    """Of those that are numbers; NaN where there are none."""
    values = values[~np.isnan(values)]
    return float(of(values)) if values.size else float("nan")


def _family(field: Field, family: str) -> report.Folded:
    """All solvers on one family: evaluations to all tolerances, the time of a block, and what the fits decided."""

    def part(solver: str, key: str, at: float) -> str:
        rows = field.of("solve", family, solver, tolerance=at)
        return number(1e3 * middle(lap[key] for row in rows for lap in row["seconds"]), ".1f")

    def time(at: float) -> Callable[[str], str]:
        return lambda solver: " / ".join(part(solver, key, at) for key in ("total", "f", "bookkeeping"))

    def peak(solver: str) -> str:
        rows = field.of("solve", family, solver, tolerance=SHOWN[-1])
        return f"{max((row['peak_bytes'] or 0) for row in rows) / 1e6:.1f}"

    fits = field.of("training", family, FLAGSHIP)
    decided = (
        f"fit {number} ({row['cpu_seconds']:.0f} s): {'; '.join(row['reasons']) or 'returned'}"
        for number, row in enumerate(fits)
    )
    words = (
        f"{family}: median evaluations (share solved) by tolerance; ms of a block, in all / in f (apart from solvers that "
        "call f alone) / in bookkeeping; MB at the peak of a solve"
    )
    table = listed(words, field.solvers(family), [
        ("solver", label),
        *((f"{at:g}", lambda solver, at=at: field.shown(family, solver, at)) for at in field.tolerances),
        *((f"ms to {at:g}", time(at)) for at in SHOWN),
        ("peak", peak),
    ])  # fmt: skip
    return report.Folded(family, [table, ". ".join(decided)])


def _metric(field: Field) -> Table:
    body, ratios = [], {}
    for family in field.ran(FLAGSHIP):
        enough = chosen(field.rows, "pace", family=family, enough=True)
        ours = [row for row in enough if row["solver"] == FLAGSHIP]
        theirs = [row for row in enough if row["kind"] == "classical"]
        if not ours or not theirs:
            continue
        fewest = min(theirs, key=lambda row: row["evaluations"])
        quick = min(theirs, key=lambda row: middle(row["seconds"]))
        pairs = (zip(row["seconds"], quick["seconds"], strict=True) for row in ours)
        ratios[family] = middle(a / b for laps in pairs for a, b in laps)
        spent = " ".join(str(row["evaluations"]) for row in ours)
        time = f"{ratios[family]:.2f}× {quick['solver']}"
        body.append([family, spent, "{evaluations} {solver}".format_map(fewest), time])
    for name, among in (("headline families (1e-2)", field.headline(1e-2)), ("all families", field.families)):
        found = [ratios[family] for family in among if family in ratios]
        words = f"geometric mean, {len(found)} of {len(among)} {name}"
        body.append([words, "", "", f"{geometric(found):.2f}×" if found else ""])
    words = (
        "Evaluations from which on the mean score stays within 0.5 points or 0.01 bits of the equilibrium's (one number a "
        "seed), and the time of so many"
    )
    return Table(words, ["family", "MetaBroyden, evaluations", "fewest classical", "time over the fastest such"], body)


def _leaks(field: Field) -> Table:
    def cell(rows: list[Row]) -> str:
        return f"{middle(row['mean'] for row in rows):.1e} / {max(row['most'] for row in rows):.1e}"

    words = "Leak: bits by which earlier predictions change when the last eight tokens do, to a tolerance, mean / most"
    place = "{family}, {solver}".format_map, "{tolerance:g}".format_map
    return pivot(words, chosen(field.rows, "leak"), *place, cell, corner="family, solver")


def comparison(ours: Field, theirs: Field) -> str:
    """What differs between two runs: the ratios whose interval excludes one, and samples that only one of them solves.

    Raises:
        ValueError: If the runs share nothing, or hold different samples or budgets.
    """
    if ours.budget != theirs.budget:
        raise ValueError(f"runs can be compared at the same budget, got {ours.budget} and {theirs.budget}")
    body, count = [], 0
    for family, solver, at in product(ours.families, ours.solvers(), ours.tolerances):
        one, other = (field.outcome(family, solver, at) for field in (ours, theirs))
        if one is None or other is None:
            continue
        sizes = [side.evaluations.shape[1] for side in (one, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"runs can be compared on the same samples; {family} has {sizes[0]} and {sizes[1]}")
        found, (won, lost) = ratio(one, other), alone(one, other)
        count += 1
        if won != lost or not found.low <= 1 <= found.high:
            body.append([family, solver, f"{at:g}", f"{found}", f"{won} : {lost}"])
    if not count:
        raise ValueError("the two runs have no family and solver in common")
    head = ["family", "solver", "tolerance", "evaluations, first over second", "only one solves"]
    words = f"{count} pairs of a family, a solver and a tolerance; {len(body)} differ."
    return f"{words}\n\n{markdown(head, body)}" if body else words
