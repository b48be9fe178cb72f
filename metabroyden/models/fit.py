"""Training and storing of classifiers built round a DEQ."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden import checkpoint
from metabroyden.data.images import ImageData, ImageSplit, shift
from metabroyden.models.conv import ConvClassifier, ConvClassifierConfig
from metabroyden.models.dense import DenseClassifier, DenseClassifierConfig
from metabroyden.models.mlp import MLPClassifier, MLPClassifierConfig
from metabroyden.models.multiscale import MultiscaleClassifier, MultiscaleClassifierConfig
from metabroyden.models.twins import Twin, build_twin

MODELS: dict[str, tuple[type, type]] = {
    ConvClassifier.kind: (ConvClassifier, ConvClassifierConfig),
    DenseClassifier.kind: (DenseClassifier, DenseClassifierConfig),
    MLPClassifier.kind: (MLPClassifier, MLPClassifierConfig),
    MultiscaleClassifier.kind: (MultiscaleClassifier, MultiscaleClassifierConfig),
}
"""Models by kind, with their config types."""


@dataclass(frozen=True)
class ClassifierTraining:
    """How a classifier is trained: Adam with a cosine schedule, cross-entropy, images shifted by up to a pixel.

    Attributes:
        epochs, batch, learning_rate, clip: as usual. seed: of weights, order and shifts.
    """

    epochs: int = 16
    batch: int = 64
    learning_rate: float = 2e-3
    clip: float = 1.0
    seed: int = 0


def train_classifier(
    build: Callable[[], Any],
    data: ImageData,
    config: ClassifierTraining,
    *,
    path: Path | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Any:
    """Train the model that `build` makes; with a path, an interrupted run goes on bit for bit from its last epoch.

    `progress` receives (epoch, words). The model comes back in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build()
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    per_epoch = len(data.train.images) // config.batch
    if per_epoch < 1:
        raise ValueError(f"a batch of {config.batch} is more than the {len(data.train.images)} training images")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * per_epoch)
    epoch, seconds = 0, 0.0
    if path is not None and path.exists():
        tensors, header = checkpoint.read(path, "training")
        if header.get("config") != json.loads(json.dumps(asdict(config))):
            raise checkpoint.CheckpointError(f"{path} was written by another training: {header.get('config')}")
        checkpoint.restore_training(tensors, model, optimizer, generator, path)
        epoch, seconds = header["epoch"], header["seconds"]
        optimizer.param_groups[0].update(lr=header["learning_rate"], initial_lr=config.learning_rate)
        schedule.load_state_dict(header["schedule"])
    while epoch < config.epochs:
        began = time.perf_counter()
        loss = _epoch(model, data.train, config, optimizer, schedule, generator)
        epoch, seconds = epoch + 1, seconds + time.perf_counter() - began
        if path is not None:
            header = {
                "config": asdict(config),
                "epoch": epoch,
                "seconds": seconds,
                "schedule": schedule.state_dict(),
                "learning_rate": optimizer.param_groups[0]["lr"],
            }
            checkpoint.write(
                path, "training/classifier", checkpoint.training_tensors(model, optimizer, generator), header
            )
        if progress is not None:
            progress(epoch, f"loss {loss:.3f}, validation accuracy {accuracy(model, data.validation):.3f}")
    return model.eval()


def _epoch(
    model: nn.Module,
    split: ImageSplit,
    config: ClassifierTraining,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
) -> float:
    model.train()
    order = torch.randperm(len(split.images), generator=generator)
    total = torch.zeros(())
    batches = order[: len(order) // config.batch * config.batch].split(config.batch)
    for index in batches:
        images = shift(split.images[index], generator)
        loss = nn.functional.cross_entropy(model(images), split.labels[index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        total += loss.detach()
    return float(total) / len(batches)


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], split: ImageSplit) -> float:
    """Share of a split's images that the model gets right."""
    if isinstance(model, nn.Module):
        model.eval()
    return float((model(split.images).argmax(dim=1) == split.labels).float().mean())


def save_model(model: Any, path: str | Path, summary: dict[str, Any] | None = None) -> Path:
    """Write a model of `MODELS`, or a twin of one (weights and config, not its solver); `summary` is kept beside them."""
    if getattr(model, "kind", None) not in MODELS:
        raise TypeError(f"save_model takes one of {sorted(MODELS)}, got {type(model).__name__}")
    header = {"config": model.describe(), "summary": summary or {}}
    if isinstance(model.deq, Twin):
        header["twin"] = model.deq.describe()
    return checkpoint.write(path, f"model/{model.kind}", model.state_dict(), header)


def load_model(path: str | Path, **deq_options: Any) -> Any:
    """The model in a file, in evaluation mode; `deq_options` go to its `DEQ` (solver, rtol, max_nfe, …).

    TypeError for options where the file holds a twin, which has no DEQ.
    """
    tensors, header = checkpoint.read(path, "model")
    kind = header["kind"].split("/")[1]
    if kind not in MODELS:
        raise checkpoint.CheckpointError(f"{path} holds a model of unknown kind {kind!r}; known: {sorted(MODELS)}")
    cls, config_type = MODELS[kind]
    twin = header.get("twin")
    if twin is not None and deq_options:
        raise TypeError(f"{path} holds a twin ({twin}), which takes no options of a DEQ; got {sorted(deq_options)}")
    try:
        config = config_type(**header["config"])
        model = cls(config, **deq_options) if twin is None else build_twin(cls, config, twin)
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path}: its description is damaged: {error!r}") from error
    checkpoint.load_weights(model, tensors, path)
    return model.eval()
