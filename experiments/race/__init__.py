"""All solvers on all families, under one protocol (results/race/PROTOCOL.md): rows, figures, reports."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from experiments.bench.options import Budgeted, OnDevice, OnModels
from experiments.bench.runner import Row, Run, at_least_one, digest, known, show, threads, write_rows
from experiments.race import ablation, hyper_deq, report, schema
from experiments.race.units import Setting, Unit, beyond, cells, family
from metabroyden.comparison.statistics import Field
from metabroyden.meta import distributed
from metabroyden.storage import atomic_write
from metabroyden.zoo.models import FAMILIES

FREE = ("models", "meta", "device", "compare", "report")


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
    report: bool = False
    """Solve nothing: make figures and report again from the rows that are there."""


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
    if not config.report:
        _measure(job, Setting(config, device, digest(job.work.name)))
    show(report.write(job.folder))


def _measure(job: Run, setting: Setting) -> None:
    """Make the rows that are not there yet; publish all."""
    config, device = setting.config, setting.device
    with threads(config.threads):
        made = {unit.name: _rows(job, unit) for unit in pieces(setting)}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        described = job.described(settings=setting.digest, device=name)
    for unit, rows in made.items():
        write_rows(job.folder / "rows" / f"{unit}.jsonl.gz", rows, strict=True)
    atomic_write(job.folder / "config.json", json.dumps(described, indent=2) + "\n")
    atomic_write(job.folder / "schema.json", schema.PATH.read_text())


def _rows(job: Run, unit: Unit) -> list[Row]:
    return job.unit(unit.key, lambda: map(schema.check, unit.make(job.work / unit.key)), strict=True)


def pieces(setting: Setting) -> list[Unit]:
    """The race itself, and what is run on the families beside it."""
    config = setting.config
    found = [family(setting, name) for name in config.families]
    if not config.cells:
        return found
    found += [cells(setting)] if setting.device.type == "cpu" else []  # that is where their problems are
    for name in config.families:
        found.append(beyond(setting, name))
        found += [part.unit(setting, name) for part in (hyper_deq, ablation) if name in part.FAMILIES]
    return found
