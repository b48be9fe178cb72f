"""Meta-training past the unroll that backpropagation is stable over: evolution strategies against it, at equal CPU time."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.legacy import pes_report
from experiments.legacy.provenance import command_line, plain, provenance, results_folder, write_results
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet, unroll
from metabroyden.meta.backprop import differentiate, frozen
from metabroyden.meta.defaults import tasks_layout
from metabroyden.meta.draws import training_batch
from metabroyden.meta.fit import make_learned
from metabroyden.meta.progress import progress_bar
from metabroyden.state import gather
from metabroyden.zoo.models import load_model
from metabroyden.zoo.models.families import get_family
from metabroyden.zoo.tasks import family_tasks

WAYS = ("backpropagation", "truncated", "PES")


_PLACES = ("models", "results", "progress")


@dataclass(frozen=True)
class Pes:
    """From one solver trained on short unrolls, go on over long ones in three ways and write results/meta/pes/."""

    family: str = "conv-digits"
    """A family of metabroyden.zoo.models.FAMILIES, of images."""
    solver: str = "grouped"
    """A learned solver; small and without a safeguard, so that what it does late is its own."""
    unroll: int = 10
    """Steps of a segment, and of the unrolls the solver starts out from."""
    segments: int = 6
    """Segments of a long unroll."""
    begin_seconds: float = 25.0
    """CPU time on short unrolls."""
    seconds: float = 40.0
    """CPU time of each way on the long ones."""
    sigma: float = 0.01
    """Of the perturbations."""
    particles: int = 4
    """Pairs of perturbations."""
    learning_rate: float = 2e-3
    """Of all ways."""
    batch: int = 16
    """Problems a step."""
    seed: int = 0
    """Of weights and draws."""
    lengths: tuple[int, ...] = (5, 10, 20, 40, 60, 90, 120)
    """Unrolls whose gradients are measured at the beginning."""
    models: Path = Path("results/models")
    """Where the frozen models are."""
    results: Path = Path("results/meta/pes")
    """Where rows, the figure and the report go; of a run with other settings than these to a trial- folder in it."""
    progress: bool = True
    """Show progress bars."""


def run(config: Pes) -> None:
    """The whole job; what it wrote before is replaced at the end."""
    family = get_family(config.family)
    model = load_model(config.models / config.family / "model.safetensors", warn=False).requires_grad_(False)
    tasks = family_tasks(model, family.criterion())
    layout, _ = tasks_layout(tasks)
    solver = make_learned(config.solver, layout, seed=config.seed, hidden=8, initializer_width=0, safeguard=None)
    common = MetaConfig(
        steps=1_000_000,
        unroll=config.unroll,
        batch=config.batch,
        learning_rate=config.learning_rate,
        seed=config.seed,
        backend="native",
        validation_size=64,
        validation_rtol=1e-4,
        validation_nfe=config.unroll * config.segments,
        validate_every=1_000_000,
        budget_clock="cpu",
    )
    rows: list[dict[str, Any]] = []
    _train(
        "short", replace(common, budget_seconds=config.begin_seconds, validate_every=50), solver, tasks, config, rows
    )
    rows += _length_rows(solver, tasks, common, config)
    long = replace(common, budget_seconds=config.seconds)
    settings = {
        "backpropagation": replace(long, unroll=config.unroll * config.segments, validate_every=10),
        "truncated": replace(long, segments=config.segments, validate_every=10),
        "PES": replace(
            long,
            segments=config.segments,
            estimator="pes",
            sigma=config.sigma,
            particles=config.particles,
            validate_every=5 * config.segments,
        ),
    }
    for way in WAYS:
        _train(way, settings[way], copy.deepcopy(solver), tasks, config, rows)
    described = {
        "command": command_line("pes", config, _PLACES),
        "config": plain(config),
        "provenance": provenance(),
    }
    folder = results_folder(config.results, config, _PLACES)
    write_results(folder, rows, described)
    Console().print(f"Figure and report: {pes_report.write(folder, rows, described)}")


def _train(way: str, meta: MetaConfig, solver: Any, tasks: TaskSet, config: Pes, rows: list[dict[str, Any]]) -> None:
    """Train in one way, and note its looks at validation, its gradients, and how residuals fall afterwards."""
    norms: list[float] = []
    trainer = MetaTrainer(solver, tasks, meta)
    trainer.curves = lambda step, values: norms.append(values["gradient norm"]) if "gradient norm" in values else None
    with progress_bar(f"{config.family}, {way}", meta.steps, show=config.progress) as bar:
        trainer.run(bar)
    finite = torch.tensor([norm for norm in norms if math.isfinite(norm)] or [math.inf])
    rows.append(
        {
            "row": "way",
            "way": way,
            "steps": trainer.step,
            "parameters": sum(p.numel() for p in solver.parameters()),
            "cpu_seconds": solver.summary["cpu_seconds"],
            "norms": torch.quantile(finite, torch.tensor([0.1, 0.5, 0.9, 1.0])).tolist(),
            "incidents": solver.summary["incidents"],
            "score": trainer.best_score,
        }
    )
    rows += [{"row": "look", "way": way, **entry, "loss": None} for entry in trainer.history]
    z0, x = tasks.problems("validation")
    z0, x = gather((z0, x), torch.arange(meta.validation_size))
    steps = 2 * config.unroll * config.segments
    with torch.no_grad():
        residuals = unroll(solver, tasks.f, z0, x, steps=steps, backend="native").residuals
    quartiles = residuals.nan_to_num(torch.inf).quantile(torch.tensor([0.25, 0.5, 0.75]), dim=1)
    rows.append({"row": "curve", "way": way, "residual": quartiles.tolist()})


def _length_rows(solver: Any, tasks: TaskSet, meta: MetaConfig, config: Pes) -> list[dict[str, Any]]:
    """The exact gradient's norm by the length of the unroll, on a few batches."""
    rows = []
    solver.requires_grad_(True)
    with frozen(tasks.f):
        for length in config.lengths:
            norms = []
            for step in range(5):
                z0, x = training_batch(tasks, meta, step)
                norms.append(float(differentiate(solver, tasks.f, z0, x, meta, "native", steps=length)[1]))
            rows.append({"row": "length", "unroll": length, "norms": norms})
    return rows
