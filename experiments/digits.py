"""First light: a convolutional DEQ on handwritten digits, two learned root finders, and the race against Broyden."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from experiments.bench import measure
from experiments.bench import solvers as known
from experiments.bench.batch import clock_rows, part_rows
from experiments.bench.options import Budgeted, Seeded, Timed, Unrolled
from experiments.bench.peers import available
from experiments.bench.problems import double_equilibria, held_out
from experiments.bench.runner import Row, config_hash, plain, provenance, ticks, write_rows
from experiments.bench.tables import Table
from experiments.digits_report import (
    COORDINATEWISE,
    GROUPED,
    SHOWN,
    Results,
    claims_table,
    evaluations_table,
    write_report,
)
from metabroyden import Anderson, Broyden, Implicit, load_solver, save_solver
from metabroyden.learned import LearnedStart
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.learned.layout import Layout
from metabroyden.meta import MetaConfig, MetaTrainer
from metabroyden.meta.fit import make_learned
from metabroyden.meta.progress import progress_bar
from metabroyden.storage import atomic_write
from metabroyden.zoo.data.digits import load_digits
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
from metabroyden.zoo.tasks import family_tasks

TOLERANCES, CLOCKED = (1e-1, 1e-2, 1e-3, 1e-4), (1e-2, 1e-3)
BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60)
LEARNED: dict[str, tuple[str, Row]] = {
    GROUPED: ("grouped", {"hidden": 20, "rank": 32}),
    COORDINATEWISE: ("coordinatewise", {"hidden": 6}),
}
"""By name in the report: kind and options."""


@dataclass(frozen=True)
class Digits(Seeded, Unrolled, Budgeted, Timed, command="digits", repeats=7):
    """Train a DEQ on digits, meta-train its root finder, compare it with the classical solvers."""

    epochs: int = 16
    """Epochs of the DEQ's training."""
    grouped_steps: int = 600
    """Outer steps of the grouped LSTM's meta-training."""
    coordinatewise_steps: int = 400
    """Outer steps of the coordinatewise LSTM's meta-training."""
    unroll: int = 14
    """Solver steps in each unroll, full backpropagation through time."""
    test_samples: int = 300
    """Held-out images used (of 300)."""


def run(config: Digits) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it only shows its results again."""
    console, began = Console(), time.perf_counter()
    identity = replace(config, results=Path(), runs=Path(), overwrite=False, progress=True)
    work = config.runs / f"seed{config.seed}-{config_hash(identity)}"
    if config.overwrite:
        shutil.rmtree(work, ignore_errors=True)
    model = _trained_model(config, work / "model.safetensors")
    console.print(f"DEQ trained: {work / 'model.safetensors'}")
    learned = {name: _meta_trained(config, name, model, work) for name in LEARNED}
    if not (work / "rows.jsonl.gz").exists():
        rows, notes = _compared(config, model, learned)
        atomic_write(work / "evaluation.json", json.dumps({**notes, "provenance": provenance()}, indent=2))
        write_rows(work / "rows.jsonl.gz", rows)
    _publish(config, work)
    _show(config, console)
    console.print(f"This sitting took {time.perf_counter() - began:.0f} s.")


def _trained_model(config: Digits, path: Path) -> Any:
    """a. The DEQ: forward root solve by Anderson, backward by implicit differentiation."""
    if path.exists():
        return load_model(path)
    solver, data = Anderson(memory=5), load_digits()
    backward = Implicit(solver=solver, rtol=1e-2, max_nfe=20)
    # most early solves stop at the budget, which is what training wants: gradients need no more
    options: Row = {"solver": solver, "backward": backward, "rtol": 1e-3, "max_nfe": 40, "warn": False}
    training = Training(epochs=config.epochs, seed=config.seed)
    with progress_bar("training the DEQ", config.epochs, show=config.progress) as bar:
        model = train(
            lambda: ConvClassifier(ConvClassifierConfig(), **options), Images(data), training,
            path=path.with_suffix(".training.safetensors"), report=by_epoch(bar, "accuracy"),
        )  # fmt: skip
    save_model(model, path, {"validation_accuracy": accuracy(model, data.validation), "training": asdict(training)})
    return model


def _meta_trained(config: Digits, name: str, model: Any, work: Path) -> Any:
    """b. A learned solver, trained through unrolled solves, chosen on validation."""
    kind, options = LEARNED[name]
    path, steps = work / f"{kind}.safetensors", getattr(config, f"{kind}_steps")
    if path.exists():
        return load_solver(path)
    shape = (model.config.channels, model.config.side, model.config.side)
    solver = make_learned(kind, Layout("image", shape), seed=config.seed, conditioning="input", **options)
    meta = MetaConfig(steps=steps, unroll=config.unroll, backend=config.backend, seed=config.seed)
    tasks = family_tasks(model, Images(load_digits()))
    trainer = MetaTrainer(solver, tasks, meta, checkpoint=path.with_suffix(".training.safetensors"))
    with progress_bar(f"meta-training, {kind}", steps, show=config.progress) as bar:
        trainer.run(bar)
    solver.fingerprint = fingerprint(model.cell)
    save_solver(solver, path)
    return solver


def _compared(config: Digits, model: Any, learned: dict[str, Any]) -> tuple[list[Row], Row]:
    """c. Baselines tuned on validation, then everything once on the test split."""
    criterion, budget = Images(load_digits()), config.budget
    model.requires_grad_(False)
    held = replace(held_out(model, criterion, "test", config.test_samples), name="digits")
    tuned = known.tuned(held_out(model, criterion, "validation", config.test_samples), budget)
    anderson, broyden = tuned["tuned Anderson"], tuned["tuned Broyden"]
    solvers = {
        **learned,
        "Picard": tuned["tuned Picard"],
        "Anderson": anderson,
        "Broyden": Broyden(memory=budget),
        "tuned Broyden": broyden,
        "Anderson + learned start": LearnedStart.of(learned[GROUPED], anderson),
        "Broyden + learned start": LearnedStart.of(learned[GROUPED], broyden),
    }
    contestants = known.contestants(**solvers) + (
        known.torchdeq("Anderson", "Broyden") if available("torchdeq") else []
    )
    contestants = [replace(one, seed=config.seed) for one in contestants]
    star, found = double_equilibria(model.cell, held)
    held, stamp = replace(held, star=star, known=found), measure.stamp_of(held)
    rules = measure.Rules(TOLERANCES, budget, block=len(held))
    rows = measure.measure(held, contestants, rules, stamp, progress=config.progress)
    with ticks("comparing", len(SHOWN) + len(CLOCKED) + 1, show=config.progress) as tick:
        for one in (one for one in contestants if one.name in SHOWN):
            depths = [count for count in BUDGETS if count <= budget]
            rows += [{**stamp(one), **row} for row in measure.depth_rows(held, one.solver, depths)]
            tick(f"accuracy, {one.name}")
        for tolerance in CLOCKED:
            options: Row = {"tolerance": tolerance, "budget": budget, "repeats": config.repeats, "reference": "Broyden"}
            rows += clock_rows(held, contestants, stamp, **options)
            tick(f"wall-clock to {tolerance:g}")
        parts = part_rows(held, [one for one in contestants if one.name in learned], repeats=3 * config.repeats)
        rows += [{"seed": config.seed, **row} for row in parts]
        tick("parts")
    return rows, {
        "tuned": {name: repr(solver) for name, solver in tuned.items()},
        "equilibria_known": float(found.float().mean()),
        "test_samples": len(held),
        "solver_parameters": {name: sum(p.numel() for p in solver.parameters()) for name, solver in learned.items()},
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "meta_training_seconds": {name: solver.summary.get("seconds") for name, solver in learned.items()},
    }


def _publish(config: Digits, work: Path) -> None:
    """d. Copy what a person wants to results/, and write the reports: one for the seed, one over all seeds."""
    folder = config.results / f"seed{config.seed}"
    for name in ("rows.jsonl.gz", "model.safetensors", "grouped.safetensors", "coordinatewise.safetensors"):
        atomic_write(folder / name, (work / name).read_bytes())
    command = f"python -m experiments digits --seed {config.seed}"
    notes = json.loads((work / "evaluation.json").read_text())
    described = {"command": command, "config": plain(config), **notes}
    atomic_write(folder / "config.json", json.dumps(described, indent=2) + "\n")
    write_report(folder, [folder])
    write_report(config.results, sorted(config.results.glob("seed*/")))


def _show(config: Digits, console: Console) -> None:
    """e. The tables, where the figures are, and the saved solver at work inside the reloaded DEQ."""
    folder = config.results / f"seed{config.seed}"
    results, test = Results([folder]), load_digits().test
    console.print(Markdown("## Evaluations to a tolerance: median / 90th percentile / success"))
    console.print(Markdown(str(evaluations_table(results))))
    console.print(Markdown(str(claims_table(results))))
    saved, body = load_solver(folder / "grouped.safetensors"), []
    for words, solver, budget in (
        ("Broyden to 1e-3", Broyden(memory=60), 60),
        ("saved solver to 1e-3", saved, 60),
        ("saved solver, 8 evaluations at most", saved, 8),
    ):
        model = load_model(folder / "model.safetensors", solver=solver, rtol=1e-3, max_nfe=budget, warn=False)
        right = accuracy(model, test)
        spent = model.deq.last_solution.nfe.float()
        body.append([words, f"{right:.2%}", f"{spent.mean():.1f}", f"{spent.median():g}"])
    console.print(Markdown("## The saved solver, reloaded into the reloaded DEQ"))
    console.print(Markdown(str(Table("", ["forward solve", "test accuracy", "mean evaluations", "median"], body))))
    console.print(f"Figures and report: {folder / 'report.md'}; over all seeds: {config.results / 'report.md'}")
