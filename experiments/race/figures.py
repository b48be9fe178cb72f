"""The race's figures, from rows alone, as PNG and PDF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.figures import (
    FLAGSHIP,
    axes,
    bars,
    colour,
    grid,
    heat_map,
    intervals,
    label,
    legend,
    line,
    log_ticks,
    profiles,
    save,
)  # fmt: skip
from experiments.bench.runner import Row
from experiments.bench.statistics import Field, Outcome, profile

BEST = "best classical"
_PROFILED = (FLAGSHIP, BEST, "universal", "tuned Anderson", "tuned Picard", "Broyden", "torchdeq Broyden",
             "tuned torchdeq Anderson")  # fmt: skip
_BARS = (FLAGSHIP, BEST, "Broyden", "tuned torchdeq Anderson", "torchdeq Broyden")
_OTHER = {"digits": "fashion", "fashion": "digits", "shakespeare": "words", "words": "shakespeare"}
_SHOWN = (1e-2, 1e-3)
_FIRST = "(learned solvers: first seed)"


def write_all(fields: Mapping[str, Field], far: Sequence[Row], folder: Path) -> list[Path]:
    """Every figure there are rows for; the PNG files, each with a PDF beside it. far: curves past the horizon."""
    field, outside = fields["families"], fields.get("outside")
    made: dict[str, Any] = {f"residual-{by}": _residuals(field, by) for by in ("evaluations", "time")}
    made |= {f"evaluations-{at:g}": _bars(field, at) for at in _SHOWN}
    made |= {f"reduction-{at:g}": _reduction(field, at) for at in _SHOWN}
    made |= {"profiles": _profiles(field), **{f"metric-{by}": _metric(field, by) for by in ("evaluations", "time")}}
    made |= {"overview": _overview(field), "break-even": _break_even(field), "paths": _paths(field)}
    made["norms"] = _norms(outside) if outside is not None and _swept(outside) else None
    made["transfer"] = _transfer(fields) if "transfer" in fields else None
    made["horizon"] = _horizon(field, far) if far else None
    made["ablation"] = _ablation(fields["ablation"]) if "ablation" in fields else None
    return [save(figure, folder / f"{name}.png") for name, figure in made.items() if figure is not None]


def outcome(field: Field, family: str, drawn: str, tolerance: float) -> Outcome | None:
    """How a solver did, or the best classical one."""
    return field.outcome(family, field.best(family, tolerance) if drawn == BEST else drawn, tolerance)


def _drawn(field: Field, family: str) -> list[tuple[str, str]]:
    """(solver, what it is drawn as) on a family: the flagship and what it is held against."""
    best = field.best(family, 1e-3)
    chosen = [*((name, name) for name in (FLAGSHIP, "grouped", "hyper-anderson")), (best, BEST)]
    chosen += [(name, name) for name in ("Broyden", "torchdeq Broyden") if name != best]
    return [(name, drawn) for name, drawn in chosen if name in field.solvers(family)]


def _residuals(field: Field, by: str) -> Any:
    """Median (by evaluations: and the middle half) of the residual, one small plot a family."""
    figure, places = grid(len(field.families))
    for place, family in zip(places, field.families, strict=True):
        for name, drawn in _drawn(field, family):
            curve = min(field.of("curve", family, name), key=lambda row: row["seed"] or 0)
            if by == "time":
                line(place, drawn, [1e3 * at for at in curve["seconds"]], curve["by_time"])
            else:
                line(place, drawn, curve["evaluations"], curve["median"], (curve["low"], curve["high"]))
        place.set_title(f"{family} ({field.best(family, 1e-3)})", fontsize=8)
        place.set(xlim=(0, field.budget if by == "evaluations" else None), ylim=(1e-5, 3), yscale="log")
    words = "time of the first block, ms" if by == "time" else "evaluations of f"
    figure.supxlabel(f"{words} {_FIRST}", fontsize=9)
    figure.supylabel("relative residual, best so far", fontsize=9)
    legend(figure, places)
    return figure


def _bars(field: Field, tolerance: float) -> Any:
    """Median evaluations with the share solved above each bar."""
    words = "A share stands where not all samples are solved; a failure counts as the budget"
    figure, place = axes(
        max(8.0, 0.95 * len(field.families)), ylabel=f"median evaluations to {tolerance:g}", ylim=(0, field.budget + 6)
    )
    bars(place, field.families, _BARS, lambda family, name: outcome(field, family, name, tolerance))
    place.set_title(words, fontsize=8)
    place.legend(frameon=False, fontsize=8, ncols=len(_BARS))
    return figure


def _reduction(field: Field, tolerance: float) -> Any:
    """MetaBroyden's evaluations over those of three rivals, with intervals, by family."""

    def value(family: str, rival: str) -> Any:
        name = field.best(family, tolerance) if rival == BEST else rival
        there = {FLAGSHIP, name} <= set(field.solvers(family))
        return field.ratio(family, FLAGSHIP, name, tolerance) if there else None

    families = [family for family in field.families if value(family, BEST) is not None]
    families.sort(key=lambda family: value(family, BEST).value)
    headline = field.headline(tolerance)
    marked = {f"{name} *" if name in headline else name: name for name in families}
    words = f"evaluations of MetaBroyden over those of the rival, to {tolerance:g}"
    figure, place = axes(6.8, 1.2 + 0.34 * max(4, len(families)), xlabel=words, xlim=(0, 1.3))
    rivals = (BEST, "Broyden", "torchdeq Broyden")
    intervals(place, list(marked), rivals, lambda name, rival: value(marked[name], rival), "over ")
    place.set_title("* the best classical solver needs 12 or more", fontsize=8)
    place.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _pair() -> tuple[Any, list[Any]]:
    """A figure of two plots, one a tolerance."""
    figure, places = grid(2, 2, (5.25, 4.4))
    for place, tolerance in zip(places, _SHOWN, strict=True):
        place.set_title(f"to {tolerance:g}")
    return figure, places


def _profiles(field: Field) -> Any:
    """Dolan and Moré's profiles, every family weighing the same."""
    figure, places = _pair()
    factors = np.geomspace(1, 10, 60)
    for place, tolerance in zip(places, _SHOWN, strict=True):
        shares: dict[str, list[np.ndarray]] = {}
        for family in field.families:
            every = {name: outcome(field, family, name, tolerance) for name in _PROFILED}
            there = {name: one for name, one in every.items() if one is not None}
            for name, share in profile(there, factors).items():
                shares.setdefault(name, []).append(share)
        # a family on which a solver did not run is one that it does not solve
        profiles(place, factors, {name: np.sum(of, axis=0) / len(field.families) for name, of in shares.items()})
    places[0].set_ylabel("share of samples solved")
    legend(figure, places)
    return figure


def _metric(field: Field, by: str) -> Any:
    """Mean score of the task by evaluations, or by the time at which so many were done."""
    figure, places = grid(len(field.families))
    for place, family in zip(places, field.families, strict=True):
        (star,) = field.of("star", family, "float64")
        for name, drawn in _drawn(field, family):
            at, scores = _scores(field, family, name, by)
            line(place, drawn, at, scores, marked=True)
        goal = float(np.mean(star["score"]))
        place.axhline(goal, color="black", linewidth=0.8)
        below, above = (-0.24, 0.04) if star["higher_is_better"] else (-0.05, 0.6)
        place.set_ylim(goal + below, goal + above)
        place.set_title(f"{family}: {'accuracy' if star['higher_is_better'] else 'bits a token'}", fontsize=8)
        log_ticks(place, (1, 2, 5, 10, 20, 40)) if by == "evaluations" else place.set_xscale("log")
    words = (
        "time of a solve of the first block that stops after so many evaluations, ms"
        if by == "time"
        else "evaluations of f"
    )
    figure.supxlabel(f"{words} {_FIRST}", fontsize=9)
    legend(figure, places)
    return figure


def _scores(field: Field, family: str, name: str, by: str) -> tuple[list[float], list[float]]:
    rows = field.of("depth", family, name)
    seed = min((row["seed"] or 0 for row in rows), default=0)
    points = {row["evaluations"]: row["score"] for row in rows if (row["seed"] or 0) == seed}
    if by == "evaluations":
        return list(points), list(points.values())
    paces = [
        row for row in field.of("pace", family, name) if (row["seed"] or 0) == seed and row["evaluations"] in points
    ]
    spent = {row["evaluations"]: 1e3 * float(np.median(row["seconds"])) for row in paces}
    return [spent[k] for k in points if k in spent], [points[k] for k in points if k in spent]


def _overview(field: Field) -> Any:
    """Every solver on every family: evaluations over those of untuned Broyden, to 1e-3."""
    names = field.solvers()
    values = np.full((len(names), len(field.families)), np.nan)
    for column, family in enumerate(field.families):
        for row, name in enumerate(names):
            found = field.outcome(family, name, 1e-3)
            if found is not None and found.success >= 0.5:
                values[row, column] = found.median / field.must(family, "Broyden", 1e-3).median
    words = "median evaluations to 1e-3 over untuned Broyden's (–: less than half solved, or did not run)"
    return heat_map(values, [label(name) for name in names], field.families, words)


def _paths(field: Field) -> Any | None:
    """The iterates of several solvers on one input, in the plane in which they vary most; the equilibrium is the origin."""
    families = [family for family in field.families if field.of("path", family, FLAGSHIP)]
    if not families:
        return None
    figure, places = grid(len(families))
    for place, family in zip(places, families, strict=True):
        for name in (FLAGSHIP, "Broyden", "tuned Anderson"):
            for row in field.of("path", family, name):
                line(place, name, row["along"], row["across"], marked=True, alpha=0.85, linewidth=1.0)
                ring = {"marker": "o", "markersize": 7, "color": colour(name), "fillstyle": "none"}
                place.plot(row["along"][:1], row["across"][:1], **ring)
        place.plot(0, 0, marker="*", markersize=9, color="black", linestyle="", label="equilibrium")
        place.set_title(family, fontsize=8)
        place.set(xticks=[], yticks=[])
    words = "first input of the test split; rings: first evaluations; plane of the iterates' two principal components"
    figure.supxlabel(words, fontsize=9)
    legend(figure, places)
    return figure


def _break_even(field: Field) -> Any | None:
    """How many samples a solver must solve until its training has paid, against the fastest classical solver."""
    found: dict[str, float] = {}
    for family in field.families:
        trained = [row["cpu_seconds"] for row in field.of("training", family, FLAGSHIP)]
        ours = field.outcome(family, FLAGSHIP, 1e-3)
        if trained and ours is not None:
            theirs = field.must(family, field.fastest(family, 1e-3), 1e-3)
            samples = ours.evaluations.shape[1] / ours.seconds.shape[1]
            saved = float(np.median(theirs.seconds) - np.median(ours.seconds)) / samples
            found[family] = float(np.median(trained)) / saved if saved > 0 else np.inf
    if not found:
        return None
    paying = sorted((name for name in found if np.isfinite(found[name])), key=lambda name: -found[name])
    words = "samples solved to 1e-3 until training has paid, on one thread"
    figure, place = axes(6.8, 1.2 + 0.3 * max(4, len(found)), xlabel=words, xscale="log")
    for at, family in enumerate(paying):
        place.barh(at, found[family], color=colour(FLAGSHIP))
        place.text(found[family] * 1.05, at, f"{found[family]:,.0f}", va="center", fontsize=7)
    place.set_yticks(range(len(paying)), paying, fontsize=8)
    never = [name for name in found if name not in paying]
    place.set_title(
        f"never, since no time is saved: {', '.join(never)}" if never else "on all families", fontsize=6, wrap=True
    )
    return figure


def _swept(outside: Field) -> dict[float, str]:
    """Norm ↦ name of the dense cells of the sweep."""
    found = {name.partition("dense, norm ")[2]: name for name in outside.families}
    return {float(norm): found[norm] for norm in sorted(found, key=lambda norm: float(norm or 0)) if norm}


def _norms(outside: Field) -> Any:
    """Median evaluations of solvers as they are, by the cell's spectral norm; the universal one knows such cells."""
    sweep = _swept(outside)
    figure, places = _pair()
    for place, tolerance in zip(places, _SHOWN, strict=True):
        for name in outside.solvers(next(iter(sweep.values()))):
            medians = [outside.must(cell, name, tolerance).median for cell in sweep.values()]
            line(place, name, list(sweep), medians, marked=True)
        place.set(xlabel="spectral norm of W in tanh(Wz + x), 128 units", ylim=(0, None))
    places[0].set_ylabel("median evaluations, a failure as the budget")
    legend(figure, places)
    return figure


def transferred(fields: Mapping[str, Field], tolerance: float) -> tuple[list[str], list[str], np.ndarray]:
    """(solvers, problems, evaluations over those of the best classical solver tuned on the family's own inputs).

    Problems are families, and their inputs changed. NaN where a solver did not run.
    """
    field, outside, transfer = fields["families"], fields.get("outside"), fields["transfer"]
    columns: dict[str, list[float]] = {}
    for family in (family for family in field.families if FLAGSHIP in field.solvers(family)):
        best = field.best(family, tolerance)
        cell, _, data = family.rpartition("-")
        twin = transfer.outcome(family, f"{FLAGSHIP} of {cell}-{_OTHER[data]}", tolerance)
        own, universal = (field.outcome(family, name, tolerance) for name in (FLAGSHIP, "universal"))
        columns[family] = _ratios(field.must(family, best, tolerance), own, twin, universal)
        for problem in outside.families if outside is not None else ():
            if problem.rpartition(", ")[0] == family and outside is not None:
                own, universal = (outside.outcome(problem, name, tolerance) for name in (FLAGSHIP, "universal"))
                columns[problem] = _ratios(outside.must(problem, best, tolerance), own, None, universal)
    return ["own", "of the twin on other data", "universal"], list(columns), np.array(list(columns.values())).T


def _ratios(theirs: Outcome, *ours: Outcome | None) -> list[float]:
    return [float("nan") if one is None else one.median / theirs.median for one in ours]


def _transfer(fields: Mapping[str, Field], tolerance: float = 1e-2) -> Any:
    """A heat map: solvers against problems that they were trained on, and that they were not."""
    names, problems, values = transferred(fields, tolerance)
    words = f"evaluations to {tolerance:g} over those of the best classical solver, tuned on the family's own inputs"
    return heat_map(values, names, problems, words)


def _horizon(field: Field, far: Sequence[Row]) -> Any:
    """Median and middle half of the residual to four times the steps MetaBroyden is trained for, which end at the line."""
    families = list(dict.fromkeys(row["family"] for row in far))
    figure, places = grid(len(families))
    for place, family in zip(places, families, strict=True):
        for row in (row for row in far if row["family"] == family):
            line(place, row["solver"], row["evaluations"], row["median"], (row["low"], row["high"]))
        for row in field.of("horizon", family, FLAGSHIP)[:1]:
            place.axvline(row["steps"] / 4, color="black", linewidth=0.8, linestyle=":", label="trained steps")
        place.set_title(family, fontsize=8)
        place.set(yscale="log", ylim=(1e-7, 3))
    figure.supxlabel("evaluations of f", fontsize=9)
    figure.supylabel("relative residual, best so far", fontsize=9)
    legend(figure, places)
    return figure


def _ablation(field: Field) -> Any:
    """Median evaluations of MetaBroyden and of what is left without each of its pieces."""
    figure, places = _pair()
    for place, tolerance in zip(places, _SHOWN, strict=True):
        bars(place, field.families, field.solvers(), partial(field.outcome, tolerance=tolerance))
    places[0].set_ylabel("median evaluations")
    legend(figure, places)
    return figure
