"""Meta-training over long unrolls: backpropagation, whole and truncated, against persistent evolution strategies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench import report
from experiments.bench.options import OnFamily, Seeded
from experiments.bench.problems import Family
from experiments.bench.runner import Row, Run
from experiments.configs.pes import SMALL, WAYS, settings
from metabroyden import load_solver, save_solver
from metabroyden.comparison import figures
from metabroyden.comparison.tables import chosen, listed
from metabroyden.meta import MetaTrainer, TaskSet, make_learned, unroll
from metabroyden.meta.defaults import tasks_layout
from metabroyden.meta.estimators import differentiate, frozen, training_batch
from metabroyden.meta.schedule import in_words
from metabroyden.progress import progress_bar
from metabroyden.state import gather


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
    tasks, job = family.tasks(config.seed), Run(config, free=("models",), inputs=(family.path,))
    begin = job.work / "short.safetensors"

    def short() -> Iterator[Row]:
        solver = make_learned(config.solver, tasks_layout(tasks)[0], seed=config.seed, **SMALL)
        yield from trained("short", solver, tasks, config)
        save_solver(solver, begin)
        meta, learned = settings(config, "short"), solver.requires_grad_(True)
        batches = [training_batch(tasks, meta, step) for step in range(5)]
        with frozen(tasks.f):
            for length in config.lengths:
                found = (differentiate(learned, tasks.f, *one, meta, "native", steps=length) for one in batches)
                yield {"row": "length", "unroll": length, "norms": [float(norm) for _, norm in found]}

    rows = job.unit("short", short)
    for way in WAYS:
        rows += job.unit(way, lambda: trained(way, load_solver(begin), tasks, config))  # noqa: B023 (called at once)
    job.finish(rows, write)


def trained(way: str, solver: Any, tasks: TaskSet, config: Pes) -> Iterator[Row]:
    """Train in one way: its looks at validation, its gradients, and how residuals fall afterwards."""
    meta, norms = settings(config, way), list[float]()
    trainer = MetaTrainer(solver, tasks, meta)
    trainer.curves = lambda step, values: norms.append(values.get("gradient norm", np.nan))
    with progress_bar(f"{config.family}, {way}", meta.steps, show=config.progress) as bar:
        trainer.run(bar)
    finite = [norm for norm in norms if np.isfinite(norm)] or [np.inf]
    taken = {key: solver.summary[key] for key in ("cpu_seconds", "incidents", "steps")}
    taken |= {"parameters": sum(p.numel() for p in solver.parameters()), "score": trainer.best_score}
    yield {"row": "way", "way": way, **taken, "norms": np.quantile(finite, [0.1, 0.5, 0.9, 1.0]).tolist()}
    yield from ({"row": "look", "way": way, **entry, "loss": None} for entry in trainer.history)
    problems = gather(tasks.problems("validation"), torch.arange(meta.validation_size))
    found = unroll(solver, tasks.f, *problems, steps=2 * config.unroll * config.segments, backend="native")
    quartiles = found.residuals.nan_to_num(torch.inf).quantile(torch.tensor([0.25, 0.5, 0.75]), dim=1)
    yield {"row": "curve", "way": way, "residual": quartiles.tolist()}


@report.of_rows("Meta-training over long unrolls")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and pes.png, from rows alone."""
    total = described["config"]["unroll"] * described["config"]["segments"]
    curves = {row["way"]: row["residual"][1] for row in chosen(rows, "curve")}
    looks = {way: chosen(rows, "look", way=way) for way in WAYS}
    scores = {way: [[row[key] for row in of] for key in ("cpu_seconds", "score")] for way, of in looks.items()}
    drawn = figures.curves(
        folder / "pes.png",
        ({"short": ([], []), **scores},
         {"xlabel": "CPU seconds on long unrolls", "ylabel": "evaluations to 1e-4 on validation"}),
        ({way: (range(len(curve)), curve) for way, curve in curves.items()},
         {"xlabel": f"steps, {total} of them trained on", "ylabel": "relative residual, median", "yscale": "log"}),
    )  # fmt: skip
    ways = listed("", chosen(rows, "way"), [
        ("way", "{way}"), ("outer steps", "{steps}"), ("evaluations", "{score:.1f}"),
        (f"residual at {total}", lambda row: f"{curves[row['way']][total]:.2g}"),
        (f"at {2 * total}", lambda row: f"{curves[row['way']][2 * total]:.2g}"),
        ("gradient norm, median / 90% / largest", "{norms[1]:.3g} / {norms[2]:.3g} / {norms[3]:.3g}"),
        ("incidents", lambda row: in_words(row["incidents"]) or "none"),
    ])  # fmt: skip
    return [drawn, ways, listed("Gradients at the beginning", chosen(rows, "length"), [
        ("unroll", "{unroll}"), ("median", lambda row: f"{np.median(row['norms']):.3g}"),
        ("largest", lambda row: f"{max(row['norms']):.3g}"),
    ])]  # fmt: skip
