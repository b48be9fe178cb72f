"""Training a DEQ while its solvers learn: wall-clock and accuracy against training with Broyden and with Anderson."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.bench import figures, report
from experiments.bench.options import Budgeted
from experiments.bench.runner import Row, Run, read_rows, ticks
from experiments.bench.statistics import geometric
from experiments.bench.tables import Table
from metabroyden import Anderson, Broyden, EquilibriumCache, Implicit
from metabroyden.learned.layout import Layout
from metabroyden.meta import OnlineConfig, OnlineMetaTrainer
from metabroyden.meta.fit import make_learned
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.data.images import ImageSplit, shift
from metabroyden.zoo.models import ConvClassifier, ConvClassifierConfig

LEARNED = "learned, in alternation"
WAYS = (LEARNED, "Broyden", "Anderson")
FIXED_IMAGES = ("Anderson, fixed images", "Anderson, fixed images, warm starts")
PARTS = ("forward", "backward", "update", "meta")


@dataclass(frozen=True)
class Alternate(Budgeted, command="alternate", budget=50):
    """Train the same DEQ with Broyden, with Anderson, and with solvers that learn on the way; results/alternate/."""

    seeds: int = 3
    """Seeds of weights, batches and solvers."""
    epochs: int = 12
    """Epochs of each training."""
    batch: int = 64
    """Images of a training step."""
    channels: int = 24
    """Channels of the DEQ's state."""
    side: int = 16
    """Height and width of the images, enlarged from 8×8, and of the state."""
    learning_rate: float = 2e-3
    """Peak of Adam's learning rate, with a cosine schedule."""
    rtol: float = 1e-2
    """Tolerance of both directions, the same for all."""
    memory: int = 30
    """Memory of Broyden's method; Anderson's is 6."""
    warmup_steps: int = 40
    """Training steps at the beginning with a meta-step each; the learned solvers take over after them."""
    every: int = 8
    """Training steps from one meta-step to the next after that."""
    unroll: int = 8
    """Solver steps of a meta-step."""
    meta_batch: int = 8
    """Problems of a meta-step."""
    meta_learning_rate: float = 3e-3
    """Of the meta-steps."""
    width: int = 16
    """LSTM width, preconditioner rank and initializer width of the learned solvers."""
    images: int | None = None
    """Use only so many training images."""


def run(config: Alternate) -> None:
    """The whole job; a seed that was finished before is not trained again."""
    job, rows = Run(config), []
    with ticks("training", config.seeds * config.epochs, show=config.progress) as done:
        for seed in range(config.seeds):
            rows += job.unit(f"seed{seed}", lambda: _seed(config, seed, done))  # noqa: B023 (called at once)
    job.finish(rows, write)


def _seed(config: Alternate, seed: int, done: Callable[..., None]) -> list[Row]:
    """Rows of one seed: an epoch of each way in turn, so that all see the same machine."""
    data = load_digits()
    train, validation = (_enlarged(split, config.side) for split in (data.train, data.validation))
    if config.images is not None:
        train = ImageSplit(train.images[: config.images], train.labels[: config.images], train.indices)
    ways = WAYS + (FIXED_IMAGES if seed == 0 else ())
    trainings = [_Training(config, way, train, seed) for way in ways]
    rows = []
    for epoch in range(config.epochs):
        rows += [{"row": "epoch", "seed": seed, "epoch": epoch + 1, **way.epoch(validation)} for way in trainings]
        done(f"accuracy {rows[-1]['accuracy']:.3f}")
    return rows


def _enlarged(split: ImageSplit, side: int) -> ImageSplit:
    images = nn.functional.interpolate(split.images, size=(side, side), mode="bilinear")
    return ImageSplit(images, split.labels, split.indices)


class _Training:
    """One way of training, an epoch at a time, with a stopwatch on its parts."""

    def __init__(self, config: Alternate, way: str, train: ImageSplit, seed: int) -> None:
        self.config, self.way, self.train = config, way, train
        torch.manual_seed(seed)
        solver: Any = Broyden(memory=config.memory) if way == "Broyden" else Anderson(memory=6)
        self.model = ConvClassifier(
            ConvClassifierConfig(channels=config.channels, inner=2 * config.channels, side=config.side),
            solver=solver,
            backward=Implicit(solver=solver, rtol=config.rtol, max_nfe=config.budget),
            rtol=config.rtol,
            max_nfe=config.budget,
            warn=False,
        )
        self.keep_up = _keep_up(config, self.model, seed) if way == LEARNED else None
        self.augment = way in WAYS
        self.cache = EquilibriumCache(len(train.images)) if way == FIXED_IMAGES[1] else None
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)
        self.per_epoch = len(train.images) // config.batch
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.epochs * self.per_epoch)
        self.generator = torch.Generator().manual_seed(seed)
        self.seconds = 0.0

    def epoch(self, validation: ImageSplit) -> dict[str, Any]:
        """Train for an epoch; what it cost, and the accuracy at equilibria found by one and the same Broyden."""
        order = torch.randperm(len(self.train.images), generator=self.generator)
        batches = order[: self.per_epoch * self.config.batch].split(self.config.batch)
        steps = [self._step(rows) for rows in batches]
        means = {key: sum(step[key] for step in steps) / len(steps) for key in steps[0]}
        spent = {part: means.pop(part) * len(steps) for part in PARTS}
        self.seconds += sum(spent.values())
        return {
            "way": self.way,
            **{key: round(value, 4) for key, value in means.items()},
            "seconds": round(self.seconds, 4),
            "spent": {part: round(value, 4) for part, value in spent.items()},
            "accuracy": round(self._accuracy(validation), 5),
        }

    def _step(self, rows: Tensor) -> dict[str, float]:
        model, deq = self.model, self.model.deq
        images = self.train.images[rows]
        if self.augment:
            images = shift(images, self.generator)
        moments = [time.perf_counter()]
        x = model.inject(images)
        z = deq(x) if self.cache is None else deq(x, self.cache.start(rows, torch.zeros_like(x)))
        forward = deq.last_solution
        assert forward is not None
        if self.cache is not None:
            self.cache.store(rows, forward.z)
        loss = nn.functional.cross_entropy(model.classify(z), self.train.labels[rows])
        moments.append(time.perf_counter())
        self.optimizer.zero_grad()
        loss.backward()
        moments.append(time.perf_counter())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        moments.append(time.perf_counter())
        if self.keep_up is not None:
            self.keep_up.step()
        moments.append(time.perf_counter())
        parts = dict(zip(PARTS, np.diff(moments).tolist(), strict=True))
        backward = deq.last_backward_solution
        assert backward is not None
        return {
            "loss": float(loss.detach()),
            "evaluations": float(forward.nfe.double().mean()),
            "products": float(backward.nfe.double().mean()),
            "slowest_evaluations": float(forward.nfe.max()),
            "slowest_products": float(backward.nfe.max()),
            "failed": float((~forward.converged).double().mean()),
            "failed_backward": float((~backward.converged).double().mean()),
            **parts,
        }

    @torch.no_grad()
    def _accuracy(self, split: ImageSplit) -> float:
        deq = self.model.deq
        kept = deq.solver, deq.rtol, deq.max_nfe
        deq.solver, deq.rtol, deq.max_nfe = Broyden(memory=60), 1e-3, 80
        right = (self.model(split.images).argmax(dim=1) == split.labels).float().mean()
        deq.solver, deq.rtol, deq.max_nfe = kept
        return float(right)


def _keep_up(config: Alternate, model: ConvClassifier, seed: int) -> OnlineMetaTrainer:
    layout = Layout("image", (config.channels, config.side, config.side))
    sizes: dict[str, Any] = {"hidden": config.width, "rank": config.width}
    return OnlineMetaTrainer(
        model.deq,
        make_learned("grouped", layout, seed=seed, initializer_width=config.width, **sizes),
        make_learned("adjoint", layout, seed=seed, **sizes),
        config=OnlineConfig(
            warmup_steps=config.warmup_steps,
            every=config.every,
            unroll=config.unroll,
            batch=config.meta_batch,
            learning_rate=config.meta_learning_rate,
        ),
        seed=seed,
    )


def write(folder: Path) -> Path:
    """report.md and its figures, from rows alone."""
    rows, described = read_rows(folder / "rows.jsonl"), report.read_config(folder)
    config, by_way = described["config"], _by_way(rows)
    sections: list[report.Section] = [
        f"{report.made_by(described)} {described['seconds']} s.",
        f"A convolutional DEQ ({config['channels']} channels, {config['side']}×{config['side']}), digits shifted at "
        f"random, batch {config['batch']}, {config['epochs']} epochs, {config['seeds']} seeds; forward and backward to "
        f"{config['rtol']:g} within {config['budget']} evaluations, the same for all. The learned solvers (grouped LSTM "
        f"forward, adjoint LSTM backward, width {config['width']}) start untrained: for the first {config['warmup_steps']} "
        "steps Anderson solves and a meta-step follows each training step, then they take over and a meta-step follows "
        f"every {config['every']}th. Time is that of training steps, meta-steps included, without validation; an epoch of "
        "each way in turn, in one process. Accuracy is that of 297 validation images at equilibria found by one and the "
        "same Broyden (1e-3).",
        _times(by_way),
        _time_figure(by_way, folder / "accuracy_by_time.png"),
        _costs(by_way),
        "Evaluations and products (with Jᵀ) a sample, mean and slowest of the batch, in the last epoch; the slowest decides "
        "how long a batch takes. Failed: short of the tolerance within the budget, forward / backward, all epochs.",
        _cost_figure(by_way, folder / "evaluations_by_epoch.png"),
        _warm(by_way),
    ]
    return report.write(folder, "Training a DEQ while its solvers learn", sections)


def _by_way(rows: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """Epochs of each seed of each way."""
    seeds = sorted({row["seed"] for row in rows})
    found = {w: [[r for r in rows if (r["way"], r["seed"]) == (w, s)] for s in seeds] for w in (*WAYS, *FIXED_IMAGES)}
    return {way: [epochs for epochs in runs if epochs] for way, runs in found.items()}


def _times(by_way: dict[str, list[list[Row]]]) -> Table:
    """Time of the learned way over that of the others: geometric mean over seeds, and each."""
    best = {way: [max(row["accuracy"] for row in epochs) for epochs in by_way[way]] for way in WAYS}
    targets = [min(of_seed) for of_seed in zip(*best.values(), strict=True)]
    readings: dict[str, Callable[[list[Row], float], float]] = {
        "whole training": lambda epochs, target: epochs[-1]["seconds"],
        "until the accuracy that all reach": lambda epochs, target: next(
            row["seconds"] for row in epochs if row["accuracy"] >= target
        ),
        "last epoch": lambda epochs, target: sum(epochs[-1]["spent"].values()),
    }
    body = []
    for rival in WAYS[1:]:
        cells = []
        for reading in readings.values():
            ours, theirs = (map(reading, by_way[way], targets) for way in (LEARNED, rival))
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            cells.append(f"**{geometric(ratios):.2f}×** ({', '.join(f'{ratio:.2f}' for ratio in ratios)} by seed)")
        body.append([f"Against {rival}", *cells, f"{np.mean(best[LEARNED]):.2%} ({np.mean(best[rival]):.2%})"])
    return Table("Time of the learned way", ["", *readings, "best validation accuracy (the rival's)"], body)


def _costs(by_way: dict[str, list[list[Row]]]) -> Table:
    body = []
    for way in WAYS:
        spent = {part: np.mean([sum(row["spent"][part] for row in run) for run in by_way[way]]) for part in PARTS}
        last = {key: np.mean([run[-1][key] for run in by_way[way]]) for key in _LAST}
        failed = [np.mean([row[key] for run in by_way[way] for row in run]) for key in ("failed", "failed_backward")]
        body.append(
            [
                way,
                f"{sum(spent.values()):.0f} s",
                *(f"{spent[part]:.0f} s" for part in ("forward", "backward", "meta")),
                *(f"{last[key]:.1f} / {last[f'slowest_{key}']:.1f}" for key in ("evaluations", "products")),
                " / ".join(f"{share:.2%}" for share in failed),
                f"{last['accuracy']:.2%}",
            ]
        )
    head = ["way", "training", "forward", "backward", "meta-steps", "evaluations", "products", "failed", "accuracy"]
    return Table("", head, body)


_LAST = ("evaluations", "slowest_evaluations", "products", "slowest_products", "accuracy")


def _warm(by_way: dict[str, list[list[Row]]]) -> Table:
    """What the cache of equilibria gains where every epoch shows the same images."""
    (cold,), (warm,) = (by_way[way] for way in FIXED_IMAGES)
    body = [
        [str(a["epoch"]), f"{a['evaluations']:.1f}", f"{b['evaluations']:.1f}",
         f"{b['spent']['forward'] / a['spent']['forward']:.2f}×", f"{a['accuracy']:.2%}", f"{b['accuracy']:.2%}"]
        for a, b in zip(cold, warm, strict=True)
    ]  # fmt: skip
    head = [
        "epoch",
        "evaluations, from zero",
        "from the cache",
        "time of the forward pass",
        "accuracy",
        "with the cache",
    ]
    return Table("Warm starts: `EquilibriumCache`, Anderson, images not shifted, seed 0", head, body)


def _time_figure(by_way: dict[str, list[list[Row]]], path: Path) -> Path:
    figure, (left, right) = figures.grid(2, 2, (5, 4.2))
    for number, way in enumerate(WAYS):
        seconds, accuracy = (_mean(by_way[way], key) for key in ("seconds", "accuracy"))
        figures.line(left, way, seconds, 1 - accuracy, number=number)
        figures.line(right, way, range(1, len(seconds) + 1), np.diff(seconds, prepend=0.0).tolist(), number=number)
    left.set(xlabel="training time (s), mean over seeds", ylabel="validation error", yscale="log")
    right.set(xlabel="epoch", ylabel="seconds an epoch, meta-steps included", ylim=(0, None))
    figures.legend(figure, (left, right))
    return figures.save(figure, path)


def _cost_figure(by_way: dict[str, list[list[Row]]], path: Path) -> Path:
    words = {"evaluations": "evaluations of f, forward", "products": "products with Jᵀ, backward"}
    figure, places = figures.grid(2, 2, (5, 4.2))
    for place, (key, label) in zip(places, words.items(), strict=True):
        for number, way in enumerate(WAYS):
            mean = _mean(by_way[way], key)
            figures.line(place, way, range(1, len(mean) + 1), mean, number=number)
        place.set(xlabel="epoch", ylabel=f"{label} (mean of a sample)", ylim=(0, None))
    figures.legend(figure, places)
    return figures.save(figure, path)


def _mean(runs: Sequence[Sequence[Row]], key: str) -> Any:
    return np.mean([[row[key] for row in run] for run in runs], axis=0)
