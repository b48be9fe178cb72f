"""`fit_solver` with its defaults on a trained family's cell: is its solver returned, or refused, and why."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

import metabroyden as mb
from experiments.legacy import fit_report
from experiments.legacy.provenance import command_line, plain, provenance, results_folder, write_results
from metabroyden.zoo.models import load_model
from metabroyden.zoo.models.criteria import Images
from metabroyden.zoo.models.families import get_family, trained_model

_PLACES = ("family", "rtol", "seed", "models", "results", "progress")


@dataclass(frozen=True)
class Fit:
    """Fit a root finder to a family of images by one call of fit_solver; the comparison it makes goes to the report."""

    family: str = "conv-fashion"
    """A family of images in metabroyden.zoo.models.FAMILIES."""
    rtol: float = 1e-3
    """Tolerance at which solvers are judged."""
    contexts: int = 2000
    """Training images given to it, at most."""
    steps: int | None = None
    """Outer steps, at most; None: fit_solver's own number."""
    seed: int = 0
    """Of weights, batches and the split."""
    models: Path = Path("results/models")
    """Where the frozen models are."""
    results: Path = Path("results/fit")
    """Where results go, a folder a family, tolerance and seed in it; those of other settings to a trial- folder."""
    progress: bool = True
    """Show a bar, and the comparison."""


def run(config: Fit) -> None:
    """One call, which is not gone on with where it was interrupted; the report over all that there are."""
    path, family = trained_model(config.models, config.family), get_family(config.family)
    criterion = family.criterion()
    if not isinstance(criterion, Images):
        raise ValueError(
            f"wanted a family of images, whose contexts are single tensors; {config.family} is one of texts"
        )
    model = load_model(path, warn=False).requires_grad_(False)
    with torch.no_grad():
        x = model.inject(criterion.data.train.images[: config.contexts])
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"wanted a family whose contexts are single tensors; those of {config.family} are {len(x)}")
    solver = mb.fit_solver(
        model.cell, x, rtol=config.rtol, steps=config.steps, seed=config.seed, fallback=False, progress=config.progress
    )
    row = {
        "family": config.family,
        "seed": config.seed,
        "solver": type(solver).__name__,
        "contexts": len(x),
        "training": {key: value for key, value in solver.summary.items() if key in ("steps", "seconds", "cpu_seconds")},
        **solver.summary["held_out"],
    }
    described = {
        "command": command_line(
            f"fit --family {config.family} --rtol {config.rtol:g} --seed {config.seed}", config, _PLACES
        ),
        "config": plain(config),
        "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "provenance": provenance(),
    }
    results = results_folder(config.results, config, _PLACES)
    write_results(results / f"{config.family}-{config.rtol:g}-seed{config.seed}", [row], described)
    Console().print(Markdown(fit_report.write(results).read_text()))
