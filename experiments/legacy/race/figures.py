"""The race's figures, from rows alone: colours for the colour-blind, lines and hatches for grey, PNG and PDF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import NullFormatter

from experiments.legacy.plots import new_axes
from experiments.legacy.race import figures_beside
from experiments.legacy.race.contestants import FLAGSHIP
from experiments.legacy.race.schema import Row
from experiments.legacy.race.statistics import Field
from experiments.legacy.race.style import LABELS, LOOKS, grid, heat_map, legend, look, save

_HATCHES = ("", "///", "...", "xx", "\\\\")
_PROFILED = (FLAGSHIP, "best classical", "universal", "tuned Anderson", "tuned Picard", "Broyden", "torchdeq Broyden",
             "tuned torchdeq Anderson")  # fmt: skip
_BARS = (FLAGSHIP, "best classical", "Broyden", "tuned torchdeq Anderson", "torchdeq Broyden")


def write_all(parts: Mapping[str, Field], far: Sequence[Row], folder: Path) -> list[Path]:
    """Every figure there are rows for; the PNG files, each with a PDF beside it. far: curves past the horizon."""
    field = parts["families"]
    made: list[tuple[str, Any]] = [("residual-evaluations", _residuals(field, by_time=False))]
    made += [("residual-time", _residuals(field, by_time=True))]
    made += [(f"evaluations-{tolerance:g}", _bars(field, tolerance)) for tolerance in (1e-2, 1e-3)]
    made += [(f"reduction-{tolerance:g}", _reduction(field, tolerance)) for tolerance in (1e-2, 1e-3)]
    made += [("profiles", _profiles(field)), ("metric-evaluations", _metric(field, by_time=False))]
    made += [("metric-time", _metric(field, by_time=True)), ("overview", _overview(field))]
    made += [("break-even", figure) for figure in (_break_even(field),) if figure is not None]
    made += [("paths", _paths(field))] if _pathed(field) else []
    made += figures_beside.make(parts, far)
    return [save(figure, folder / f"{name}.png") for name, figure in made]


def _drawn(field: Field, family: str) -> list[tuple[str, str]]:
    """(solver, what it is drawn as) on a family: the flagship and what it is held against."""
    best = field.best(family, 1e-3)
    chosen = [
        (FLAGSHIP, FLAGSHIP),
        ("grouped", "grouped"),
        ("hyper-anderson", "hyper-anderson"),
        (best, "best classical"),
    ]
    chosen += [(name, name) for name in ("Broyden", "torchdeq Broyden") if name != best]
    return [(name, drawn) for name, drawn in chosen if name in field.solvers(family)]


def _residuals(field: Field, *, by_time: bool) -> Any:
    """Median (by evaluations: and the middle half) of the residual, one small plot a family."""
    figure, places = grid(len(field.families))
    for place, family in zip(places, field.families, strict=True):
        for name, drawn in _drawn(field, family):
            curves = field.of("curve", family, name)
            curve = min(curves, key=lambda row: row["seed"] or 0)
            label = LABELS.get(drawn, drawn)
            if by_time:
                place.semilogy([1e3 * at for at in curve["seconds"]], curve["by_time"], label=label, **look(drawn))
                continue
            place.semilogy(curve["evaluations"], curve["median"], label=label, **look(drawn))
            band = (curve["evaluations"], curve["low"], curve["high"])
            place.fill_between(*band, color=look(drawn)["color"], alpha=0.12, linewidth=0)
        place.set_title(f"{family} ({field.best(family, 1e-3)})", fontsize=8)
        place.set_xlim(0, field.budget if not by_time else None)
        place.set_ylim(1e-5, 3)
    words = "time of the first block, ms" if by_time else "evaluations of f"
    figure.supxlabel(f"{words} (learned solvers: first seed)", fontsize=9)
    figure.supylabel("relative residual, best so far", fontsize=9)
    legend(figure, places)
    return figure


def _resolve(field: Field, family: str, drawn: str, tolerance: float) -> str:
    return field.best(family, tolerance) if drawn == "best classical" else drawn


def _bars(field: Field, tolerance: float) -> Any:
    """Median evaluations with the share solved above each bar."""
    figure, axes = new_axes(max(8.0, 0.95 * len(field.families)))
    width = 0.8 / len(_BARS)
    for number, drawn in enumerate(_BARS):
        colour = LOOKS[drawn][0]
        label: str | None = LABELS.get(drawn, drawn)
        for place, family in enumerate(field.families):
            found = field.standing(family, _resolve(field, family, drawn, tolerance), tolerance)
            if found is None:
                continue
            at = place + (number - (len(_BARS) - 1) / 2) * width
            axes.bar(at, found.median, width, color=colour, hatch=_HATCHES[number], edgecolor="white", label=label)
            label = None
            if found.success < 0.995:
                axes.text(at, found.median + 0.7, f"{found.success:.0%}", ha="center", fontsize=5, rotation=90)
    axes.set_xticks(range(len(field.families)), field.families, rotation=35, ha="right", fontsize=7)
    axes.set(ylabel=f"median evaluations to {tolerance:g}", ylim=(0, field.budget + 6))
    axes.grid(axis="x", visible=False)
    axes.set_title("A share stands where not all samples are solved; a failure counts as the budget", fontsize=8)
    axes.legend(frameon=False, fontsize=8, ncols=len(_BARS))
    return figure


def _reduction(field: Field, tolerance: float) -> Any:
    """MetaBroyden's evaluations over those of three rivals, with intervals, by family."""
    families = sorted(
        field.flagship, key=lambda name: field.ratio(name, FLAGSHIP, field.best(name, tolerance), tolerance).value
    )
    figure, axes = new_axes(6.8)
    figure.set_figheight(1.2 + 0.34 * max(4, len(families)))
    headline = field.headline(tolerance)
    for number, drawn in enumerate(("best classical", "Broyden", "torchdeq Broyden")):
        for place, family in enumerate(families):
            rival = _resolve(field, family, drawn, tolerance)
            if rival not in field.solvers(family):
                continue
            value = field.ratio(family, FLAGSHIP, rival, tolerance)
            colour, _, marker = LOOKS[drawn]
            axes.errorbar(
                value.value, place + 0.22 * (1 - number), fmt=marker, color=colour, markersize=5,
                xerr=[[value.value - value.low], [value.high - value.value]], label=f"over {drawn}" if not place else None,
            )  # fmt: skip
    axes.set_yticks(range(len(families)), [f"{name} *" if name in headline else name for name in families], fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel=f"evaluations of MetaBroyden over those of the rival, to {tolerance:g}", xlim=(0, 1.3))
    axes.set_title("* the best classical solver needs 12 or more", fontsize=8)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _profiles(field: Field) -> Any:
    """Dolan and Moré's profiles: share of samples solved within τ times the fewest evaluations of all."""
    ran = {name for family in field.families for name in field.solvers(family)} | {"best classical"}
    names = [name for name in _PROFILED if name in ran]
    figure, places = grid(2, 2)
    figure.set_size_inches(10.5, 4.4)
    factors = np.geomspace(1, 10, 60)
    for place, tolerance in zip(places, (1e-2, 1e-3), strict=True):
        shares = {name: np.zeros((len(field.families), len(factors))) for name in names}
        for number, family in enumerate(field.families):
            spent = {}
            for name in names:
                found = field.standing(family, _resolve(field, family, name, tolerance), tolerance)
                if found is not None:
                    middle = np.sort(np.where(found.solved, found.evaluations, np.inf), axis=0)
                    spent[name] = middle[len(middle) // 2]  # of a sample's seeds the middle one
            fewest = np.min(list(spent.values()), axis=0)
            for name, values in spent.items():
                with np.errstate(invalid="ignore"):
                    ratio = np.where(np.isfinite(values), values / fewest, np.inf)
                shares[name][number] = (ratio[None] <= factors[:, None]).mean(axis=1)
        for name in names:
            place.plot(factors, shares[name].mean(axis=0), label=LABELS.get(name, name), **look(name))
        place.set_xscale("log")
        place.set_xticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
        place.set(xlabel="τ: evaluations over the fewest of those drawn", ylim=(0, 1.02), title=f"to {tolerance:g}")
    places[0].set_ylabel("share of samples solved within τ")
    legend(figure, places)
    return figure


def _metric(field: Field, *, by_time: bool) -> Any:
    """Mean score of the task by evaluations, or by the time at which so many were done."""
    figure, places = grid(len(field.families))
    for place, family in zip(places, field.families, strict=True):
        (star,) = field.of("star", family, "float64")
        goal = float(np.mean(star["score"]))
        for name, drawn in _drawn(field, family):
            rows = field.of("depth", family, name)
            if not rows:
                continue
            seed = min(row["seed"] or 0 for row in rows)
            rows = [row for row in rows if (row["seed"] or 0) == seed]
            at: list[float] = [row["evaluations"] for row in rows]
            if by_time:
                paces = [row for row in field.of("pace", family, name) if (row["seed"] or 0) == seed]
                spent = {row["evaluations"]: 1e3 * float(np.median(row["seconds"])) for row in paces}
                rows = [row for row in rows if row["evaluations"] in spent]
                at = [spent[row["evaluations"]] for row in rows]
            marker = LOOKS[drawn][2]
            scores = [row["score"] for row in rows]
            place.plot(at, scores, marker=marker, markersize=3, label=LABELS.get(drawn, drawn), **look(drawn))
        place.axhline(goal, color="black", linewidth=0.8)
        below, above = (-0.24, 0.04) if star["higher_is_better"] else (-0.05, 0.6)
        place.set_ylim(goal + below, goal + above)
        place.set_title(f"{family}: {'accuracy' if star['higher_is_better'] else 'bits a token'}", fontsize=8)
        place.set_xscale("log")
        place.xaxis.set_minor_formatter(NullFormatter())
        if not by_time:
            place.set_xticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
    words = (
        "time of a solve of the first block that stops after so many evaluations, ms" if by_time else "evaluations of f"
    )
    figure.supxlabel(f"{words} (learned solvers: first seed)", fontsize=9)
    legend(figure, places)
    return figure


def _overview(field: Field) -> Any:
    """Every solver on every family: evaluations over those of untuned Broyden, to 1e-3."""
    names = list(dict.fromkeys(name for family in field.families for name in field.solvers(family)))
    values = np.full((len(names), len(field.families)), np.nan)
    for column, family in enumerate(field.families):
        base = field.must(family, "Broyden", 1e-3)
        for row, name in enumerate(names):
            found = field.standing(family, name, 1e-3)
            if found is not None and found.success >= 0.5:
                values[row, column] = found.median / base.median
    words = "median evaluations to 1e-3 over untuned Broyden's (–: less than half solved, or did not run)"
    return heat_map(values, [LABELS.get(name, name) for name in names], field.families, words)


def _pathed(field: Field) -> list[str]:
    """Families with paths of MetaBroyden and of others."""
    return [family for family in field.flagship if field.of("path", family, FLAGSHIP)]


def _paths(field: Field) -> Any:
    """The iterates of several solvers on one input, in the plane in which they vary most; the equilibrium is the origin."""
    families = _pathed(field)
    figure, places = grid(len(families))
    for place, family in zip(places, families, strict=True):
        for name, drawn in ((FLAGSHIP, FLAGSHIP), ("Broyden", "Broyden"), ("tuned Anderson", "best classical")):
            for row in field.of("path", family, name):
                shown, marker = look(drawn), LOOKS[drawn][2]
                place.plot(
                    row["along"], row["across"], marker=marker, markersize=3, alpha=0.85,
                    label=f"{LABELS.get(name, name)}", **{**shown, "linewidth": 1.0},
                )  # fmt: skip
                place.plot(
                    row["along"][:1],
                    row["across"][:1],
                    marker="o",
                    markersize=7,
                    color=shown["color"],
                    fillstyle="none",
                )
        place.plot(0, 0, marker="*", markersize=9, color="black", linestyle="", label="equilibrium")
        place.set_title(family, fontsize=8)
        place.set_xticks([])
        place.set_yticks([])
    figure.supxlabel(
        "first input of the test split; rings: first evaluations; plane of the iterates' two principal components",
        fontsize=9,
    )
    legend(figure, places)
    return figure


def _break_even(field: Field) -> Any | None:
    """How many samples a solver must solve until its training has paid, against the fastest classical solver."""
    found: list[tuple[str, float, float]] = []
    for family in field.flagship:
        trained = [row["cpu_seconds"] for row in field.of("training", family, FLAGSHIP)]
        ours = field.standing(family, FLAGSHIP, 1e-3)
        if not trained or ours is None:
            continue
        theirs = field.must(family, field.fastest(family, 1e-3), 1e-3)
        samples = ours.evaluations.shape[1] / ours.seconds.shape[1]
        saved = float(np.median(theirs.seconds) - np.median(ours.seconds)) / samples
        found.append((family, float(np.median(trained)), saved))
    if not found:
        return None
    figure, axes = new_axes(6.8)
    figure.set_figheight(1.2 + 0.3 * max(4, len(found)))
    paying = sorted(((cost / saved, family) for family, cost, saved in found if saved > 0), reverse=True)
    never = [family for family, _, saved in found if saved <= 0]
    for place, (count, _) in enumerate(paying):
        axes.barh(place, count, color=LOOKS[FLAGSHIP][0])
        axes.text(count * 1.05, place, f"{count:,.0f}", va="center", fontsize=7)
    axes.set_yticks(range(len(paying)), [family for _, family in paying], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("samples solved to 1e-3 until training has paid, on one thread")
    words = f"never, since no time is saved: {', '.join(never)}" if never else "on all families"
    axes.set_title(words, fontsize=6, wrap=True)
    return figure
