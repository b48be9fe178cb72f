"""First light: a convolutional DEQ on handwritten digits, two learned root finders, and the race against Broyden."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from experiments.bench.peers import TorchDEQSolver, available
from experiments.bench.runner import config_hash, plain, provenance, write_rows
from experiments.legacy import benchmark, report
from experiments.legacy.family_report import FamilyReport, read_folders
from metabroyden import Anderson, Broyden, Implicit, load_solver, save_solver
from metabroyden.learned import LearnedStart
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.learned.layout import Layout
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet
from metabroyden.meta.fit import make_learned
from metabroyden.meta.progress import progress_bar
from metabroyden.storage import atomic_write
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.data.images import ImageSplit, shift
from metabroyden.zoo.models import (
    ConvClassifier,
    ConvClassifierConfig,
    Images,
    Training,
    accuracy,
    load_model,
    save_model,
    train,
)
from metabroyden.zoo.models.fit import by_epoch

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60)
GROUPED, COORDINATEWISE = "grouped LSTM", "coordinatewise LSTM"
REPORT = FamilyReport(
    title="Digits: learned root finders against classical ones",
    about="A convolutional DEQ on 8×8 digits",
    learned=(GROUPED, COORDINATEWISE),
    classical=("Picard", "Anderson", "Broyden", "tuned Broyden", "torchdeq Anderson", "torchdeq Broyden"),
    shown=(GROUPED, COORDINATEWISE, "Broyden", "Anderson", "Picard"),
)


@dataclass(frozen=True)
class Digits:
    """Train a DEQ on digits, meta-train its root finder, compare it with the classical solvers."""

    seed: int = 0
    """Seed of the DEQ, of both meta-trainings and of their batches; the data split is always the same."""
    epochs: int = 16
    """Epochs of the DEQ's training."""
    grouped_steps: int = 600
    """Outer steps of the grouped LSTM's meta-training."""
    coordinatewise_steps: int = 400
    """Outer steps of the coordinatewise LSTM's meta-training."""
    unroll: int = 14
    """Solver steps in each unroll, full backpropagation through time."""
    backend: str = "higher"
    """Unroll by "higher", or by plain autograd ("native"): the same gradients."""
    budget: int = 60
    """Evaluations each sample may cost in the comparison."""
    repeats: int = 7
    """Interleaved timing repeats."""
    test_samples: int = 300
    """Held-out images used (of 300)."""
    results: Path = Path("results/digits")
    """Where results go: a folder for this seed, and a report over all seeds found there."""
    runs: Path = Path("runs/digits")
    """Where unfinished work is kept, to go on from."""
    overwrite: bool = False
    """Throw away unfinished and finished work of this configuration and start anew."""
    progress: bool = True
    """Show progress bars."""


def run(config: Digits) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it only shows its results again."""
    console = Console()
    began = time.perf_counter()
    identity = replace(config, results=Path(), runs=Path(), overwrite=False, progress=True)
    work = config.runs / f"seed{config.seed}-{config_hash(identity)}"
    if config.overwrite and work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)

    model = _trained_model(config, work)
    console.print(f"DEQ trained: {work / 'model.safetensors'}")
    tasks = _tasks(model)
    solvers = {
        GROUPED: _meta_trained(config, "grouped", config.grouped_steps, model, tasks, work, hidden=20, rank=32),
        COORDINATEWISE: _meta_trained(
            config, "coordinatewise", config.coordinatewise_steps, model, tasks, work, hidden=6
        ),
    }
    rows_path = work / "rows.jsonl.gz"
    if not rows_path.exists():
        rows, notes = _evaluate(config, model, tasks, solvers)
        notes["provenance"] = provenance()
        atomic_write(work / "evaluation.json", json.dumps(notes, indent=2))
        write_rows(rows_path, ({"seed": config.seed, **row} for row in rows))
    _publish(config, work)
    _show(config, console)
    console.print(f"This sitting took {time.perf_counter() - began:.0f} s.")


def _trained_model(config: Digits, work: Path) -> Any:
    """a. The DEQ: forward root solve by Anderson, backward by implicit differentiation."""
    path = work / "model.safetensors"
    if path.exists():
        return load_model(path)
    solver = Anderson(memory=5)

    def build() -> ConvClassifier:
        backward = Implicit(solver=solver, rtol=1e-2, max_nfe=20)
        # most early solves stop at the budget, which is what training wants: gradients need no more
        return ConvClassifier(
            ConvClassifierConfig(), solver=solver, backward=backward, rtol=1e-3, max_nfe=40, warn=False
        )

    data = load_digits()
    training = Training(epochs=config.epochs, seed=config.seed)
    with progress_bar("training the DEQ", config.epochs, show=config.progress) as bar:
        model = train(
            build, Images(data), training, path=work / "model.training.safetensors", report=by_epoch(bar, "accuracy")
        )
    save_model(model, path, {"validation_accuracy": accuracy(model, data.validation), "training": asdict(training)})
    return model


def _tasks(model: Any) -> TaskSet:
    """The DEQ's fixed-point problems, the injection of images as context; training images are shifted as in training."""
    data = load_digits()
    return TaskSet(
        model.cell,
        data.train.images,
        data.validation.images,
        data.test.images,
        encode=model.inject,
        augment=shift,
    )


def _meta_trained(config: Digits, kind: str, steps: int, model: Any, tasks: TaskSet, work: Path, **options: int) -> Any:
    """b. A learned solver, trained through unrolled solves, chosen on validation."""
    path = work / f"{kind}.safetensors"
    if path.exists():
        return load_solver(path)
    c = model.config
    layout = Layout("image", (c.channels, c.side, c.side))
    solver = make_learned(kind, layout, seed=config.seed, conditioning="input", **options)
    meta = MetaConfig(steps=steps, unroll=config.unroll, backend=config.backend, seed=config.seed)
    trainer = MetaTrainer(solver, tasks, meta, checkpoint=work / f"{kind}.training.safetensors")
    with progress_bar(f"meta-training, {kind}", steps, show=config.progress) as bar:
        trainer.run(bar)
    solver.fingerprint = fingerprint(model.cell)
    save_solver(solver, path)
    return solver


def _problems(model: Any, tasks: TaskSet, split: ImageSplit, name: str, limit: int) -> benchmark.Problems:
    z0, x = tasks.problems(name)
    assert isinstance(z0, torch.Tensor)
    return benchmark.Problems(model.cell, z0[:limit], x[:limit], model.classify, split.labels[:limit])


def _evaluate(
    config: Digits, model: Any, tasks: TaskSet, learned: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """c. Baselines tuned on validation, then everything once on the test split."""
    data = load_digits()
    model.requires_grad_(False)
    validation = _problems(model, tasks, data.validation, "validation", len(data.validation.labels))
    problems = _problems(model, tasks, data.test, "test", config.test_samples)
    tuned = benchmark.tune_classical(validation, budget=config.budget, tolerances=(1e-2, 1e-3))
    start = learned[GROUPED]
    solvers: dict[str, Any] = {
        **learned,
        "Picard": tuned["picard"][0],
        "Anderson": tuned["anderson"][0],
        "Broyden": Broyden(memory=config.budget),
        "tuned Broyden": tuned["broyden"][0],
        "Anderson + learned start": LearnedStart.of(start, tuned["anderson"][0]),
        "Broyden + learned start": LearnedStart.of(start, tuned["broyden"][0]),
    }
    if available("torchdeq"):
        solvers["torchdeq Anderson"] = TorchDEQSolver("anderson")
        solvers["torchdeq Broyden"] = TorchDEQSolver("broyden")
    double = _in_double(model)
    near = [benchmark.run_solver(start, problems, 1e-4, config.budget)[0]]
    star, known = benchmark.reference_equilibrium(double.cell, problems.z0, problems.x, near)
    rows: list[dict[str, Any]] = []
    stages = len(solvers) * 2 + 3
    with progress_bar("comparing", stages, show=config.progress) as bar:
        done = 0

        def tick(words: str) -> None:
            nonlocal done
            done += 1
            if bar is not None:
                bar(done, words)

        for name, solver in solvers.items():
            rows += benchmark.sample_rows(
                name, solver, problems, tolerances=TOLERANCES, budget=config.budget, star=star, known=known
            )
            tick(name)
            if name in REPORT.shown:
                rows += benchmark.accuracy_rows(
                    name, solver, problems, budgets=[b for b in BUDGETS if b <= config.budget], rtol=TOLERANCES[-1]
                )
            tick(name)
        for rtol in (1e-2, 1e-3):
            rows += benchmark.clock_rows(
                solvers, problems, rtol=rtol, budget=config.budget, repeats=config.repeats, reference="Broyden"
            )
            tick(f"wall-clock to {rtol:g}")
        rows += benchmark.part_rows(learned, problems, repeats=3 * config.repeats)
        tick("parts")
    notes = {
        "tuned": {name: repr(solver) for name, (solver, _) in tuned.items()},
        "equilibria_known": float(known.float().mean()),
        "test_samples": len(problems.labels),
        "solver_parameters": {name: sum(p.numel() for p in solver.parameters()) for name, solver in learned.items()},
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "meta_training_seconds": {name: solver.summary.get("seconds") for name, solver in learned.items()},
    }
    return rows, notes


def _in_double(model: Any) -> ConvClassifier:
    """A float64 copy of the model."""
    double = ConvClassifier(model.config)
    double.load_state_dict(model.state_dict())
    return double.double().requires_grad_(False)


def _publish(config: Digits, work: Path) -> None:
    """d. Copy what a person wants to results/, and write the reports: one for the seed, one over all seeds."""
    folder = config.results / f"seed{config.seed}"
    for name in ("rows.jsonl.gz", "model.safetensors", "grouped.safetensors", "coordinatewise.safetensors"):
        atomic_write(folder / name, (work / name).read_bytes())
    described = {
        "command": f"python -m experiments digits --seed {config.seed}",
        "config": plain(config),
        **json.loads((work / "evaluation.json").read_text()),
    }
    atomic_write(folder / "config.json", json.dumps(described, indent=2) + "\n")
    REPORT.write(folder, [folder])
    REPORT.write(config.results, sorted(config.results.glob("seed*/")))


def _show(config: Digits, console: Console) -> None:
    """e. The table, where the figures are, and the saved solver at work inside the reloaded DEQ."""
    folder = config.results / f"seed{config.seed}"
    results = report.Results(read_folders([folder]))
    console.print(Markdown("## Evaluations to a tolerance: median / 90th percentile / success"))
    console.print(Markdown(report.evaluations_table(results)))
    console.print(Markdown(REPORT.claims(results)))
    data = load_digits()
    saved = load_solver(folder / "grouped.safetensors")
    lines = []
    for title, solver, rtol, budget in (
        ("Broyden to 1e-3", Broyden(memory=60), 1e-3, 60),
        ("saved solver to 1e-3", saved, 1e-3, 60),
        ("saved solver, 8 evaluations at most", saved, 1e-3, 8),
    ):
        model = load_model(folder / "model.safetensors", solver=solver, rtol=rtol, max_nfe=budget, warn=False)
        right = accuracy(model, data.test)
        spent = model.deq.last_solution.nfe.float()
        lines.append([title, f"{100 * right:.2f}%", f"{spent.mean():.1f}", f"{spent.median():g}"])
    console.print(Markdown("## The saved solver, reloaded into the reloaded DEQ"))
    console.print(Markdown(report.table(["forward solve", "test accuracy", "mean evaluations", "median"], lines)))
    console.print(f"Figures and report: {folder / 'report.md'}; over all seeds: {config.results / 'report.md'}")
