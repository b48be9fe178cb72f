"""All solvers on all families, under one protocol (results/race/PROTOCOL.md): rows, figures, reports."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from experiments.bench.options import Budgeted, OnDevice, OnModels
from experiments.bench.runner import Run, at_least_one, digest, known, read_rows, show, threads
from experiments.bench.statistics import Field
from experiments.race import ablation, hyper_deq, report, schema
from experiments.race.units import Setting, Unit, beyond, cells, family
from metabroyden.meta import distributed
from metabroyden.storage import atomic_write
from metabroyden.zoo.models import FAMILIES

FREE = ("models", "meta", "device", "compare")


@dataclass(frozen=True)
class Race(Budgeted, OnModels, OnDevice, command="race"):
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
    threads: int = 1
    """Of the CPU."""
    rounds: int = 3
    """Timed rounds of a block, to 1e-2 and 1e-3."""
    meta: Path = Path("results/meta")
    """Where the trained solvers are."""
    compare: tuple[Path, Path] | None = None
    """Two folders of earlier runs: solve nothing, print where they differ, with paired intervals."""


def run(config: Race) -> None:
    """The whole job: rows of every family that are not there yet, then figures and reports from all."""
    if config.compare is not None:
        ours, theirs = (Field(schema.read(folder / "rows"), "families") for folder in config.compare)
        console, found = Console(), report.comparison(ours, theirs)
        # a file is wider than any terminal
        console.print(Markdown(found)) if console.is_terminal else print(found)
        return
    at_least_one(config, "images", "segments", "budget", "rounds", "threads")
    known("family", config.families, FAMILIES)
    device = distributed.resolve(config.device)
    if device.type != "cpu":
        config = replace(config, results=config.results.with_name("gpu") / config.results.name)
    job = Run(config, free=FREE, shared=(*FREE, "families", "cells"), inputs=[device.type])
    setting = Setting(config, device, digest(job.work.name))
    with threads(config.threads):
        paths = [(unit.name, _rows(unit, job.work / unit.key)) for unit in pieces(setting)]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        described = job.described(settings=setting.digest, device=name)
    for name, path in paths:
        schema.write(job.folder / "rows" / f"{name}.jsonl.gz", read_rows(path))
        (job.folder / "rows" / f"{name}.jsonl").unlink(missing_ok=True)
    atomic_write(job.folder / "config.json", json.dumps(described, indent=2) + "\n")
    atomic_write(job.folder / "schema.json", schema.PATH.read_text())
    show(report.write(job.folder))


def pieces(setting: Setting) -> list[Unit]:
    """The race itself, and what is run on the families beside it."""
    config = setting.config
    found = [family(setting, name) for name in config.families]
    if not config.cells:
        return found
    found += [cells(setting)] if setting.device.type == "cpu" else []  # that is where their problems are
    for name in config.families:
        found.append(beyond(setting, name))
        found += [hyper_deq.unit(setting, name)] if name in hyper_deq.FAMILIES else []
        found += [ablation.unit(setting, name)] if name in ablation.FAMILIES else []
    return found


def _rows(unit: Unit, work: Path) -> Path:
    """The file of a unit's rows, made where it is not there yet."""
    path = work / "rows.jsonl"
    if not path.exists():
        schema.write(path, unit.make(work))
    return path
