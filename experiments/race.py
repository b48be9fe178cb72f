"""All solvers on all families, under one protocol (results/race/PROTOCOL.md): rows, figures, reports."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from experiments import meta
from experiments.legacy.provenance import command_line, config_hash, plain, provenance, results_folder
from experiments.legacy.race import ablation, hyper_deq, report, schema
from experiments.legacy.race.ablation import AblationUnit
from experiments.legacy.race.beyond import BeyondUnit
from experiments.legacy.race.hyper_deq import HyperDEQUnit
from experiments.legacy.race.statistics import Field
from experiments.legacy.race.units import CellsUnit, FamilyUnit, Settings, Unit
from metabroyden.meta import distributed
from metabroyden.storage import atomic_write
from metabroyden.zoo.models import FAMILIES
from metabroyden.zoo.models.families import get_family

FREE = ("models", "meta", "device", "results", "runs", "compare", "fresh", "progress")


@dataclass(frozen=True)
class Race:
    """Race all solvers on all families and write results/race/. Interrupted, it goes on with the next family."""

    families: tuple[str, ...] = tuple(FAMILIES)
    """Families of metabroyden.zoo.models.FAMILIES."""
    cells: bool = True
    """Beside the race itself: cells that nothing was trained on, solvers of other families and far past their horizon,
    MetaBroyden without its pieces (which trains it anew), and silva-networks' HyperDEQ."""
    images: int = 256
    """Held-out images of a family, in blocks of half as many."""
    segments: int = 128
    """Held-out segments of a text, in four blocks."""
    budget: int = 60
    """Evaluations each sample may cost."""
    threads: int = 1
    """Of the CPU."""
    rounds: int = 3
    """Timed rounds of a block, to 1e-2 and 1e-3."""
    models: Path = Path("results/models")
    """Where the frozen models are."""
    meta: Path = Path("results/meta")
    """Where the trained solvers are."""
    device: str = "auto"
    """Where to run: auto (a GPU where there is one), cpu, cuda, cuda:N."""
    results: Path = Path("results/race")
    """Where results go; those of a run with other settings than these to a trial- folder in it, those of a GPU to gpu/race
    beside it."""
    runs: Path = Path("runs/race")
    """Where unfinished work is kept, to go on from."""
    compare: tuple[Path, Path] | None = None
    """Two folders of earlier runs: solve nothing, print where they differ, with paired intervals."""
    fresh: bool = False
    """Throw away unfinished and finished work of this configuration and start anew."""
    progress: bool = True
    """Show progress bars."""


def run(config: Race) -> None:
    """The whole job: rows of every family that are not there yet, then figures and reports from all."""
    if config.compare is not None:
        ours, theirs = (Field(schema.read(folder / "rows")) for folder in config.compare)
        console, found = Console(), report.comparison(ours, theirs)
        # a file is wider than any terminal
        console.print(Markdown(found)) if console.is_terminal else print(found)
        return
    for name in ("images", "segments", "budget", "rounds", "threads"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    for family in config.families:
        get_family(family)
    device = distributed.resolve(config.device)
    identity = replace(
        config, families=(), cells=True, **{name: getattr(Race, name) for name in FREE if name != "device"}
    )
    settings = config_hash(replace(identity, device=device.type))
    if config.fresh:
        shutil.rmtree(config.runs / settings, ignore_errors=True)
    place = config.results if device.type == "cpu" else config.results.with_name("gpu") / config.results.name
    folder = results_folder(place, config, FREE)
    options = {name: getattr(config, name) for name in ("images", "segments", "budget", "rounds", "models", "meta")}
    setting = Settings(**options, device=device, digest=settings, progress=config.progress)
    units: list[Unit] = [FamilyUnit(setting, family) for family in config.families]
    if config.cells:
        units += _beside(config, setting)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        paths = [(unit.name, _rows(unit, config.runs / settings / unit.key)) for unit in units]
        made = provenance()
    finally:
        torch.set_num_threads(threads)
    for name, path in paths:
        atomic_write(folder / "rows" / f"{name}.jsonl.gz", path.read_bytes())
    described = {
        "command": command_line("race", config, FREE),
        "config": plain(config),
        "settings": settings,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "provenance": made,
    }
    atomic_write(folder / "config.json", json.dumps(described, indent=2) + "\n")
    atomic_write(folder / "schema.json", json.dumps(schema.SCHEMA, indent=2) + "\n")
    Console().print(Markdown(report.write(folder).read_text()))


def _beside(config: Race, setting: Settings) -> list[Unit]:
    """What is run on the families beside the race."""
    units: list[Unit] = [CellsUnit(setting)] if setting.device.type == "cpu" else []  # that is where their problems are
    for family in config.families:
        units.append(BeyondUnit(setting, family))
        if family in hyper_deq.FAMILIES:
            units.append(HyperDEQUnit(setting, family))
        if family in ablation.FAMILIES:
            units.append(AblationUnit(setting, family, partial(_without, config)))
    return units


class _Ablated(meta.Job):
    """MetaBroyden's usual training, but for what a variant leaves out."""

    def __init__(self, config: meta.Meta, variant: ablation.Variant) -> None:
        self.variant = variant
        super().__init__(config)

    def altered_options(self) -> dict[str, Any]:
        return self.variant.options

    def altered(self, solver: Any) -> Any:
        return self.variant.prepared(solver)


def _without(config: Race, family: str, variant: str, seed: int) -> Any:
    """The trained variant; training goes on where it was interrupted."""
    left_out = ablation.TRAINED[variant]
    usual = meta.Meta(
        family=family,
        seed=seed,
        models=config.models,
        runs=config.runs / "ablation" / hashlib.sha256(left_out.words.encode()).hexdigest()[:8],
        device=config.device,
        fresh=config.fresh,
        progress=config.progress,
    )
    return _Ablated(usual, left_out).trained()


def _rows(unit: Unit, work: Path) -> Path:
    """The file of a unit's rows, made where it is not there yet."""
    path = work / "rows.jsonl.gz"
    if not path.exists():
        schema.write(path, unit.rows(work))
    return path
