"""Inference with a trained solver as users run it: samples per second and score, against the fastest classical solver."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

import metabroyden as mb
from experiments.legacy import equilibria, throughput_report
from experiments.legacy.provenance import command_line, plain, provenance, results_folder, write_results
from experiments.legacy.throughput_rows import Throughput as Measurement
from experiments.legacy.throughput_rows import raw_inputs
from metabroyden.meta.progress import progress_bar
from metabroyden.zoo.models import load_model
from metabroyden.zoo.models.families import get_family, trained_model

_PLACES = ("family", "models", "meta", "results", "runs", "progress")
_TUNED_ON = 64  # validation problems


@dataclass(frozen=True)
class Throughput:
    """Run a trained DEQ with its trained solver and with tuned classical ones: samples per second and score."""

    family: str = "conv-fashion"
    """A family of metabroyden.zoo.models.FAMILIES."""
    solver: str = "meta-broyden-seed0"
    """A folder of a trained solver in results/meta/FAMILY, or a shipped solver's name, such as universal."""
    rtol: float = 1e-2
    """Tolerance of all solves."""
    batches: tuple[int, ...] = (1, 32, 256)
    """Samples (of a text: segments) given to the model at once."""
    samples: int = 256
    """Test samples; all of a round's solvers see the same ones, the rounds together all that fill a batch."""
    rounds: int = 8
    """Timed rounds of a batch size; up to four times as many where they are short."""
    budget: int = 60
    """Evaluations each sample may cost."""
    threads: int = 1
    """Of the CPU."""
    compiled: bool = False
    """Time compiled solves with a fixed budget, too; compiling takes half a minute a solver and batch size."""
    models: Path = Path("results/models")
    """Where the frozen models are."""
    meta: Path = Path("results/meta")
    """Where the trained solvers are."""
    results: Path = Path("results/throughput")
    """Where results go, a folder a family in it; those of other settings than these to a trial- folder."""
    runs: Path = Path("runs/throughput")
    """Where tuned classical solvers are kept."""
    progress: bool = True
    """Show a progress bar."""


def run(config: Throughput) -> None:
    """The whole job for one family, tuned solvers apart, and the report over all families that there are."""
    for name in ("samples", "rounds", "budget", "threads"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if min(config.batches, default=0) < 1:
        raise ValueError(f"batches must be of at least 1 sample, got {config.batches}")
    path, family = trained_model(config.models, config.family), get_family(config.family)
    learned = _learned(config)
    criterion = family.criterion()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        model = load_model(path, warn=False).requires_grad_(False)
        inputs = raw_inputs(model, criterion, config.samples)
        if max(config.batches) > len(inputs):
            raise ValueError(f"a batch of {max(config.batches)} is more than the {len(inputs)} test samples")
        solvers = {config.solver: learned, **_classical(config, path, model, criterion)}
        options = {"rtol": config.rtol, "max_nfe": config.budget, "warn": False}
        models = {
            name: load_model(path, solver=solver, **options).requires_grad_(False) for name, solver in solvers.items()
        }
        with progress_bar(config.family, len(config.batches), show=config.progress) as bar:
            count = iter(range(1, len(config.batches) + 1))
            done = (lambda: None) if bar is None else (lambda: bar(next(count), ""))
            measurement = Measurement(models, config.solver, inputs, config.rounds, done)
            rows = measurement.rows(config.batches, compiled=config.compiled)
        described = {
            "command": command_line(f"throughput --family {config.family}", config, _PLACES),
            "config": plain(config),
            "metric": criterion.metric,
            "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "provenance": provenance(),
        }
    finally:
        torch.set_num_threads(threads)
    results = results_folder(config.results, config, (*_PLACES, "compiled"))  # which adds rows and changes none
    write_results(results / config.family, [{"family": config.family, **row} for row in rows], described)
    Console().print(Markdown(throughput_report.write(results).read_text()))


def _learned(config: Throughput) -> Any:
    if config.solver in mb.list_pretrained():
        return mb.load_solver(config.solver)
    path = config.meta / config.family / config.solver / "solver.safetensors"
    if not path.exists():
        kind, _, seed = config.solver.rpartition("-seed")
        if not (kind and seed.isdigit()):
            shipped = ", ".join(mb.list_pretrained())
            raise ValueError(f"solver must be NAME-seedNUMBER or a shipped one ({shipped}), got {config.solver!r}")
        command = f"python -m experiments meta --family {config.family} --solver {kind} --seed {seed}"
        raise FileNotFoundError(f"{path} is missing: train it with `{command}`")
    return mb.load_solver(path)


def _classical(config: Throughput, path: Path, model: Any, criterion: Any) -> dict[str, Any]:
    """The tuned ones, found once and kept."""
    settings = f"{config.budget} {_TUNED_ON}".encode()
    digest = hashlib.sha256(path.read_bytes() + settings).hexdigest()[:8]
    folder = config.runs / config.family / digest
    if not folder.exists():
        validation = equilibria.held_out(model, criterion, "validation", _TUNED_ON)
        found = equilibria.tuned_solvers(validation, config.budget)
        if get_family(config.family).splitting:
            found |= equilibria.splitting_solvers(validation, config.budget)
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        for name, solver in found.items():
            mb.save_solver(solver, unfinished / f"{name}.solver")
        unfinished.rename(folder)
    return {file.stem: mb.load_solver(file) for file in sorted(folder.glob("*.solver"))}
