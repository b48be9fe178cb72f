"""report.md and figure of the drop-in experiment, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.legacy.plots import save_figure
from experiments.legacy.report import made_by, table
from metabroyden.storage import atomic_write

Row = dict[str, Any]
LEARNED = "learned"
_RIVALS = ("torchdeq Broyden", "torchdeq Anderson", "torchdeq fixed point")


def write(folder: Path, rows: Sequence[Row], described: dict[str, Any]) -> Path:
    """Write report.md and drop_in.png into the folder."""
    figure = bars(rows, folder / "drop_in.png")
    seeds = described["seeds"]
    first = next(iter(seeds.values()))
    config, sizes = described["config"], first["parameters"]
    known = np.mean([note["equilibria_known"] for note in seeds.values()])
    fits = "; ".join(
        f"seed {seed}: {note['fit_seconds']:.0f} s, on held-out training images {note['held_out']['mean_evaluations']:.1f} "
        f"evaluations to {note['held_out']['rtol']:g} (Broyden {note['held_out']['mean_evaluations_broyden']:.1f})"
        for seed, note in seeds.items()
    )
    tuned = "; ".join(f"{name}: `{solver}`" for name, solver in first["solvers"].items())
    sections = [
        "# An unmodified torchdeq model, made faster",
        made_by(described["command"], first["provenance"], "torchdeq"),
        f"A torchdeq classifier (convolutional DEQ, {config['channels']} channels on 8×8 digits, "
        f"{sizes['model']:,} parameters) is trained with torchdeq's Anderson and implicit differentiation. "
        '`fit_solver(model, train_images, layout="image", fallback=False)` fits a root finder of '
        f"{sizes['learned solver']:,} parameters to it, `register` makes it known to torchdeq. Then the same weights run "
        "with one solver's name or another in "
        f"`get_deq`, on {rows[0]['batch']} test images in one batch, max_iter {config['budget']}, stop_mode rel. "
        "torchdeq's solvers have its default options.",
        f"The fit: {fits}.",
        f"Tuned on {config['tune_samples']} validation images (seed {next(iter(seeds))}): {tuned}.",
        "## What it shows",
        verdicts(rows),
        f"![{figure.stem}]({figure.name})",
        tables(rows),
        "Calls and rows are counted by a hook on the cell, apart from any solver's own count. torchdeq hands f over as a "
        "closure, so every call is on the whole batch, frozen samples or not, and goes on until the worst sample is done. "
        "Evaluations are a sample's own: the calls made when its residual first met the tolerance, median / 90th "
        f"percentile / share that got there within {config['budget']} (else the budget counts). Time is the whole model's, "
        f"medians over {config['repeats']} interleaved repeats; ratios are medians of paired ratios. Outside f: all but "
        "calls times the time of one. Over several seeds, means; evaluations over all samples.",
        "Distance: median, relative, to a float64 equilibrium (found for "
        f"{100 * known:.1f}% of images); agreement: with the class predicted from it. Ours leave a sample alone once it has "
        "met the tolerance, torchdeq's improve it until the worst one has: hence their smaller distances. To end as near "
        "with ours, ask for a tighter tolerance.",
    ]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def tables(rows: Sequence[Row]) -> str:
    """A table for each tolerance."""
    parts = []
    header = ("solver", "accuracy", "calls of f", "rows of f", "evaluations", "time", "to torchdeq Broyden",
              "outside f", "distance", "agreement")  # fmt: skip
    for rtol in _tolerances(rows):
        body = []
        for name in _solvers(rows):
            chosen = _of(rows, name, rtol)
            nfe = np.concatenate([row["nfe"] for row in chosen])
            reached = np.concatenate([row["reached"] for row in chosen])
            body.append(
                [
                    f"**{name}**" if name == LEARNED else name,
                    f"{100 * _mean(chosen, 'accuracy'):.2f}%",
                    f"{_mean(chosen, 'calls'):g}",
                    f"{_mean(chosen, 'rows'):,.0f}",
                    f"{np.median(nfe):g} / {np.percentile(nfe, 90):g} / {100 * reached.mean():.1f}%",
                    f"{1e3 * _mean(chosen, 'seconds'):.0f} ms",
                    f"{_mean(chosen, 'ratio'):.2f}×",
                    f"{100 * _mean(chosen, 'outside_f'):.0f}%",
                    "–" if chosen[0]["distance"] is None else f"{_mean(chosen, 'distance'):.1e}",
                    "–" if chosen[0]["agreement"] is None else f"{100 * _mean(chosen, 'agreement'):.1f}%",
                ]
            )
        parts.append(f"### To {rtol:g}\n\n{table(header, body)}")
    return "\n\n".join(parts)


def verdicts(rows: Sequence[Row]) -> str:
    """The learned solver against torchdeq's own, in words; better or worse as it is."""
    lines = []
    for rtol in _tolerances(rows):
        mine = _of(rows, LEARNED, rtol)
        said = []
        for rival in _RIVALS:
            theirs = _of(rows, rival, rtol)
            calls = _mean(mine, "calls") / _mean(theirs, "calls")
            seconds = np.mean([a["seconds"] / b["seconds"] for a, b in zip(mine, theirs, strict=True)])
            medians = (np.median(np.concatenate([row["nfe"] for row in side])) for side in (mine, theirs))
            own, other = medians
            points = 100 * (_mean(mine, "accuracy") - _mean(theirs, "accuracy"))
            said.append(
                f"{rival}: {calls:.2f}× the calls of f, {seconds:.2f}× the time, {own:g} evaluations against {other:g} on "
                f"the median image, accuracy {points:+.2f} points"
            )
        lines.append(f"- **To {rtol:g}**, the learned solver against {'; '.join(said)}.")
    return "\n".join(lines)


def bars(rows: Sequence[Row], path: Path) -> Path:
    """Calls of f and wall-clock by solver, a colour for each tolerance."""
    names, tolerances = _solvers(rows)[::-1], _tolerances(rows)
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 4.4), sharey=True)
    height = 0.8 / len(tolerances)
    for axes, key, scale, label in (
        (panels[0], "calls", 1.0, "calls of f on the batch, until the worst image is done"),
        (panels[1], "seconds", 1e3, "milliseconds for the model on the batch"),
    ):
        for number, (rtol, colour) in enumerate(zip(tolerances, ("#56B4E9", "#0072B2"), strict=False)):
            values = [scale * _mean(_of(rows, name, rtol), key) for name in names]
            places = np.arange(len(names)) + (len(tolerances) / 2 - 0.5 - number) * height
            drawn = axes.barh(places, values, 0.92 * height, color=colour, label=f"to {rtol:g}")
            axes.bar_label(drawn, [f"{value:.0f}" for value in values], padding=2, fontsize=8)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.margins(x=0.12)
    panels[0].set_yticks(range(len(names)), names)
    for text in panels[0].get_yticklabels():
        if text.get_text() == LEARNED:
            text.set_fontweight("bold")
    panels[1].legend(frameon=False, loc="lower right")
    accuracies = [100 * row["accuracy"] for row in rows]
    span = f"{min(accuracies):.1f}–{max(accuracies):.1f}%"
    figure.suptitle(f"One torchdeq model, its solver exchanged; accuracy on held-out digits {span}", fontsize=11)
    return save_figure(figure, path)


def _of(rows: Sequence[Row], solver: str, rtol: float) -> list[Row]:
    """Rows of a solver to a tolerance, by seed."""
    return sorted((row for row in rows if (row["solver"], row["rtol"]) == (solver, rtol)), key=lambda row: row["seed"])


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _solvers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["solver"] for row in rows))


def _tolerances(rows: Sequence[Row]) -> list[float]:
    return sorted({row["rtol"] for row in rows}, reverse=True)
