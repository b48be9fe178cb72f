"""HyperAnderson in many configurations at equal budget, on validation problems: our strongest learned rival."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from experiments.bench.runner import write_rows
from experiments.legacy import equilibria, tuning_report
from experiments.legacy.provenance import command_line, plain, provenance, results_folder
from experiments.meta import RECIPES, Job, Meta, Recipe
from metabroyden.storage import atomic_write

USUAL = RECIPES["hyper-anderson"]
_PER_STEP = 10  # solver iterations
_PLACES = ("models", "results", "runs", "fresh", "progress")
FREE = ("family", "only", "backend", *_PLACES)
"""Options that do not make a trial of a run: the others change no figure."""


@dataclass(frozen=True)
class Variant:
    """What is tried: the loss (a name of OBJECTIVES), Adam's rate, steps in an unroll, options of `HyperAndersonConfig`."""

    objective: str = "residual"
    learning_rate: float = 1e-3
    unroll: int = 10
    options: dict[str, Any] = field(default_factory=dict)

    def recipe(self, iterations: int) -> Recipe:
        """The recipe that spends so many solver iterations."""
        parts = {item.name: getattr(self, item.name) for item in fields(self)}
        parts["options"] = {**USUAL.options, "memory": 5, "gram": False, "hidden": 32, **self.options}
        return replace(USUAL, steps=max(1, round(iterations / self.unroll)), **parts)


def _variants() -> Iterator[tuple[str, Variant]]:
    for loss, objective in (("published loss", "hyper"), ("log residual", "residual")):
        for memory in (3, 5, 8):
            for gram in (False, True):
                name = f"{loss}, m = {memory}" + ", Gram" * gram
                yield name, Variant(objective, options={"memory": memory, "gram": gram})
        for rate in (3e-4, 3e-3):
            yield f"{loss}, rate {rate:g}", Variant(objective, learning_rate=rate)
        yield f"{loss}, unroll 14", Variant(objective, unroll=14)
        yield f"{loss}, hidden 64", Variant(objective, options={"hidden": 64})
        yield f"{loss}, published initialisation", Variant(objective, options={"zero_output": False})


VARIANTS: dict[str, Variant] = dict(_variants())
"""Losses × memory × Gram matrix, and of either loss with m = 5 what else may matter, one change at a time."""


@dataclass(frozen=True)
class TuneHyper:
    """Try HyperAnderson's configurations on the validation problems of a family; the test split is not read."""

    family: str = "conv-fashion"
    """A family of metabroyden.zoo.models.FAMILIES."""
    steps: int = 600
    """Outer steps of 10 solver iterations each; longer unrolls get as many iterations in fewer steps."""
    only: tuple[str, ...] = ()
    """Names of the configurations to try; all where none is given."""
    seed: int = 0
    """Seed of the solver's weights and of the batches."""
    budget: int = 60
    """Evaluations each sample may cost."""
    samples: int = 256
    """Validation problems used."""
    backend: str = "higher"
    """Unroll by "higher", or by plain autograd ("native"): the same gradients."""
    models: Path = Path("results/models")
    """Where the frozen models are."""
    results: Path = Path("results/meta")
    """Where hyper-anderson-tuning.md goes, over all families tried, and the rows, to hyper-anderson-tuning/ in it; those of
    a run with other settings than these to a trial- folder in it."""
    runs: Path = Path("runs/tune-hyper")
    """Where unfinished work is kept, to go on from."""
    fresh: bool = False
    """Throw away unfinished and finished work of this family and start anew."""
    progress: bool = True
    """Show progress bars."""


def run(config: TuneHyper) -> None:
    """Train and measure what has not been yet; the report is written after each configuration."""
    unknown = set(config.only) - set(VARIANTS)
    if unknown:
        raise ValueError(f"unknown configurations {sorted(unknown)}: known are {'; '.join(VARIANTS)}")
    if config.steps < 1:
        raise ValueError(f"steps must be at least 1, got {config.steps}")
    if config.fresh and (config.runs / config.family).exists():
        shutil.rmtree(config.runs / config.family)
    console = Console()
    results = results_folder(config.results, config, FREE)
    folder = results / "hyper-anderson-tuning"
    rows: list[dict[str, Any]] = []
    for name in config.only or VARIANTS:
        rows.append(_row(config, name))
        described = {
            "command": command_line("tune-hyper", config, _PLACES),
            "config": plain(config),
            "provenance": provenance(),
        }
        atomic_write(folder / f"{config.family}.json", json.dumps(described, indent=2) + "\n")
        write_rows(folder / f"{config.family}.jsonl.gz", rows)
        report = tuning_report.write(folder, results / "hyper-anderson-tuning.md")
        console.print(f"{config.family}: {len(rows)} of {len(config.only or VARIANTS)} configurations: {name}")
    console.print(Markdown(report.read_text()))


def _row(config: TuneHyper, name: str) -> dict[str, Any]:
    """One configuration, trained and measured; from the file of an earlier sitting where it is there."""
    recipe = VARIANTS[name].recipe(_PER_STEP * config.steps)
    meta = Meta(
        family=config.family, solver="hyper-anderson", seed=config.seed, budget=config.budget, samples=config.samples,
        backend=config.backend, models=config.models, runs=config.runs, progress=config.progress,
    )  # fmt: skip
    job = Job(meta, recipe)
    path = job.work / "row.json"
    if not path.exists():
        solver = job.trained()
        held = equilibria.held_out(job.model, job.criterion, "validation", config.samples)
        (row,) = equilibria.difficulty_rows(config.family, held, {name: solver}, budget=config.budget)
        row |= {
            "config": asdict(solver.config),
            "recipe": asdict(recipe),
            "seconds": solver.summary["seconds"],
            "skipped_steps": solver.summary["skipped_steps"],
        }
        atomic_write(path, json.dumps(row) + "\n")
    return json.loads(path.read_text())
