"""All solvers on all families, under one protocol (results/race/PROTOCOL.md): rows, figures, reports."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from experiments.bench.options import Budgeted, OnDevice, OnModels
from experiments.bench.runner import Row, Run, at_least_one, digest, known, show, threads, write_rows
from experiments.race import fitted, hyper_deq, report, schema
from experiments.race.units import Setting, Unit, family
from metabroyden.comparison.statistics import Field
from metabroyden.meta import distributed
from metabroyden.progress import ticks
from metabroyden.storage import atomic_write
from metabroyden.zoo.models import FAMILIES

FREE = ("models", "meta", "fits", "device", "lanes", "compare", "report")


@dataclass(frozen=True)
class Race(Budgeted, OnModels, OnDevice, command="race"):
    """Race all solvers on all families and write results/race/. Interrupted, it goes on with the next family."""

    families: tuple[str, ...] = tuple(FAMILIES)
    """Families of metabroyden.zoo.models.FAMILIES."""
    hyper_deq: bool = True
    """Also train silva-networks' HyperDEQ, on two families."""
    images: int = 256
    """Held-out images of a family, in blocks of half as many."""
    segments: int = 128
    """Held-out segments of a text, in four blocks."""
    threads: int = 1
    """Of the CPU, in each lane."""
    rounds: int = 3
    """Timed rounds of a block, to 1e-2 and 1e-3."""
    seeds: int = 3
    """Fits of each family."""
    fits: Path = Path("results/race/solvers")
    """Where the solvers of fit_solver are; one that is missing is fitted, in up to five minutes."""
    meta: Path = Path("results/meta")
    """Where other learned solvers are."""
    lanes: int = 2
    """Processes that share the work."""
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
    at_least_one(config, "images", "segments", "budget", "rounds", "threads", "seeds", "lanes")
    known("family", config.families, FAMILIES)
    device = distributed.resolve(config.device)
    if device.type != "cpu":
        config = replace(config, results=config.results.with_name("gpu") / config.results.name)
    job = Run(config, free=FREE, shared=(*FREE, "families", "hyper_deq"), inputs=[device.type])
    if not config.report:
        _measure(job, Setting(config, device, digest(job.work.name)))
    whole = job.folder == config.results and device.type == "cpu"  # a trial stands for itself
    show(report.write(job.folder, config.results.parent if whole else None))


def _measure(job: Run, setting: Setting) -> None:
    """Make the solvers and rows that are not there yet; publish all."""
    config, device = setting.config, setting.device
    missing = [one for one in setting.fits() if not one[2].exists()]
    _spread(config, "race, fits", [partial(_fit, setting, *one) for one in missing])
    units = pieces(setting)  # not before the solvers are there, of whose files their keys are made
    todo = [unit.name for unit in units if not job.has(unit.key)]
    _spread(config, "race", [partial(_make, job, setting, name) for name in todo])
    with threads(config.threads):
        made = {unit.name: _rows(job, unit) for unit in units}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        described = job.described(settings=setting.digest, device=name)
    for unit, rows in made.items():
        write_rows(job.folder / "rows" / f"{unit}.jsonl.gz", rows, strict=True)
    atomic_write(job.folder / "config.json", json.dumps(described, indent=2) + "\n")
    atomic_write(job.folder / "schema.json", schema.PATH.read_text())


def _spread(config: Race, title: str, work: Sequence[Callable[[], None]]) -> None:
    """Do all of this, in as many processes as there are lanes."""
    with ticks(title, len(work), show=config.progress) as done:
        if config.lanes == 1 or len(work) < 2:
            for one in work:
                one()
                done()
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(config.lanes, mp_context=context) as pool:
            for future in as_completed([pool.submit(one) for one in work]):
                future.result()
                done()


def _fit(setting: Setting, family: str, seed: int, path: Path) -> None:
    with threads(setting.config.threads):
        fitted.fit(setting.family(family), seed, path)


def _make(job: Run, setting: Setting, name: str) -> None:
    """The rows of one unit, by its name: a unit itself does not travel to another process."""
    quiet = replace(setting, config=replace(setting.config, progress=False))
    with threads(setting.config.threads):
        (unit,) = (one for one in pieces(quiet) if one.name == name)
        _rows(job, unit)


def _rows(job: Run, unit: Unit) -> list[Row]:
    return job.unit(unit.key, lambda: map(schema.check, unit.make(job.work / unit.key)), strict=True)


def pieces(setting: Setting) -> list[Unit]:
    """The race itself, the largest models first, and another library's learned solver."""
    names = dict.fromkeys(name for name, _, _ in setting.fits())
    found = [family(setting, name) for name in names]
    if setting.config.hyper_deq:
        found += [hyper_deq.unit(setting, name) for name in names if name in hyper_deq.FAMILIES]
    return found
