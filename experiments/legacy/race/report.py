"""results/race/report.md, from rows alone: per-family figures first, means after them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.legacy.race import figures, page
from experiments.legacy.race.contestants import FLAGSHIP
from experiments.legacy.race.figures_beside import transferred
from experiments.legacy.race.schema import PARTS, read
from experiments.legacy.race.statistics import HEADLINE, TORCHDEQ, Field, Interval, compared
from experiments.legacy.report import made_by, table
from metabroyden.compare import FAR
from metabroyden.storage import atomic_write

SHOWN = (1e-2, 1e-3)
BUDGETS = (10, 20, 40, 60)
Table = page.Table
"""A table: what it is, its header, its rows."""
_LINK = r"\[([^]]+)\]\([^)]+\)"


def write(folder: Path) -> Path:
    """Write report.md and report.html beside rows/ and config.json; ValueError where there are no rows."""
    rows = read(folder / "rows")
    solved = {row["part"] for row in rows if row["row"] == "solve"}
    field = Field(rows)
    parts = {part: Field(rows, part) for part in PARTS if part in solved}
    if "ablation" in parts:  # what was trained anew has one seed
        parts["ablation"] = Field([row for row in rows if not row["seed"]], "ablation")
    far = [row for row in rows if row["part"] == "horizon"]
    drawn = figures.write_all(parts, far, folder / "figures")
    described = json.loads((folder / "config.json").read_text())
    lead = (
        "Rules: `results/race/PROTOCOL.md`. Rows: [rows/](rows/), as [schema.json](schema.json) says. Median evaluations "
        "over held-out samples (share of them solved), a failure counting the whole budget of "
        f"{field.budget}; ratios with 95% bootstrap intervals over samples and seeds."
    )
    found = [*tables(field), *beside(parts)]
    made = made_by(described["command"], described["provenance"], "torchdeq")
    page.write(folder / "report.html", [f"Made by `{described['command']}`.", re.sub(_LINK, r"\1", lead)], drawn, found)
    sections = ["# The race", made, f"{lead} Sortable and zoomable: [report.html](report.html)."]
    sections += [f"![{path.stem}](figures/{path.name})" for path in drawn]
    for words, head, body in found:
        sections += [f"## {words}", table(head, body)]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def tables(field: Field) -> list[Table]:
    """All tables of the report."""
    made = [_families(field, tolerance) for tolerance in SHOWN]
    made.append(_means(field))
    made += [_every(field, tolerance) for tolerance in SHOWN]
    made += [_success(field), _budgets(field), _paired(field), _equilibria(field), _time(field), _metric(field)]
    made += [found for found in (_leak(field), _horizon(field)) if found[2]]
    return made


def beside(parts: Mapping[str, Field]) -> list[Table]:
    """Tables of what is run beside the race, as far as there are rows."""
    made = []
    if "outside" in parts:
        made += [
            _every(parts["outside"], at, "Outside of what the families' solvers were trained and tuned on", "problem")
            for at in SHOWN
        ]
    if "transfer" in parts:
        made += [_transfer(parts, at) for at in SHOWN]
        made += [_every(parts["transfer"], at, "Solvers of other families that fit its states") for at in SHOWN]
    if "ablation" in parts:
        made += [_every(parts["ablation"], at, "MetaBroyden, seed 0, without its pieces") for at in SHOWN]
    if "hyper-deq" in parts:
        made += [_every(parts["hyper-deq"], at, "silva-networks' HyperDEQ, stopped by our rule") for at in SHOWN]
        made.append(_times_of(parts["hyper-deq"], "HyperDEQ"))
    return made


def comparison(ours: Field, theirs: Field) -> str:
    """What differs between two runs: the ratios whose interval excludes one, and samples that only one of them solves."""
    found = compared(ours, theirs)
    body = [
        [family, solver, f"{tolerance:g}", f"{ratio}", f"{won} : {lost}"]
        for family, solver, tolerance, ratio, won, lost in found
        if not ratio.low <= 1 <= ratio.high or won != lost
    ]
    head = ["family", "solver", "tolerance", "evaluations, first over second", "only one solves"]
    words = f"{len(found)} pairs of a family, a solver and a tolerance; {len(body)} differ."
    return words + ("\n\n" + table(head, body) if body else "")


def _spent(field: Field, family: str, solver: str, tolerance: float) -> str:
    found = field.standing(family, solver, tolerance)
    return "" if found is None else f"{found.median:g} ({found.success:.0%})"


def _times(value: Interval) -> str:
    return "" if np.isnan(value.value) else f"{value}"


def _families(field: Field, tolerance: float) -> Table:
    head = [
        "family", "MetaBroyden", "best classical", "ratio", "Broyden", "ratio", "fastest classical", "time",
        "torchdeq Broyden", "ratio", "time",
    ]  # fmt: skip
    headline, body = field.headline(tolerance), []
    for family in field.flagship:
        best, fastest, peer = field.best(family, tolerance), field.fastest(family, tolerance), TORCHDEQ[0]
        raced = field.standing(family, peer, tolerance) is not None
        body.append(
            [
                f"**{family}**" if family in headline else family,
                _spent(field, family, FLAGSHIP, tolerance),
                f"{_spent(field, family, best, tolerance)} {best}",
                _times(field.ratio(family, FLAGSHIP, best, tolerance)),
                _spent(field, family, "Broyden", tolerance),
                _times(field.ratio(family, FLAGSHIP, "Broyden", tolerance)),
                fastest,
                _times(field.time_ratio(family, FLAGSHIP, fastest, tolerance)),
                _spent(field, family, peer, tolerance),
                _times(field.ratio(family, FLAGSHIP, peer, tolerance)) if raced else "",
                _times(field.time_ratio(family, FLAGSHIP, peer, tolerance)) if raced else "",
            ]
        )
    words = f"To {tolerance:g}, by family (bold: the best classical solver needs {HEADLINE} or more on validation)"
    return words, head, body


def _means(field: Field) -> Table:
    figures = ["evaluations", "time"]
    head = ["MetaBroyden over", "tolerance", "headline families", *figures, "all families", *figures]
    body = []
    for tolerance in SHOWN:
        rivals: list[tuple[str, Any, Any]] = [
            (
                "the best, the fastest classical",
                lambda family, at=tolerance: field.best(family, at),
                lambda family, at=tolerance: field.fastest(family, at),
            ),
            *((name, name, name) for name in ("Broyden", *TORCHDEQ, "hyper-anderson", "grouped", "universal")),
        ]
        for words, fewest, fastest in rivals:
            row = [words, f"{tolerance:g}"]
            for chosen in (field.headline(tolerance), field.families):
                among = [family for family in chosen if family in field.flagship and _ran(field, family, fewest)]
                row += [
                    str(len(among)),
                    _times(field.mean_ratio(among, FLAGSHIP, fewest, tolerance)),
                    _times(field.mean_time_ratio(among, FLAGSHIP, fastest, tolerance)),
                ]
            body.append(row)
    return "Geometric means over families", head, body


def _ran(field: Field, family: str, rival: Any) -> bool:
    return callable(rival) or rival in field.solvers(family)


def _every(field: Field, tolerance: float, words: str = "Every solver", first: str = "family") -> Table:
    names = list(dict.fromkeys(name for family in field.families for name in field.solvers(family)))
    body = [[family, *(_spent(field, family, name, tolerance) for name in names)] for family in field.families]
    return f"{words}: to {tolerance:g}", [first, *names], body


def _transfer(parts: Mapping[str, Field], tolerance: float) -> Table:
    names, problems, values = transferred(parts, tolerance)
    body = [
        [problem, *("" if np.isnan(value) else f"{value:.2f}" for value in column)]
        for problem, column in zip(problems, values.T, strict=True)
    ]
    words = "Transfer: evaluations over those of the best classical solver tuned on the family's own inputs, to"
    return f"{words} {tolerance:g}", ["problem", *(f"MetaBroyden, {name}" for name in names[:2]), *names[2:]], body


def _times_of(field: Field, rival: str) -> Table:
    head = ["family", *(f"{words}, {at:g}" for at in SHOWN for words in ("evaluations", "time"))]
    body = []
    for family in field.flagship:
        row = [family]
        for at in SHOWN:
            row += [f"{field.ratio(family, FLAGSHIP, rival, at)}", f"{field.time_ratio(family, FLAGSHIP, rival, at)}"]
        body.append(row)
    return f"MetaBroyden over {rival}", head, body


def _success(field: Field) -> Table:
    head = ["family", *(f"{tolerance:g}" for tolerance in field.tolerances)]
    body = []
    for family in field.flagship:
        row = [family]
        for tolerance in field.tolerances:
            every = {name: field.must(family, name, tolerance).success for name in field.solvers(family, "classical")}
            top = max(every, key=lambda name: every[name])
            ours = field.must(family, FLAGSHIP, tolerance).success
            mark = "**" if ours > every[top] else ""
            row.append(f"{mark}{ours:.1%}{mark} / {every[top]:.1%} {top}")
        body.append(row)
    return f"Share solved in {field.budget} evaluations: MetaBroyden / the best of the classical ones", head, body


def _budgets(field: Field) -> Table:
    head = ["family", *(f"{budget}, to {tolerance:g}" for tolerance in SHOWN for budget in BUDGETS)]
    body = []
    for family in field.flagship:
        row = [family]
        for tolerance in SHOWN:
            ours = field.must(family, FLAGSHIP, tolerance)
            theirs = field.must(family, field.best(family, tolerance), tolerance)
            row += [f"{ours.within(budget):.0%} / {theirs.within(budget):.0%}" for budget in BUDGETS]
        body.append(row)
    return "Share solved by budget: MetaBroyden / the best classical", head, body


def _paired(field: Field) -> Table:
    head = [
        "family",
        *(f"{words}, {tolerance:g}" for tolerance in SHOWN for words in ("evaluations", "only one solves")),
    ]
    body = []
    for family in field.flagship:
        row = [family]
        for tolerance in SHOWN:
            rival = field.best(family, tolerance)
            difference, won, lost = field.paired(family, FLAGSHIP, rival, tolerance)
            row += [f"{difference:.1f}", f"{won} : {lost}"]
        body.append(row)
    words = "Paired by sample: MetaBroyden minus the best classical; samples that only it, that only the other solves"
    return words, head, body


def _equilibria(field: Field) -> Table:
    head = [
        "family",
        "known",
        *(f"{words}, {at:g}" for at in SHOWN for words in ("distance", "farther", "elsewhere", "score", "agree")),
    ]
    body = []
    for family in field.flagship:
        (star,) = field.of("star", family, "float64")
        row = [family, f"{star['known']} of {star['samples']}"]
        for tolerance in SHOWN:
            rival = field.best(family, tolerance)
            ours, theirs = (_distances(field, family, name, tolerance) for name in (FLAGSHIP, rival))
            both = np.isfinite(ours) & np.isfinite(theirs)
            farther = float((ours > 3 * theirs)[both].mean()) if both.any() else float("nan")
            scores = [_mean(field, family, name, tolerance, "score") for name in (FLAGSHIP, rival)]
            row += [
                f"{np.nanmedian(ours):.1e} / {np.nanmedian(theirs):.1e}",
                f"{farther:.1%}",
                " / ".join(f"{_elsewhere(field, family, name, tolerance):.1%}" for name in (FLAGSHIP, rival)),
                f"{scores[0]:.4f} / {scores[1]:.4f} / {np.mean(star['score']):.4f}",
                " / ".join(f"{_mean(field, family, name, tolerance, 'agrees'):.1%}" for name in (FLAGSHIP, rival)),
            ]
        body.append(row)
    words = (
        "The same equilibrium: median distance to the float64 one, MetaBroyden / the best classical; share of samples that "
        "both solve where it is more than three times farther; share of what either solves that is more than "
        f"{FAR:g} tolerances away and stays so when solved to less; score of both and at the float64 equilibrium; "
        "predictions of both that are the float64 equilibrium's"
    )
    return words, head, body


def _lists(field: Field, family: str, solver: str, tolerance: float, key: str) -> np.ndarray:
    """(S, N) values by sample; NaN for None."""
    seeds = [[value for row in rows for value in row[key]] for rows in field.blocks(family, solver, tolerance)]
    return np.array(seeds, dtype=float)  # None becomes NaN


def _distances(field: Field, family: str, solver: str, tolerance: float) -> np.ndarray:
    """(N,) means over seeds of the distances of samples that all of them solve; NaN for the others."""
    solved = field.must(family, solver, tolerance).solved.all(axis=0)
    return np.where(solved, _lists(field, family, solver, tolerance, "distance").mean(axis=0), np.nan)


def _elsewhere(field: Field, family: str, solver: str, tolerance: float) -> float:
    """Share of the samples solved that are far from the float64 equilibrium, and stay so when solved to less.

    On an ill-conditioned problem the same solver comes nearer with a smaller tolerance, at another equilibrium it does not.
    """
    apart = _lists(field, family, solver, tolerance, "distance")
    known = field.must(family, solver, tolerance).solved & np.isfinite(apart)
    for tighter in field.tolerances:
        if tighter < tolerance and field.standing(family, solver, tighter) is not None:
            apart = np.fmin(apart, _lists(field, family, solver, tighter, "distance"))
    return float((apart[known] > FAR * tolerance).mean()) if known.any() else float("nan")


def _mean(field: Field, family: str, solver: str, tolerance: float, key: str) -> float:
    values = _lists(field, family, solver, tolerance, key)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _time(field: Field) -> Table:
    head = ["family", "solver", "ms", "f", "solver", "bookkeeping", "peak MB"]
    body = []
    for family in field.flagship:
        for name in dict.fromkeys((FLAGSHIP, field.best(family, 1e-3), field.fastest(family, 1e-3), *TORCHDEQ[:1])):
            rows = field.of("solve", family, name, tolerance=1e-3)
            laps = [lap for row in rows for lap in row["seconds"]]
            if not laps:
                continue
            parts = [_middle(lap[key] for lap in laps) for key in ("total", "f", "solver", "bookkeeping")]
            peak = max((row["peak_bytes"] or 0) for row in rows)
            body.append(
                [family, name, *("" if np.isnan(part) else f"{1e3 * part:.1f}" for part in parts), f"{peak / 1e6:.1f}"]
            )
    words = (
        "Where the time of a block goes, to 1e-3 (medians; f apart from a solver that calls f alone), and peak memory"
    )
    return words, head, body


def _middle(values: Iterable[float | None]) -> float:
    found = [value for value in values if value is not None]
    return float(np.median(found)) if found else float("nan")


def _metric(field: Field) -> Table:
    head = ["family", "score at z*", "MetaBroyden, evaluations", "fewest classical", "time over the fastest such"]
    body, ratios = [], {}
    for family in field.flagship:
        (star,) = field.of("star", family, "float64")
        ours = [row for row in field.of("pace", family, FLAGSHIP) if row["enough"]]
        classical = [
            row
            for name in field.solvers(family, "classical")
            for row in field.of("pace", family, name)
            if row["enough"]
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
        mean = f"{np.exp(np.mean(np.log(found))):.2f}×" if found else ""
        body.append([f"geometric mean, {len(found)} of {len(among)} {name}", "", "", "", mean])
    words = (
        "Evaluations from which on the mean score stays within 0.5 points or 0.01 bits of the equilibrium's (one number a "
        "seed), and the time of so many"
    )
    return words, head, body


def _leak(field: Field) -> Table:
    head = ["family", "solver", *(f"{tolerance:g}, mean / most" for tolerance in SHOWN)]
    body = []
    for family in field.families:
        for name in field.solvers(family):
            rows = [field.of("leak", family, name, tolerance=tolerance) for tolerance in SHOWN]
            if all(rows):
                cells = [
                    f"{_middle(r['mean'] for r in found):.1e} / {max(r['most'] for r in found):.1e}" for found in rows
                ]
                body.append([family, name, *cells])
    return "Leak: bits by which earlier predictions change when the last eight tokens do", head, body


def _horizon(field: Field) -> Table:
    head = [
        "family",
        "solver",
        "tolerance",
        "evaluations",
        "fallback solves",
        "lost",
        "with what was spent before",
        "handed over",
    ]
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
                    handed = f"{total['triggered'] / total['samples']:.1%}"
                    steps = str(max(row["steps"] for row in rows))
                    figures = [str(total[key]) for key in ("fallback", "lost", "broken")]
                    body.append([family, name, f"{tolerance:g}", steps, *figures, handed])
    return (
        "Four times past the trained horizon, all seeds: samples that the fallback solves and the learned solver loses",
        head,
        body,
    )
