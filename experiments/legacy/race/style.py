"""How solvers look in the race's figures: colours for the colour-blind, lines and markers for grey."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.legacy.plots import new_axes, plt
from experiments.legacy.race.contestants import FLAGSHIP

# Okabe & Ito's colours; line style and marker tell solvers apart without them
LOOKS: dict[str, tuple[str, str, str]] = {
    FLAGSHIP: ("#D55E00", "-", "o"),
    "grouped": ("#CC79A7", "-", "s"),
    "hyper-anderson": ("#E69F00", (0, (5, 1)), "D"),  # type: ignore[dict-item]
    "universal": ("#999999", "-", "v"),
    "tuned Picard": ("#8A6D00", (0, (3, 1, 1, 1)), "d"),  # type: ignore[dict-item]
    "tuned Anderson": ("#7B3294", (0, (5, 1, 1, 1)), "h"),  # type: ignore[dict-item]
    "Picard": ("#F0E442", "-.", "d"),
    "Anderson": ("#009E73", "-.", "^"),
    "Newton-Krylov": ("#8C564B", (0, (3, 1, 1, 1)), "p"),  # type: ignore[dict-item]
    "torchdeq Anderson": ("#000000", (0, (1, 1)), "*"),  # type: ignore[dict-item]
    "best classical": ("#009E73", "-.", "^"),
    "Broyden": ("#0072B2", "--", "x"),
    "torchdeq Broyden": ("#56B4E9", ":", "+"),
    "tuned torchdeq Anderson": ("#000000", (0, (1, 1)), "*"),  # type: ignore[dict-item]
}
LABELS = {
    FLAGSHIP: "MetaBroyden",
    "grouped": "GroupedLSTM",
    "hyper-anderson": "HyperAnderson",
    "universal": "universal",
}


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG and, beside it, as PDF; the PNG's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    figure.savefig(path.with_suffix(".pdf"), bbox_inches="tight", metadata={"CreationDate": None})
    plt.close(figure)
    return path


def look(name: str) -> dict[str, Any]:
    """Colour, line style and width of a solver."""
    colour, line, _ = LOOKS.get(name, ("#777777", "-", "."))
    return {"color": colour, "linestyle": line, "linewidth": 2.2 if name == FLAGSHIP else 1.5}


def grid(count: int, columns: int = 4) -> tuple[Any, list[Any]]:
    """A figure of small plots, the empty ones hidden."""
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.3 * columns, 2.5 * rows), squeeze=False)
    places = list(axes.flat)
    for place in places[count:]:
        place.set_visible(False)
    for place in places[:count]:
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
        place.tick_params(labelsize=7)
    return figure, places[:count]


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> Any:
    """Ratios with their numbers, blue below one and red above; a dash for NaN."""
    figure, axes = new_axes(max(7.0, 0.45 * len(columns) + 3))
    figure.set_figheight(1.6 + 0.3 * len(rows))
    axes.grid(visible=False)
    axes.imshow(values, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        ink = "white" if abs(value - 1) > 0.75 else "black"
        axes.text(x, y, f"{value:.2f}" if np.isfinite(value) else "–", ha="center", va="center", fontsize=6, color=ink)
    axes.set_xticks(range(len(columns)), columns, rotation=55, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_title(title, fontsize=8)
    return figure


def legend(figure: Any, axes: Any) -> None:
    """One legend above all small plots."""
    found: dict[str, Any] = {}
    for place in axes:
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="upper center", ncols=min(6, len(found)), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
