"""Training and storing of models built round a DEQ."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden import checkpoint, resume
from metabroyden.deq import DEQ
from metabroyden.described import check, damaged
from metabroyden.folder import model_card
from metabroyden.nn.jacobian import jacobian_penalty
from metabroyden.zoo.models.base import MODELS, EquilibriumModel
from metabroyden.zoo.models.criteria import Criterion, device_of
from metabroyden.zoo.models.twins import Twin, Unrolled, build_twin

PRECISIONS = (torch.float32, torch.float64, torch.half, torch.bfloat16)  # of a stored model's weights
_LARGEST_SIZE = 2**20  # of what no weight depends on, such as an image's side under a stride


@dataclass(frozen=True)
class Training:
    """How a model is trained: AdamW, a cosine schedule after a linear warm-up, clipped gradients.

    Attributes:
        epochs: passes, as the criterion counts them.
        clip: of the gradient's norm.
        warmup: share of all steps in which the learning rate rises.
        beta2: AdamW's decay of squared gradients.
        pretrain: epochs at first in which a DEQ is trained as the weight-tied network of so many layers, `depth`:
            shallow steps are cheap (Bai, Kolter & Koltun 2019, section 4).
        least: where given, the depth of each of those steps is drawn from least, …, depth, so that no single depth is
            the one that the weights suit.
        half: whether those epochs compute in bfloat16 where that is safe (autocast), whatever the model.
        jacobian: weight of the Jacobian penalty at the equilibrium (`jacobian_penalty`).
        seed: of weights, order and augmentation.
    """

    epochs: int = 16
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    warmup: float = 0.0
    clip: float = 1.0
    beta2: float = 0.999
    pretrain: int = 0
    depth: int = 8
    least: int | None = None
    half: bool = False
    jacobian: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("depth", 1), ("pretrain", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.pretrain > self.epochs:
            raise ValueError(f"pretrain must be at most the {self.epochs} epochs, got {self.pretrain}")
        if self.least is not None and not 1 <= self.least <= self.depth:
            raise ValueError(f"least must be from 1 to the depth {self.depth}, got {self.least}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = self.warmup * steps
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        return self.learning_rate * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


@dataclass(frozen=True)
class _Described:
    """What the header of a stored model says."""

    config: dict[str, Any]
    twin: dict[str, Any] | None = None
    to_half: bool = False


@dataclass(frozen=True)
class EpochEnd:
    """Where a training stands after an epoch: mean loss, score on validation, seconds of training so far."""

    epoch: int
    loss: float
    score: float
    seconds: float


@dataclass(frozen=True)
class _Record:
    """What the header of a training's checkpoint says."""

    history: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


def train(
    build: Callable[[], Any],
    criterion: Criterion,
    config: Training,
    *,
    path: Path | None = None,
    device: torch.device | str = "cpu",
    report: Callable[[EpochEnd, Any], None] | None = None,
) -> Any:
    """Train the model that `build` makes; with a path, an interrupted run goes on bit for bit from its last epoch.

    After every epoch `report` receives where it stands, and the model (once more where the run was killed before the epoch's
    checkpoint was written); `history` of a checkpoint reads all of that back. The model comes back in evaluation mode.

    Raises:
        ValueError: the batch is larger than the data.
        FloatingPointError: a loss that is not finite; the checkpoint of the last epoch stays.
        CheckpointError: the file at `path` belongs to another training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build().to(device)
    generator = torch.Generator().manual_seed(config.seed)
    rate, betas, decay = config.learning_rate, (0.9, config.beta2), config.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=decay, fused=True)
    criterion.steps(config.batch)  # refuses early
    described, what = json.loads(json.dumps(asdict(config))), _what(model)
    past: list[dict[str, Any]] = []
    if path is not None and path.exists():
        tensors, header = checkpoint.read(path, "training")
        past = _past(header, path, config.epochs)
        other = _differences(header, described)
        if header.get("model", what) != what:
            raise checkpoint.CheckpointError(f"{path} holds {header['model']}, not {what}: remove it to start anew")
        if other:
            raise checkpoint.CheckpointError(
                f"{path} was written by another training, with {other} instead of "
                f"{ {key: described[key] for key in other} }: remove it to start anew"
            )
        resume.restore(tensors, header, path, model, optimizer, taken=len(past), generator=generator)
    while len(past) < config.epochs:
        began = time.perf_counter()
        loss = _epoch(model, criterion, config, len(past), optimizer, generator)
        seconds = time.perf_counter() - began + (past[-1]["seconds"] if past else 0.0)
        now = EpochEnd(len(past) + 1, loss, criterion.score(model, "validation"), seconds)
        past.append(asdict(now))
        if report is not None:
            report(now, model)
        if path is not None:
            header = {"config": described, "model": what, "history": past}
            checkpoint.write(path, "training/model", *resume.pack(model, optimizer, header, generator=generator))
    return model.eval()


def _differences(header: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's training had other than this one, save a penalty that would only have come later."""
    before = asdict(Training()) | header.get("config", {})
    later = {"jacobian"} if len(header["history"]) <= config["pretrain"] else set()
    return {key: before[key] for key, value in config.items() if key not in later and before[key] != value}


def _what(model: Any) -> dict[str, Any]:
    """Which model this is, as JSON gives it back; of one not of ours its class alone."""
    if not isinstance(model, EquilibriumModel):
        return {"kind": type(model).__name__}
    twin = model.deq.describe() if isinstance(model.deq, Twin) else None
    return json.loads(json.dumps({"kind": model.kind, "config": model.describe(), "twin": twin}))


def history(path: Path) -> list[EpochEnd]:
    """The epochs of the training whose checkpoint this is; `CheckpointError` where it is none."""
    return [EpochEnd(**past) for past in _past(checkpoint.read(path, "training")[1], path)]


def _past(header: dict[str, Any], path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The epochs that a checkpoint's header tells of, at most so many; `CheckpointError` for what no training wrote."""
    check(header, _Record, path)
    past = header["history"]
    for number, entry in enumerate(past):
        check(entry, EpochEnd, path, score=Any)  # a DEQ that is not trained as one yet may fail on validation
        if not isinstance(entry["score"], float | int):
            raise damaged(path, f"the score of epoch {number + 1} is {entry['score']!r:.80}")
        if entry.keys() != EpochEnd.__dataclass_fields__.keys() or entry["epoch"] != number + 1:
            raise damaged(path, f"its history has {entry!r:.200} for epoch {number + 1}")
    if most is not None and len(past) > most:
        raise damaged(path, f"its history is of {len(past)} epochs, wanted at most {most}")
    return past


def _epoch(
    model: Any,
    criterion: Criterion,
    config: Training,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> float:
    """One epoch; its mean loss, without the penalty."""
    model.train()
    per_epoch = criterion.steps(config.batch)
    device = device_of(model)
    total = torch.zeros((), device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), Stage(model, config, epoch) as stage:
        torch.manual_seed(config.seed + 1000 * (epoch + 1))  # dropout's, so that a resumed epoch has the same
        for number, loss in enumerate(stage.losses(criterion, generator)):
            rate = config.rate(epoch * per_epoch + number, config.epochs * per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total += loss.detach()
            optimizer.zero_grad()
            (loss + stage.penalty(generator)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss of epoch {epoch + 1} is not finite: try a smaller learning rate")
    return float(total) / per_epoch


class Stage:
    """How an epoch trains a model with a DEQ, unrolled at first, with a penalty on its equilibria later."""

    def __init__(self, model: Any, config: Training, epoch: int) -> None:
        self.model, self.config, self.early = model, config, epoch < config.pretrain
        self.deq = model.deq if isinstance(model.deq, DEQ) else None
        self.weight = 0.0 if self.early else config.jacobian
        self._found: tuple[Any, Any, Any] | None = None

    def __enter__(self) -> Stage:
        if self.deq is not None and self.weight:
            self.deq.hooks.append(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.deq is not None:
            self.model.deq = self.deq
            if self.weight:
                self.deq.hooks.remove(self._note)

    def losses(self, criterion: Criterion, generator: torch.Generator) -> Iterator[Tensor]:
        """Those of the criterion, each computed as this epoch wants it."""
        config, device = self.config, device_of(self.model).type
        waiting = criterion.losses(self.model, config.batch, generator)
        while True:
            if self.early and self.deq is not None:
                self.model.deq = Unrolled(self.deq.cell, self._depth(generator))
            with torch.autocast(device, torch.bfloat16, enabled=self.early and config.half):
                loss = next(waiting, None)
            if loss is None:
                return
            yield loss

    def _depth(self, generator: torch.Generator) -> int:
        least, most = self.config.least, self.config.depth
        return most if least is None else int(torch.randint(least, most + 1, (), generator=generator, device="cpu"))

    def _note(self, f: Any, context: Any, z: Any) -> None:
        self._found = f, context, z

    def penalty(self, generator: torch.Generator) -> Tensor | float:
        """The weighted penalty at the equilibrium found last; ValueError where there is none to penalise."""
        if not self.weight:
            return 0.0
        if self._found is None:
            raise ValueError(
                "a Jacobian penalty needs the equilibria of a DEQ: this model has none, or unrolls its solves"
            )
        (f, context, z), self._found = self._found, None
        held = z.detach() if isinstance(z, Tensor) else tuple(part.detach() for part in z)
        return self.weight * jacobian_penalty(f, held, context, generator=generator)


def save_model(model: Any, path: str | Path, summary: dict[str, Any] | None = None, *, slim: bool = False) -> Path:
    """Write a model of `MODELS`, or a twin of one (weights and config, not its solver); `summary` is kept beside them.

    With `slim` weights of float32 are written in half precision where they are many (`checkpoint.to_half`), and come back
    rounded, as float32.
    """
    kind, tensors, header = _contents(model, summary)
    kept = checkpoint.to_half(tensors) if slim else tensors
    header["to_half"] = any(kept[name].dtype != value.dtype for name, value in tensors.items())
    return checkpoint.write(path, kind, kept, header)


def save_pretrained(model: Any, folder: str | Path, summary: dict[str, Any] | None = None) -> Path:
    """Write a model as `save_model` does, but as a folder in Hugging Face's convention; returns the folder.

    `load_model` reads it.
    """
    kind, tensors, header = _contents(model, summary)
    facts = {"weights": sum(value.numel() for value in tensors.values()), **header["config"], **header["summary"]}
    intent = "A model with a deep equilibrium layer, saved by metabroyden. A root finder for it is saved apart."
    code = 'from metabroyden.zoo.models import load_model\n\nmodel = load_model("path/to/this/folder")'
    card = model_card(type(model).__name__, intent, facts, code)
    return checkpoint.write_pretrained(folder, kind, tensors, header, card)


def _contents(model: Any, summary: dict[str, Any] | None) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Kind, weights and description of a model or a twin; TypeError for anything else."""
    if getattr(model, "kind", None) not in MODELS:
        raise TypeError(f"save_model takes one of {sorted(MODELS)}, got {type(model).__name__}")
    header = {"config": model.describe(), "summary": summary or {}}
    if isinstance(model.deq, Twin):
        header["twin"] = model.deq.describe()
    return f"model/{model.kind}", model.state_dict(), header


def load_model(path: str | Path, **deq_options: Any) -> Any:
    """The model in a file or folder, in evaluation mode, on the CPU.

    `deq_options` go to its `DEQ` (solver, rtol, max_nfe, …).

    Raises FileNotFoundError where there is neither, `CheckpointError` for one that cannot be used, TypeError for options
    where it holds a twin, which has no DEQ.
    """
    tensors, header = checkpoint.read(path, "model")
    if header.get("to_half"):
        tensors = checkpoint.widened(tensors)
    return build_model(header, tensors, path, **deq_options)


def build_model(header: dict[str, Any], tensors: dict[str, Tensor], path: str | Path, **deq_options: Any) -> Any:
    """The model that a checkpoint's header describes, with these weights; `CheckpointError` where they do not fit."""
    kind = header["kind"].split("/")[1]
    if kind not in MODELS:
        raise checkpoint.CheckpointError(f"{path} holds a model of unknown kind {kind!r}; known: {sorted(MODELS)}")
    cls: Any = MODELS[kind]
    check(header, _Described, path)
    check(header["config"], cls.config_type, path)
    twin = header.get("twin")
    if twin is not None and deq_options:
        raise TypeError(f"{path} holds a twin ({twin}), which takes no options of a DEQ; got {sorted(deq_options)}")
    _check_sizes(header["config"], tensors, path)

    def build(**options: Any) -> Any:
        config = cls.config_type(**header["config"])
        return cls(config, **options) if twin is None else build_twin(cls, config, twin)

    make = (lambda: build(**deq_options)) if deq_options else None  # wrong options are not the file's fault
    return checkpoint.built(build, tensors, path, PRECISIONS, make=make).eval()


def _check_sizes(config: dict[str, Any], tensors: dict[str, Tensor], path: str | Path) -> None:
    """`CheckpointError` for a size that no model with so many weights can have."""
    most = max(_LARGEST_SIZE, *(value.numel() for value in tensors.values()), 0)
    for name, value in config.items():
        if isinstance(value, int) and not 0 <= value <= most:
            raise damaged(path, f"{name} is {value}, wanted from 0 to {most}")


def by_epoch(bar: Callable[[int, str], None] | None, metric: str) -> Callable[[EpochEnd, Any], None]:
    """What `train` may report to, moving a bar; nothing happens where there is none."""

    def report(now: EpochEnd, model: Any) -> None:
        if bar is not None:
            bar(now.epoch, f"loss {now.loss:.3f}, validation {metric} {now.score:.3f}")

    return report
