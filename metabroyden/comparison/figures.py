"""The one style of all figures, and the kinds of plots they are made of. From rows and outcomes alone.

Colours are Okabe & Ito's and Tol's, told apart by the colour-blind; line styles and markers tell solvers apart in grey.
Figures are made without pyplot, so that no backend is chosen or switched. matplotlib is imported when one is drawn.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metabroyden.comparison.statistics import Interval, Outcome
from metabroyden.comparison.tables import Row, grouped
from metabroyden.storage import atomic_write

FLAGSHIP = "meta-broyden"
Look = tuple[str, Any, str]
"""A solver's colour, line style and marker."""
_DASHES, _DOTS, _DASHDOTS = (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1))
LOOKS: dict[str, Look] = {
    FLAGSHIP: ("#D55E00", "-", "o"),
    "grouped": ("#CC79A7", "-", "s"),
    "hyper-anderson": ("#E69F00", _DASHES, "D"),
    "universal": ("#999999", "-", "v"),
    "coordinatewise": ("#882255", _DASHES, "s"),
    "Picard": ("#8A6D00", "-.", "d"),
    "tuned Picard": ("#B4AC60", _DASHDOTS, "d"),
    "Anderson": ("#009E73", "-.", "^"),
    "tuned Anderson": ("#44AA99", (0, (5, 1, 1, 1)), "h"),
    "Broyden": ("#56B4E9", "--", "P"),
    "tuned Broyden": ("#0072B2", _DASHDOTS, "X"),
    "bad Broyden": ("#332288", "--", "H"),
    "Newton": ("#661100", _DASHDOTS, "p"),
    "Newton-Krylov": ("#661100", _DASHDOTS, "P"),
    "best classical": ("#000000", "-.", "^"),
    "fastest classical": ("#000000", "--", "v"),
    "Peaceman-Rachford": ("#000000", _DASHDOTS, "<"),
    "forward-backward": ("#8C564B", _DASHES, ">"),
    "torchdeq Broyden": ("#332288", ":", "+"),
    "tuned torchdeq Broyden": ("#332288", _DOTS, "4"),
    "torchdeq Anderson": ("#555555", _DOTS, "*"),
    "tuned torchdeq Anderson": ("#555555", ":", "8"),
    "torchdeq Picard": ("#8A6D00", ":", "3"),
    "scipy broyden1": ("#0072B2", ":", "1"),
    "scipy hybr": ("#D55E00", ":", "2"),
}
"""Colour, line style and marker, one a solver in every figure."""
LABELS = {FLAGSHIP: "MetaBroyden", "meta-splitting": "MetaBroyden", "grouped": "GroupedLSTM",
          "hyper-anderson": "HyperAnderson", "coordinatewise": "coordinatewise LSTM"}  # fmt: skip
_SPARE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#8C564B", "#F0E442", "#0072B2", "#D55E00")
_HATCHES = ("", "///", "...", "xx", "\\\\", "oo", "++", "--")
_MARKERS = ("o", "s", "^", "D", "v", "p", "h", "*")
_LINES = (_DASHES, _DASHDOTS, _DOTS, (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)), "--", ":")
_RED, _INK = "#B00020", "#333333"
_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000)
_FEW = 8
"""Curves up to which each has its band, and a legend beside them."""


def label(name: str) -> str:
    """What a solver is called in tables and figures."""
    return LABELS.get(name, name)


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: with its $ signs, and in a legend even where it begins with _."""
    return f" {text}".replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")


def title(place: Any, text: str) -> None:
    """Set a title in lines that fit above the axes; formulas between $ signs are set where they are right."""
    text = " ".join(text.split())
    text = text if "$" in text and _is_formula(text) else plain(text)
    inches = place.get_position().width * place.figure.get_figwidth()
    place.set_title(textwrap.fill(text, max(20, int(13 * inches))), fontsize=10)


def _is_formula(text: str) -> bool:
    """Whether matplotlib can set what is between $ signs."""
    from matplotlib.mathtext import MathTextParser

    try:
        MathTextParser("path").parse(text)
    except (ValueError, RuntimeError):
        return False
    return True


def assign(methods: Mapping[str, str | None]) -> dict[str, Look]:
    """Colour, line style and marker of the solvers of one comparison, no two of them alike.

    A learned solver has the look of its method, where nobody else has, a name of `LOOKS` its own; others have spare ones.

    Args:
        methods: by name, the registered name of the solver's class, or None.
    """
    found: dict[str, Look] = {}
    for name, method in methods.items():
        own = LOOKS.get("meta-broyden" if method == "meta-splitting" else method or "", LOOKS.get(name))
        if own is not None and own not in found.values():
            found[name] = own
    taken = {look[0] for look in found.values()}
    spare = [colour for colour in dict.fromkeys(look[0] for look in LOOKS.values()) if colour not in taken]
    for number, name in enumerate(name for name in methods if name not in found):
        colour = spare[number] if number < len(spare) else _SPARE[number % len(_SPARE)]
        line = _LINES[(number + number // len(_MARKERS)) % len(_LINES)]
        found[name] = (colour, line, _MARKERS[number % len(_MARKERS)])
    return {name: found[name] for name in methods}


def colour(name: str, number: int = 0) -> str:
    """A solver's colour; the number-th spare one for a name without."""
    return LOOKS[name][0] if name in LOOKS else _SPARE[number % len(_SPARE)]


def look(name: str, number: int = 0) -> dict[str, Any]:
    """Colour, line style, width and label of a solver's line."""
    line = LOOKS[name][1] if name in LOOKS else "-"
    width = 2.2 if name == FLAGSHIP else 1.5
    return {"color": colour(name, number), "linestyle": line, "linewidth": width, "label": label(name)}


def marker(name: str, number: int = 0) -> str:
    """A solver's marker."""
    return LOOKS[name][2] if name in LOOKS else _MARKERS[number % len(_MARKERS)]


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG and, beside it, as PDF; the PNG's path."""
    atomic_write(path, png(figure))
    figure.savefig(path.with_suffix(".pdf"), bbox_inches="tight", metadata={"CreationDate": None})
    return path


def png(figure: Any) -> bytes:
    """A figure as PNG of a palette of 256 colours, which keeps those of the solvers and takes a third of the size."""
    from PIL import Image  # matplotlib needs it, too

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130, bbox_inches="tight")
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(small, "PNG", optimize=True)
    return small.getvalue()


def own_axes(ax: Any = None, size: tuple[float, float] = (6.4, 4.2)) -> Any:
    """The axes that a caller gave, or new ones of pyplot's, whose backend stays what it is.

    TypeError for what are no axes, ImportError without matplotlib.
    """
    if ax is not None:
        if not hasattr(ax, "get_yaxis_transform"):
            raise TypeError(f"ax must be matplotlib axes, got {type(ax).__name__}")
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("figures need matplotlib, which is not installed: pip install matplotlib") from error
    place = plt.subplots(figsize=size, layout="constrained")[1]
    place.grid(alpha=0.25)
    place.spines[["top", "right"]].set_visible(False)
    return place


def axes(width: float = 6.4, height: float = 4.2, **settings: Any) -> tuple[Any, Any]:
    """A figure with one plot; settings: of its axes, as `Axes.set` takes them."""
    figure, (place,) = grid(1, 1, (width, height))
    place.tick_params(labelsize=9)
    place.set(**settings)
    return figure, place


def grid(count: int, columns: int = 4, size: tuple[float, float] = (3.3, 2.5)) -> tuple[Any, list[Any]]:
    """A figure of small plots of a size each in inches, the empty ones hidden."""
    from matplotlib.figure import Figure

    rows = math.ceil(count / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows))
    places = figure.subplots(rows, columns, squeeze=False)
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


def lines(place: Any, rows: Iterable[Row], by: str, x: str, y: str, **style: Any) -> None:
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
        hatch, words = _HATCHES[number % len(_HATCHES)], label(name)
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


class Reduction(NamedTuple):
    """A solver's line in a figure of reductions."""

    label: str
    evaluations: Interval  # over the best classical solver's
    time: Interval  # over the fastest one's
    note: str  # in words
    look: Look
    lost: bool = False  # whether it solves fewer samples


def reductions(place: Any, groups: Sequence[tuple[str, Sequence[Reduction]]]) -> None:
    """Ratios of evaluations (filled) and of time (hollow) with their intervals beside a line at one, on a log scale.

    groups: words and lines. On the right stand the notes and the ratios of time. A note is red where evaluations are above
    one or fewer samples are solved, a ratio of time where it is above one.
    """
    at, ticks = 0.0, []
    every = [one for _, lines in groups for one in lines]
    timed = any(np.isfinite(one.time.value) for one in every)
    aside = _NOTE + 5.2 * max(len(words) for words in (_NOTED, *(one.note for one in every)))
    for words, lines in groups:
        if words:
            _heading(place, at, words)
            at += 1
        for one in lines:
            ticks.append((at, one.label))
            _reduction(place, at, one, aside)
            at += 1
    _named_rows(place, ticks, at)
    place.set_xlabel(
        "evaluations over the best classical solver's (filled)"
        + (",\ntime over the fastest one's (hollow); left of 1 is less" if timed else "; left of 1 is fewer"),
        fontsize=9,
    )
    for x, words in ((_NOTE, _NOTED), *([(aside, "time")] if timed else [])):
        _beside(place, x, -0.9, words, "#666666")
    seen = [value for one in every for ratio in (one.evaluations, one.time) for value in ratio if 0 < value < np.inf]
    low, high = min([0.5, *seen]) / 1.15, max([1.5, *seen]) * 1.15
    fine = (0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 3)
    log_ticks(place, [tick for tick in (fine if high / low < 8 else _RATIOS) if low <= tick <= high], suffix="×")
    place.set_xlim(low, high)
    place.axvline(1, color="black", linewidth=0.8, zorder=1)


_NOTED = "median (solved)"
_NOTE = 7.0
"""Where notes stand, in points from the axes."""


def _beside(place: Any, x: float, at: float, words: str, ink: str) -> None:
    """Words on the right of the axes."""
    where = {"xycoords": place.get_yaxis_transform(), "xytext": (x, 0), "textcoords": "offset points"}
    place.annotate(words, (1, at), fontsize=8.5, va="center", color=ink, annotation_clip=False, **where)


def _reduction(place: Any, at: float, one: Reduction, aside: float) -> None:
    """A solver's line; aside: where the ratio of times stands, in points from the axes."""
    colour, _, mark = one.look
    for ratio, shift, fill in ((one.evaluations, -0.14, colour), (one.time, 0.14, "white")):
        if np.isfinite(ratio.value):
            spread = np.array([[ratio.value - ratio.low], [ratio.high - ratio.value]]).clip(0)
            style = {"fmt": mark, "color": colour, "markersize": 6, "markeredgewidth": 1.4, "linewidth": 1.2}
            place.errorbar([ratio.value], [at + shift], xerr=spread, markerfacecolor=fill, **style)
    worse = one.lost or one.evaluations.value > 1
    notes = [(_NOTE, one.note, worse)]
    if np.isfinite(one.time.value):
        notes.append((aside, f"{one.time.value:.2f}×", one.time.value > 1))
    for x, words, red in notes:
        _beside(place, x, at, words, _RED if red else _INK)


def _heading(place: Any, at: float, words: str) -> None:
    """Words above a group of rows."""
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    place.text(
        0.01,
        at,
        words,
        transform=place.get_yaxis_transform(),
        fontsize=8.5,
        fontweight="bold",
        va="center",
        bbox=behind,
    )


def _named_rows(place: Any, ticks: Sequence[tuple[float, str]], end: float) -> None:
    """Rows from the top down, with the solvers' names."""
    place.set_yticks([tick for tick, _ in ticks], [plain(label) for _, label in ticks], fontsize=9)
    place.tick_params(axis="x", labelsize=8.5)
    place.set_ylim(end - 0.4, -1.4)
    place.grid(axis="y", visible=False)


class Time(NamedTuple):
    """A solver's bar in a figure of times."""

    label: str
    milliseconds: float
    inside: float  # share of it inside f
    note: str  # in words
    look: Look


def times(place: Any, groups: Sequence[tuple[str, Sequence[Time]]]) -> None:
    """Bars of milliseconds, the part outside of f paler; groups: words and bars."""
    at, ticks = 0.0, []
    for words, bars in groups:
        _heading(place, at, words)
        for at, one in enumerate(bars, int(at) + 1):  # noqa: B020 (goes on)
            ticks.append((at, one.label))
            inside = one.inside * one.milliseconds
            place.barh(at, inside, 0.7, color=one.look[0])
            place.barh(at, one.milliseconds - inside, 0.7, left=inside, color=one.look[0], alpha=0.35)
            place.text(one.milliseconds, at, f" {one.note}", fontsize=8.5, va="center")
        at += 1
    _named_rows(place, ticks, at)
    place.set_ylim(at - 0.4, -0.6)
    place.set_xlabel("milliseconds for all problems: inside f, outside of it (paler)", fontsize=9)
    place.set_xlim(0, 1.45 * max(one.milliseconds for _, bars in groups for one in bars))


def converging(place: Any, x: Sequence[float], curve: Mapping[str, Sequence[float]], end: float, style: Row) -> None:
    """A curve of medians that ends, with a mark, where they reach `end`; a band from "low" to "high" that ends likewise."""
    last = _reached(curve["median"], end)
    place.plot(x[:last], curve["median"][:last], **style)
    if last and curve["median"][last - 1] <= end:
        place.plot(x[last - 1], curve["median"][last - 1], style.get("marker", "o"), color=style["color"], markersize=6)
    if "high" in curve:
        last = _reached(curve["high"], end)
        band = curve["low"][:last], curve["high"][:last]
        place.fill_between(x[:last], *band, color=style["color"], alpha=0.1, linewidth=0)


def key(place: Any) -> None:
    """A legend: among the curves where there are few of them, else beside the axes."""
    many = len(place.get_legend_handles_labels()[1]) > _FEW
    beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    place.legend(frameon=False, fontsize=8.5, handlelength=2.8, **(beside if many else {"loc": "best"}))


def bands(curves: int) -> bool:
    """Whether so many curves each have a band."""
    return curves <= _FEW


def _reached(values: Sequence[float], end: float) -> int:
    """How many values there are up to the first that is at most `end`; all of them where none is."""
    return next((number for number, value in enumerate(values, 1) if value <= end), len(values))


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
            xerr=np.array([middle - low, high - middle]), label=prefix + label(name),
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
