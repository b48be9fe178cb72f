"""Adapt the universal solver, or a family's, to a DEQ in a few steps, and measure it before and after."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.markdown import Markdown

from experiments.legacy import equilibria, specialise_report
from experiments.legacy.equilibria import HeldOut
from experiments.legacy.provenance import command_line, plain, provenance, results_folder, write_results
from experiments.legacy.transfer import BROYDEN, transfer_row
from metabroyden import Broyden, load_solver, save_solver
from metabroyden.meta.progress import progress_bar
from metabroyden.meta.specialise import SpecialiseConfig, specialise
from metabroyden.state import Packing
from metabroyden.zoo.models import load_model
from metabroyden.zoo.models.criteria import NextToken
from metabroyden.zoo.models.families import get_family, trained_model
from metabroyden.zoo.models.packed import Packed
from metabroyden.zoo.tasks import family_tasks

_PLACES = ("family", "models", "results", "progress")
_HELD = 64  # validation contexts made beforehand with a text's training ones


@dataclass(frozen=True)
class Specialise:
    """Adapt a solver to a family's DEQ in a few outer steps; evaluations to 1e-2 on its test contexts before and after."""

    family: str = "conv-fashion"
    """A family of metabroyden.zoo.models.FAMILIES."""
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
    budget: int = 60
    """Evaluations each sample may cost in the comparison."""
    samples: int = 256
    """Held-out problems used."""
    seed: int = 0
    """Seed of the new parts and of the batches."""
    models: Path = Path("results/models")
    """Where the frozen models are."""
    results: Path = Path("results/specialise")
    """Where results go, a folder a family and seed in it; those of other settings to a trial- folder."""
    progress: bool = True
    """Show progress bars."""


def run(config: Specialise) -> None:
    """The whole job; twenty steps are done again rather than gone on with."""
    path, family = trained_model(config.models, config.family), get_family(config.family)
    start = load_solver(config.start)
    criterion = family.criterion()
    model = load_model(path, warn=False).requires_grad_(False)
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
    rows = _measured(config, model, criterion, start, adapted)
    results = results_folder(config.results, config, ("seed", *_PLACES))
    folder = results / config.family / f"seed{config.seed}"
    described = {
        "command": command_line(f"specialise --family {config.family}", config, _PLACES),
        "config": plain(config),
        "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in adapted.parameters()),
        "provenance": provenance(),
    }
    write_results(folder, rows, described)
    save_solver(adapted, folder / "solver.safetensors")
    Console().print(Markdown(specialise_report.write(results).read_text()))


def _as_vector(model: Any) -> bool:
    """Whether a state of several tensors has no layout that a solver knows of."""
    return getattr(model.cell, "layout", "vector") != "pyramid"


def _held(config: Specialise, model: Any, criterion: Any, split: str, limit: int) -> HeldOut:
    """Held-out problems in the form in which the solver was adapted to them."""
    held = equilibria.held_out(model, criterion, split, limit)
    if isinstance(held.z0, torch.Tensor) or not _as_vector(model):
        return held
    packing = Packing.of(held.z0)
    return replace(held, f=Packed(cast(Any, held.f), packing), z0=packing.pack(held.z0))


def _measured(config: Specialise, model: Any, criterion: Any, start: Any, adapted: Any) -> list[dict[str, Any]]:
    held = _held(config, model, criterion, "test", config.samples)
    validation = _held(config, model, criterion, "validation", 64)
    contestants = {
        BROYDEN: Broyden(config.budget),
        **equilibria.tuned_solvers(validation, config.budget),
        "before": start,
        "after": adapted,
    }
    rows = []
    with progress_bar(f"{config.family}, measuring", len(contestants), show=config.progress) as bar:
        for number, (name, solver) in enumerate(contestants.items(), 1):
            rows.append(
                transfer_row("specialised", name, solver, config.start, config.family, held, budget=config.budget)
            )
            if bar is not None:
                bar(number, name)
    return rows
