"""Meta-training over long unrolls: backpropagation, whole and truncated, against persistent evolution strategies."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench import figures, report
from experiments.bench.options import OnFamily, Seeded
from experiments.bench.problems import Family
from experiments.bench.runner import Row, Run
from experiments.bench.tables import chosen, listed
from metabroyden import load_solver, save_solver
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet, unroll
from metabroyden.meta.defaults import tasks_layout
from metabroyden.meta.estimators import differentiate, frozen, training_batch
from metabroyden.meta.fit import make_learned
from metabroyden.meta.progress import progress_bar
from metabroyden.meta.schedule import in_words
from metabroyden.state import gather
from metabroyden.zoo.tasks import family_tasks

WAYS = ("backpropagation", "truncated", "PES")
SMALL: dict[str, Any] = {"hidden": 8, "initializer_width": 0, "safeguard": None}


@dataclass(frozen=True)
class Pes(Seeded, OnFamily, command="pes", family="conv-digits", results=Path("results/meta/pes")):
    """From one solver trained on short unrolls, go on over long ones in three ways at equal CPU time."""

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
    lengths: tuple[int, ...] = (5, 10, 20, 40, 60, 90, 120)
    """Unrolls whose gradients are measured at the beginning."""


def run(config: Pes) -> None:
    """The whole job. Interrupted, it goes on with the next way."""
    family = Family(config.family, config.models)
    tasks = family_tasks(family.model(), family.criterion)
    job = Run(config, free=("models",), inputs=(family.path,))
    total, begin = config.unroll * config.segments, job.work / "short.safetensors"
    common = MetaConfig(
        steps=1_000_000, unroll=config.unroll, batch=config.batch, learning_rate=config.learning_rate, seed=config.seed,
        backend="native", validation_size=64, validation_rtol=1e-4, validation_nfe=total, validate_every=50,
        seconds=config.begin_seconds, budget_clock="cpu",
    )  # fmt: skip
    long = replace(common, seconds=config.seconds, validate_every=10)
    evolved: dict[str, Any] = {"estimator": "pes", "sigma": config.sigma, "particles": config.particles}
    settings = {
        "backpropagation": replace(long, unroll=total),
        "truncated": replace(long, segments=config.segments),
        "PES": replace(long, segments=config.segments, validate_every=5 * config.segments, **evolved),
    }

    def short() -> Iterator[Row]:
        solver = make_learned(config.solver, tasks_layout(tasks)[0], seed=config.seed, **SMALL)
        yield from _trained("short", common, solver, tasks, config)
        yield from _length_rows(copy.deepcopy(solver), tasks, common, config)
        save_solver(solver, begin)

    rows = job.unit("short", short)
    for way in WAYS:
        rows += job.unit(way, lambda: _trained(way, settings[way], load_solver(begin), tasks, config))  # noqa: B023
    job.finish(rows, write)


def _trained(way: str, meta: MetaConfig, solver: Any, tasks: TaskSet, config: Pes) -> Iterator[Row]:
    """Train in one way: its looks at validation, its gradients, and how residuals fall afterwards."""
    norms: list[float] = []
    trainer = MetaTrainer(solver, tasks, meta)
    trainer.curves = lambda step, values: norms.append(values["gradient norm"]) if "gradient norm" in values else None
    with progress_bar(f"{config.family}, {way}", meta.steps, show=config.progress) as bar:
        trainer.run(bar)
    finite = torch.tensor([norm for norm in norms if math.isfinite(norm)] or [math.inf])
    taken = {"cpu_seconds": solver.summary["cpu_seconds"], "incidents": solver.summary["incidents"]}
    spread = torch.quantile(finite, torch.tensor([0.1, 0.5, 0.9, 1.0])).tolist()
    size = sum(p.numel() for p in solver.parameters())
    yield {"row": "way", "way": way, "steps": trainer.step, "parameters": size, "norms": spread, "score": trainer.best_score,
           **taken}  # fmt: skip
    yield from ({"row": "look", "way": way, **entry, "loss": None} for entry in trainer.history)
    z0, x = gather(tasks.problems("validation"), torch.arange(meta.validation_size))
    with torch.no_grad():
        steps = 2 * config.unroll * config.segments
        residuals = unroll(solver, tasks.f, z0, x, steps=steps, backend="native").residuals
    quartiles = residuals.nan_to_num(torch.inf).quantile(torch.tensor([0.25, 0.5, 0.75]), dim=1)
    yield {"row": "curve", "way": way, "residual": quartiles.tolist()}


def _length_rows(solver: Any, tasks: TaskSet, meta: MetaConfig, config: Pes) -> Iterator[Row]:
    """The exact gradient's norm by the length of the unroll, on a few batches."""
    solver.requires_grad_(True)
    with frozen(tasks.f):
        for length in config.lengths:
            batches = [training_batch(tasks, meta, step) for step in range(5)]
            norms = [
                float(differentiate(solver, tasks.f, *batch, meta, "native", steps=length)[1]) for batch in batches
            ]
            yield {"row": "length", "unroll": length, "norms": norms}


@report.of_rows("Meta-training over long unrolls")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and pes.png, from rows alone."""
    config = described["config"]
    total = config["unroll"] * config["segments"]
    curves = {row["way"]: row["residual"][1] for row in chosen(rows, "curve")}
    return [
        f"{config['family']}, {config['solver']} without a safeguard, meta-trained on unrolls of {config['unroll']} steps "
        f"(short), then for {config['seconds']:g} CPU seconds in each of three ways on unrolls of {total}: by full "
        f"backpropagation; by backpropagation truncated to segments of {config['unroll']}; by persistent evolution "
        f"strategies over such segments, {config['particles']} antithetic pairs, σ = {config['sigma']:g}.",
        _figure(rows, curves, total, folder / "pes.png"),
        listed("", chosen(rows, "way"), [
            ("way", "{way}"), ("outer steps", "{steps}"), ("evaluations", "{score:.1f}"),
            (f"residual at {total}", lambda row: f"{curves[row['way']][total]:.2g}"),
            (f"at {2 * total}", lambda row: f"{curves[row['way']][2 * total]:.2g}"),
            ("gradient norm, median / 90% / largest", "{norms[1]:.3g} / {norms[2]:.3g} / {norms[3]:.3g}"),
            ("incidents", lambda row: in_words(row["incidents"]) or "none"),
        ]),
        "Evaluations: mean on validation to 1e-4, a failure counting twice the budget; residuals: medians on validation, of "
        "the weights that did best there. Gradient norms: of all outer steps, before clipping.",
        "The exact gradient's norm from the short solver's weights, by the length of the unroll, median and largest of "
        "five batches:",
        listed("", chosen(rows, "length"), [
            ("unroll", "{unroll}"), ("median", lambda row: f"{np.median(row['norms']):.3g}"),
            ("largest", lambda row: f"{max(row['norms']):.3g}"),
        ]),
    ]  # fmt: skip


def _figure(rows: list[Row], curves: dict[str, list[float]], total: int, path: Path) -> Path:
    """Evaluations on validation by CPU time, and residuals by step."""
    figure, (left, right) = figures.grid(2, 2, (5, 4.2))
    for number, (way, curve) in enumerate(curves.items()):
        looks = chosen(rows, "look", way=way)
        if way in WAYS:
            figures.line(left, way, [r["cpu_seconds"] for r in looks], [r["score"] for r in looks], number=number)
        figures.line(right, way, range(len(curve)), curve, number=number)
    left.set(xlabel="CPU seconds on long unrolls", ylabel="evaluations to 1e-4 on validation")
    right.axvline(total, color="#999999", linewidth=0.8)
    right.set(xlabel="steps", ylabel="relative residual, median", yscale="log")
    figures.legend(figure, (left, right))
    return figures.save(figure, path)
