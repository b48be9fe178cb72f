"""Drop-in: an unmodified torchdeq model, trained by torchdeq, made faster by a root finder fitted to it."""

from __future__ import annotations

import copy
import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn

import metabroyden as mb
from experiments.bench.peers import available
from experiments.legacy import drop_in, drop_in_report
from experiments.legacy.benchmark import reference_equilibrium
from experiments.legacy.provenance import config_hash, plain, provenance, write_results
from metabroyden import checkpoint
from metabroyden.integrations.torchdeq import FixedPointMap, register
from metabroyden.meta.progress import progress_bar
from metabroyden.solvers.tuning import tune
from metabroyden.storage import atomic_write
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.models import Images, Training, accuracy, train
from metabroyden.zoo.models.conv import ConvCell
from metabroyden.zoo.models.fit import by_epoch

TOLERANCES = (1e-2, 1e-3)
OWN = {"torchdeq Broyden": "broyden", "torchdeq Anderson": "anderson", "torchdeq fixed point": "fixed_point_iter"}
"""torchdeq's solvers, with its default options."""


@dataclass(frozen=True)
class DropIn:
    """Train a torchdeq classifier on digits, fit a root finder to it, put that in, and compare with torchdeq's own."""

    seed: int = 0
    """First seed, of the model and of the fit; the data split is always the same."""
    seeds: int = 1
    """Models trained, fitted to and compared."""
    channels: int = 32
    """Channels of the DEQ's state; twice as many inside its cell."""
    epochs: int = 16
    """Epochs of the model's training."""
    steps: int = 400
    """Outer steps of fit_solver (its default)."""
    budget: int = 60
    """max_iter of every solver in the comparison."""
    repeats: int = 5
    """Interleaved timing repeats."""
    test_samples: int = 300
    """Held-out images used (of 300)."""
    tune_samples: int = 100
    """Validation images on which Picard and Anderson are tuned."""
    results: Path = Path("results/torchdeq")
    """Where rows, figure and report go."""
    runs: Path = Path("runs/drop-in")
    """Where unfinished work is kept, to go on from."""
    fresh: bool = False
    """Throw away unfinished and finished work of this configuration and start anew."""
    progress: bool = True
    """Show progress bars."""


class Classifier(nn.Module):
    """Images (B, 1, 8, 8) → logits, as one writes it with torchdeq: nothing in it knows of metabroyden's solvers."""

    def __init__(self, channels: int, **deq_options: Any) -> None:
        import torchdeq

        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.GroupNorm(4, channels))
        self.cell = ConvCell(channels, 2 * channels)
        self.deq = torchdeq.get_deq(**deq_options)
        self.head = nn.Linear(channels * 8 * 8, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, through a solve."""
        x = self.stem(images)
        states, _ = self.deq(lambda z: self.cell(z, x), torch.zeros_like(x))
        return self.head(states[-1].flatten(1))


def run(config: DropIn) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it only shows its results again."""
    if not available("torchdeq"):
        raise SystemExit("python -m experiments drop-in needs torchdeq: pip install torchdeq==0.1.0")
    console, began = Console(), time.perf_counter()
    rows: list[dict[str, Any]] = []
    notes: dict[str, Any] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        found = _one_seed(replace(config, seed=seed, seeds=1))
        rows += found["rows"]
        notes[str(seed)] = found["notes"]
    described = {
        "command": f"python -m experiments drop-in --seed {config.seed} --seeds {config.seeds}",
        "config": plain(config),
        "seeds": notes,
    }
    write_results(config.results, rows, described)
    report = drop_in_report.write(config.results, rows, described)
    console.print(Markdown(drop_in_report.verdicts(rows)))
    console.print(f"Tables and figure: {report}. This sitting took {time.perf_counter() - began:.0f} s.")


def _one_seed(config: DropIn) -> dict[str, Any]:
    """Rows and notes of one model; what is done is not done again."""
    identity = replace(config, results=Path(), runs=Path(), fresh=False, progress=True)
    work = config.runs / f"seed{config.seed}-{config_hash(identity)}"
    if config.fresh and work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    path = work / "evaluation.json"
    if not path.exists():
        model = _trained(config, work)
        atomic_write(path, json.dumps(_evaluated(config, model, _fitted(config, model, work))))
    return json.loads(path.read_text())


def _trained(config: DropIn, work: Path) -> Classifier:
    """a. The model, trained by torchdeq's own solvers and implicit differentiation."""

    def build() -> Classifier:
        # most early solves stop at the budget, which is what training wants: gradients need no more
        return Classifier(
            config.channels,
            ift=True,
            f_solver="anderson",
            f_max_iter=30,
            f_tol=1e-3,
            f_stop_mode="rel",
            b_solver="broyden",
            b_max_iter=15,
            b_tol=1e-2,
            b_stop_mode="rel",
        )

    path = work / "model.safetensors"
    if path.exists():
        model = build().eval()
        checkpoint.load_weights(model, checkpoint.read(path, "model")[0], path)
        return model
    data = load_digits()
    training = Training(epochs=config.epochs, seed=config.seed)
    with progress_bar("training with torchdeq", config.epochs, show=config.progress) as bar:
        model = train(
            build, Images(data), training, path=work / "model.training.safetensors", report=by_epoch(bar, "accuracy")
        )
    header = {"training": asdict(training), "validation_accuracy": accuracy(model, data.validation)}
    checkpoint.write(path, "model/torchdeq-classifier", model.state_dict(), header)
    return model


def _fitted(config: DropIn, model: Classifier, work: Path) -> Any:
    """b. One call: a root finder for the model as it is, from its training images alone."""
    path = work / "learned.safetensors"
    if path.exists():
        return mb.load_solver(path)
    solver = mb.fit_solver(
        model,
        load_digits().train.images,
        layout="image",
        steps=config.steps,
        seed=config.seed,
        fallback=False,  # measured below, whatever it is worth
        progress=config.progress,
        checkpoint=work / "learned.training.safetensors",
    )
    mb.save_solver(solver, path)
    return solver


def _evaluated(config: DropIn, model: Classifier, learned: Any) -> dict[str, Any]:
    """c. The same model with one solver after the other in its DEQ, on test images."""
    data = load_digits()
    images, labels = (part[: config.test_samples] for part in (data.test.images, data.test.labels))
    ours = {"learned": learned, "our Broyden": mb.Broyden(memory=config.budget), **_tuned(config, model)}
    for name, solver in ours.items():
        register(name, solver)
    names = {"learned": "learned", **OWN, **{name: name for name in ours}}
    double = FixedPointMap(copy.deepcopy(model).double())
    found = [reference_equilibrium(double, z0, x, rtol=1e-7, max_nfe=300) for z0, x in _chunks(double, images.double())]
    star, known = (torch.cat(parts) for parts in zip(*found, strict=True))
    rows: list[dict[str, Any]] = []
    with progress_bar("comparing", len(TOLERANCES), show=config.progress) as bar:
        for number, rtol in enumerate(TOLERANCES):
            models = {name: _with_solver(config, model, registered, rtol) for name, registered in names.items()}
            rows += drop_in.rows(
                models,
                images,
                labels,
                rtol=rtol,
                budget=config.budget,
                repeats=config.repeats,
                reference="torchdeq Broyden",
                star=star,
                known=known,
            )
            if bar is not None:
                bar(number + 1, f"to {rtol:g}")
    notes = {
        "solvers": {name: repr(solver) for name, solver in ours.items() if name != "learned"},
        "held_out": learned.summary["held_out"],
        "fit_seconds": learned.summary["seconds"],
        "parameters": {"model": _size(model), "learned solver": _size(learned)},
        "equilibria_known": float(known.float().mean()),
        "provenance": provenance(),
    }
    return {"rows": [{"seed": config.seed, **row} for row in rows], "notes": notes}


def _with_solver(config: DropIn, model: Classifier, name: str, rtol: float) -> Classifier:
    """The model with another solver's name in get_deq: all that a user changes."""
    built = Classifier(config.channels, f_solver=name, f_tol=rtol, f_stop_mode="rel", f_max_iter=config.budget)
    built.load_state_dict(model.state_dict())
    return built.eval()


def _tuned(config: DropIn, model: Classifier) -> dict[str, Any]:
    """Picard and Anderson, tuned on validation images."""
    x = load_digits().validation.images[: config.tune_samples]
    f = FixedPointMap(model)
    z0 = f.initial_state(x)
    grid = [
        mb.Anderson(memory, damping, ridge)
        for memory in (5, 8)
        for damping in (1.0, 1.5, 2.0)
        for ridge in (1e-8, 1e-2, 1e-1)
    ]
    options: dict[str, Any] = {"tolerances": TOLERANCES, "max_nfe": config.budget}
    return {
        "our tuned Anderson": tune(grid, f, z0, x, **options)[0][0],
        "our tuned Picard": mb.Picard.tuned(f, z0, x, **options),
    }


def _chunks(f: FixedPointMap, images: Tensor, size: int = 75) -> list[tuple[Tensor, Tensor]]:
    """(z0, x) of parts of the images: full memory in float64 is large."""
    return [(f.initial_state(part), part) for part in images.split(size)]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
