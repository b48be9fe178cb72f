"""Meta-train a root finder on the fixed-point problems of a trained family, and measure it on held-out ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from metabroyden import Anderson, Broyden, load_solver, save_solver
from metabroyden.evaluation import equilibria, meta_report, meta_rows, texts
from metabroyden.evaluation.provenance import config_hash, plain, provenance, write_results
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.learned.safeguard import Safeguard
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet
from metabroyden.meta.families import family_layout, family_tasks
from metabroyden.meta.fit import make_learned
from metabroyden.meta.objectives import OBJECTIVES
from metabroyden.meta.progress import progress_bar
from metabroyden.models import load_model
from metabroyden.models.criteria import NextToken
from metabroyden.models.families import get_family
from metabroyden.state import Packing
from metabroyden.storage import atomic_write

CLASSICAL = "classical"
CLOCKED = (1e-2, 1e-3)
OPTIONS = ("steps", "objective", "context", "budget", "samples", "repeats", "backend")
BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40)


@dataclass(frozen=True)
class Recipe:
    """How a solver is meta-trained, see `MetaConfig` and the solver's own config; `kind` where it is not named by that."""

    kind: str = ""
    steps: int = 600
    unroll: int = 14
    segments: int = 2
    batch: int = 32
    objective: str = "residual"
    learning_rate: float = 2e-3
    pool: int = 1024  # training contexts of a text, made beforehand
    options: dict[str, Any] = field(default_factory=dict)


_SAME: dict[str, Any] = {"initializer": 64, "safeguard": Safeguard(horizon=None, patience=15, progress=0.5)}
RECIPES: dict[str, Recipe] = {
    "meta-broyden": Recipe(options={**_SAME, "rank": 64, "gated": 28}),
    "grouped": Recipe(options={**_SAME, "rank": 64}),
    "coordinatewise": Recipe(steps=400, segments=1, options=_SAME),
    "hyper-anderson": Recipe(steps=3000, unroll=10, segments=1, learning_rate=1e-3, options=_SAME),
    "neural-fixed-point": Recipe(options=_SAME),
    "gated-secant": Recipe(kind="neural-fixed-point", options={**_SAME, "form": "secant"}),
    "meta-learner": Recipe(steps=400, segments=1, options=_SAME),
    "started-broyden": Recipe(kind="started", segments=1, options={**_SAME, "classical": Broyden(60)}),
    "started-anderson": Recipe(kind="started", segments=1, options={**_SAME, "classical": Anderson()}),
}
"""All with the same width of the start and the same safeguard."""
TEXT: dict[str, Any] = {"batch": 16, "steps": 300}
"""What is different where f is a language model's, ten times as costly."""
SLOW = {"multiscale-fashion": 0.5}
"""Share of a recipe's steps that is taken on a family, so that meta-training stays near ten minutes of one core."""
HELD = 128
"""Validation problems of a text on which weights are chosen."""


@dataclass(frozen=True)
class Meta:
    """Meta-train a solver on a family, compare it with the tuned classical ones on held-out problems, write the report."""

    family: str = "conv-fashion"
    """A family of metabroyden.models.FAMILIES."""
    solver: str = "meta-broyden"
    """A learned solver, or "classical" for the rows of the classical ones."""
    seed: int = 0
    """Seed of the solver's weights and of the batches."""
    steps: int | None = None
    """Outer steps, instead of the recipe's."""
    objective: str | None = None
    """What is minimised, instead of the recipe's: a name of metabroyden.meta.objectives.OBJECTIVES."""
    context: str = "native"
    """What the solver knows of x: its injection ("native") or the first evaluation ("f0")."""
    budget: int = 60
    """Evaluations each sample may cost in the comparison."""
    samples: int = 256
    """Held-out problems used."""
    repeats: int = 5
    """Interleaved timing repeats."""
    backend: str = "higher"
    """Unroll by "higher", or by plain autograd ("native"): the same gradients."""
    models: Path = Path("results/models")
    """Where the frozen models are."""
    results: Path = Path("results/meta")
    """Where results go; those of a run with other settings than these to a trial- folder in it, with a report of its own."""
    runs: Path = Path("runs/meta")
    """Where unfinished work is kept, to go on from."""
    fresh: bool = False
    """Throw away unfinished and finished work of this configuration and start anew."""
    progress: bool = True
    """Show progress bars."""


def run(config: Meta) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it writes the report again."""
    console = Console()
    if config.solver != CLASSICAL and config.solver not in RECIPES:
        raise ValueError(f"unknown solver {config.solver!r}: known are {', '.join([*RECIPES, CLASSICAL])}")
    if config.steps is not None and config.steps < 1:
        raise ValueError(f"steps must be at least 1, got {config.steps}")
    if config.objective is not None and config.objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {config.objective!r}: known are {', '.join(OBJECTIVES)}")
    job = Job(config)
    job.run()
    console.print(f"{config.family}, {config.solver}, seed {config.seed}: {job.folder}")
    console.print(Markdown(meta_report.write(job.results).read_text()))


class Job:
    """One solver on one family, trained by a recipe: that of its name, unless another is given.

    Attributes:
        model, criterion: the frozen family. work: folder of what is unfinished. results: folder of reports.
    """

    def __init__(self, config: Meta, recipe: Recipe | None = None) -> None:
        self.config = config
        identity = replace(config, models=Path(), results=Path(), runs=Path(), fresh=False, progress=True)
        self.path = config.models / config.family / "model.safetensors"
        family = get_family(config.family)
        if not self.path.exists():
            raise FileNotFoundError(
                f"{self.path} is missing: train it with `python -m experiments models --family {config.family}`"
            )
        self.family, self.criterion = family, family.criterion()
        self.model = load_model(self.path, warn=False).requires_grad_(False)
        self.texts = isinstance(self.criterion, NextToken)
        self.recipe = self._usual() if recipe is None else recipe
        name = config.solver if config.solver == CLASSICAL else f"{config.solver}-seed{config.seed}"
        chosen = {item.name: getattr(config, item.name) for item in fields(config) if item.name in OPTIONS}
        usual = all(item.default == chosen.get(item.name, item.default) for item in fields(config))
        trial = "trial-" + hashlib.sha256(repr(chosen).encode()).hexdigest()[:8]
        self.results = config.results if usual else config.results / trial
        self.folder = self.results / config.family / name
        settings = (self.recipe, BUDGETS, CLOCKED, HELD, meta_rows.TOLERANCES)
        digest = hashlib.sha256(repr(settings).encode() + self.path.read_bytes()).hexdigest()[:8]
        self.work = config.runs / config.family / f"{name}-{config_hash(identity)}-{digest}"
        if config.fresh and self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        if not (self.work / "began.json").exists():
            atomic_write(self.work / "began.json", json.dumps(provenance(), indent=2) + "\n")

    def _usual(self) -> Recipe:
        """The recipe of the solver's name, as the family and the settings want it."""
        config, recipe = self.config, RECIPES.get(self.config.solver, Recipe())
        if self.texts and config.solver != "hyper-anderson":
            recipe = replace(recipe, **TEXT)
        steps = config.steps if config.steps is not None else round(SLOW.get(config.family, 1) * recipe.steps)
        return replace(recipe, steps=steps, objective=config.objective or recipe.objective)

    def run(self) -> None:
        """Train, measure, publish."""
        solver = None if self.config.solver == CLASSICAL else self.trained()
        if not (self.work / "rows.jsonl").exists():
            write_results(self.work, self._measured(solver), self._described(solver))
        rows = [json.loads(line) for line in (self.work / "rows.jsonl").read_text().splitlines()]
        write_results(self.folder, rows, json.loads((self.work / "config.json").read_text()))
        if solver is not None:
            atomic_write(self.folder / "solver.safetensors", (self.work / "solver.safetensors").read_bytes())

    def _tasks(self) -> TaskSet:
        tasks = family_tasks(self.model, self.criterion)
        if not self.texts:
            return tasks
        return tasks.prepared(self.recipe.pool, torch.Generator().manual_seed(self.config.seed), HELD)

    def trained(self) -> Any:
        """The solver: that of an earlier sitting where it was finished there."""
        path = self.work / "solver.safetensors"
        if path.exists():
            return load_solver(path)
        config, recipe = self.config, self.recipe
        tasks = self._tasks()
        layout, channels = family_layout(tasks)
        context = config.context if channels else "f0"
        solver = make_learned(
            recipe.kind or config.solver,
            layout,
            seed=config.seed,
            context=context,
            context_channels=channels if context == "native" else 0,
            **recipe.options,
        )
        meta = MetaConfig(
            steps=recipe.steps,
            unroll=recipe.unroll,
            segments=recipe.segments,
            batch=recipe.batch,
            learning_rate=recipe.learning_rate,
            objective=OBJECTIVES[recipe.objective](),
            backend=config.backend,
            seed=config.seed,
            validate_every=max(1, recipe.steps // 8),
            validation_nfe=config.budget,
            validation_size=HELD if self.texts else 256,
        )
        trainer = MetaTrainer(solver, tasks, meta, checkpoint=self.work / "training.safetensors")
        with progress_bar(f"{config.family}, {config.solver}", recipe.steps, show=config.progress) as bar:
            trainer.run(bar)
        solver.fingerprint = fingerprint(self.model.cell)
        save_solver(solver, path)
        return solver

    def _measured(self, solver: Any) -> list[dict[str, Any]]:
        config = self.config
        held = equilibria.held_out(self.model, self.criterion, "test", config.samples)
        validation = equilibria.held_out(self.model, self.criterion, "validation", 64)
        classical = equilibria.tuned_solvers(validation, config.budget)
        sure: tuple[Any, ...] = ()
        if self.family.splitting:
            splitting = equilibria.splitting_solvers(validation, config.budget)
            classical, sure = classical | splitting, (splitting["Peaceman-Rachford"],)
        contestants = (
            {config.solver: solver} if solver is not None else {**classical, "Broyden": Broyden(config.budget)}
        )
        star, known = meta_rows.double_equilibria(self.model.cell, held, sure)
        index = torch.arange(len(held))
        packing = Packing.of(held.z0)
        at_star = float(held.judge(packing.unpack(star.to(packing.pack(held.z0).dtype)), index).mean())
        rows: list[dict[str, Any]] = [
            {"row": "star", "known": float(known.float().mean()), "score": at_star, "samples": len(held)}
        ]
        with progress_bar(f"{config.family}, measuring", len(contestants) + 1, show=config.progress) as bar:
            for number, (name, one) in enumerate(contestants.items(), 1):
                rows += meta_rows.solve_rows(name, one, held, star, known, budget=config.budget)
                depths = [k for k in BUDGETS if k <= config.budget]
                rows += [
                    {**row, "row": "score", "solver": name}
                    for row in equilibria.depth_rows(config.family, held, solver=one, depths=depths)
                ]
                if isinstance(self.criterion, NextToken):
                    model = load_model(self.path, solver=one, warn=False).requires_grad_(False)
                    leaks = texts.leak_rows(name, model, self.criterion, tolerances=CLOCKED)
                    rows += [{**row, "solver": name} for row in leaks]
                if bar is not None:
                    bar(number, name)
            if solver is not None:
                batch = 64 if self.texts else 256
                both = {config.solver: solver, **classical}
                rows += meta_rows.clock_rows(
                    both, held, tolerances=CLOCKED, budget=config.budget, batch=batch, repeats=config.repeats
                )
        return rows

    def _described(self, solver: Any) -> dict[str, Any]:
        config = self.config
        command = f"python -m experiments meta --family {config.family} --solver {config.solver} --seed {config.seed}"
        for item in fields(config):
            value = getattr(config, item.name)
            if item.name in OPTIONS and value != item.default:
                command += f" --{item.name} {value}"
        described = {
            "command": command,
            "config": plain(config),
            "model_sha256": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "began": json.loads((self.work / "began.json").read_text()),
            "provenance": provenance(),
        }
        if solver is not None:
            described |= {
                "recipe": asdict(self.recipe),
                "parameters": sum(p.numel() for p in solver.parameters()),
                "model_parameters": sum(p.numel() for p in self.model.parameters()),
                "summary": solver.summary,
            }
        return described
