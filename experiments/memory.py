"""Memory and time of training through an equilibrium, against the weight-tied network unrolled to a depth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from experiments.legacy import memory as measure
from experiments.legacy import memory_report
from experiments.legacy.provenance import plain, provenance, write_results
from metabroyden.meta.progress import progress_bar


@dataclass(frozen=True)
class Memory:
    """Measure training steps, implicit and unrolled, at several numbers of evaluations and write results/memory/."""

    evaluations: tuple[int, ...] = (10, 30, 100)
    """Evaluations of the cell in the forward pass; for the unrolled network its depth."""
    batch: int = 32
    """Samples in a batch."""
    channels: int = 32
    """Channels of the convolutional cell."""
    side: int = 16
    """Height and width of its state."""
    width: int = 64
    """Channels of the sequence cell."""
    tokens: int = 64
    """Tokens of its state."""
    memory: int = 6
    """Updates that Broyden's method keeps; fewer by four than the fewest evaluations, so that every run drops some."""
    backward: int = 20
    """Products with the transposed Jacobian in the implicit backward pass."""
    gain: float = 5.0
    """What initial weight matrices are multiplied with, so that no sample comes to rest within the evaluations."""
    seed: int = 0
    """Of weights, injection and loss."""
    repeats: int = 3
    """Interleaved timing repeats."""
    resident: bool = True
    """Measure resident sizes too, each in a process of its own."""
    results: Path = Path("results/memory")
    """Where rows, figures and the report go."""
    progress: bool = True
    """Show a progress bar."""


def run(config: Memory) -> None:
    """The whole job; what it wrote before is replaced at the end."""
    console = Console()
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    jobs = _jobs(config)
    with progress_bar("measuring", len(jobs), show=config.progress) as bar:
        for number, (words, job) in enumerate(jobs):
            rows += job()
            if bar is not None:
                bar(number + 1, words)
    described = {
        "command": "python -m experiments memory",
        "config": plain(config),
        "seconds": round(time.perf_counter() - began),
        "provenance": provenance(),
    }
    write_results(config.results, rows, described)
    report = memory_report.write(config.results, rows, described)
    console.print(Markdown(memory_report.verdicts(rows)))
    console.print(f"Figures and report: {report} ({described['seconds']} s)")


def _jobs(config: Memory) -> list[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """What there is to do, with a word for each."""
    jobs: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = []
    for cell, channels, extent in (
        ("conv", config.channels, config.side),
        ("causal", config.width, config.tokens),
    ):
        trainings = [
            measure.Training(
                cell,
                way,
                evaluations,
                batch=config.batch,
                channels=channels,
                extent=extent,
                memory=config.memory,
                backward_nfe=config.backward,
                gain=config.gain,
                seed=config.seed,
            )
            for way in measure.WAYS
            for evaluations in config.evaluations
        ]
        jobs += [(f"{cell}: bytes", partial(_each, measure.byte_row, training)) for training in trainings]
        if config.resident:
            jobs += [(f"{cell}: processes", partial(_each, measure.resident_row, training)) for training in trainings]
        jobs.append((f"{cell}: time", partial(measure.time_rows, trainings, config.repeats)))
    return jobs


def _each(row: Callable[[measure.Training], dict[str, Any]], training: measure.Training) -> list[dict[str, Any]]:
    return [row(training)]
