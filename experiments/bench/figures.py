"""The one style of all figures, and the kinds of plots they are made of. From rows and outcomes alone.

Colours are Okabe & Ito's, told apart by the colour-blind; line styles, markers and hatches tell solvers apart in grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.bench.statistics import Interval, Outcome
from experiments.bench.tables import grouped

FLAGSHIP = "meta-broyden"
_DASHES, _DOTS, _DASHDOTS = (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1))
LOOKS: dict[str, tuple[str, Any, str]] = {
    FLAGSHIP: ("#D55E00", "-", "o"),
    "grouped": ("#CC79A7", "-", "s"),
    "hyper-anderson": ("#E69F00", _DASHES, "D"),
    "universal": ("#999999", "-", "v"),
    "coordinatewise": ("#CC79A7", _DASHES, "s"),
    "tuned Picard": ("#8A6D00", _DASHDOTS, "d"),
    "tuned Anderson": ("#7B3294", (0, (5, 1, 1, 1)), "h"),
    "Picard": ("#F0E442", "-.", "d"),
    "Anderson": ("#009E73", "-.", "^"),
    "Newton": ("#8C564B", _DASHDOTS, "p"),
    "Newton-Krylov": ("#8C564B", _DASHDOTS, "p"),
    "best classical": ("#009E73", "-.", "^"),
    "Peaceman-Rachford": ("#009E73", _DASHDOTS, "^"),
    "Broyden": ("#0072B2", "--", "x"),
    "tuned Broyden": ("#0072B2", _DASHDOTS, "x"),
    "bad Broyden": ("#56B4E9", "--", "x"),
    "torchdeq Broyden": ("#56B4E9", ":", "+"),
    "torchdeq Anderson": ("#000000", _DOTS, "*"),
    "tuned torchdeq Anderson": ("#000000", _DOTS, "*"),
    "torchdeq Picard": ("#8A6D00", ":", "d"),
    "scipy broyden1": ("#0072B2", ":", "1"),
    "scipy hybr": ("#D55E00", ":", "2"),
}
"""Colour, line style and marker, one a solver in every figure."""
LABELS = {FLAGSHIP: "MetaBroyden", "grouped": "GroupedLSTM", "hyper-anderson": "HyperAnderson",
          "coordinatewise": "coordinatewise LSTM"}  # fmt: skip
_SPARE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#8C564B", "#F0E442", "#0072B2", "#D55E00")
_HATCHES = ("", "///", "...", "xx", "\\\\", "oo", "++", "--")
_MARKERS = ("o", "s", "^", "D", "v", "p", "h", "*")


def colour(name: str, number: int = 0) -> str:
    """A solver's colour; the number-th spare one for a name without."""
    return LOOKS[name][0] if name in LOOKS else _SPARE[number % len(_SPARE)]


def look(name: str, number: int = 0) -> dict[str, Any]:
    """Colour, line style, width and label of a solver's line."""
    line = LOOKS[name][1] if name in LOOKS else "-"
    width = 2.2 if name == FLAGSHIP else 1.5
    return {"color": colour(name, number), "linestyle": line, "linewidth": width, "label": LABELS.get(name, name)}


def marker(name: str, number: int = 0) -> str:
    """A solver's marker."""
    return LOOKS[name][2] if name in LOOKS else _MARKERS[number % len(_MARKERS)]


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG and, beside it, as PDF; the PNG's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    figure.savefig(path.with_suffix(".pdf"), bbox_inches="tight", metadata={"CreationDate": None})
    plt.close(figure)
    return path


def axes(width: float = 6.4, height: float = 4.2, **settings: Any) -> tuple[Any, Any]:
    """A figure with one plot; settings: of its axes, as `Axes.set` takes them."""
    figure, (place,) = grid(1, 1, (width, height))
    place.tick_params(labelsize=9)
    place.set(**settings)
    return figure, place


def grid(count: int, columns: int = 4, size: tuple[float, float] = (3.3, 2.5)) -> tuple[Any, list[Any]]:
    """A figure of small plots of a size each in inches, the empty ones hidden."""
    rows = math.ceil(count / columns)
    figure, places = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    every = list(places.flat)
    for place in every[count:]:
        place.set_visible(False)
    for place in every[:count]:
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
        place.tick_params(labelsize=7)
    return figure, every[:count]


def panels(
    items: Sequence[Any], draw: Callable[[Any, Any], None], xlabel: str = "", ylabel: str = "", *, title: str = "{}",
    columns: int = 4, size: tuple[float, float] = (3.3, 2.5),
) -> Any:  # fmt: skip
    """A figure of small plots under one legend, an item each, which draw(place, item) draws; title: its format."""
    figure, places = grid(len(items), columns, size)
    for place, item in zip(places, items, strict=True):
        place.set_title(title.format(item), fontsize=8)
        draw(place, item)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    legend(figure, places)
    return figure


def curves(
    path: Path, *panels: tuple[Mapping[str, Sequence[Any]], dict[str, Any]], size: tuple[float, float] = (5, 4.2)
) -> Path:
    """Write a figure of plots side by side: by name (x, y) or (x, y, band) of a line, see `line`; settings of the axes."""
    figure, places = grid(len(panels), len(panels), size)
    for place, (lines, settings) in zip(places, panels, strict=True):
        for number, (name, drawn) in enumerate(lines.items()):
            line(place, name, *drawn, number=number)
        place.set(**settings)
    legend(figure, places)
    return save(figure, path)


def line(
    place: Any, name: str, x: Sequence[float], y: Sequence[float],
    band: tuple[Sequence[float], Sequence[float]] | None = None, *, number: int = 0, marked: bool = False, **more: Any,
) -> None:  # fmt: skip
    """A solver's line, with a band from low to high; number: of the spare look, where the name has none of its own."""
    shown = {**look(name, number), **more, **({"marker": marker(name, number), "markersize": 3.5} if marked else {})}
    place.plot(x, y, **shown)
    if band is not None:
        place.fill_between(x, *band, color=shown["color"], alpha=0.12, linewidth=0)


def lines(place: Any, rows: Iterable[dict[str, Any]], by: str, x: str, y: str, **style: Any) -> None:
    """A line for each name under the key `by`, of the numbers under x and y; style: as of `line`."""
    for number, of in enumerate(grouped(rows, by)):
        line(place, of[0][by], [row[x] for row in of], [row[y] for row in of], number=number, **style)


def bars(
    place: Any, groups: Sequence[str], names: Sequence[str], height: Callable[[str, str], Outcome | float | None]
) -> None:
    """Bars of each name in each group, from height(group, name): a number, or an outcome, whose median it is and above
    which the share solved stands where not all are."""
    width = 0.84 / len(names)
    for number, name in enumerate(names):
        hatch, words = _HATCHES[number % len(_HATCHES)], LABELS.get(name, name)
        shown: dict[str, Any] = {"color": colour(name, number), "hatch": hatch, "edgecolor": "white"}
        for at, group in enumerate(groups):
            found = height(group, name)
            if found is None:
                continue
            tall = found.median if isinstance(found, Outcome) else found
            spot = at + (number - (len(names) - 1) / 2) * width
            place.bar(spot, tall, width, label=words, **shown)
            words = ""  # once
            if isinstance(found, Outcome) and found.success < 0.995:
                place.text(spot, tall + 0.5, f"{found.success:.0%}", ha="center", fontsize=5, rotation=90)
    place.set_xticks(range(len(groups)), groups, rotation=35, ha="right", fontsize=7)
    place.grid(axis="x", visible=False)


def intervals(
    place: Any,
    groups: Sequence[str],
    names: Sequence[str],
    value: Callable[[str, str], Interval | None],
    prefix: str = "",
) -> None:
    """Ratios with their intervals beside a line at one, a group a row."""
    for number, name in enumerate(names):
        found = [(at, one) for at, group in enumerate(groups) if (one := value(group, name)) is not None]
        heights = [at + 0.22 * ((len(names) - 1) / 2 - number) for at, _ in found]
        middle, low, high = np.array([one for _, one in found]).reshape(-1, 3).T
        place.errorbar(
            middle, heights, fmt=marker(name, number), color=colour(name, number), markersize=5,
            xerr=np.array([middle - low, high - middle]), label=prefix + LABELS.get(name, name),
        )  # fmt: skip
    place.set_yticks(range(len(groups)), groups, fontsize=8)
    place.axvline(1, color="black", linewidth=0.8)


def profiles(place: Any, factors: np.ndarray, shares: Mapping[str, np.ndarray]) -> None:
    """Performance profiles, see `statistics.profile`."""
    for number, (name, share) in enumerate(shares.items()):
        line(place, name, list(factors), list(share), number=number)
    log_ticks(place, [tick for tick in (1, 2, 3, 5, 10, 20, 30) if tick <= factors[-1] + 1e-9])
    place.set(xlabel="times the evaluations of the best", ylim=(0, 1.02))


def log_ticks(place: Any, ticks: Iterable[float], axis: str = "x", suffix: str = "") -> None:
    """A logarithmic axis with these numbers at it."""
    ticks = list(ticks)
    place.set(**{f"{axis}scale": "log"})
    getattr(place, f"set_{axis}ticks")(ticks, [f"{tick:g}{suffix}" for tick in ticks])
    getattr(place, f"{axis}axis").minorticks_off()


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> Any:
    """A figure of ratios with their numbers, blue below one and red above; a dash for NaN."""
    figure, place = axes(max(7.0, 0.45 * len(columns) + 3), 1.6 + 0.3 * len(rows))
    place.grid(visible=False)
    place.imshow(values, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        ink = "white" if abs(value - 1) > 0.75 else "black"
        place.text(x, y, f"{value:.2f}" if np.isfinite(value) else "–", ha="center", va="center", fontsize=6, color=ink)
    place.set_xticks(range(len(columns)), columns, rotation=55, ha="right", fontsize=7)
    place.set_yticks(range(len(rows)), rows, fontsize=7)
    place.set_title(title, fontsize=8)
    return figure


def legend(figure: Any, places: Iterable[Any]) -> None:
    """One legend above all small plots."""
    found: dict[str, Any] = {}
    for place in places:
        for handle, words in zip(*place.get_legend_handles_labels(), strict=True):
            found.setdefault(words, handle)
    figure.legend(found.values(), found.keys(), loc="upper center", ncols=min(6, len(found)), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
