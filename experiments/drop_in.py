"""Drop-in: an unmodified torchdeq model, trained by torchdeq, made faster by a root finder fitted to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import metabroyden as mb
from experiments.bench import report
from experiments.bench.options import Budgeted, Seeded, Timed
from experiments.bench.peers import available, recorded
from experiments.bench.problems import HeldOut, double_equilibria
from experiments.bench.runner import Row, Run
from experiments.configs.torchdeq import TRAINED, Classifier
from metabroyden import checkpoint
from metabroyden.comparison import figures
from metabroyden.comparison.clock import laps
from metabroyden.comparison.statistics import Outcome
from metabroyden.comparison.tables import Table, chosen, grouped, listed, mean, pivot, scaled, short
from metabroyden.integrations.torchdeq import FixedPointMap, register
from metabroyden.progress import progress_bar, ticks
from metabroyden.solvers.tuning import tune
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.models import Images, Training, train
from metabroyden.zoo.models.fit import by_epoch

TOLERANCES = (1e-2, 1e-3)
LEARNED, REFERENCE = "learned", "torchdeq Broyden"
OWN = {REFERENCE: "broyden", "torchdeq Anderson": "anderson", "torchdeq fixed point": "fixed_point_iter"}
"""torchdeq's solvers, with its default options."""


@dataclass(frozen=True)
class DropIn(Seeded, Budgeted, Timed, command="drop-in", results=Path("results/torchdeq")):
    """Train a torchdeq classifier on digits, fit a root finder to it, put that in, and compare with torchdeq's own."""

    seeds: int = 1
    """Models trained, fitted to and compared."""
    channels: int = 32
    """Channels of the DEQ's state; twice as many inside its cell."""
    epochs: int = 16
    """Epochs of the model's training."""
    steps: int = 400
    """Outer steps of fit_solver (its default)."""
    test_samples: int = 300
    """Held-out images used (of 300)."""
    tune_samples: int = 100
    """Validation images on which Picard and Anderson are tuned."""


def run(config: DropIn) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it only shows its results again."""
    if not available("torchdeq"):
        raise SystemExit("python -m experiments drop-in needs torchdeq: pip install torchdeq==0.1.0")
    rows, notes = list[Row](), dict[str, Row]()
    for seed in range(config.seed, config.seed + config.seeds):
        job = Run(replace(config, seed=seed, seeds=1), free=("seed", "seeds"), shared=())
        notes[str(seed)], *found = job.unit("evaluation", lambda: evaluated(config, seed, job.work))  # noqa: B023
        rows += [{"seed": seed, **row} for row in found]
    job = Run(config, free=("seed", "seeds"), shared=(), always=f"--seed {config.seed} --seeds {config.seeds}")
    job.finish(rows, write, seeds=notes)


def trained(config: DropIn, seed: int, path: Path) -> Classifier:
    """a. The model, read where it was trained before."""
    build, training = partial(Classifier, config.channels, **TRAINED), Training(epochs=config.epochs, seed=seed)
    if not path.exists():
        with progress_bar("training with torchdeq", config.epochs, show=config.progress) as bar:
            kept, shown = path.with_suffix(".training.safetensors"), by_epoch(bar, "accuracy")
            model = train(build, Images(load_digits()), training, path=kept, report=shown)
        checkpoint.write(path, "model/torchdeq-classifier", model.state_dict(), {"training": asdict(training)})
    model = build().eval()
    checkpoint.load_weights(model, checkpoint.read(path, "model")[0], path)
    return model


def fitted(config: DropIn, seed: int, model: Classifier, path: Path) -> Any:
    """b. One call: a root finder for the model as it is, from its training images alone."""
    if not path.exists():
        options: dict[str, Any] = {"steps": config.steps, "seed": seed, "progress": config.progress}
        options["checkpoint"] = path.with_suffix(".training.safetensors")
        # measured below, whatever it is worth
        solver = mb.fit_solver(model, load_digits().train.images, layout="image", fallback=False, **options)
        mb.save_solver(solver, path)
    return mb.load_solver(path)


def evaluated(config: DropIn, seed: int, work: Path) -> Iterator[Row]:
    """c. The same model with one solver after the other in its DEQ, on test images: notes, then rows."""
    model = trained(config, seed, work / "model.safetensors")
    learned = fitted(config, seed, model, work / "learned.safetensors")
    f, images = FixedPointMap(model), load_digits().test.images[: config.test_samples]
    ours = {LEARNED: learned, "our Broyden": mb.Broyden(memory=config.budget), **tuned(config, f)}
    for name, solver in ours.items():
        register(name, solver)
    held = HeldOut(f, f.initial_state(images), images, lambda z, index: torch.zeros(len(index)))
    star, known = double_equilibria(f, held, rtol=1e-7, max_nfe=300)
    sizes = [sum(p.numel() for p in one.parameters()) for one in (model, learned)]
    yield {
        "solvers": {name: repr(solver) for name, solver in ours.items() if name != LEARNED},
        "held_out": learned.summary["held_out"], "fit_seconds": learned.summary["seconds"],
        "parameters": dict(zip(("model", "learned solver"), sizes, strict=True)),
        "equilibria_known": float(known.float().mean()),
    }  # fmt: skip
    with ticks("comparing", len(TOLERANCES), show=config.progress) as done:
        for rtol in TOLERANCES:
            options: dict[str, Any] = {"f_tol": rtol, "f_stop_mode": "rel", "f_max_iter": config.budget}
            models = {}
            for name in (LEARNED, *OWN, *ours):  # another name in get_deq: all that a user changes
                models[name] = Classifier(config.channels, f_solver=OWN.get(name, name), **options).eval()
                models[name].load_state_dict(model.state_dict())
            yield from compared(config, models, images, rtol, star, known)
            done(f"to {rtol:g}")


def tuned(config: DropIn, f: FixedPointMap) -> dict[str, Any]:
    """Picard and Anderson, tuned on validation images."""
    x = load_digits().validation.images[: config.tune_samples]
    grid = [mb.Anderson(*parts) for parts in product((5, 8), (1.0, 1.5, 2.0), (1e-8, 1e-2, 1e-1))]
    options: dict[str, Any] = {"tolerances": TOLERANCES, "max_nfe": config.budget}
    anderson = tune(grid, f, f.initial_state(x), x, **options)[0][0]
    return {"our tuned Anderson": anderson, "our tuned Picard": mb.Picard.tuned(f, f.initial_state(x), x, **options)}


@torch.no_grad()
def compared(
    config: DropIn, models: dict[str, Classifier], images: Tensor, rtol: float, star: Tensor, known: Tensor
) -> Iterator[Row]:
    """Rows of the models to one tolerance; star, known: float64 equilibria (B, n), and (B,) where they were found.

    By a record of what the cell does, apart from any solver's own count: `calls` of f and their `rows`; by sample the calls
    made when its residual first met the tolerance, else the budget. Times are those of the whole model, in turns; nobody
    records while they run.
    """
    counts, labels = dict[str, Row](), load_digits().test.labels[: len(images)]
    wanted = models[LEARNED].head(star.to(images.dtype)).argmax(dim=1)
    for name, model in models.items():
        with recorded(model.cell) as record:
            z = model.equilibrium(images)
        evaluations, reached = record.trace().evaluations_to(rtol, config.budget)
        predicted = model.classify(z).argmax(dim=1)
        distance = (z.flatten(1).double() - star).norm(dim=1) / star.norm(dim=1)
        there = {"agreement": (predicted == wanted)[known].float().mean(), "distance": distance[known].median()}
        counts[name] = {
            "calls": record.count, "rows": record.rows, "evaluations": evaluations.tolist(),
            "status": "".join("C" if hit else "B" for hit in reached),
            "accuracy": short(float((predicted == labels).float().mean())),
            **{key: short(float(value)) if known.any() else None for key, value in there.items()},
        }  # fmt: skip
    jobs = {name: partial(model, images) for name, model in models.items()}
    seconds = laps({**jobs, "f": partial(models[REFERENCE].cell, z, models[REFERENCE].stem(images))}, config.repeats)
    f_time = float(np.median(seconds["f"]))
    for name, row in counts.items():
        total, ratio = float(np.median(seconds[name])), float(np.median(seconds[name] / seconds[REFERENCE]))
        taken = {"seconds": total, "ratio": ratio, "f_seconds": f_time, "outside_f": 1 - row["calls"] * f_time / total}
        yield {"row": "drop-in", "solver": name, "rtol": rtol, "batch": len(images), **row, **short(taken)}


@report.of_rows("An unmodified torchdeq model, made faster", "torchdeq")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and drop_in.png, from rows alone; over several seeds means, evaluations over all samples."""
    return [against(rows), _bars(rows, folder / "drop_in.png"), *map(_table, grouped(rows, "rtol"))]


def against(rows: Sequence[Row]) -> Table:
    """The learned solver beside each of torchdeq's own: calls of f and time over theirs, evaluations, accuracy."""

    def cell(theirs: Sequence[Row]) -> str:
        mine = chosen(rows, "drop-in", solver=LEARNED, rtol=theirs[0]["rtol"])
        calls = mean(mine, "calls") / mean(theirs, "calls")
        seconds = np.mean([a["seconds"] / b["seconds"] for a, b in zip(mine, theirs, strict=True)])
        medians = " / ".join(f"{Outcome.of(side).median:g}" for side in (mine, theirs))
        points = 100 * (mean(mine, "accuracy") - mean(theirs, "accuracy"))
        return f"{calls:.2f}×, {seconds:.2f}×, {medians}, {points:+.2f} points"

    words = "The learned solver beside torchdeq's: calls of f, time, median evaluations (ours / theirs), accuracy"
    return pivot(words, [row for row in rows if row["solver"] in OWN], "{solver}", "to {rtol:g}", cell)


def _table(rows: Sequence[Row]) -> Table:
    """All solvers to a tolerance."""

    def average(key: str, words: str) -> Callable[[Sequence[Row]], str]:
        return lambda of: "–" if of[0][key] is None else words.format(mean(of, key))

    return listed(f"To {rows[0]['rtol']:g}", grouped(scaled(rows, 1e3, "seconds"), "solver"), [
        ("solver", lambda of: f"**{LEARNED}**" if of[0]["solver"] == LEARNED else of[0]["solver"]),
        ("accuracy", average("accuracy", "{:.2%}")),
        ("calls of f", average("calls", "{:g}")),
        ("rows of f", average("rows", "{:,.0f}")),
        ("evaluations", lambda of: "{0.median:g} / {0.p90:g} / {0.success:.1%}".format(Outcome.of(of))),
        ("time", average("seconds", "{:.0f} ms")),
        ("to torchdeq Broyden", average("ratio", "{:.2f}×")),
        ("outside f", average("outside_f", "{:.0%}")),
        ("distance", average("distance", "{:.1e}")),
        ("agreement", average("agreement", "{:.1%}")),
    ])  # fmt: skip


def _bars(rows: Sequence[Row], path: Path) -> Path:
    """Calls of f and wall-clock by solver, a bar for each tolerance."""
    words = {"calls": "calls of f, until the worst image is done", "seconds": "seconds for the model on the batch"}
    groups = {(of[0]["solver"], f"to {of[0]['rtol']:g}"): of for of in grouped(rows, "solver", "rtol")}
    solvers, tolerances = (list(dict.fromkeys(group[side] for group in groups)) for side in (0, 1))

    def draw(place: Any, key: str) -> None:
        figures.bars(place, solvers, tolerances, lambda *group: mean(groups[group], key))
        place.set_title(words[key], fontsize=9)

    return figures.save(figures.panels(list(words), draw, columns=2, size=(5, 4.2)), path)
