"""Training a DEQ while its solvers learn: wall-clock and accuracy against training with Broyden and with Anderson."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn

from experiments.legacy import alternate_report
from experiments.legacy.provenance import config_hash, plain, provenance, write_results
from metabroyden import Anderson, Broyden, EquilibriumCache, Implicit
from metabroyden.learned.layout import Layout
from metabroyden.meta import OnlineConfig, OnlineMetaTrainer
from metabroyden.meta.fit import make_learned
from metabroyden.meta.progress import progress_bar
from metabroyden.storage import atomic_write
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.data.images import ImageSplit, shift
from metabroyden.zoo.models import ConvClassifier, ConvClassifierConfig

LEARNED = "learned, in alternation"
WAYS = ("Broyden", "Anderson", LEARNED)
FIXED_IMAGES = ("Anderson, fixed images", "Anderson, fixed images, warm starts")


@dataclass(frozen=True)
class Alternate:
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
    budget: int = 50
    """Evaluations a sample may cost, in either direction."""
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
    results: Path = Path("results/alternate")
    """Where rows, figures and the report go."""
    runs: Path = Path("runs/alternate")
    """Where finished seeds are kept until all are."""
    progress: bool = True
    """Show a progress bar."""


def run(config: Alternate) -> None:
    """The whole job; a seed that was finished before is not trained again."""
    console = Console()
    rows: list[dict[str, Any]] = []
    seconds = 0.0
    with progress_bar("training", config.seeds * config.epochs, show=config.progress) as bar:
        for seed in range(config.seeds):
            path = config.runs / config_hash(config) / f"seed{seed}.json"
            if not path.exists():
                began = time.perf_counter()
                found = _seed(config, seed, bar)
                kept = {"rows": found, "seconds": time.perf_counter() - began, "provenance": provenance()}
                atomic_write(path, json.dumps(kept))
            kept = json.loads(path.read_text())
            rows += kept["rows"]
            seconds += kept["seconds"]
    described = {
        "command": "python -m experiments alternate",
        "config": plain(config),
        "seconds": round(seconds),
        "provenance": kept["provenance"],
    }
    write_results(config.results, rows, described)
    report = alternate_report.write(config.results, rows, described)
    console.print(Markdown(alternate_report.verdicts(rows)))
    console.print(f"Figures and report: {report} ({described['seconds']} s)")


def _seed(config: Alternate, seed: int, bar: Callable[[int, str], None] | None) -> list[dict[str, Any]]:
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
        if bar is not None:
            bar(seed * config.epochs + epoch + 1, f"accuracy {rows[-1]['accuracy']:.3f}")
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
        parts = ("forward", "backward", "update", "meta")
        spent = {part: means.pop(part) * len(steps) for part in parts}
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
        parts = dict(
            zip(("forward", "backward", "update", "meta"), map(_difference, moments, moments[1:]), strict=True)
        )
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


def _difference(before: float, after: float) -> float:
    return after - before


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
