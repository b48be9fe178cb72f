"""DEQs that nothing was tuned on, each fitted by one call of `fit_solver`: what comes back, and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from experiments.bench.options import Budgeted, Seeded
from experiments.bench.runner import Row, Run, at_least_one, digest, known, publish, show
from experiments.strangers.frozen import load
from experiments.strangers.report import write
from experiments.strangers.rows import measured
from experiments.strangers.suite import names, spec_of
from experiments.strangers.train import MODELS, path_of, train_missing
from metabroyden.progress import ticks


@dataclass(frozen=True)
class Strangers(Seeded, Budgeted, command="strangers"):
    """Fit a root finder to DEQs that nothing was tuned on; measure it on inputs that the fit never saw."""

    part: Literal["dev", "held"] = "dev"
    """The half to develop on, or the one that a hash of the names kept for the end."""
    only: tuple[str, ...] = ()
    """Only these of it, by name."""
    rtol: tuple[float, ...] = (1e-2, 1e-3, 1e-4)
    """Tolerances, each with a fit of its own."""
    samples: int = 128
    """Test samples that solvers are measured on, at most 256."""
    steps: int | None = None
    """Outer steps of a fit, at most; None: fit_solver's own number."""
    train: bool = False
    """Train the DEQs whose files are missing, of both halves, and measure nothing."""
    models: Path = MODELS
    """Where the frozen DEQs are."""


def run(config: Strangers) -> None:
    """Some two minutes a stranger and tolerance. Interrupted, it goes on with the next one."""
    at_least_one(config, "samples", "budget", "steps")
    known("stranger", config.only, names())
    wanted = [name for name in names(config.part) if not config.only or name in config.only]
    if config.train:
        return train_missing([spec_of(name) for name in config.only or names()], config.models)
    if not wanted:
        there = ", ".join(names(config.part))
        raise ValueError(f"{', '.join(config.only)}: not of part {config.part}, which has {there}")
    always = f"--part {config.part} --seed {config.seed}"
    job = Run(config, free=("part", "seed", "models"), shared=("part", "only", "rtol", "models"), always=always)
    rows: list[Row] = []
    pairs = list(product(wanted, config.rtol))
    with ticks("fitting to strangers", len(pairs), show=config.progress) as done:
        for name, rtol in pairs:
            key = f"{name}-{rtol:g}-{digest(path_of(name, config.models))}"
            rows += job.unit(key, lambda: measured(config, load(name, config.models), rtol))  # noqa: B023 (called at once)
            done(f"{name}, {rtol:g}")
    publish(job.folder / f"{config.part}-seed{config.seed}", rows, job.described())
    show(write(job.folder))
