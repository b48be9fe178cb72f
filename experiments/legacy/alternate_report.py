"""report.md and figures of training with solvers that learn on the way, from rows alone."""

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
_LEARNED = "learned, in alternation"
_DRAWN = {
    _LEARNED: {"color": "#D55E00", "linestyle": "-", "linewidth": 2.6},
    "Broyden": {"color": "#0072B2", "linestyle": "--", "linewidth": 1.8},
    "Anderson": {"color": "#009E73", "linestyle": "-.", "linewidth": 1.8},
    "Anderson, fixed images": {"color": "#56B4E9", "linestyle": "--", "linewidth": 1.5},
    "Anderson, fixed images, warm starts": {"color": "#E69F00", "linestyle": "-", "linewidth": 1.5},
}


def write(folder: Path, rows: Sequence[Row], described: dict[str, Any]) -> Path:
    """Write report.md and its figures into the folder."""
    _accuracy_figure(rows, folder / "accuracy_by_time.png")
    _cost_figure(rows, folder / "evaluations_by_epoch.png")
    config = described["config"]
    sections = [
        "# Training a DEQ while its solvers learn",
        f"{made_by(described['command'], described['provenance'])} {described['seconds']} s.",
        f"A convolutional DEQ ({config['channels']} channels, {config['side']}×{config['side']}), digits shifted at "
        f"random, batch {config['batch']}, {config['epochs']} epochs, {config['seeds']} seeds; forward and backward to "
        f"{config['rtol']:g} within {config['budget']} evaluations, the same for all. The learned solvers (grouped LSTM "
        f"forward, adjoint LSTM backward, width {config['width']}) start untrained: for the first {config['warmup_steps']} "
        "steps "
        "Anderson solves and a meta-step follows each training step, then they take over and a meta-step follows every "
        f"{config['every']}th. Time is that of training steps, meta-steps included, without validation; an epoch of each "
        "way in turn, in one process. Accuracy is that of 297 validation images at equilibria found by one and the same "
        "Broyden (1e-3).",
        "## What it shows",
        verdicts(rows),
        "![accuracy](accuracy_by_time.png)",
        _table(rows),
        "Evaluations and products (with Jᵀ) a sample, mean and slowest of the batch, in the last epoch; the slowest decides "
        "how long a batch takes. Failed: short of the tolerance within the budget, forward / backward, all epochs.",
        "![evaluations](evaluations_by_epoch.png)",
        "## Warm starts",
        _warm(rows),
    ]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def verdicts(rows: Sequence[Row]) -> str:
    """The answer to the question, in sentences."""
    lines = []
    for rival in ("Broyden", "Anderson"):
        total = _ratios(rows, rival, lambda chosen, target: chosen[-1]["seconds"])
        reach = _ratios(rows, rival, _time_to)
        tail = _ratios(rows, rival, lambda chosen, target: sum(chosen[-1]["spent"].values()))
        lines.append(
            f"- **Against {rival}**: {_spread(total)} of its time for the whole training, {_spread(reach)} until the "
            f"validation accuracy that all reach, {_spread(tail)} for the last epoch alone."
        )
    best = {way: np.mean([_best(_of(rows, way, seed)) for seed in _seeds(rows)]) for way in _main(rows)}
    lines.append("- Best validation accuracy: " + ", ".join(f"{way} {value:.2%}" for way, value in best.items()) + ".")
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> str:
    body = []
    for way in _main(rows):
        chosen = [_of(rows, way, seed) for seed in _seeds(rows)]
        last = [epochs[-1] for epochs in chosen]
        spent = {
            part: np.mean([sum(r["spent"][part] for r in epochs) for epochs in chosen]) for part in last[0]["spent"]
        }
        mean = {key: np.mean([row[key] for row in last]) for key in ("evaluations", "products", "slowest_evaluations")}
        slowest = np.mean([row["slowest_products"] for row in last])
        failed = [np.mean([r[key] for epochs in chosen for r in epochs]) for key in ("failed", "failed_backward")]
        body.append(
            [
                way,
                f"{sum(spent.values()):.0f} s",
                *(f"{spent[part]:.0f} s" for part in ("forward", "backward", "meta")),
                f"{mean['evaluations']:.1f} / {mean['slowest_evaluations']:.1f}",
                f"{mean['products']:.1f} / {slowest:.1f}",
                f"{failed[0]:.2%} / {failed[1]:.2%}",
                f"{np.mean([row['accuracy'] for row in last]):.2%}",
            ]
        )
    head = ["way", "training", "forward", "backward", "meta-steps", "evaluations", "products", "failed", "accuracy"]
    return table(head, body)


def _warm(rows: Sequence[Row]) -> str:
    """What the cache of equilibria gains where every epoch shows the same images."""
    cold, warm = (_of(rows, way, 0) for way in list(_DRAWN)[3:])
    if not cold or not warm:
        return "Not measured."
    body = [
        [
            str(a["epoch"]),
            f"{a['evaluations']:.1f}",
            f"{b['evaluations']:.1f}",
            f"{b['spent']['forward'] / a['spent']['forward']:.2f}×",
            f"{a['accuracy']:.2%}",
            f"{b['accuracy']:.2%}",
        ]
        for a, b in zip(cold, warm, strict=True)
    ]
    head = [
        "epoch",
        "evaluations, from zero",
        "from the cache",
        "time of the forward pass",
        "accuracy",
        "with the cache",
    ]
    saved = 1 - sum(r["evaluations"] for r in warm[1:]) / max(1e-9, sum(r["evaluations"] for r in cold[1:]))
    return (
        "`EquilibriumCache`, Anderson, images not shifted (a shifted image has another equilibrium), seed 0: from the "
        f"second epoch on it saves {saved:.0%} of the evaluations.\n\n{table(head, body)}"
    )


def _of(rows: Sequence[Row], way: str, seed: int) -> list[Row]:
    return [row for row in rows if row["way"] == way and row["seed"] == seed]


def _main(rows: Sequence[Row]) -> list[str]:
    return [way for way in list(_DRAWN)[:3] if any(row["way"] == way for row in rows)]


def _seeds(rows: Sequence[Row]) -> list[int]:
    return sorted({row["seed"] for row in rows})


def _best(epochs: Sequence[Row]) -> float:
    return max(row["accuracy"] for row in epochs)


def _time_to(epochs: Sequence[Row], target: float) -> float:
    return next(row["seconds"] for row in epochs if row["accuracy"] >= target)


def _ratios(rows: Sequence[Row], rival: str, reading: Any) -> list[float]:
    """One ratio a seed of the learned way's reading to a rival's."""
    ratios = []
    for seed in _seeds(rows):
        target = min(_best(_of(rows, way, seed)) for way in _main(rows))
        ratios.append(reading(_of(rows, _LEARNED, seed), target) / reading(_of(rows, rival, seed), target))
    return ratios


def _spread(values: Sequence[float]) -> str:
    middle = float(np.exp(np.mean(np.log(values))))
    return f"**{middle:.2f}×** ({', '.join(f'{value:.2f}' for value in values)} by seed)"


def _accuracy_figure(rows: Sequence[Row], path: Path) -> Path:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    for way in _main(rows):
        chosen = [_of(rows, way, seed) for seed in _seeds(rows)]
        seconds = np.mean([[row["seconds"] for row in epochs] for epochs in chosen], axis=0)
        accuracy = np.array([[row["accuracy"] for row in epochs] for epochs in chosen])
        axes[0].plot(seconds, 1 - accuracy.mean(axis=0), label=way, **_DRAWN[way])
        epochs = np.arange(1, len(seconds) + 1)
        axes[1].plot(epochs, np.diff(seconds, prepend=0.0), label=way, **_DRAWN[way])
    axes[0].set(xlabel="training time (s), mean over seeds", ylabel="validation error", yscale="log")
    axes[1].set(xlabel="epoch", ylabel="seconds an epoch, meta-steps included", ylim=(0, None))
    for plot in axes:
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return save_figure(figure, path)


def _cost_figure(rows: Sequence[Row], path: Path) -> Path:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    words = {"evaluations": "evaluations of f, forward", "products": "products with Jᵀ, backward"}
    for plot, (key, label) in zip(axes, words.items(), strict=True):
        for way in _main(rows):
            mean = np.mean([[row[key] for row in _of(rows, way, seed)] for seed in _seeds(rows)], axis=0)
            plot.plot(np.arange(1, len(mean) + 1), mean, label=way, **_DRAWN[way])
        plot.set(xlabel="epoch", ylabel=f"{label} (mean of a sample)", ylim=(0, None))
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return save_figure(figure, path)
