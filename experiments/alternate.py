"""Training a DEQ while its solvers learn: wall-clock and accuracy against training with Broyden and with Anderson."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.bench import figures, report
from experiments.bench.options import Budgeted
from experiments.bench.runner import Row, Run, ticks
from experiments.bench.statistics import geometric
from experiments.bench.tables import Table, chosen, grouped, listed, mean
from metabroyden import Anderson, Broyden, EquilibriumCache, Implicit
from metabroyden.learned.layout import Layout
from metabroyden.meta import OnlineConfig, OnlineMetaTrainer, make_learned
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.data.images import ImageSplit, shift
from metabroyden.zoo.models import ConvClassifier, ConvClassifierConfig

LEARNED = "learned, in alternation"
WAYS = (LEARNED, "Broyden", "Anderson")
COLD, WARM = FIXED_IMAGES = ("Anderson, fixed images", "Anderson, fixed images, warm starts")
PARTS = ("forward", "backward", "update", "meta")
RATE, RTOL = 2e-3, 1e-2
"""Peak of Adam's learning rate, with a cosine schedule; the tolerance of both directions."""


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
    warmup_steps: int = 40
    """Training steps at the beginning with a meta-step each; the learned solvers take over after them."""
    every: int = 8
    """Training steps from one meta-step to the next after that."""
    unroll: int = 8
    """Solver steps of a meta-step."""
    meta_batch: int = 8
    """Problems of a meta-step."""
    width: int = 16
    """LSTM width, preconditioner rank and initializer width of the learned solvers."""


def run(config: Alternate) -> None:
    """The whole job; a seed that was finished before is not trained again."""
    job, rows = Run(config), []
    with ticks("training", config.seeds * config.epochs, show=config.progress) as done:
        for seed in range(config.seeds):
            rows += job.unit(f"seed{seed}", lambda: trained(config, seed, done))  # noqa: B023 (called at once)
    job.finish(rows, write)


def trained(config: Alternate, seed: int, done: Callable[..., None]) -> list[Row]:
    """Rows of one seed: an epoch of each way in turn, so that all see the same machine."""
    data = load_digits()
    train, validation = (_enlarged(split, config.side) for split in (data.train, data.validation))
    ways = WAYS + (FIXED_IMAGES if seed == 0 else ())
    trainings = [Training(config, way, train, seed) for way in ways]
    rows = []
    for epoch in range(config.epochs):
        rows += [{"row": "epoch", "seed": seed, "epoch": epoch + 1, **way.epoch(validation)} for way in trainings]
        done(f"accuracy {rows[-1]['accuracy']:.3f}")
    return rows


def _enlarged(split: ImageSplit, side: int) -> ImageSplit:
    images = nn.functional.interpolate(split.images, size=(side, side), mode="bilinear")
    return ImageSplit(images, split.labels, split.indices)


class Training:
    """One way of training, an epoch at a time, with a stopwatch on its parts."""

    def __init__(self, config: Alternate, way: str, train: ImageSplit, seed: int) -> None:
        self.config, self.way, self.train = config, way, train
        torch.manual_seed(seed)
        solver = Broyden(memory=30) if way == "Broyden" else Anderson(memory=6)
        sizes = ConvClassifierConfig(channels=config.channels, inner=2 * config.channels, side=config.side)
        backward = Implicit(solver=solver, rtol=RTOL, max_nfe=config.budget)
        self.model = ConvClassifier(
            sizes, solver=solver, backward=backward, rtol=RTOL, max_nfe=config.budget, warn=False
        )
        self.online = _online(config, self.model, seed) if way == LEARNED else None
        self.cache = EquilibriumCache(len(train.images)) if way == WARM else None
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.per_epoch = len(train.images) // config.batch
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.epochs * self.per_epoch)
        self.generator = torch.Generator().manual_seed(seed)
        self.spent = np.zeros(len(PARTS))

    def epoch(self, validation: ImageSplit) -> Row:
        """Train for an epoch; what it cost, and the accuracy at equilibria found by one and the same Broyden."""
        order = torch.randperm(len(self.train.images), generator=self.generator)
        before = self.spent.copy()
        steps = [self.step(rows) for rows in order[: self.per_epoch * self.config.batch].split(self.config.batch)]
        spent = dict(zip(PARTS, (self.spent - before).round(4).tolist(), strict=True))
        means = {key: round(mean(steps, key), 4) for key in steps[0]}
        seconds = round(float(self.spent.sum()), 4)
        return {"way": self.way, **means, "seconds": seconds, "spent": spent, "accuracy": self.accuracy(validation)}

    def step(self, rows: Tensor) -> Row:
        """A training step, timed, and what its two solves took."""
        model, deq = self.model, self.model.deq
        images = self.train.images[rows]
        if self.way in WAYS:
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
        if self.online is not None:
            self.online.step()
        self.spent += np.diff([*moments, time.perf_counter()])
        found: Row = {"loss": float(loss.detach())}
        for name, failed, solution in (
            ("evaluations", "failed", forward),
            ("products", "failed_backward", deq.last_backward_solution),
        ):
            assert solution is not None
            found[name], found[f"slowest_{name}"] = float(solution.nfe.double().mean()), float(solution.nfe.max())
            found[failed] = float((~solution.converged).double().mean())
        return found

    @torch.no_grad()
    def accuracy(self, split: ImageSplit) -> float:
        """Share of images that are classified as they should be."""
        deq = self.model.deq
        kept = deq.solver, deq.rtol, deq.max_nfe
        deq.solver, deq.rtol, deq.max_nfe = Broyden(memory=60), 1e-3, 80
        right = (self.model(split.images).argmax(dim=1) == split.labels).float().mean()
        deq.solver, deq.rtol, deq.max_nfe = kept
        return round(float(right), 5)


def _online(config: Alternate, model: ConvClassifier, seed: int) -> OnlineMetaTrainer:
    layout = Layout("image", (config.channels, config.side, config.side))
    sizes: dict[str, Any] = {"seed": seed, "hidden": config.width, "rank": config.width}
    told = {name: getattr(config, name) for name in ("warmup_steps", "every", "unroll")}
    return OnlineMetaTrainer(
        model.deq,
        make_learned("grouped", layout, initializer_width=config.width, **sizes),
        make_learned("adjoint", layout, **sizes),
        config=OnlineConfig(batch=config.meta_batch, learning_rate=3e-3, **told),
        seed=seed,
    )


Runs = dict[str, list[list[Row]]]
"""Epochs of each seed of each way."""


@report.of_rows("Training a DEQ while its solvers learn")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and its figures, from rows alone."""
    config = described["config"]
    runs = {way: grouped(chosen(rows, "epoch", way=way), "seed") for way in (*WAYS, *FIXED_IMAGES)}
    warm = [{**a, "cold": b, "time": a["spent"]["forward"] / b["spent"]["forward"]}
            for a, b in zip(*runs[WARM], *runs[COLD], strict=True)]  # fmt: skip
    return [
        f"A convolutional DEQ ({config['channels']} channels, {config['side']}×{config['side']}), digits shifted at "
        f"random, batch {config['batch']}, {config['epochs']} epochs, {config['seeds']} seeds; forward and backward to "
        f"{RTOL:g} within {config['budget']} evaluations, the same for all. The learned solvers (grouped LSTM "
        f"forward, adjoint LSTM backward, width {config['width']}) start untrained: for the first {config['warmup_steps']} "
        "steps Anderson solves and a meta-step follows each training step, then they take over and a meta-step follows "
        f"every {config['every']}th. Time is that of training steps, meta-steps included, without validation; an epoch of "
        "each way in turn, in one process. Accuracy is that of 297 validation images at equilibria found by one and the "
        f"same Broyden (1e-3). All of it took {described['seconds']} s.",
        _times(runs),
        _figure(folder / "accuracy_by_time.png", runs, [
            (lambda of: (of["seconds"], 1 - of["accuracy"]),
             {"xlabel": "training time (s), mean over seeds", "ylabel": "validation error", "yscale": "log"}),
            (lambda of: (of["epoch"], np.diff(of["seconds"], prepend=0.0)),
             {"xlabel": "epoch", "ylabel": "seconds an epoch, meta-steps included", "ylim": (0, None)}),
        ]),
        listed("", [_cost(way, runs[way]) for way in WAYS], [
            ("way", "{way}"), ("training", "{training:.0f} s"), ("forward", "{forward:.0f} s"),
            ("backward", "{backward:.0f} s"), ("meta-steps", "{meta:.0f} s"),
            ("evaluations", "{evaluations:.1f} / {slowest_evaluations:.1f}"),
            ("products", "{products:.1f} / {slowest_products:.1f}"),
            ("failed", "{failed:.2%} / {failed_backward:.2%}"), ("accuracy", "{accuracy:.2%}"),
        ]),
        "Evaluations and products (with Jᵀ) a sample, mean and slowest of the batch, in the last epoch; the slowest decides "
        "how long a batch takes. Failed: short of the tolerance within the budget, forward / backward, all epochs.",
        _figure(folder / "evaluations_by_epoch.png", runs, [
            (lambda of: (of["epoch"], of["evaluations"]),
             {"xlabel": "epoch", "ylabel": "evaluations of f, forward (mean of a sample)", "ylim": (0, None)}),
            (lambda of: (of["epoch"], of["products"]),
             {"xlabel": "epoch", "ylabel": "products with Jᵀ, backward (mean of a sample)", "ylim": (0, None)}),
        ]),
        listed("Warm starts: `EquilibriumCache`, Anderson, images not shifted, seed 0", warm, [
            ("epoch", "{epoch}"), ("evaluations, from zero", "{cold[evaluations]:.1f}"),
            ("from the cache", "{evaluations:.1f}"), ("time of the forward pass", "{time:.2f}×"),
            ("accuracy", "{cold[accuracy]:.2%}"), ("with the cache", "{accuracy:.2%}"),
        ]),
    ]  # fmt: skip


def _times(runs: Runs) -> Table:
    """Time of the learned way over that of the others: geometric mean over seeds, and each."""
    best = {way: [max(row["accuracy"] for row in epochs) for epochs in runs[way]] for way in WAYS}
    targets = [min(of_seed) for of_seed in zip(*best.values(), strict=True)]

    def over(reading: Callable[[list[Row], float], float], rival: str) -> str:
        ours, theirs = (map(reading, runs[way], targets) for way in (LEARNED, rival))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        return f"**{geometric(ratios):.2f}×** ({', '.join(f'{ratio:.2f}' for ratio in ratios)} by seed)"

    def accuracies(rival: str) -> str:
        return f"{np.mean(best[LEARNED]):.2%} ({np.mean(best[rival]):.2%})"

    return listed("Time of the learned way", WAYS[1:], [
        ("", "Against {}".format),
        ("whole training", partial(over, lambda epochs, target: epochs[-1]["seconds"])),
        ("until the accuracy that all reach", partial(over, _until)),
        ("last epoch", partial(over, lambda epochs, target: sum(epochs[-1]["spent"].values()))),
        ("best validation accuracy (the rival's)", accuracies),
    ])  # fmt: skip


def _until(epochs: list[Row], target: float) -> float:
    return next(row["seconds"] for row in epochs if row["accuracy"] >= target)


def _cost(way: str, runs: list[list[Row]]) -> Row:
    """Seconds of whole trainings, means over seeds; means of the last epochs; shares that failed in all of them."""
    spent = {part: sum(row["spent"][part] for run in runs for row in run) / len(runs) for part in PARTS}
    ends = ("evaluations", "slowest_evaluations", "products", "slowest_products", "accuracy")
    last = {key: mean([run[-1] for run in runs], key) for key in ends}
    failed = {key: mean([row for run in runs for row in run], key) for key in ("failed", "failed_backward")}
    return {"way": way, "training": sum(spent.values()), **spent, **last, **failed}


def _figure(path: Path, runs: Runs, panels: list[tuple[Callable[[dict[str, Any]], tuple[Any, Any]], Row]]) -> Path:
    """Panels of a curve a way, (x, y) made of the means over seeds by epoch, with the settings of their axes."""
    figure, places = figures.grid(2, 2, (5, 4.2))
    for place, (curve, settings) in zip(places, panels, strict=True):
        for number, way in enumerate(WAYS):
            keys = ("epoch", "seconds", "accuracy", "evaluations", "products")
            means = {key: np.mean([[row[key] for row in run] for run in runs[way]], axis=0) for key in keys}
            figures.line(place, way, *curve(means), number=number)
        place.set(**settings)
    figures.legend(figure, places)
    return figures.save(figure, path)
