"""Train solvers across DEQs and test them on weights, widths and families that they never saw."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench import measure, problems, report, solvers
from experiments.bench.figures import heat_map, save
from experiments.bench.measure import Rules, stamp_of
from experiments.bench.options import Compared, OnModels, Seeded
from experiments.bench.problems import HeldOut, of_known
from experiments.bench.runner import Row, Run, read_rows, sha256, show, ticks
from experiments.bench.statistics import Field, geometric
from experiments.bench.tables import Table, by_name, number
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
FREE = ("models", "digits")
TOLERANCE, BROYDEN = 1e-2, "Broyden"


@dataclass(frozen=True)
class Generalise(Seeded, Compared, OnModels, command="generalise", samples=128):
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
    batch: int = 24
    """Problems of an outer step."""
    digits: Path = Path("results/digits")
    """Where the seeds of the digits DEQ are."""


def run(config: Generalise) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it writes the report again."""
    job = _Job(config)
    folder = job.run.publish(job.rows(), **job.described())
    for path in job.work.glob("*.safetensors"):
        if not path.name.startswith("training-"):
            atomic_write(folder / path.name, path.read_bytes())
    show(write(folder))


class _Job:
    """All parts, each with rows of its own in the folder of unfinished work."""

    def __init__(self, config: Generalise) -> None:
        self.config = config
        self.run = Run(config, free=FREE, inputs=[BY_PROGRESS, *self._inputs()])
        self.work = self.run.work

    def _inputs(self) -> Iterable[Path]:
        """The models that are trained and tested on, weights along training among them."""
        names = dict.fromkeys((*self.config.trained, *self.config.unseen, *self.config.weights))
        files = [path for name in names for path in sorted((self.config.models / name).rglob("*.safetensors"))]
        return [*files, *(sorted(self.config.digits.glob("seed*/model.safetensors")) if self.config.seeds else ())]

    def rows(self) -> list[Row]:
        """The rows of all parts, those that are there already read and the others made."""
        parts: dict[str, Callable[[], list[Row]]] = {"families": self._families}
        parts |= {"widths": self._widths} if self.config.widths else {}
        parts |= {f"weights-{family}": functools.partial(self._weights, family) for family in self.config.weights}
        parts |= {"seeds": self._seeds} if self.config.seeds else {}
        return [row for name, make in parts.items() for row in self.run.unit(name, make)]

    def described(self) -> Row:
        """What stands beside the rows."""
        files = [self._model_path(name) for name in (*self.config.trained, *self.config.unseen, *self.config.weights)]
        trained = [path for path in sorted(self.work.glob("*.safetensors")) if not path.name.startswith("training-")]
        return {
            "models_sha256": {path.parent.name: sha256(path) for path in files},
            "solvers": {path.stem: load_solver(path).summary for path in trained},
        }

    def _families(self) -> list[Row]:
        config, free = self.config, self._free_solvers()
        rows: list[Row] = []
        names = [*config.trained, *config.unseen]
        with ticks("families", len(names), show=config.progress) as done:
            for name in names:
                family = problems.Family(name, config.models)
                part = "families seen" if name in config.trained else "families unseen"
                tuned = solvers.tuned(family.problems("validation", 64), config.budget)
                known = {key: (solver, NOTHING) for key, solver in tuned.items()}
                rows += self._row(part, name, family.problems("test", config.samples), {**free, **known})
                done(name)
        return rows

    def _widths(self) -> list[dict[str, Any]]:
        solvers, rows = self._free_solvers(), []
        for n in (16, 64, 256, 1024):
            for norm in (0.9, 1.5):
                held = of_known(cells.blas(self.config.samples, n, norm, seed=5, x_seed=7))
                rows += self._row("widths", f"dense, {n} wide, norm {norm:g}", held, solvers)
        for channels in (4, 16, 48):
            held = of_known(cells.conv(self.config.samples, channels, 8, 1.5, seed=5, x_seed=7))
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
            held = problems.held_out(models[epoch], criterion, "test", config.samples)
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
            held = problems.held_out(model, criterion, "test", config.samples)
            part = "seeds unseen" if seed == 2 else "seeds seen"
            contestants = {"grouped": (solver, "digits, seeds 0 and 1"), **self._free_solvers()}
            rows += self._row(part, f"digits, seed {seed}", held, contestants)
        return rows

    def _row(self, part: str, tested: str, held: HeldOut, every: dict[str, tuple[Any, str]]) -> list[Row]:
        held, rows = replace(held, name=tested), []
        for name, (solver, trained) in {BROYDEN: (Broyden(self.config.budget), NOTHING), **every}.items():
            stamp = stamp_of(held, part=part, trained=trained)
            rules = Rules((TOLERANCE,), self.config.budget)
            rows += measure.measure(held, [solvers.contestant(name, solver)], rules, stamp)[:-1]  # curves are not kept
        return rows

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


_PARTS = {
    "families unseen": "Families never seen",
    "families seen": "Families whose weights along training were trained on (test contexts)",
    "widths": "Random cells of many widths, never seen",
    "weights unseen": "Later weights of a known DEQ, no adaptation",
    "weights seen": "Weights that were trained on (test contexts)",
    "seeds unseen": "Another seed of a known DEQ, no adaptation",
    "seeds seen": "Seeds that were trained on (test contexts)",
}


def write(folder: Path) -> Path:
    """report.md and transfer.png beside the rows of a folder, from these alone."""
    rows, described = read_rows(folder / "rows.jsonl"), report.read_config(folder)
    there = {row["part"] for row in rows}
    fields = {part: Field(rows, part) for part in _PARTS if part in there}
    words = (
        "Median evaluations to 1e-2 on held-out test contexts (share of them solved within "
        f"{described['config']['budget']}), ratio to Broyden's with full memory. A failure counts as the budget; where "
        "Broyden does not get half of the samples there, no ratio. Tuned: damping, memory and ridge by grid on "
        "validation contexts of the very family."
    )
    figure = save(_grid(fields), folder / "transfer.png")
    tables = [ratio_table(_PARTS[part], field) for part, field in fields.items()]
    return report.write(folder, "Generalisation", [report.made_by(described), words, figure, *tables])


def over_broyden(field: Field, problem: str, solver: str) -> float:
    """Ratio of medians; NaN where there is none, or where Broyden does not get half of the samples there."""
    ours, theirs = (field.outcome(problem, name, TOLERANCE) for name in (solver, BROYDEN))
    return float("nan") if ours is None or theirs is None or theirs.success < 0.5 else ours.median / theirs.median


def ratio_table(title: str, field: Field) -> Table:
    """Medians (success) and ratios to Broyden by problem; geometric means last."""

    def cell(solver: str, problem: str) -> str:
        found = field.outcome(problem, solver, TOLERANCE)
        ratio = "" if solver == BROYDEN else number(over_broyden(field, problem, solver))
        return "" if found is None else f"{found}{f' {ratio}×' if ratio else ''}"

    names = field.solvers()
    columns = [(name, functools.partial(cell, name)) for name in names]
    means = [geometric(over_broyden(field, problem, name) for problem in field.families) for name in names]
    table = by_name(title, field.families, [("", str), *columns])
    return table._replace(
        body=[*table.body, ["geometric mean", *(f"{m:.2f}×" if np.isfinite(m) else "" for m in means)]]
    )


def _grid(fields: dict[str, Field]) -> Any:
    """Trained on (rows) against tested on (columns): ratio to Broyden's evaluations, of all learned solvers."""
    learned = [(field, row) for field in fields.values() for row in field.rows if row["trained"] != NOTHING]
    found = {
        (f"{row['solver']}: {row['trained']}", row["family"]): over_broyden(field, row["family"], row["solver"])
        for field, row in learned
    }
    names, tested = (list(dict.fromkeys(key[side] for key in found)) for side in (0, 1))
    values = np.array([[found.get((name, problem), np.nan) for problem in tested] for name in names])
    return heat_map(values, names, tested, "evaluations to 1e-2 over Broyden's (blue: fewer)")
