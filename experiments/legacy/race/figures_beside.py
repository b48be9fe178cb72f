"""Figures of what is run beside the race: other inputs and cells, other families' solvers, far horizons, ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.legacy.race.contestants import FLAGSHIP
from experiments.legacy.race.schema import Row
from experiments.legacy.race.statistics import Field, SolverResult, ratio_of
from experiments.legacy.race.style import LABELS, LOOKS, grid, heat_map, legend, look

_COLOURS = ("#D55E00", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#F0E442", "#999999", "#0072B2")
_HATCHES = ("", "///", "...", "xx", "\\\\", "oo", "++", "--")
_OTHER = {"digits": "fashion", "fashion": "digits", "shakespeare": "words", "words": "shakespeare"}


def make(parts: Mapping[str, Field], far: Sequence[Row]) -> list[tuple[str, Any]]:
    """(name, figure) of all there are rows for; far: curves past the horizon."""
    outside, made = parts.get("outside"), []
    if outside is not None and swept(outside):
        made.append(("norms", norms(outside)))
    if "transfer" in parts:
        made.append(("transfer", transfer(parts)))
    if far:
        made.append(("horizon", horizon(parts["families"], far)))
    if "ablation" in parts:
        made.append(("ablation", ablation(parts["ablation"])))
    return made


def swept(outside: Field) -> list[tuple[float, str]]:
    """(norm, name) of the dense cells of the sweep."""
    found = [(name.partition("dense, norm ")[2], name) for name in outside.families]
    return sorted((float(norm), name) for norm, name in found if norm)


def norms(outside: Field) -> Any:
    """Median evaluations of solvers as they are, by the cell's spectral norm; the universal one knows such cells."""
    sweep = swept(outside)
    figure, places = grid(2, 2)
    figure.set_size_inches(10.5, 4.4)
    for place, tolerance in zip(places, (1e-2, 1e-3), strict=True):
        for name in outside.solvers(sweep[0][1]):
            shown = LOOKS[name]
            found = [outside.must(cell, name, tolerance) for _, cell in sweep]
            place.plot(
                [norm for norm, _ in sweep], [one.median for one in found], color=shown[0], linestyle=shown[1],
                marker=shown[2], markersize=4, label=LABELS.get(name, name),
            )  # fmt: skip
        place.set(xlabel="spectral norm of W in tanh(Wz + x), 128 units", title=f"to {tolerance:g}", ylim=(0, None))
    places[0].set_ylabel("median evaluations, a failure as the budget")
    legend(figure, places)
    return figure


def transferred(parts: Mapping[str, Field], tolerance: float) -> tuple[list[str], list[str], np.ndarray]:
    """(solvers, problems, evaluations over those of the best classical solver tuned on the family's own inputs).

    Problems are families, and their inputs changed. NaN where a solver did not run.
    """
    field, outside, transfer = parts["families"], parts.get("outside"), parts["transfer"]
    names = ["own", "of the twin on other data", "universal"]
    problems: list[str] = []
    columns: list[list[float]] = []
    for family in field.flagship:
        best = field.best(family, tolerance)
        theirs = field.must(family, best, tolerance)
        found = [
            field.standing(family, FLAGSHIP, tolerance),
            transfer.standing(family, f"{FLAGSHIP} of {_twin(family)}", tolerance),
            field.standing(family, "universal", tolerance),
        ]
        columns.append([_ratio(one, theirs) for one in found])
        problems.append(family)
        for problem in outside.families if outside is not None else ():
            if problem.rpartition(", ")[0] == family and outside is not None:
                theirs = outside.must(problem, best, tolerance)
                found = [outside.standing(problem, name, tolerance) for name in (FLAGSHIP, "universal")]
                columns.append([_ratio(found[0], theirs), float("nan"), _ratio(found[1], theirs)])
                problems.append(problem)
    return names, problems, np.array(columns).T


def _twin(family: str) -> str:
    """The same cell on other data."""
    cell, _, data = family.rpartition("-")
    return f"{cell}-{_OTHER[data]}"


def _ratio(ours: SolverResult | None, theirs: SolverResult) -> float:
    return float("nan") if ours is None else ratio_of(ours, theirs).value


def transfer(parts: Mapping[str, Field], tolerance: float = 1e-2) -> Any:
    """A heat map: solvers against problems that they were trained on, and that they were not."""
    names, problems, values = transferred(parts, tolerance)
    words = f"evaluations to {tolerance:g} over those of the best classical solver, tuned on the family's own inputs"
    return heat_map(values, names, problems, words)


def horizon(field: Field, far: Sequence[Row]) -> Any:
    """Median and middle half of the residual to four times the steps MetaBroyden is trained for, which end at the line."""
    families = list(dict.fromkeys(row["family"] for row in far))
    figure, places = grid(len(families))
    for place, family in zip(places, families, strict=True):
        rows = [row for row in far if row["family"] == family]
        for row in rows:
            name = row["solver"]
            place.semilogy(row["evaluations"], row["median"], label=LABELS.get(name, name), **look(name))
            colour = look(name)["color"]
            place.fill_between(row["evaluations"], row["low"], row["high"], color=colour, alpha=0.12, linewidth=0)
        for row in field.of("horizon", family, FLAGSHIP)[:1]:
            place.axvline(row["steps"] / 4, color="black", linewidth=0.8, linestyle=":", label="trained steps")
        place.set_title(family, fontsize=8)
        place.set_ylim(1e-7, 3)
    figure.supxlabel("evaluations of f", fontsize=9)
    figure.supylabel("relative residual, best so far", fontsize=9)
    legend(figure, places)
    return figure


def ablation(field: Field) -> Any:
    """Median evaluations of MetaBroyden and of what is left without each of its pieces."""
    figure, places = grid(2, 2)
    figure.set_size_inches(10.5, 4.0)
    names = list(dict.fromkeys(name for family in field.families for name in field.solvers(family)))
    width = 0.84 / len(names)
    for place, tolerance in zip(places, (1e-2, 1e-3), strict=True):
        for number, name in enumerate(names):
            label: str | None = LABELS.get(name, name)
            for at, family in enumerate(field.families):
                found = field.standing(family, name, tolerance)
                if found is None:
                    continue
                spot = at + (number - (len(names) - 1) / 2) * width
                shown = {"color": _COLOURS[number], "hatch": _HATCHES[number], "edgecolor": "white"}
                place.bar(spot, found.median, width, label=label, **shown)
                label = None
                if found.success < 0.995:
                    place.text(spot, found.median + 0.4, f"{found.success:.0%}", ha="center", fontsize=5, rotation=90)
        place.set_xticks(range(len(field.families)), field.families, fontsize=8)
        place.set_title(f"median evaluations to {tolerance:g}", fontsize=9)
    legend(figure, places)
    return figure
