"""The race's figures, from rows alone, as PNG and PDF."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.runner import Row
from experiments.race import beyond
from metabroyden.comparison import figures as plots
from metabroyden.comparison.figures import FLAGSHIP, line, panels
from metabroyden.comparison.report import Picture
from metabroyden.comparison.statistics import BEST, FASTEST, Field, profile
from metabroyden.comparison.tables import middle

_PROFILED = (FLAGSHIP, BEST, "universal", "tuned Anderson", "tuned Picard", "Broyden", "torchdeq Broyden",
             "tuned torchdeq Anderson")  # fmt: skip
_SHOWN = (1e-2, 1e-3)
_AXIS = {"evaluations": "evaluations of f (learned solvers: first seed)",
         "time": "time of the first block, ms (learned solvers: first seed)"}  # fmt: skip
_RESIDUAL = "relative residual, best so far"


_CAPTIONS = {
    "reduction-0.01": "To 1e-2, what `fit_solver` makes by default: evaluations over the best classical solver's (filled), "
    "time over the fastest one's (hollow); left of 1 it wins. Red: it loses, or solves fewer by more than a standard error. "
    "In brackets the best classical solver and its evaluations; * it needs 12 or more on validation; † half or more of the "
    "calls refuse it, and return the fastest classical solver. Families: medians, 95% intervals; strangers, workloads: "
    "means; bars of workloads and of co-trained models span their seeds.",
    "reduction-0.001": "The same to 1e-3.",
    "residual-evaluations": "Smallest residual so far by evaluations of f: median over samples and the middle half of them.",
    "residual-time": "Smallest residual so far by time of a whole block: median over samples.",
    "profiles": "Share of samples solved within so many times the evaluations of whichever solver needs fewest.",
    "metric-evaluations": "The task's metric after so many evaluations of f.",
    "metric-time": "The task's metric by time.",
    "break-even": "Solves after which the meta-training has paid for itself in time; families where it never does are left "
    "out.",
}
"""What to see in each figure."""


def write_all(field: Field, folder: Path, results: Path | None = None) -> list[Picture]:
    """Every figure there are rows for, as PNG with a PDF beside it, and its caption; results: see `beyond.groups`."""
    made: dict[str, Any] = {f"reduction-{at:g}": _reduction(field, at, results) for at in _SHOWN}
    made |= {f"residual-{by}": _residuals(field, by) for by in _AXIS}
    made |= {"profiles": _profiles(field), **{f"metric-{by}": _metric(field, by) for by in _AXIS}}
    made |= {"break-even": _break_even(field)} if any(row["row"] == "training" for row in field.rows) else {}
    return [
        Picture(plots.save(figure, folder / f"{name}.png"), _CAPTIONS[name]) for name, figure in made.items() if figure
    ]


def _drawn(field: Field, family: str) -> dict[str, str]:
    """The flagship and what it is held against on a family: solvers, and what they are drawn as."""
    best = field.named(family, BEST, 1e-3)
    names = dict.fromkeys((FLAGSHIP, "grouped", "hyper-anderson", best, "Broyden", "torchdeq Broyden"))
    return {name: BEST if name == best else name for name in names if name in field.solvers(family)}


def _first(rows: Sequence[Row]) -> list[Row]:
    """Those of the first seed."""
    return [row for row in rows if row["seed"] == rows[0]["seed"]]


def _residuals(field: Field, by: str) -> Any:
    """Median (by evaluations: and the middle half) of the residual."""

    def draw(place: Any, family: str) -> None:
        for name, drawn in _drawn(field, family).items():
            curve = field.of("curve", family, name)[0]
            if by == "time":
                line(place, drawn, [1e3 * at for at in curve["seconds"]], curve["by_time"])
            else:
                line(place, drawn, curve["evaluations"], curve["median"], (curve["low"], curve["high"]))
        place.set_title(f"{family} ({field.named(family, BEST, 1e-3)})", fontsize=8)
        place.set(xlim=(0, field.budget if by == "evaluations" else None), ylim=(1e-5, 3), yscale="log")

    return panels(field.families, draw, _AXIS[by], _RESIDUAL)


def _reduction(field: Field, at: float, results: Path | None) -> Any:
    """MetaBroyden's evaluations over the best classical solver's and time over the fastest one's, by family and beyond."""

    def line(family: str) -> plots.Reduction:
        ours, best = field.must(family, FLAGSHIP, at), field.must(family, BEST, at)
        returned = [row["returned"] for row in field.of("training", family, FLAGSHIP)]
        marks = (" *" if family in field.headline(at) else "") + beyond.mark(returned)
        name = f"{family}{marks} ({field.named(family, BEST, at)} {best.median:g})"
        spent = field.ratio(family, FLAGSHIP, BEST, at)
        time = field.ratio(family, FLAGSHIP, FASTEST, at, time=True)
        lost = ours.success < best.success - ours.error
        return plots.Reduction(name, spent, time, str(ours), plots.LOOKS[FLAGSHIP], lost)

    families = sorted(map(line, field.ran(FLAGSHIP)), key=lambda one: one.evaluations.value)
    groups = [("families", families), *(beyond.groups(results, at) if results else [])]
    rows = sum(1 + len(lines) for _, lines in groups)
    figure, place = plots.axes(6.8, 1.2 + 0.3 * max(4, rows))
    plots.reductions(place, groups)
    place.set_title(f"MetaBroyden to {at:g}", fontsize=9)
    return figure


_pair = partial(panels, _SHOWN, title="to {:g}", columns=2, size=(5.25, 4.4))
"""A figure of two plots, one a tolerance."""


def _profiles(field: Field) -> Any:
    """Dolan and Moré's profiles, every family weighing the same; one on which a solver did not run it does not solve."""
    factors = np.geomspace(1, 10, 60)

    def draw(place: Any, at: float) -> None:
        shares: dict[str, Any] = {}
        for family in field.families:
            found = {name: field.outcome(family, name, at) for name in _PROFILED}
            for name, share in profile({name: one for name, one in found.items() if one}, factors).items():
                shares[name] = shares.get(name, 0) + share / len(field.families)
        plots.profiles(place, factors, shares)

    return _pair(draw, ylabel="share of samples solved")


def _metric(field: Field, by: str) -> Any:
    """Mean score of the task by evaluations, or by the time at which so many were done."""

    def draw(place: Any, family: str) -> None:
        (star,) = field.of("star", family, "float64")
        for name, drawn in _drawn(field, family).items():
            points = {row["evaluations"]: row["score"] for row in _first(field.of("depth", family, name))}
            if by == "time":
                paces = {row["evaluations"]: row["seconds"] for row in _first(field.of("pace", family, name))}
                points = {1e3 * middle(paces[k]): score for k, score in points.items() if k in paces}
            line(place, drawn, list(points), list(points.values()), marked=True)
        goal, higher = float(np.mean(star["score"])), star["higher_is_better"]
        place.axhline(goal, color="black", linewidth=0.8)
        place.set_ylim(goal - (0.24 if higher else 0.05), goal + (0.04 if higher else 0.6))
        place.set_title(f"{family}: {'accuracy' if higher else 'bits a token'}", fontsize=8)
        plots.log_ticks(place, (1, 2, 5, 10, 20, 40)) if by == "evaluations" else place.set_xscale("log")

    return panels(field.families, draw, _AXIS[by].replace("time", "time of so many evaluations"))


def _break_even(field: Field) -> Any:
    """How many samples a solver must solve until its training has paid, against the fastest classical solver; None where it
    never does."""
    found: dict[str, float] = {}
    for family in field.ran(FLAGSHIP):
        trained = middle(row["cpu_seconds"] for row in field.of("training", family, FLAGSHIP))
        ours, theirs = (field.must(family, name, 1e-3) for name in (FLAGSHIP, FASTEST))
        samples = ours.evaluations.shape[1] / ours.seconds.shape[1]
        saved = float(np.median(theirs.seconds) - np.median(ours.seconds)) / samples
        found[family] = trained / saved if saved > 0 else np.inf
    paying = sorted((name for name in found if 0 < found[name] < np.inf), key=lambda name: -found[name])
    if not paying:
        return None
    words = "samples solved to 1e-3 until training has paid, on one thread"
    figure, place = plots.axes(6.8, 1.2 + 0.3 * max(4, len(found)), xlabel=words, xscale="log")
    drawn = place.barh(paying, [found[name] for name in paying], color=plots.colour(FLAGSHIP))
    place.bar_label(drawn, fmt="{:,.0f}", fontsize=7, padding=3)
    never = ", ".join(name for name in found if name not in paying)
    place.set_title(f"never, since no time is saved: {never}" if never else "on all families", fontsize=6, wrap=True)
    return figure
