"""All solvers on all families, under one protocol (results/race/PROTOCOL.md): rows, figures, reports."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown

from metabroyden import checkpoint
from metabroyden.evaluation import equilibria, meta_rows, texts
from metabroyden.evaluation.equilibria import HeldOut
from metabroyden.evaluation.metrics import short
from metabroyden.evaluation.provenance import command_line, config_hash, plain, provenance, results_folder
from metabroyden.evaluation.race import contestants, measure, report, schema
from metabroyden.evaluation.race.contestants import Contestant
from metabroyden.evaluation.race.schema import Row
from metabroyden.evaluation.race.statistics import Field
from metabroyden.meta import distributed
from metabroyden.meta.progress import progress_bar
from metabroyden.models import FAMILIES, load_model
from metabroyden.models.criteria import NextToken
from metabroyden.models.families import get_family, trained_model
from metabroyden.solve import solve
from metabroyden.storage import atomic_write

DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 40)
CLOCKED = (1e-2, 1e-3)
NEAR = {"accuracy": 0.005, "bits": 0.01}
"""How far from the equilibrium's score counts as equal."""
FREE = ("models", "meta", "device", "results", "runs", "compare", "fresh", "progress")


@dataclass(frozen=True)
class Race:
    """Race all solvers on all families and write results/race/. Interrupted, it goes on with the next family."""

    families: tuple[str, ...] = tuple(FAMILIES)
    """Families of metabroyden.models.FAMILIES."""
    images: int = 256
    """Held-out images of a family, in blocks of half as many."""
    segments: int = 128
    """Held-out segments of a text, in four blocks."""
    budget: int = 60
    """Evaluations each sample may cost."""
    rounds: int = 3
    """Timed rounds of a block, to 1e-2 and 1e-3."""
    models: Path = Path("results/models")
    """Where the frozen models are."""
    meta: Path = Path("results/meta")
    """Where the trained solvers are."""
    device: str = "auto"
    """Where to run: auto (a GPU where there is one), cpu, cuda, cuda:N."""
    results: Path = Path("results/race")
    """Where results go; those of a run with other settings than these to a trial- folder in it."""
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
        Console().print(Markdown(report.comparison(ours, theirs)))
        return
    for name in ("images", "segments", "budget", "rounds"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    for family in config.families:
        get_family(family)
    device = distributed.resolve(config.device)
    identity = replace(config, families=(), **{name: getattr(Race, name) for name in FREE if name != "device"})
    settings = config_hash(replace(identity, device=device.type))
    if config.fresh:
        shutil.rmtree(config.runs / settings, ignore_errors=True)
    folder = results_folder(config.results, config, FREE)
    paths = []
    for family in config.families:
        job = _Family(config, family, settings, device)
        paths.append(job.rows())
    for path in paths:
        atomic_write(folder / "rows" / f"{path.parent.name}.jsonl", path.read_bytes())
    described = {
        "command": command_line("race", config, FREE),
        "config": plain(config),
        "settings": settings,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "provenance": provenance(),
    }
    atomic_write(folder / "config.json", json.dumps(described, indent=2) + "\n")
    atomic_write(folder / "schema.json", json.dumps(schema.SCHEMA, indent=2) + "\n")
    Console().print(Markdown(report.write(folder).read_text()))


class _Family:
    """One family: its problems, who runs on them, and the rows."""

    def __init__(self, config: Race, name: str, settings: str, device: torch.device) -> None:
        self.config, self.name, self.settings, self.device = config, name, settings, device
        self.path, self.family = trained_model(config.models, name), get_family(name)
        self.criterion = self.family.criterion()
        self.texts = isinstance(self.criterion, NextToken)
        solvers = sorted((config.meta / name).glob("*-seed*/solver.safetensors"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in (self.path, *solvers))).hexdigest()[:8]
        self.work = config.runs / settings / f"{name}-{digest}" / name
        self.commit = provenance()["commit"]

    def rows(self) -> Path:
        """The file of the family's rows, made where it is not there yet."""
        path = self.work / "rows.jsonl"
        if not path.exists():
            schema.write(path, self._made())
        return path

    def _stamp(self, one: Contestant) -> Row:
        return {
            "part": "families",
            "family": self.name,
            "solver": one.name,
            "kind": one.kind,
            "seed": one.seed,
            "config": self.settings,
            "commit": self.commit,
        }

    def _made(self) -> list[Row]:
        config = self.config
        model = load_model(self.path, warn=False).requires_grad_(False).to(self.device)
        validation = equilibria.held_out(model, self.criterion, "validation", 64)
        held = equilibria.held_out(model, self.criterion, "test", config.segments if self.texts else config.images)
        ours = contestants.classical(validation, config.budget, splitting=self.family.splitting)
        learned = contestants.learned(config.meta, self.name)
        everyone = [
            *ours,
            *(contestants.started(learned[0], ours) if learned else ()),
            *learned,
            contestants.universal(),
            *contestants.peers(validation, config.budget),
        ]
        for one in learned:
            one.solver.to(self.device)
        star, known = self._equilibria(model, held, ours)
        rules = measure.Rules(
            meta_rows.TOLERANCES, CLOCKED, config.budget, max(1, len(held) // (4 if self.texts else 2)), config.rounds
        )
        rows = [*self._tuned_rows(ours, validation), self._star_row(held, star, known)]
        blocks = math.ceil(len(held) / rules.block) * len(rules.tolerances)
        with progress_bar(f"{self.name}, solves", blocks, show=config.progress) as bar:
            count = iter(range(1, blocks + 1))
            done = (lambda: None) if bar is None else (lambda: bar(next(count), ""))
            rows += measure.solve_rows(everyone, held, star, known, rules, self._stamp, done)
        rows += self._metric_rows(everyone, held, rows, rules)
        for one in learned:
            taken = {key: one.solver.summary[key] for key in ("cpu_seconds", "steps")}
            rows.append({"row": "training", **self._stamp(one), **taken})
            steps = 4 * getattr(one.solver.config, "gated", 14)
            for row in meta_rows.horizon_rows(one.name, one.solver, held, steps=steps):
                rows.append({**row, **self._stamp(one)})
        return rows + self._leak_rows([one for one in everyone if not one.peer])

    def _equilibria(self, model: Any, held: HeldOut, ours: list[Contestant]) -> tuple[torch.Tensor, torch.Tensor]:
        """(z*, known), kept beside the rows."""
        path = self.work / "equilibria.safetensors"
        if not path.exists():
            sure = tuple(one.solver for one in ours if one.name == "Peaceman-Rachford")
            star, known = meta_rows.double_equilibria(model.cell, held, sure)
            checkpoint.write(path, "measured/equilibria", {"star": star, "known": known}, {})
        tensors, _ = checkpoint.read(path, "measured")
        return tensors["star"].to(held.device), tensors["known"].to(held.device)

    def _tuned_rows(self, ours: list[Contestant], validation: HeldOut) -> list[Row]:
        """How ours did on the problems that they were tuned on: which families are headline ones follows from that."""
        z0, x, _ = next(iter(validation.chunks()))
        budget, rows = self.config.budget, []
        for one in ours:
            tightest = min(meta_rows.TOLERANCES)
            found = solve(validation.f, z0, x, solver=one.solver, rtol=tightest, max_nfe=budget, throw=False)
            for tolerance in meta_rows.TOLERANCES:
                spent, reached = found.trace.evaluations_to(tolerance, budget)
                figures = {"median": float(np.median(spent)), "success": float(reached.mean())}
                row = {"row": "tuned", **self._stamp(one), "options": one.options, "tolerance": tolerance, **figures}
                rows.append(row)
        return rows

    def _star_row(self, held: HeldOut, star: torch.Tensor, known: torch.Tensor) -> Row:
        index = torch.arange(len(held), device=held.device)
        packing = measure.Packing.of(held.z0)
        z = packing.unpack(star.to(packing.pack(held.z0).dtype))
        return {
            "row": "star",
            **self._stamp(Contestant("float64", "classical", None, "")),
            "samples": len(held),
            "known": int(known.sum()),
            "score": short(held.judge(z, index).tolist()),
            "higher_is_better": not self.texts,
        }

    def _metric_rows(
        self, everyone: list[Contestant], held: HeldOut, rows: list[Row], rules: measure.Rules
    ) -> list[Row]:
        """Score by evaluations, and the time of as many as bring it to the equilibrium's for good."""
        (star,) = (row for row in rows if row["row"] == "star")
        goal, near = float(np.mean(star["score"])), NEAR["bits" if self.texts else "accuracy"]
        found: list[Row] = []
        enough: list[tuple[Contestant, int]] = []
        for one in everyone:
            if one.peer:
                continue
            depths = [k for k in DEPTHS if k <= self.config.budget]
            scores = equilibria.depth_rows(self.name, held, solver=one.solver, depths=depths)
            for row in scores:
                figures = {key: row[key] for key in ("evaluations", "score")}
                found.append({"row": "depth", **self._stamp(one), "samples": len(held), **figures})
            far = [row["evaluations"] for row in scores if abs(row["score"] - goal) > near]
            later = [k for k in depths if not far or k > far[-1]]
            if later:
                enough.append((one, later[0]))
        return [*found, *measure.pace_rows(enough, held, rules, self._stamp)]

    def _leak_rows(self, everyone: list[Contestant]) -> list[Row]:
        rows: list[Row] = []
        if not isinstance(self.criterion, NextToken):
            return rows
        for one in everyone:
            model = load_model(self.path, solver=one.solver, warn=False).requires_grad_(False).to(self.device)
            for row in texts.leak_rows(one.name, model, self.criterion, tolerances=CLOCKED):
                figures = {key: row[key] for key in ("tolerance", "mean", "most")}
                rows.append({"row": "leak", **self._stamp(one), **figures})
        return rows
