"""A DEQ and its root finder trained together from scratch: time and accuracy beside training with Broyden and Anderson."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.bench import report
from experiments.bench.options import Budgeted
from experiments.bench.runner import Row, Run
from metabroyden import DEQ, Anderson, Broyden, EquilibriumCache, Implicit
from metabroyden.comparison import figures
from metabroyden.comparison.statistics import geometric
from metabroyden.comparison.tables import Table, chosen, grouped, listed, mean, means
from metabroyden.learned.layout import Layout
from metabroyden.meta import CoTrainConfig, CoTrainer, make_learned
from metabroyden.meta.defaults import RATES
from metabroyden.progress import ticks
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.data.images import ImageSplit, shift
from metabroyden.zoo.models import ConvClassifier, ConvClassifierConfig

LEARNED = "co-trained"
WAYS = (LEARNED, "Broyden", "Anderson")
COLD, WARM = FIXED_IMAGES = ("Anderson, fixed images", "Anderson, fixed images, warm starts")
PARTS = ("forward", "backward", "update", "meta")
_TOLD = ("warmup_steps", "every", "unroll", "residual_weight", "residual_batch", "balance")
RATE, RTOL = 2e-3, 1e-2
"""Peak of Adam's learning rate, with a cosine schedule; the tolerance of both directions."""
JUDGING: dict[str, Any] = {"solver": Broyden(memory=60), "rtol": 1e-3, "max_nfe": 80, "warn": False}
"""How the equilibria are found at which accuracy is measured, whichever way trained."""


@dataclass(frozen=True)
class Alternate(Budgeted, command="alternate", budget=50):
    """Train the same DEQ with Broyden, with Anderson, and together with its own root finder; results/alternate/."""

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
    warmup_steps: int = 20
    """Training steps at the beginning with a meta-step each; the learned solver takes over after them."""
    every: int = 8
    """Training steps from one meta-step to the next after that."""
    unroll: int = 8
    """Solver steps of a meta-step."""
    meta_batch: int = 8
    """Problems of a meta-step."""
    rank: int = 16
    """Rank of the learned solver's preconditioner."""
    residual_weight: float = 0.1
    """Weight of the residuals of the learned solver's first steps, at most."""
    residual_batch: int = 16
    """Samples of a batch that they are of."""
    balance: float = 0.5
    """Their gradient's norm over that of the task's, at most."""


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
        self.way, self.train, self.batch, self.seconds = way, train, config.batch, 0.0
        torch.manual_seed(seed)
        options: Row = {"solver": Broyden(memory=30) if way == "Broyden" else Anderson(memory=6)}
        options |= {"rtol": RTOL, "max_nfe": config.budget}
        sizes = ConvClassifierConfig(channels=config.channels, inner=2 * config.channels, side=config.side)
        self.model = ConvClassifier(sizes, **options, backward=Implicit(**options), warn=False)
        self.online = _online(config, self.model, seed) if way == LEARNED else None
        self.cache = EquilibriumCache(len(train.images)) if way == WARM else None
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.used = len(train.images) // config.batch * config.batch
        steps = config.epochs * (self.used // config.batch)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.generator = torch.Generator().manual_seed(seed)

    def epoch(self, validation: ImageSplit) -> Row:
        """Train for an epoch; what it cost, and the accuracy at equilibria found by one and the same Broyden."""
        order = torch.randperm(len(self.train.images), generator=self.generator)
        spent, steps = zip(*map(self.step, order[: self.used].split(self.batch)), strict=True)
        taken = np.sum(spent, axis=0).round(4).tolist()
        self.seconds = round(self.seconds + sum(taken), 4)
        average = {key: round(mean(steps, key), 4) for key in steps[0]}
        with torch.no_grad():
            z = DEQ(self.model.cell, **JUDGING)(self.model.inject(validation.images))
            found = self.model.classify(z).argmax(dim=1)
        accuracy = round(float((found == validation.labels).float().mean()), 5)
        parts = dict(zip(PARTS, taken, strict=True))
        return {"way": self.way, **average, "seconds": self.seconds, "spent": parts, "accuracy": accuracy}

    def step(self, rows: Tensor) -> tuple[list[float], Row]:
        """A training step: seconds of its parts, and what its two solves took."""
        model, deq, images = self.model, self.model.deq, self.train.images[rows]
        if self.way in WAYS:
            images = shift(images, self.generator)
        moments = [time.perf_counter()]
        x = model.inject(images)
        z = deq(x) if self.cache is None else deq(x, self.cache.start(rows, torch.zeros_like(x)))
        forward = deq.last_solution
        if self.cache is not None:
            self.cache.store(rows, forward.z)
        task = nn.functional.cross_entropy(model.classify(z), self.train.labels[rows])
        loss = task if self.online is None else self.online.loss(task)
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
        moments.append(time.perf_counter())
        found = _solved("evaluations", "failed", forward)
        found |= _solved("products", "failed_backward", deq.last_backward_solution)
        return np.diff(moments).tolist(), {"loss": float(task.detach()), **found}


def _solved(spent: str, failed: str, found: Any) -> Row:
    most = {f"slowest_{spent}": float(found.nfe.max()), failed: float((~found.converged).double().mean())}
    return {spent: float(found.nfe.double().mean()), **most}


def _online(config: Alternate, model: ConvClassifier, seed: int) -> CoTrainer:
    layout = Layout("image", (config.channels, config.side, config.side))
    sizes: dict[str, Any] = {"rank": config.rank, "conditioning": "input", "learned_steps": 2 * config.unroll}
    told = {name: getattr(config, name) for name in _TOLD}
    solver = make_learned("meta-broyden", layout, seed=seed, schedule_length=config.unroll, **sizes)
    rates = {name: 0.5 * rate for name, rate in RATES.items()}
    return CoTrainer(model.deq, solver, config=CoTrainConfig(batch=config.meta_batch, **rates, **told), seed=seed)


@report.of_rows("A DEQ and its root finder trained together from scratch")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and its figures, from rows alone."""
    rows = [{**row, **row["spent"], "taken": sum(row["spent"].values()), "error": 1 - row["accuracy"]} for row in rows]
    last = max(row["epoch"] for row in rows)
    ways = {way: means(chosen(rows, "epoch", way=way), "epoch") for way in (*WAYS, *FIXED_IMAGES)}
    warm = [{**a, "cold": b, "time": a["forward"] / b["forward"]} for a, b in zip(ways[WARM], ways[COLD], strict=True)]
    whole = {row["way"]: row for row in means(rows, "way")}
    costs = [
        {**ways[way][-1], "whole": whole[way], **{part: last * whole[way][part] for part in PARTS}} for way in WAYS
    ]

    def panel(x: str, y: str, xlabel: str, ylabel: str, **axes: Any) -> tuple[Any, Row]:
        shown = {way: figures.FLAGSHIP if way == LEARNED else way for way in WAYS}
        lines = {shown[way]: ([row[x] for row in ways[way]], [row[y] for row in ways[way]]) for way in WAYS}
        return lines, {"xlabel": xlabel, "ylabel": ylabel, **(axes or {"ylim": (0, None)})}

    by_time = figures.curves(
        folder / "accuracy_by_time.png",
        panel("seconds", "error", "training time (s), mean over seeds", "validation error", yscale="log"),
        panel("epoch", "taken", "epoch", "seconds an epoch, meta-steps included"),
    )
    by_epoch = figures.curves(
        folder / "evaluations_by_epoch.png",
        panel("epoch", "evaluations", "epoch", "evaluations of f, forward (mean of a sample)"),
        panel("epoch", "products", "epoch", "products with Jᵀ, backward (mean of a sample)"),
    )
    return [
        _times({way: grouped(chosen(rows, "epoch", way=way), "seed") for way in WAYS}),
        by_time,
        listed("", costs, [
            ("way", "{way}"), ("training", "{seconds:.0f} s"), ("forward", "{forward:.0f} s"),
            ("backward", "{backward:.0f} s"), ("meta-steps", "{meta:.0f} s"),
            ("evaluations", "{evaluations:.1f} / {slowest_evaluations:.1f}"),
            ("products", "{products:.1f} / {slowest_products:.1f}"),
            ("failed", "{whole[failed]:.2%} / {whole[failed_backward]:.2%}"), ("accuracy", "{accuracy:.2%}"),
        ]),
        by_epoch,
        listed("Warm starts: `EquilibriumCache`, Anderson, images not shifted, seed 0", warm, [
            ("epoch", "{epoch}"), ("evaluations, from zero", "{cold[evaluations]:.1f}"),
            ("from the cache", "{evaluations:.1f}"), ("time of the forward pass", "{time:.2f}×"),
            ("accuracy", "{cold[accuracy]:.2%}"), ("with the cache", "{accuracy:.2%}"),
        ]),
    ]  # fmt: skip


def _times(runs: dict[str, list[list[Row]]]) -> Table:
    """Time of co-training over that of the others: geometric mean over seeds, and each."""
    best = {way: [max(row["accuracy"] for row in epochs) for epochs in runs[way]] for way in WAYS}
    targets = [min(of_seed) for of_seed in zip(*best.values(), strict=True)]
    readings: Row = {
        way: [(run[-1]["seconds"], next(row["seconds"] for row in run if row["accuracy"] >= target), run[-1]["taken"])
              for run, target in zip(runs[way], targets, strict=True)]
        for way in WAYS
    }  # fmt: skip
    body = []
    for rival in WAYS[1:]:
        ratios = np.divide(readings[LEARNED], readings[rival]).T
        words = [f"**{geometric(of):.2f}×** ({', '.join(f'{one:.2f}' for one in of)} by seed)" for of in ratios]
        body.append([f"Against {rival}", *words, f"{np.mean(best[LEARNED]):.2%} ({np.mean(best[rival]):.2%})"])
    reached = ["whole training", "until the accuracy that all reach", "last epoch"]
    return Table("Time of co-training", ["", *reached, "best validation accuracy (the rival's)"], body)
