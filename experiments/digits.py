"""The demo: a convolutional DEQ on handwritten digits, three learned root finders, and what each saves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metabroyden as mb
from experiments.bench import report
from experiments.bench.options import Budgeted, Seeded
from experiments.bench.runner import Row, Run, read_rows, show, write_rows
from metabroyden.comparison.figures import FLAGSHIP, label
from metabroyden.progress import progress_bar
from metabroyden.storage import atomic_write
from metabroyden.zoo import models
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.models.fit import by_epoch

LEARNED = (FLAGSHIP, "grouped", "coordinatewise")
TOLERANCES = (1e-2, 1e-3, 1e-4)
PASTE = Path(__file__).with_name("configs") / "demo.md"
"""What the demo ends with: lines for one's own code."""


@dataclass(frozen=True)
class Digits(Seeded, Budgeted, command="digits"):
    """Train a DEQ on digits, meta-train root finders for it, compare them with tuned classical solvers."""

    epochs: int = 16
    """Epochs of the DEQ's training."""
    steps: int = 600
    """Outer steps of the meta-training of MetaBroyden and the grouped LSTM, at most; of the coordinatewise LSTM a third."""
    rounds: int = 3
    """Timed rounds in which the solvers take turns."""
    test_samples: int = 300
    """Held-out images used (of 300)."""


class Labelled(nn.Module):
    """A model on images whose labels travel along, for a metric to see; it reads the images alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        """The model's output for the images."""
        return self.model(given["image"])


def run(config: Digits) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it only shows its results again."""
    job = Run(config, free=("seed",), shared=(), always=f"--seed {config.seed}")
    model = _trained(config, job.work / "model.safetensors")
    learned = {name: _fitted(config, name, model, job.work) for name in LEARNED}
    rows = job.unit("compared", lambda: _compared(config, model, learned).rows)
    folder = job.folder / f"seed{config.seed}"
    atomic_write(folder / "config.json", json.dumps(job.described(), indent=2) + "\n")
    write_rows(folder / "rows.jsonl.gz", rows)
    for name in ("model", *LEARNED):
        atomic_write(folder / f"{name}.safetensors", (job.work / f"{name}.safetensors").read_bytes())
    show(write(folder))
    write(job.folder)
    print(f"\nFigures and report: {folder / 'report.html'}\n{PASTE.read_text(encoding='utf-8').format(folder=folder)}")


def _trained(config: Digits, path: Path) -> Any:
    """The DEQ: forward root solve by Anderson, backward by implicit differentiation."""
    if path.exists():
        return models.load_model(path)
    solver, data = mb.Anderson(memory=5), load_digits()
    # most early solves stop at the budget, which is what training wants: gradients need no more
    backward = mb.Implicit(solver=solver, rtol=1e-2, max_nfe=20)
    options: Row = {"solver": solver, "backward": backward, "rtol": 1e-3, "max_nfe": 40, "warn": False}
    training, kept = models.Training(epochs=config.epochs, seed=config.seed), path.with_suffix(".training.safetensors")
    with progress_bar("training the DEQ", config.epochs, show=config.progress) as bar:
        model = models.train(
            lambda: models.ConvClassifier(models.ConvClassifierConfig(), **options),
            models.Images(data), training, path=kept, report=by_epoch(bar, "accuracy"),
        )  # fmt: skip
    found = {"validation_accuracy": models.accuracy(model, data.validation), "training": asdict(training)}
    models.save_model(model, path, found)
    return model


def _fitted(config: Digits, name: str, model: Any, work: Path) -> Any:
    """A learned solver, trained on the training images without their labels."""
    path = work / f"{name}.safetensors"
    if not path.exists():
        options: Row = {"steps": max(1, config.steps // (3 if name == "coordinatewise" else 1)), "seed": config.seed}
        kept, images = path.with_suffix(".training.safetensors"), load_digits().train.images
        print(f"\nTraining {name}, and a first look at it on training images that it left alone:", flush=True)
        solver = mb.fit_solver(
            model, images, solver=name, fallback=False, checkpoint=kept, progress=config.progress, **options
        )
        mb.save_solver(solver, path)
    return mb.load_solver(path)


def _compared(config: Digits, model: Any, learned: dict[str, Any]) -> mb.Comparison:
    """All solvers once on the test images; the classical ones are tuned on the validation images."""
    data = load_digits()

    def given(split: Any, count: int) -> dict[str, Tensor]:
        return {"image": split.images[:count], "label": split.labels[:count]}

    def right(z: Any, given: dict[str, Tensor]) -> Tensor:
        return (model.classify(z).argmax(1) == given["label"]).float()

    test, tuning = given(data.test, config.test_samples), given(data.validation, config.test_samples)
    options: Row = {"max_nfe": config.budget, "rounds": config.rounds, "progress": config.progress}
    with torch.no_grad():
        return mb.compare(
            Labelled(model), test, solvers=learned, tune_on=tuning, rtol=TOLERANCES, metric=right, **options
        )


def write(folder: Path) -> Path:
    """Write report.md, report.html and figures of a seed's folder, or of all seeds below a folder."""
    seeds = sorted(folder.glob("seed*")) or [folder]
    described = [report.read_config(seed) for seed in seeds]
    rows = [
        {**row, "solver": label(row["solver"]), "seed": made["config"]["seed"]}
        for seed, made in zip(seeds, described, strict=True)
        for row in read_rows(seed / "rows.jsonl")
    ]
    about = (
        f"A convolutional DEQ on 8×8 digits, {len(seeds)} seed(s) of DEQ and meta-training; held-out test images; the "
        "classical solvers are tuned on validation images; the metric is accuracy."
    )
    words = "\n\n".join([about, *(report.made_by(made) for made in described)])
    title = "Root finders on a convolutional DEQ, digits"
    mb.Comparison(rows, methods={label(name): name for name in LEARNED}, title=title, about=words).save(folder)
    return folder / "report.md"
