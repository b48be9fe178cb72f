"""Train solvers across DEQs and test them on weights, widths and families that they never saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench import measure, problems, report, solvers
from experiments.bench.measure import Rules, stamp_of
from experiments.bench.options import Compared, OnModels, Seeded
from experiments.bench.problems import HeldOut, of_known
from experiments.bench.runner import Row, Run, sha256, show
from experiments.bench.solvers import Contestant
from metabroyden import Broyden, load_solver, save_solver
from metabroyden.comparison.figures import heat_map, save
from metabroyden.comparison.statistics import Field, against
from metabroyden.comparison.tables import Table
from metabroyden.learned.layout import Layout
from metabroyden.learned.safeguard import BY_PROGRESS
from metabroyden.meta import MetaConfig, TaskSet, make_learned, plan
from metabroyden.meta.plan import measure_classical
from metabroyden.meta.tasks import Source
from metabroyden.meta.trainer import MultiTaskTrainer
from metabroyden.progress import progress_bar
from metabroyden.storage import atomic_write
from metabroyden.zoo.models import load_model
from metabroyden.zoo.models.episodes import load_episodes
from metabroyden.zoo.models.families import FAMILIES, get_family, trained_model
from metabroyden.zoo.random_cells import KINDS, RandomCells, random_problem
from metabroyden.zoo.tasks import family_tasks
from metabroyden.zoo.testbed import cells

TRAINED = ("dense-digits", "dense-fashion", "mlp-digits", "mlp-fashion", "conv-digits")
"""Families whose weights along training the universal solver learns from, beside random cells."""
SHARE = 8.0
"""How many times as often as those of one family random cells are drawn."""
LATE = 3
"""Checkpoints before the last that MetaBroyden learns from; GroupedLSTM learns from all, the later the more often."""
OWN: dict[str, dict[str, Any]] = {
    "grouped": {"unroll": 14, "learning_rate": 4e-3, "safeguard": BY_PROGRESS},
    "meta-broyden": {"unroll": 8, "segments": 1, "coefficients": "lstm", "learned_steps": 8, "damping": 1.0},
}
"""What takes the place of the plan's choices for solvers of one DEQ."""
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
    unseen: tuple[str, ...] = tuple(name for name in FAMILIES if name not in TRAINED)
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
    files = model_files(config)
    job = Run(config, free=FREE, inputs=[BY_PROGRESS, *files])
    rows = job.unit("families", lambda: families(job))
    rows += job.unit("widths", lambda: widths(job)) if config.widths else []
    for name in config.weights:
        rows += job.unit(f"weights-{name}", lambda: weights(job, name))  # noqa: B023 (called at once)
    rows += job.unit("seeds", lambda: seeds(job)) if config.seeds else []
    folder = job.publish(rows, models_sha256={str(path): sha256(path) for path in files})
    for path in job.work.glob("*.safetensors"):
        atomic_write(folder / path.name, path.read_bytes())
    show(write(folder))


def model_files(config: Generalise) -> list[Path]:
    """The models that are trained and tested on, weights along training among them."""
    names = dict.fromkeys((*config.trained, *config.unseen, *config.weights))
    folders = [trained_model(config.models, name).parent for name in names]
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    return [*files, *(sorted(config.digits.glob("seed*/model.safetensors")) if config.seeds else ())]


def families(job: Run) -> list[Row]:
    """Solvers for any state on trained families, beside the classical ones tuned on each."""
    config, anywhere, rows = job.config, free(job), []
    for name in (*config.trained, *config.unseen):
        family = problems.Family(name, config.models)
        part = "families seen" if name in config.trained else "families unseen"
        tuned = solvers.tuned(family.problems("validation", 64), config.budget)
        every = {**anywhere, **{key: (one, NOTHING) for key, one in tuned.items()}}
        rows += measured(config, part, family.problems("test", config.samples), every)
    return rows


def widths(job: Run) -> list[Row]:
    """The same on random cells of many widths."""
    count, made = job.config.samples, {}
    for n in (16, 64, 256, 1024):
        for norm in (0.9, 1.5):
            made[f"dense, {n} wide, norm {norm:g}"] = cells.blas(count, n, norm, seed=5, x_seed=7)
    for channels in (4, 16, 48):
        made[f"convolution, {channels} channels, norm 1.5"] = cells.conv(count, channels, 8, 1.5, seed=5, x_seed=7)
    anywhere = free(job)
    return [row for name, one in made.items() for row in measured(job.config, "widths", of_known(one, name), anywhere)]


def weights(job: Run, family: str) -> list[Row]:
    """Solvers trained on the weights of a family along its training, tested on the last ones, which they never saw."""
    config, criterion, models = job.config, get_family(family).criterion(), episodes(job.config, family)
    *known, last = models
    sets = {epoch: family_tasks(models[epoch], criterion) for epoch in known}
    # those of late weights more often: they lie nearer to what is to come
    sources: list[tuple[float, Source]] = [(k + 1.0, tasks) for k, tasks in enumerate(sets.values())]
    newest, steps, on = sets[known[-1]], config.weights_steps, f"{family}, to epoch {known[-1]}"
    every = {
        "grouped": (own(job, "grouped", family, sources, newest, steps), on),
        "meta-broyden": (own(job, "meta-broyden", family, sources[-LATE:], newest, 2 * steps), on),
    }
    rows = []
    for epoch in (*known[-2:], last):
        held = problems.held_out(models[epoch], criterion, "test", config.samples)
        part = "weights unseen" if epoch == last else "weights seen"
        rows += measured(config, part, replace(held, name=f"{family}, epoch {epoch}"), every)
    return rows


def seeds(job: Run) -> list[Row]:
    """A solver trained on two seeds of one DEQ, tested on the third."""
    config, criterion = job.config, get_family("conv-digits").criterion()
    files = [config.digits / f"seed{seed}" / "model.safetensors" for seed in range(3)]
    models = [load_model(path, warn=False).requires_grad_(False) for path in files]
    one, other = (family_tasks(model, criterion) for model in models[:2])
    grouped = own(job, "grouped", "seeds", [(1.0, one), (1.0, other)], other, config.weights_steps)
    every = {"grouped": (grouped, "digits, seeds 0 and 1"), **free(job)}
    rows = []
    for seed, model in enumerate(models):
        held = problems.held_out(model, criterion, "test", config.samples)
        part = "seeds unseen" if seed == 2 else "seeds seen"
        rows += measured(config, part, replace(held, name=f"digits, seed {seed}"), every)
    return rows


def measured(config: Generalise, part: str, held: HeldOut, every: dict[str, tuple[Any, str]]) -> list[Row]:
    """Rows of Broyden's method and of these solvers, each with the name of what it was trained on."""
    every = {BROYDEN: (Broyden(config.budget), NOTHING), **every}
    everyone = solvers.contestants(**{name: one for name, (one, _) in every.items()})
    usual, rules = stamp_of(held, part=part), Rules((TOLERANCE,), config.budget)

    def stamp(one: Contestant) -> Row:
        return {**usual(one), "trained": every[one.name][1]}

    rows = measure.measure(held, everyone, rules, stamp, progress=config.progress)
    return [row for row in rows if row["row"] == "solve"]


def free(job: Run) -> dict[str, tuple[Any, str]]:
    """Solvers that run on any state, trained on random cells and on the weights of `trained` along their training."""
    config = job.config

    def tasks() -> tuple[list[tuple[float, Source]], list[TaskSet]]:
        sources: list[tuple[float, Source]] = [(SHARE, RandomCells())]
        validation: list[TaskSet] = []
        for family in config.trained:
            criterion = get_family(family).criterion()
            sets = [family_tasks(model, criterion) for model in episodes(config, family).values()]
            sources += [(1 / len(sets), one) for one in sets]
            validation.append(sets[-1])
        return sources, [
            *validation,
            *(random_tasks(kind, 100 + k) for k, kind in enumerate(2 * KINDS + 4 * ("shifted",))),
        ]

    found = {}
    for name, steps, unroll, options in (
        ("universal", config.steps, 28, {}),
        ("coordinatewise", config.coordinatewise_steps, 16, {"initializer_width": 0, "safeguard": BY_PROGRESS}),
    ):
        if steps:
            solver = partial(make_learned, name, Layout("vector", (1,)), seed=config.seed, **options)
            found[name] = trained(job, name, solver, tasks, steps=steps, unroll=unroll, learning_rate=3e-3), "many"
    return found


def own(job: Run, kind: str, of: str, sources: list[tuple[float, Source]], tasks: TaskSet, steps: int) -> Any:
    """A solver of this kind for the layout of one DEQ, which sees x itself; validated on `tasks`."""
    classical = measure_classical(tasks, rtol=TOLERANCE, max_nfe=job.config.budget)
    made = plan(tasks, classical, solver=kind, training={"seed": job.config.seed}, overrides=OWN[kind])
    told = {name: getattr(made.training, name) for name in ("unroll", "learning_rate", "orthogonal_rate")}
    build = partial(made.build, classical.problems[1])
    return trained(job, f"{kind}-{of}", build, lambda: (sources, [tasks]), steps=steps, **told)


def trained(job: Run, name: str, build: Callable[[], Any], tasks: Callable[[], tuple[Any, Any]], **told: Any) -> Any:
    """The solver that `build` makes, trained across sources; that of an earlier sitting where it was finished there."""
    path, config = job.work / f"{name}.safetensors", job.config
    if path.exists():
        return load_solver(path)
    (sources, validation), solver = tasks(), build()
    meta = MetaConfig(
        batch=config.batch, backend="native", seed=config.seed, validate_every=max(1, min(120, told["steps"] // 4)),
        validation_size=64, validation_rtol=TOLERANCE, validation_nfe=config.budget, **told,
    )  # fmt: skip
    checkpoint = job.work / "training" / path.name
    trainer = MultiTaskTrainer(solver, sources, validation, meta, checkpoint=checkpoint)
    with progress_bar(name, meta.steps, show=config.progress) as bar:
        trainer.run(bar)
    save_solver(solver, path)
    return solver


def episodes(config: Generalise, family: str) -> dict[int, Any]:
    """A family's models along their training, by epoch."""
    path = trained_model(config.models, family).with_name("episodes.safetensors")
    return {epoch: model.requires_grad_(False) for epoch, model in load_episodes(path, warn=False).items()}


def random_tasks(kind: str, seed: int) -> TaskSet:
    """64 contexts of one random cell, for validation."""
    f, z0, x = random_problem(torch.Generator().manual_seed(seed), 64, kind)
    return TaskSet(f, x[:1], x[1:], z0=lambda x: z0[: len(x)])


PARTS = {
    "families unseen": "Families never seen",
    "families seen": "Families whose weights along training were trained on (test contexts)",
    "widths": "Random cells of many widths, never seen",
    "weights unseen": "Later weights of a known DEQ, no adaptation",
    "weights seen": "Weights that were trained on (test contexts)",
    "seeds unseen": "Another seed of a known DEQ, no adaptation",
    "seeds seen": "Seeds that were trained on (test contexts)",
}


@report.of_rows("Generalisation")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and transfer.png beside the rows of a folder, from these alone."""
    there = {row["part"] for row in rows}
    fields = {part: Field(rows, part) for part in PARTS if part in there}
    return [
        "Median evaluations to 1e-2 on held-out test contexts (share of them solved within "
        f"{described['config']['budget']}), ratio to Broyden's with full memory. A failure counts as the budget; where "
        "Broyden does not get half of the samples there, no ratio. Tuned: damping, memory and ridge by grid on "
        "validation contexts of the very family.",
        save(_grid(list(fields.values())), folder / "transfer.png"),
        *(over_broyden(PARTS[part], field) for part, field in fields.items()),
    ]


def over_broyden(words: str, field: Field) -> Table:
    """Evaluations of all solvers to `TOLERANCE`, and over those of Broyden's method."""
    names = [name for name in field.solvers() if name != BROYDEN]
    return against(field, words, names, BROYDEN, TOLERANCE, "against")


def _grid(fields: list[Field]) -> Any:
    """Trained on (rows) against tested on (columns): ratio to Broyden's evaluations, of all learned solvers."""
    found = {}
    for field in fields:
        for row in (row for row in field.rows if row["trained"] != NOTHING):
            name, problem = row["solver"], row["family"]
            found[f"{name}: {row['trained']}", problem] = field.over(problem, name, BROYDEN, TOLERANCE).value
    names, tested = (list(dict.fromkeys(key[side] for key in found)) for side in (0, 1))
    values = np.array([[found.get((name, problem), np.nan) for problem in tested] for name in names])
    return heat_map(values, names, tested, "evaluations to 1e-2 over Broyden's (blue: fewer)")
