"""HyperAnderson in many configurations at equal budget, on validation problems: our strongest learned rival."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.bench import measure, report, runner, solvers
from experiments.bench.measure import Rules
from experiments.bench.options import Compared, OnFamily, Seeded, Unrolled
from experiments.bench.runner import Row, at_least_one, known, read_rows, row_files, write_rows
from experiments.bench.statistics import Outcome
from experiments.bench.tables import Table
from experiments.configs.recipes import RECIPES
from experiments.meta import Job, Meta

JUDGED = (1e-2, 1e-3)
USUAL: dict[str, Any] = {**RECIPES["hyper-anderson"], "memory": 5, "gram": False, "hidden": 32}
_PER_STEP = 10  # solver iterations
FREE = ("family", "only", "backend", "models")
"""Options that do not make a trial of a run: the others change no figure."""


def _variants() -> Iterator[tuple[str, dict[str, Any]]]:
    for loss, objective in (("published loss", "hyper"), ("log residual", "residual")):
        for memory in (3, 5, 8):
            for gram in (False, True):
                name = f"{loss}, m = {memory}" + ", Gram" * gram
                yield name, {"objective": objective, "memory": memory, "gram": gram}
        for rate in (3e-4, 3e-3):
            yield f"{loss}, rate {rate:g}", {"objective": objective, "learning_rate": rate}
        yield f"{loss}, unroll 14", {"objective": objective, "unroll": 14}
        yield f"{loss}, hidden 64", {"objective": objective, "hidden": 64}
        yield f"{loss}, published initialisation", {"objective": objective, "zero_output": False}


VARIANTS: dict[str, dict[str, Any]] = dict(_variants())
"""What is other than `USUAL`, and the loss, a name of OBJECTIVES. Losses × memory × Gram matrix, and of either loss with
m = 5 what else may matter, one change at a time."""


def overrides(name: str, iterations: int) -> dict[str, Any]:
    """The recipe of a variant that spends so many solver iterations."""
    found = {**USUAL, **VARIANTS[name]}
    return {**found, "steps": max(1, round(iterations / found["unroll"]))}


@dataclass(frozen=True)
class TuneHyper(Seeded, Unrolled, Compared, OnFamily, command="tune-hyper", results=Path("results/meta")):
    """Try HyperAnderson's configurations on the validation problems of a family; the test split is not read."""

    steps: int = 600
    """Outer steps of 10 solver iterations each; longer unrolls get as many iterations in fewer steps."""
    only: tuple[str, ...] = ()
    """Names of the configurations to try; all where none is given."""


def run(config: TuneHyper) -> None:
    """Train and measure what has not been yet; the report is written after each configuration."""
    known("configuration", config.only, VARIANTS)
    at_least_one(config, "steps")
    if config.overwrite:
        shutil.rmtree(config.runs / config.family, ignore_errors=True)
    job = runner.Run(config, free=FREE, always=f"--family {config.family}")
    folder, rows = job.folder / "hyper-anderson-tuning" / config.family, []
    for number, name in enumerate(config.only or VARIANTS, 1):
        rows += _rows(config, name)
        runner.publish(folder, rows, job.described())
        path = write(job.folder)
        Console().print(f"{config.family}: {number} of {len(config.only or VARIANTS)} configurations: {name}")
    runner.show(path)


def _rows(config: TuneHyper, name: str) -> list[Row]:
    """One configuration, trained and measured; from the file of an earlier sitting where it is there."""
    recipe = overrides(name, _PER_STEP * config.steps)
    objective = recipe.pop("objective")
    meta = Meta(
        family=config.family, solver="hyper-anderson", seed=config.seed, budget=config.budget, samples=config.samples,
        objective=objective, backend=config.backend, models=config.models, runs=config.runs, progress=config.progress,
    )  # fmt: skip
    job = Job(meta, recipe)
    path = job.run.work / "validation.jsonl"
    if not path.exists():
        one = solvers.contestant(name, job.trained(), config.seed)
        held = job.family.problems("validation", config.samples)
        taken = {key: one.solver.summary[key] for key in ("seconds", "skipped_steps")}
        trained = {
            "row": "trained",
            "solver": name,
            "config": asdict(one.solver.config),
            "recipe": {"objective": objective, "steps": recipe["steps"], "unroll": recipe["unroll"]},
            **taken,
        }
        write_rows(path, [trained, *measure.measure(held, [one], Rules(JUDGED, config.budget))])
    return read_rows(path)


def write(folder: Path) -> Path:
    """hyper-anderson-tuning.md over all families tried, from rows alone."""
    sections: list[Any] = [
        "Each trained for as many solver iterations, on the same batches; the weights kept are those that did best on "
        "validation. Sorted by the geometric mean of evaluations to 1e-2 and 1e-3. Median evaluations (share solved), mean; "
        "a failure counts as the budget. The test split was not read.",
    ]
    for path in row_files(folder / "hyper-anderson-tuning", "*/rows.jsonl"):
        sections += [_table(path.parent.name, read_rows(path)), report.made_by(report.read_config(path.parent))]
    return report.write(
        folder, "HyperAnderson: configurations on validation problems", sections, name="hyper-anderson-tuning"
    )


def _table(family: str, rows: list[Row]) -> Table:
    body = []
    for trained in (row for row in rows if row["row"] == "trained"):
        solves = [row for row in rows if row["row"] == "solve" and row["solver"] == trained["solver"]]
        found = [Outcome.of([row for row in solves if row["tolerance"] == at]) for at in JUDGED]
        mean = float(np.exp(np.mean([np.log(one.evaluations).mean() for one in found])))
        cells = [f"{one}, {one.mean:.1f}" for one in found]
        steps = f"{trained['recipe']['steps']} × {trained['recipe']['unroll']}"
        body.append([trained["solver"], f"{mean:.2f}", *cells, steps, f"{trained['seconds']:.0f} s"])
    head = ["", "geometric mean", *(f"to {at:g}" for at in JUDGED), "training", "took"]
    return Table(family, head, sorted(body, key=lambda row: float(row[1])))
