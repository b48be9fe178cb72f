"""Models of the kinds that people bring, each trained here, fitted by `fit_solver` and compared on unseen problems."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from experiments.bench.options import Compared
from experiments.bench.runner import Row, Run, at_least_one, digest, known, threads
from experiments.workloads import rows as measurements
from experiments.workloads.report import write
from experiments.workloads.suite import MODELS, WORKLOADS, model_of, path_of
from metabroyden.progress import ticks


@dataclass(frozen=True)
class Workloads(Compared, command="workloads", samples=128):
    """Fit a root finder to graph networks, transformers, Sudoku, reconstructions; measure evaluations, time and the task."""

    only: tuple[str, ...] = tuple(WORKLOADS)
    """Which of them, by name."""
    seeds: int = 2
    """Fits of each."""
    steps: int | None = None
    """Outer steps of a fit, at most; None: fit_solver's own number."""
    models: Path = MODELS
    """Where the trained models are; one that is missing is trained, in up to an hour."""


def run(config: Workloads) -> None:
    """Four to fifteen minutes a fit. Interrupted, it goes on with the next one."""
    at_least_one(config, "samples", "budget", "seeds", "steps")
    known("workload", config.only, WORKLOADS)
    job = Run(config, free=("models",), shared=("only", "seeds", "models"))
    rows: list[Row] = []
    pairs = list(product(config.only, range(config.seeds)))
    with ticks("workloads", len(pairs), show=config.progress) as done, threads(1):
        for name, seed in pairs:
            model = model_of(name, config.models)
            key = f"{name}-seed{seed}-{digest(path_of(name, config.models))}"
            rows += job.unit(key, lambda: measurements.measured(config, name, model, seed))  # noqa: B023 (called at once)
            done(f"{name}, seed {seed}")
    job.finish(rows, write)
