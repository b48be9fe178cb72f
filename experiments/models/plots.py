"""Figures of one family, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import ScalarFormatter

from experiments.bench.figures import axes as new_axes
from experiments.bench.figures import save as save_figure

if TYPE_CHECKING:
    from experiments.models.report import FamilyResults

_WAYS = {
    "DEQ": ("#D55E00", "-"),
    "DEQ, Jacobian penalty": ("#E69F00", "--"),
    "unrolled": ("#0072B2", "-."),
    "explicit": ("#000000", ":"),
    "flow": ("#009E73", "--"),
}
_LINE = 64  # characters of a passage in a line of a picture


def draw(results: FamilyResults, folder: Path) -> list[Path]:
    """All figures that the rows allow."""
    made = [training(results, folder / "training.png"), depth(results, folder / "depth.png")]
    if results.of("units"):
        made.append(units(results, folder / "units.png"))
    if results.of("tokens"):
        made.append(tokens(results, folder / "tokens.png"))
    if results.of("parts"):
        made.append(parts(results, folder / "parts.png"))
    return made


def _style(way: str) -> dict[str, Any]:
    colour, line = _WAYS[way]
    return {"color": colour, "linestyle": line, "linewidth": 1.9, "label": way}


def training(results: FamilyResults, path: Path) -> Path:
    """Validation score by epoch of every variant."""
    figure, axes = new_axes()
    for way in results.ways:
        epochs = results.of("epoch", way=way)
        axes.plot([row["epoch"] for row in epochs], [row["score"] for row in epochs], **_style(way))
    axes.set(xlabel="epoch", ylabel=f"{results.of('quality')[0]['metric']}, validation")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{results.name}: training", fontsize=10)
    return save_figure(figure, path)


def depth(results: FamilyResults, path: Path) -> Path:
    """Score and residual against evaluations, of the solver and of plain iteration."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0))
    for way in results.ways:
        for method in dict.fromkeys(row["method"] for row in results.of("depth", way=way)):
            rows = results.of("depth", way=way, method=method)
            style = _style(way) | {"label": f"{way}, {method}"}
            if method == "plain iteration" and way != "unrolled":
                style |= {"alpha": 0.5, "linewidth": 1.3}
            k = [row["evaluations"] for row in rows]
            left.plot(k, [row["score"] for row in rows], **style)
            middle = np.array([row["residual"][1] for row in rows], dtype=float)
            right.plot(k, np.where(np.isfinite(middle), middle, np.nan), **style)
    trained = results.described["depth"]
    left.axvline(trained, color="0.6", linewidth=0.8)
    left.text(trained, 0.01, " depth of the unrolled", fontsize=7, color="0.4", transform=left.get_xaxis_transform())
    left.set(xlabel="evaluations of f", ylabel=f"{results.of('quality')[0]['metric']}, test", xscale="log")
    right.set(xlabel="evaluations of f", ylabel="relative residual, median", xscale="log", yscale="log")
    right.set_ylim(top=min(right.get_ylim()[1], 10))  # what diverges leaves the picture
    right.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def units(results: FamilyResults, path: Path) -> Path:
    """Activations by depth with their fixed points, and the distance to the fixed point, of DEQ and unrolled network."""
    rows = results.of("units")
    figure, grid = plt.subplots(1, len(rows) + 1, figsize=(4.4 * (len(rows) + 1), 3.8), squeeze=False)
    for axes, row in zip(grid[0], rows, strict=False):
        for number, (path_of, star) in enumerate(zip(row["activations"], row["fixed_point"], strict=True)):
            colour = f"C{number}"
            axes.plot(path_of, color=colour, linewidth=1.3)
            axes.axhline(star, color=colour, linewidth=0.7, linestyle=":")
        axes.set(xlabel="depth", ylabel="activation")
        axes.set_title(f"{row['way']}: dotted, the fixed point (residual {row['residual']:.0e})", fontsize=9)
        grid[0][-1].semilogy(row["distance"], **_style(row["way"]))
    grid[0][-1].set(xlabel="depth", ylabel="relative distance to the fixed point")
    grid[0][-1].legend(frameon=False, fontsize=8)
    for axes in grid[0]:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def tokens(results: FamilyResults, path: Path) -> Path:
    """Held-out passages, each token on the colour of the evaluations until it has settled."""
    rows = results.of("tokens")
    top = max(max(row["evaluations"]) for row in rows)
    low = min(min(row["evaluations"]) for row in rows)
    placed = [_placed(row["tokens"]) for row in rows]
    height = sum(places[-1][1] + 1 for places in placed) + len(rows)
    figure, axes = plt.subplots(figsize=(11.5, 0.42 * height + 0.9))
    shades, scale = plt.get_cmap("cividis"), LogNorm(low, max(top, low + 1))
    y = 0.0
    for row, places in zip(rows, placed, strict=True):
        for spent, (x, line, width, shown) in zip(row["evaluations"], places, strict=True):
            share, below = float(scale(spent)), -y - line
            axes.add_patch(plt.Rectangle((x, below - 0.5), width, 0.95, color=shades(share), linewidth=0))
            ink = "white" if share < 0.55 else "black"
            axes.text(x + width / 2, below, shown, ha="center", va="center", fontsize=7.5, color=ink)
        y += places[-1][1] + 1.6
    axes.set(xlim=(0, _LINE), ylim=(-y + 0.5, 0.8))
    axes.axis("off")
    bar = figure.colorbar(plt.cm.ScalarMappable(scale, shades), ax=axes, fraction=0.02, pad=0.01)
    bar.set_ticks([n for n in (1, 2, 3, 5, 10, 20, 30, 50, 100) if low <= n <= top], minor=False)
    bar.set_ticks([], minor=True)
    bar.ax.yaxis.set_major_formatter(ScalarFormatter())
    bar.set_label("evaluations", fontsize=8)
    axes.set_title(f"Evaluations until a token's own residual stays below {rows[0]['tolerance']:g}", fontsize=10)
    return save_figure(figure, path)


def _placed(tokens: Sequence[str]) -> list[tuple[float, int, float, str]]:
    """(x, line, width, what is shown) of each token: a character has width 1, a word nearly that of its letters."""
    places: list[tuple[float, int, float, str]] = []
    x, line = 0.0, 0
    for token in tokens:
        shown = {"\n": "¶", " ": "␣"}.get(token, token)
        width = 0.5 + 0.75 * len(shown) if len(shown) > 1 else 1.0
        if x + width > _LINE:
            x, line = 0.0, line + 1
        places.append((x, line, width, shown))
        x += width
    return places


def parts(results: FamilyResults, path: Path) -> Path:
    """Residual of each tensor of the state by depth."""
    figure, axes = new_axes()
    table = np.array(results.of("parts")[0]["residual"])
    resting = (table == 0).all(axis=1)
    exact = bool(resting.any())  # a converted network: one layer after another, in so many evaluations
    shown = table[: resting.argmax() + 1] if exact else table
    depths = np.arange(1, len(shown) + 1)
    for number in range(table.shape[1]):
        axes.plot(depths, shown[:, number], "o-", markersize=3, label=f"part {number + 1} of the state")
    axes.set(xlabel="evaluations of f", ylabel="relative residual, median", yscale="linear" if exact else "log")
    if exact:
        axes.set_xticks(depths)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{results.name}: the parts of the state come to rest" + ", exactly" * exact, fontsize=10)
    return save_figure(figure, path)
