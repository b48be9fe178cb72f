"""Figures from rows. Nothing here solves anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Row = dict[str, Any]

# Okabe & Ito's colours, told apart by the colour-blind; line styles tell solvers apart in grey.
_STYLES = {
    "grouped LSTM": ("#D55E00", "-", 2.6),
    "coordinatewise LSTM": ("#CC79A7", "-", 2.0),
    "Broyden": ("#0072B2", "--", 1.8),
    "Anderson": ("#009E73", "-.", 1.8),
    "Picard": ("#000000", ":", 1.8),
}
_SPARE = [("#56B4E9", "--", 1.5), ("#E69F00", "-.", 1.5), ("#999999", ":", 1.5), ("#F0E442", "--", 1.5)]


def _style(name: str, number: int) -> dict[str, Any]:
    colour, line, width = _STYLES.get(name, _SPARE[number % len(_SPARE)])
    return {"color": colour, "linestyle": line, "linewidth": width}


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure and let it go."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path


def new_axes(width: float = 6.4) -> tuple[Any, Any]:
    """A figure with one plot in the house style."""
    figure, axes = plt.subplots(figsize=(width, 4.2))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _mean_over_seeds(rows: list[Row], value: str) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations, and the geometric mean over seeds of rows' values at each."""
    at: dict[int, list[Any]] = {}
    for row in rows:
        at.setdefault(row["nfe"], []).append(row[value])
    keys = sorted(at)
    return np.array(keys), np.array([np.exp(np.mean(np.log(np.maximum(at[key], 1e-12)), axis=0)) for key in keys])


def residual_by_evaluations(rows: list[Row], solvers: list[str], path: Path) -> Path:
    """Median and interquartile band of the residual against evaluations."""
    figure, axes = new_axes()
    for number, name in enumerate(solvers):
        chosen = [row for row in rows if row["row"] == "curve" and row["solver"] == name]
        nfe, bands = _mean_over_seeds(chosen, "residual")
        style = _style(name, number)
        axes.semilogy(nfe, bands[:, 1], label=name, **style)
        axes.fill_between(nfe, bands[:, 0], bands[:, 2], color=style["color"], alpha=0.13, linewidth=0)
    axes.set(xlabel="evaluations of f", ylabel="relative residual (best so far)", xlim=(0, None))
    axes.legend(frameon=False)
    axes.set_title("Held-out images: median, and the middle half")
    return save_figure(figure, path)


def residual_by_time(rows: list[Row], solvers: list[str], path: Path) -> Path:
    """Median residual of the batch against wall-clock."""
    figure, axes = new_axes()
    paths = [row for row in rows if row["row"] == "path"]
    first = min((row.get("seed", 0) for row in paths), default=0)
    tightest = min((row["rtol"] for row in paths), default=0)
    for number, name in enumerate(solvers):
        for row in paths:
            if (row["solver"], row.get("seed", 0), row["rtol"]) == (name, first, tightest):
                seconds = 1e3 * np.array(row["seconds"])
                axes.semilogy(seconds, row["residual"], label=name, **_style(name, number))
    axes.set(xlabel="milliseconds, whole batch", ylabel="median relative residual (best so far)")
    axes.legend(frameon=False)
    axes.set_title(f"Wall-clock, seed {first}: interleaved runs, median")
    return save_figure(figure, path)


def accuracy_by_evaluations(rows: list[Row], solvers: list[str], path: Path) -> Path:
    """Accuracy against the budget of evaluations, mean over seeds."""
    figure, axes = new_axes()
    for number, name in enumerate(solvers):
        at: dict[int, list[float]] = {}
        for row in rows:
            if row["row"] == "accuracy" and row["solver"] == name:
                at.setdefault(row["nfe"], []).append(row["accuracy"])
        axes.plot(sorted(at), [100 * np.mean(at[key]) for key in sorted(at)], label=name, **_style(name, number))
    axes.set(xlabel="evaluations of f allowed", ylabel="accuracy on held-out images (%)", xscale="log")
    ticks = [1, 2, 3, 5, 8, 12, 20, 30, 60]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return save_figure(figure, path)


def evaluations_to_tolerance(rows: list[Row], solvers: list[str], tolerances: list[str], path: Path) -> Path:
    """Median evaluations to each tolerance (whisker: 90th percentile), success rate written above."""
    figure, axes = new_axes(8.4)
    width = 0.8 / len(solvers)
    for number, name in enumerate(solvers):
        samples = [row for row in rows if row["row"] == "sample" and row["solver"] == name]
        for place, tolerance in enumerate(tolerances):
            spent = [row["nfe"][tolerance] for row in samples]
            success = np.mean([row["reached"][tolerance] for row in samples])
            middle, high = np.median(spent), np.percentile(spent, 90)
            x = place + (number - (len(solvers) - 1) / 2) * width
            colour = _style(name, number)["color"]
            axes.bar(x, middle, 0.92 * width, color=colour, alpha=0.85, label=name if place == 0 else None)
            axes.plot([x, x], [middle, high], color="0.35", linewidth=1)
            axes.text(x, high + 0.8, f"{100 * success:.0f}%", ha="center", fontsize=6.5)
    axes.set_xticks(range(len(tolerances)), [f"{float(tolerance):g}" for tolerance in tolerances])
    axes.set(xlabel="relative residual", ylabel="evaluations of f (median, to 90th percentile)")
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    axes.set_title("Above: share of samples that got there within the budget")
    return save_figure(figure, path)


def reduction_by_image(rows: list[Row], learned: str, classical: str, tolerance: str, path: Path) -> Path:
    """One point an image: evaluations of the learned solver against the classical one's."""
    spent: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        if row["row"] == "sample" and row["solver"] in (learned, classical):
            spent.setdefault((row.get("seed", 0), row["sample"]), {})[row["solver"]] = row
    pairs = np.array([(both[classical]["nfe"][tolerance], both[learned]["nfe"][tolerance]) for both in spent.values()])
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.0))
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, pairs.shape)
    left.plot(*(pairs + jitter).T, ".", color="#D55E00", alpha=0.35, markersize=4)
    top = pairs.max() + 2
    left.plot([0, top], [0, top], color="0.4", linewidth=1)
    left.text(0.97 * top, top, "equal", ha="right", va="top", fontsize=8, color="0.4")
    left.set(xlabel=f"{classical}: evaluations", ylabel=f"{learned}: evaluations", xlim=(0, top), ylim=(0, top))
    ratio = pairs[:, 0] / pairs[:, 1]
    right.hist(ratio, bins=30, color="#D55E00", alpha=0.85)
    right.axvline(1, color="0.4", linewidth=1)
    right.set(xlabel=f"times fewer evaluations than {classical}", ylabel="images")
    right.set_title(f"median {np.median(ratio):.2f}×, fewer on {100 * np.mean(ratio > 1):.0f}% of images", fontsize=10)
    left.set_title(f"each image, to {float(tolerance):g} (not reached = budget)", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)
