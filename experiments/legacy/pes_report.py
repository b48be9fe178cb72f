"""report.md and the figure of meta-training over long unrolls, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.legacy.plots import save_figure
from experiments.legacy.report import made_by, table
from metabroyden.meta.step_guard import in_words
from metabroyden.storage import atomic_write

Row = dict[str, Any]
_DRAWN = {
    "short": {"color": "#000000", "linestyle": ":"},
    "backpropagation": {"color": "#0072B2", "linestyle": "-."},
    "truncated": {"color": "#56B4E9", "linestyle": "--"},
    "PES": {"color": "#D55E00", "linestyle": "-"},
}


def write(folder: Path, rows: Sequence[Row], described: dict[str, Any]) -> Path:
    """Write report.md and its figure into the folder."""
    config = described["config"]
    total = config["unroll"] * config["segments"]
    drawn = figure(rows, total, folder / "pes.png")
    sections = [
        "# Meta-training over long unrolls",
        made_by(described["command"], described["provenance"]),
        f"{config['family']}, {config['solver']} without a safeguard, meta-trained on unrolls of {config['unroll']} steps "
        f"(short), then for {config['seconds']:g} CPU seconds in each of three ways on unrolls of {total}: by full "
        f"backpropagation; by backpropagation truncated to segments of {config['unroll']}; by persistent evolution "
        f"strategies over such segments, {config['particles']} antithetic pairs, σ = {config['sigma']:g}.",
        f"![pes]({drawn.name})",
        _ways(rows, total),
        "Evaluations: mean on validation to 1e-4, a failure counting twice the budget; residuals: medians on validation, of "
        "the weights that did best there. Gradient norms: of all outer steps, before clipping.",
        "The exact gradient's norm from the short solver's weights, by the length of the unroll, median and largest of "
        "five batches:",
        table(
            ["unroll", "median", "largest"],
            [
                [row["unroll"], f"{np.median(row['norms']):.3g}", f"{np.max(row['norms']):.3g}"]
                for row in rows
                if row["row"] == "length"
            ],
        ),
    ]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def _ways(rows: Sequence[Row], total: int) -> str:
    curves = {row["way"]: row["residual"][1] for row in rows if row["row"] == "curve"}
    body = [
        [
            row["way"],
            row["steps"],
            f"{row['score']:.1f}",
            f"{curves[row['way']][total]:.2g}",
            f"{curves[row['way']][2 * total]:.2g}",
            " / ".join(f"{value:.3g}" for value in row["norms"][1:]),
            in_words(row["incidents"]) or "none",
        ]
        for row in rows
        if row["row"] == "way"
    ]
    header = ["way", "outer steps", "evaluations", f"residual at {total}", f"at {2 * total}"]
    return table([*header, "gradient norm, median / 90% / largest", "incidents"], body)


def figure(rows: Sequence[Row], total: int, path: Path) -> Path:
    """Evaluations on validation by CPU time, and residuals by step."""
    drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for way, style in _DRAWN.items():
        looks = [row for row in rows if row["row"] == "look" and row["way"] == way]
        if way != "short":
            left.plot([row["cpu_seconds"] for row in looks], [row["score"] for row in looks], label=way, **style)
        for row in rows:
            if row["row"] == "curve" and row["way"] == way:
                right.semilogy(row["residual"][1], label=way, **style)
    left.set(xlabel="CPU seconds on long unrolls", ylabel="evaluations to 1e-4 on validation")
    right.axvline(total, color="#999999", linewidth=0.8)
    right.set(xlabel="steps", ylabel="relative residual, median")
    left.legend(frameon=False)
    right.legend(frameon=False)
    return save_figure(drawn, path)
