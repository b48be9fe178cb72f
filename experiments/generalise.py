"""Train solvers across DEQs and test them on weights, widths and families that they never saw."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from experiments.legacy import equilibria, transfer_report
from experiments.legacy.equilibria import HeldOut
from experiments.legacy.provenance import (
    command_line,
    config_hash,
    plain,
    provenance,
    results_folder,
    write_results,
)
from experiments.legacy.transfer import BROYDEN, transfer_row
from metabroyden import Broyden, load_solver, save_solver
from metabroyden.learned.layout import Layout
from metabroyden.learned.safeguard import BY_PROGRESS
from metabroyden.meta import MetaConfig, TaskSet
from metabroyden.meta.defaults import RATES, tasks_layout
from metabroyden.meta.fit import make_learned
from metabroyden.meta.progress import progress_bar
from metabroyden.meta.tasks import Source
from metabroyden.meta.trainer import MultiTaskTrainer
from metabroyden.storage import atomic_write
from metabroyden.zoo.models import load_model
from metabroyden.zoo.models.episodes import load_episodes
from metabroyden.zoo.models.families import get_family, trained_model
from metabroyden.zoo.random_cells import KINDS, RandomCells, random_problem
from metabroyden.zoo.tasks import family_tasks
from metabroyden.zoo.testbed import cells

TRAINED = ("dense-digits", "dense-fashion", "mlp-digits", "mlp-fashion", "conv-digits")
"""Families whose weights along training the universal solver learns from, beside random cells."""
UNSEEN = ("conv-fashion", "multiscale-digits", "multiscale-fashion", "transformer-shakespeare", "trellisnet-shakespeare",
          "trellisnet-words", "monotone-dense-digits", "monotone-conv-digits", "monotone-multitier-digits",
          "monotone-dense-fashion", "monotone-conv-fashion", "monotone-multitier-fashion")  # fmt: skip
"""Families it is tested on."""
SHARE = 8.0
"""How many times as often as those of one family random cells are drawn."""
LATE = 3
"""Checkpoints before the last that MetaBroyden learns from; GroupedLSTM learns from all, the later the more often."""
_LONG: dict[str, Any] = {"unroll": 14, "learning_rate": 4e-3}
_SHORT: dict[str, Any] = {"unroll": 8, **RATES}
NOTHING = "—"
_PLACES = ("models", "digits", "results", "runs", "fresh", "progress")


@dataclass(frozen=True)
class Generalise:
    """Train across DEQs, test on weights, widths and families never seen, write rows, report and transfer grid."""

    steps: int = 2400
    """Outer steps of the universal solver."""
    coordinatewise_steps: int = 400
    """Outer steps of the coordinatewise LSTM, on the same problems."""
    weights_steps: int = 400
    """Outer steps of each GroupedLSTM that is trained on other weights of one DEQ; twice as many of each MetaBroyden."""
    weights: tuple[str, ...] = ("conv-digits", "multiscale-digits")
    """Families of which solvers learn from checkpoints along training, and are tested on the last, which they never saw."""
    trained: tuple[str, ...] = TRAINED
    """Families that the universal solver learns from."""
    unseen: tuple[str, ...] = UNSEEN
    """Families that it is tested on."""
    widths: bool = True
    """Test on random cells of many widths, too."""
    seeds: bool = True
    """Train on two seeds of the digits DEQ (`experiments digits`) and test on the third, too."""
    budget: int = 60
    """Evaluations each sample may cost in the comparison."""
    samples: int = 128
    """Held-out problems used."""
    batch: int = 24
    """Problems of an outer step."""
    seed: int = 0
    """Seed of solvers and batches."""
    models: Path = Path("results/models")
    """Where the frozen models are."""
    digits: Path = Path("results/digits")
    """Where the seeds of the digits DEQ are."""
    results: Path = Path("results/generalise")
    """Where results go; those of a run with other settings than these to a trial- folder in it."""
    runs: Path = Path("runs/generalise")
    """Where unfinished work is kept, to go on from."""
    fresh: bool = False
    """Throw away unfinished and finished work of this configuration and start anew."""
    progress: bool = True
    """Show progress bars."""


def run(config: Generalise) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it writes the report again."""
    job = _Job(config)
    rows = job.rows()
    folder = results_folder(config.results, config, _PLACES)
    write_results(folder, rows, job.described())
    for path in job.work.glob("*.safetensors"):
        if not path.name.startswith("training-"):
            atomic_write(folder / path.name, path.read_bytes())
    Console().print(Markdown(transfer_report.write(folder).read_text()))


class _Job:
    """All parts, each with rows of its own in the folder of unfinished work."""

    def __init__(self, config: Generalise) -> None:
        self.config = config
        identity = replace(config, **{name: getattr(Generalise, name) for name in _PLACES})
        self.work = config.runs / f"{config_hash(identity)}-{self._inputs()}"
        if config.fresh and self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        if not (self.work / "began.json").exists():
            atomic_write(self.work / "began.json", json.dumps(provenance(), indent=2) + "\n")

    def _inputs(self) -> str:
        """A hash of the models that are trained and tested on, weights along training among them, and of the safeguard."""
        names = dict.fromkeys((*self.config.trained, *self.config.unseen, *self.config.weights))
        files = [path for name in names for path in sorted((self.config.models / name).rglob("*.safetensors"))]
        if self.config.seeds:
            files += sorted(self.config.digits.glob("seed*/model.safetensors"))
        digest = hashlib.sha256(repr(BY_PROGRESS).encode())
        for path in files:
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:8]

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all parts, those that are there already read and the others made."""
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {"families": self._families}
        if self.config.widths:
            parts["widths"] = self._widths
        for family in self.config.weights:
            parts[f"weights-{family}"] = lambda family=family: self._weights(family)  # type: ignore[misc]
        if self.config.seeds:
            parts["seeds"] = self._seeds
        found: list[dict[str, Any]] = []
        for name, make in parts.items():
            path = self.work / f"{name}.jsonl"
            if not path.exists():
                atomic_write(path, "".join(json.dumps(row) + "\n" for row in make()))
            found += [json.loads(line) for line in path.read_text().splitlines()]
        return found

    def described(self) -> dict[str, Any]:
        """What stands beside the rows."""
        files = [self._model_path(name) for name in (*self.config.trained, *self.config.unseen, *self.config.weights)]
        return {
            "command": command_line("generalise", self.config, _PLACES),
            "config": plain(self.config),
            "models_sha256": {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
            "solvers": {
                path.stem: load_solver(path).summary
                for path in sorted(self.work.glob("*.safetensors"))
                if not path.name.startswith("training-")
            },
            "began": json.loads((self.work / "began.json").read_text()),
            "provenance": provenance(),
        }

    def _families(self) -> list[dict[str, Any]]:
        config = self.config
        solvers = self._free_solvers()
        rows: list[dict[str, Any]] = []
        names = [*config.trained, *config.unseen]
        with progress_bar("families", len(names), show=config.progress) as bar:
            for number, name in enumerate(names, 1):
                criterion = get_family(name).criterion()
                model = load_model(self._model_path(name), warn=False).requires_grad_(False)
                held = equilibria.held_out(model, criterion, "test", config.samples)
                part = "families seen" if name in config.trained else "families unseen"
                rows += self._row(part, name, held, solvers)
                classical = equilibria.tuned_solvers(
                    equilibria.held_out(model, criterion, "validation", 64), config.budget
                )
                for known, solver in classical.items():
                    rows.append(transfer_row(part, known, solver, NOTHING, name, held, budget=config.budget))
                if bar is not None:
                    bar(number, name)
        return rows

    def _widths(self) -> list[dict[str, Any]]:
        solvers, rows = self._free_solvers(), []
        for n in (16, 64, 256, 1024):
            for norm in (0.9, 1.5):
                held = _as_held(cells.blas(self.config.samples, n, norm, seed=5, x_seed=7))
                rows += self._row("widths", f"dense, {n} wide, norm {norm:g}", held, solvers)
        for channels in (4, 16, 48):
            held = _as_held(cells.conv(self.config.samples, channels, 8, 1.5, seed=5, x_seed=7))
            rows += self._row("widths", f"convolution, {channels} channels, norm 1.5", held, solvers)
        return rows

    def _weights(self, family: str) -> list[dict[str, Any]]:
        config = self.config
        criterion = get_family(family).criterion()
        models = self._episodes(family)
        *known, last = models
        sets = {epoch: family_tasks(model, criterion) for epoch, model in models.items()}
        # those of late weights more often: they lie nearer to what is to come
        sources: list[tuple[float, Source]] = [(k + 1.0, sets[epoch]) for k, epoch in enumerate(known)]
        latest, newest = sources[-LATE:], [sets[known[-1]]]
        trained = {
            "grouped": self._native("grouped", family, sources, newest, config.weights_steps, _LONG),
            "meta-broyden": self._native("meta-broyden", family, latest, newest, 2 * config.weights_steps, _SHORT),
        }
        rows = []
        for epoch in (*known[-2:], last):
            held = equilibria.held_out(models[epoch], criterion, "test", config.samples)
            part = "weights unseen" if epoch == last else "weights seen"
            tested = f"{family}, epoch {epoch}"
            contestants = {name: (one, f"{family}, to epoch {known[-1]}") for name, one in trained.items()}
            rows += self._row(part, tested, held, contestants)
        return rows

    def _seeds(self) -> list[dict[str, Any]]:
        config = self.config
        criterion = get_family("conv-digits").criterion()
        models = [
            load_model(config.digits / f"seed{seed}" / "model.safetensors", warn=False).requires_grad_(False)
            for seed in range(3)
        ]
        sets = [family_tasks(model, criterion) for model in models]
        both: list[tuple[float, Source]] = [(1.0, tasks) for tasks in sets[:2]]
        solver = self._native("grouped", "seeds", both, [sets[1]], config.weights_steps, _LONG)
        rows = []
        for seed, model in enumerate(models):
            held = equilibria.held_out(model, criterion, "test", config.samples)
            part = "seeds unseen" if seed == 2 else "seeds seen"
            contestants = {"grouped": (solver, "digits, seeds 0 and 1"), **self._free_solvers()}
            rows += self._row(part, f"digits, seed {seed}", held, contestants)
        return rows

    def _row(self, part: str, tested: str, held: HeldOut, solvers: dict[str, tuple[Any, str]]) -> list[dict[str, Any]]:
        budget = self.config.budget
        every = {BROYDEN: (Broyden(budget), NOTHING), **solvers}
        return [
            transfer_row(part, name, one, trained, tested, held, budget=budget)
            for name, (one, trained) in every.items()
        ]

    def _free_solvers(self) -> dict[str, tuple[Any, str]]:
        """Solvers that run on any state, with the name of what they were trained on."""
        config = self.config
        universal = self._trained(
            "universal",
            lambda: make_learned("universal", Layout("vector", (1,)), seed=config.seed),
            config.steps,
            {"unroll": 28},
        )
        if not config.coordinatewise_steps:
            return {"universal": (universal, "many")}
        coordinatewise = self._trained(
            "coordinatewise",
            lambda: make_learned(
                "coordinatewise", Layout("vector", (1,)), seed=config.seed, initializer_width=0, safeguard=BY_PROGRESS
            ),
            config.coordinatewise_steps,
            {"unroll": 16},
        )
        return {"universal": (universal, "many"), "coordinatewise": (coordinatewise, "many")}

    def _trained(self, name: str, make: Callable[[], Any], steps: int, options: dict[str, Any]) -> Any:
        """A solver trained on weights along training of `trained` and on random cells."""
        path = self.work / f"{name}.safetensors"
        if path.exists():
            return load_solver(path)
        sources: list[tuple[float, Source]] = [(SHARE, RandomCells())]
        validation: list[Any] = []
        for family in self.config.trained:
            criterion = get_family(family).criterion()
            sets = [family_tasks(model, criterion, packed=True) for model in self._episodes(family).values()]
            sources += [(1 / len(sets), tasks) for tasks in sets]
            validation.append(sets[-1])
        validation += [_RandomSet(kind, 100 + k) for k, kind in enumerate(2 * KINDS + 4 * ("shifted",))]
        return self._across(name, make(), sources, validation, steps, {"learning_rate": 3e-3, **options})

    def _native(
        self,
        kind: str,
        of: str,
        sources: list[tuple[float, Source]],
        validation: list[TaskSet],
        steps: int,
        options: dict[str, Any],
    ) -> Any:
        """A solver of this kind for the layout of the sources, which sees x itself."""
        name = f"{kind}-{of}"
        path = self.work / f"{name}.safetensors"
        if path.exists():
            return load_solver(path)
        layout, channels = tasks_layout(validation[0])
        seeing = {"initializer_width": 32, "learned_steps": options["unroll"], "coefficients": "lstm"}
        more = seeing if kind == "meta-broyden" else {}
        solver = make_learned(
            kind,
            layout,
            seed=self.config.seed,
            conditioning="input" if channels else "initial_value",
            context_channels=channels,
            safeguard=BY_PROGRESS,
            **more,
        )
        return self._across(name, solver, sources, validation, steps, options)

    def _across(
        self, name: str, solver: Any, sources: Any, validation: Any, steps: int, options: dict[str, Any]
    ) -> Any:
        config = self.config
        meta = MetaConfig(
            steps=steps,
            batch=config.batch,
            backend="native",
            seed=config.seed,
            validate_every=max(1, min(120, steps // 4)),
            validation_size=64,
            validation_rtol=1e-2,
            validation_nfe=config.budget,
            **options,
        )
        trainer = MultiTaskTrainer(
            solver, sources, validation, meta, checkpoint=self.work / f"training-{name}.safetensors"
        )
        with progress_bar(name, steps, show=config.progress) as bar:
            trainer.run(bar)
        save_solver(solver, self.work / f"{name}.safetensors")
        return solver

    def _episodes(self, family: str) -> dict[int, Any]:
        models = load_episodes(self._model_path(family).parent / "episodes.safetensors", warn=False)
        return {epoch: model.requires_grad_(False) for epoch, model in models.items()}

    def _model_path(self, family: str) -> Path:
        return trained_model(self.config.models, family)


class _RandomSet(TaskSet):
    """64 contexts of one random cell, for validation."""

    def __init__(self, kind: str, seed: int) -> None:
        f, z0, x = random_problem(torch.Generator().manual_seed(seed), 64, kind)
        super().__init__(f, x[:1], x[1:], z0=lambda x: z0[: len(x)])


def _as_held(problem: Any) -> HeldOut:
    return HeldOut(problem.f, problem.z0, problem.context, lambda z, index: torch.zeros(len(index)))
