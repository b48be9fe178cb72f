"""report.md and the figure of gradient modes and adjoint solvers, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.legacy.plots import new_axes, save_figure
from experiments.legacy.report import made_by, table
from metabroyden.storage import atomic_write

Row = dict[str, Any]


def write(folder: Path, rows: Sequence[Row], described: dict[str, Any]) -> Path:
    """Write report.md and its figure into the folder."""
    _figure(rows, folder / "bias_by_time.png")
    config = described["config"]
    sections = [
        "# Gradients through the digits DEQs",
        f"{made_by(described['command'], described['provenance'])} {described['seconds']} s.",
        f"The trained DEQs of results/digits ({len(config['seeds'])} seeds), {config['samples']} held-out images in one "
        "batch, the cotangent that of their cross-entropy. Means over seeds (times: of medians of "
        f"{config['repeats']} interleaved repeats).",
        tables(rows),
        "![bias against time](bias_by_time.png)",
    ]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def tables(rows: Sequence[Row]) -> str:
    """Both tables, with a word on what they say."""
    adjoint = [row for row in rows if row["row"] == "adjoint"]
    rtols = sorted({row["rtol"] for row in adjoint}, reverse=True)
    body = []
    for name in _names(adjoint, "solver"):
        cells = []
        for rtol in rtols:
            mine = [row for row in adjoint if row["solver"] == name and row["rtol"] == rtol]
            median, most, solved, seconds = (
                np.mean([r[k] for r in mine]) for k in ("median", "most", "solved", "seconds")
            )
            cells.append(f"{median:.0f} / {most:.0f} / {solved:.1%}, {1000 * seconds:.0f} ms")
        body.append([name, *cells])
    modes = [row for row in rows if row["row"] == "mode"]
    known = np.mean([row["exact_known"] for row in modes])
    bias = []
    for name in _names(modes, "mode"):
        mine = [row for row in modes if row["mode"] == name]
        cosine, error, seconds = (np.mean([row[key] for row in mine]) for key in ("cosine", "error", "seconds"))
        bias.append([name, f"{cosine:.4f}", f"{error:.1e}", f"{1000 * seconds:.0f} ms"])
    return (
        "## Solving the adjoint\n\nProducts with Jᵀ a sample needs, median / 90th percentile / share solved (a failure "
        "counts as the budget), and the time of the whole backward pass.\n\n"
        + table(["adjoint solver", *(f"to {rtol:g}" for rtol in rtols)], body)
        + "\n\n## Modes\n\nThe gradient towards the cell's weights against the exact one (float64, both tolerances 1e-9, "
        f"{known:.1%} of samples solved): cosine, relative error; time of forward and backward pass. Forward "
        "tolerance 1e-5 where no other is named.\n\n"
        + table(["mode", "cosine", "relative error", "forward + backward"], bias)
    )


def _names(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _figure(rows: Sequence[Row], path: Path) -> Path:
    figure, axes = new_axes(7.2)
    modes = [row for row in rows if row["row"] == "mode"]
    for name, marker in zip(_names(modes, "mode"), "os^Dvp*hXPd", strict=False):
        mine = [row for row in modes if row["mode"] == name]
        seconds, error = (np.mean([row[key] for row in mine]) for key in ("seconds", "error"))
        axes.loglog(1000 * seconds, error, marker, markersize=9, label=name)
    axes.set(xlabel="forward + backward (ms)", ylabel="relative error of the gradient")
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)
