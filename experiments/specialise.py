"""Adapt the universal solver, or a family's, to a DEQ in a few steps, and measure it before and after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from experiments.bench import measure, report, runner, solvers
from experiments.bench.figures import axes, bars, save
from experiments.bench.measure import Rules
from experiments.bench.options import Compared, OnFamily, Seeded
from experiments.bench.problems import Family, HeldOut
from experiments.bench.runner import Row, read_rows, row_files
from experiments.bench.statistics import Field
from experiments.generalise import BROYDEN, TOLERANCE, over_broyden, ratio_table
from metabroyden import Broyden, load_solver, save_solver
from metabroyden.meta.progress import progress_bar
from metabroyden.meta.specialise import SpecialiseConfig, specialise
from metabroyden.state import Packing
from metabroyden.zoo.models.criteria import NextToken
from metabroyden.zoo.models.packed import Packed
from metabroyden.zoo.tasks import family_tasks

FREE = ("family", "seed", "models")
_HELD = 64  # validation contexts made beforehand with a text's training ones


@dataclass(frozen=True)
class Specialise(Seeded, Compared, OnFamily, command="specialise"):
    """Adapt a solver to a family's DEQ in a few outer steps; evaluations to 1e-2 on its test contexts before and after."""

    start: str = "universal"
    """What is adapted: a shipped solver's name or the path of a learned solver that fits the family."""
    steps: int = 20
    """Outer steps."""
    batch: int = 96
    """Contexts of a step."""
    unroll: int = 14
    """Solver steps that a step differentiates through."""
    learning_rate: float = 1e-2
    """Of Adam, linear to zero."""
    orthogonal_rate: float = 0.08
    """Of the matrices of initializer and preconditioner, linear to zero."""
    rank: int = 64
    """Inner channels of the preconditioner that a universal solver is given."""
    initializer_width: int = 64
    """Width of the initializer that it is given."""


def run(config: Specialise) -> None:
    """The whole job; twenty steps are done again rather than gone on with."""
    family, start = Family(config.family, config.models), load_solver(config.start)
    model, criterion = family.model(), family.criterion
    settings = SpecialiseConfig(
        steps=config.steps,
        batch=config.batch,
        unroll=config.unroll,
        learning_rate=config.learning_rate,
        orthogonal_rate=config.orthogonal_rate,
        rank=config.rank,
        initializer_width=config.initializer_width,
        seed=config.seed,
    )
    tasks = family_tasks(model, criterion, packed=_as_vector(model))
    if isinstance(criterion, NextToken):  # contexts that are solves of their own
        pool = min(1024, config.steps * config.batch)
        tasks = tasks.prepared(pool, torch.Generator().manual_seed(config.seed), _HELD)
    with progress_bar(f"{config.family}, adapting", config.steps, show=config.progress) as bar:
        adapted = specialise(start, tasks, settings, progress=bar)
    job = runner.Run(config, free=FREE, shared=(), always=f"--family {config.family}")
    folder = job.folder / config.family / f"seed{config.seed}"
    more = {"model_sha256": runner.sha256(family.path), "parameters": sum(p.numel() for p in adapted.parameters())}
    runner.publish(folder, _measured(config, family, start, adapted), job.described(**more))
    save_solver(adapted, folder / "solver.safetensors")
    runner.show(write(job.folder))


def _as_vector(model: Any) -> bool:
    """Whether a state of several tensors has no layout that a solver knows of."""
    return getattr(model.cell, "layout", "vector") != "pyramid"


def _held(family: Family, split: str, limit: int) -> HeldOut:
    """Held-out problems in the form in which the solver was adapted to them."""
    held = family.problems(split, limit)
    if isinstance(held.z0, torch.Tensor) or not _as_vector(family.model()):
        return held
    packing = Packing.of(held.z0)
    f = Packed(cast(Any, held.f), packing)
    return replace(
        held, f=f, z0=packing.pack(held.z0), judge=lambda z, index: held.judge(packing.unpack(cast(Any, z)), index)
    )


def _measured(config: Specialise, family: Family, start: Any, adapted: Any) -> list[Row]:
    tuned = solvers.tuned(_held(family, "validation", 64), config.budget)
    every = {BROYDEN: Broyden(config.budget), **tuned, "before": start, "after": adapted}
    everyone = [solvers.contestant(name, solver) for name, solver in every.items()]
    held = _held(family, "test", config.samples)
    held = replace(held, predict=None)
    return measure.measure(held, everyone, Rules((TOLERANCE,), config.budget), progress=config.progress)


def write(folder: Path) -> Path:
    """report.md and specialise.png over all families and seeds in a folder, from rows alone."""
    words = (
        "`python -m experiments specialise --family NAME`: a few outer steps on a DEQ's training contexts. Median "
        "evaluations to 1e-2 on its test contexts (share solved), ratio to Broyden's with full memory; before: the solver "
        "that was adapted."
    )
    rows, runs = [], []
    for path in row_files(folder, "*/*/rows.jsonl"):
        described = report.read_config(path.parent)
        config, commit = described["config"], described["provenance"]["commit"]
        name = f"{config['family']}, {config['steps']} steps from {config['start']}, seed {config['seed']}"
        rows += [{**row, "tested": name, "family": name} for row in read_rows(path)]
        runs.append(f"- {name}: `{described['command']}`, {described['parameters']:,} parameters, commit {commit}")
    field = Field(rows)
    figure, place = axes(max(6.4, 1.2 * len(field.families)), ylabel="evaluations to 1e-2 over Broyden's")
    bars(place, field.families, ("before", "after"), lambda family, name: over_broyden(field, family, name))
    place.axhline(1, color="0.4", linewidth=1)
    place.legend(frameon=False)
    drawn = save(figure, folder / "specialise.png")
    return report.write(folder, "Specialisation", [words, "\n".join(runs), ratio_table("", field), drawn])
