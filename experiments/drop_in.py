"""Drop-in: an unmodified torchdeq model, trained by torchdeq, made faster by a root finder fitted to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import metabroyden as mb
from experiments.bench import figures, report
from experiments.bench.options import Budgeted, Seeded, Timed
from experiments.bench.peers import available
from experiments.bench.problems import HeldOut, double_equilibria
from experiments.bench.runner import Row, Run, provenance, read_rows, ticks
from experiments.bench.statistics import Outcome
from experiments.bench.tables import Table, pivot, short
from metabroyden import checkpoint
from metabroyden.integrations.torchdeq import FixedPointMap, register
from metabroyden.meta.progress import progress_bar
from metabroyden.solution import relative_residual
from metabroyden.solvers.tuning import tune
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.models import Images, Training, accuracy, train
from metabroyden.zoo.models.conv import ConvCell
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


class CallRecord:
    """While it lasts, every call of a cell f(z, …) is counted, with the residuals it measured."""

    def __init__(self, cell: nn.Module) -> None:
        self.calls = self.rows = 0
        self.residuals: list[Tensor] = []
        self.arguments: tuple[Tensor, ...] = ()
        self._cell = cell

    def __enter__(self) -> CallRecord:
        self._hook = self._cell.register_forward_hook(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _note(self, _: nn.Module, arguments: tuple[Tensor, ...], value: Tensor) -> None:
        self.calls += 1
        self.rows += len(value)
        self.arguments = arguments
        self.residuals.append(relative_residual(arguments[0], value))

    def evaluations_to(self, rtol: float, budget: int) -> tuple[np.ndarray, np.ndarray]:
        """(evaluations, reached), (B,) each, as `Trace.evaluations_to`."""
        hit = (torch.stack(self.residuals)[:budget] <= rtol).numpy()
        reached = hit.any(axis=0)
        return np.where(reached, hit.argmax(axis=0) + 1, budget), reached


class Classifier(nn.Module):
    """Images (B, 1, 8, 8) → logits, as one writes it with torchdeq: nothing in it knows of metabroyden's solvers."""

    def __init__(self, channels: int, **deq_options: Any) -> None:
        import torchdeq

        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.GroupNorm(4, channels))
        self.cell = ConvCell(channels, 2 * channels)
        self.deq = torchdeq.get_deq(**deq_options)
        self.head = nn.Linear(channels * 8 * 8, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, through a solve."""
        x = self.stem(images)
        states, _ = self.deq(lambda z: self.cell(z, x), torch.zeros_like(x))
        return self.head(states[-1].flatten(1))


def run(config: DropIn) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it only shows its results again."""
    if not available("torchdeq"):
        raise SystemExit("python -m experiments drop-in needs torchdeq: pip install torchdeq==0.1.0")
    rows: list[Row] = []
    notes: dict[str, Row] = {}
    free = ("seed", "seeds")
    for seed in range(config.seed, config.seed + config.seeds):
        job = Run(replace(config, seed=seed, seeds=1), free=free, shared=())
        note, *found = job.unit("evaluation", lambda: _evaluated(config, seed, job.work))  # noqa: B023 (called at once)
        rows += [{"seed": seed, **row} for row in found]
        notes[str(seed)] = note
    job = Run(config, free=free, shared=(), always=f"--seed {config.seed} --seeds {config.seeds}")
    job.finish(rows, write, seeds=notes)


def _trained(config: DropIn, seed: int, work: Path) -> Classifier:
    """a. The model, trained by torchdeq's own solvers and implicit differentiation."""

    def build() -> Classifier:
        # most early solves stop at the budget, which is what training wants: gradients need no more
        return Classifier(
            config.channels,
            ift=True,
            f_solver="anderson",
            f_max_iter=30,
            f_tol=1e-3,
            f_stop_mode="rel",
            b_solver="broyden",
            b_max_iter=15,
            b_tol=1e-2,
            b_stop_mode="rel",
        )

    path = work / "model.safetensors"
    if path.exists():
        model = build().eval()
        checkpoint.load_weights(model, checkpoint.read(path, "model")[0], path)
        return model
    data = load_digits()
    training = Training(epochs=config.epochs, seed=seed)
    with progress_bar("training with torchdeq", config.epochs, show=config.progress) as bar:
        model = train(
            build, Images(data), training, path=work / "model.training.safetensors", report=by_epoch(bar, "accuracy")
        )
    header = {"training": asdict(training), "validation_accuracy": accuracy(model, data.validation)}
    checkpoint.write(path, "model/torchdeq-classifier", model.state_dict(), header)
    return model


def _fitted(config: DropIn, seed: int, model: Classifier, work: Path) -> Any:
    """b. One call: a root finder for the model as it is, from its training images alone."""
    path = work / "learned.safetensors"
    if path.exists():
        return mb.load_solver(path)
    solver = mb.fit_solver(
        model,
        load_digits().train.images,
        layout="image",
        steps=config.steps,
        seed=seed,
        fallback=False,  # measured below, whatever it is worth
        progress=config.progress,
        checkpoint=work / "learned.training.safetensors",
    )
    mb.save_solver(solver, path)
    return solver


def _evaluated(config: DropIn, seed: int, work: Path) -> Iterator[Row]:
    """c. The same model with one solver after the other in its DEQ, on test images: notes, then rows."""
    model = _trained(config, seed, work)
    learned = _fitted(config, seed, model, work)
    data = load_digits()
    images, labels = (part[: config.test_samples] for part in (data.test.images, data.test.labels))
    ours = {LEARNED: learned, "our Broyden": mb.Broyden(memory=config.budget), **_tuned(config, model)}
    for name, solver in ours.items():
        register(name, solver)
    names = {LEARNED: LEARNED, **OWN, **{name: name for name in ours}}
    f = FixedPointMap(model)
    held = HeldOut(f, f.initial_state(images), images, lambda z, index: torch.zeros(len(index)))
    star, known = double_equilibria(f, held, rtol=1e-7, max_nfe=300)
    star = star.view(len(images), config.channels, 8, 8)
    yield {
        "solvers": {name: repr(solver) for name, solver in ours.items() if name != LEARNED},
        "held_out": learned.summary["held_out"],
        "fit_seconds": learned.summary["seconds"],
        "parameters": {"model": _size(model), "learned solver": _size(learned)},
        "equilibria_known": float(known.float().mean()),
        "provenance": provenance(),
    }
    with ticks("comparing", len(TOLERANCES), show=config.progress) as done:
        for rtol in TOLERANCES:
            models = {name: _with_solver(config, model, registered, rtol) for name, registered in names.items()}
            yield from _rows(config, models, images, labels, rtol, star, known)
            done(f"to {rtol:g}")


@torch.no_grad()
def _rows(
    config: DropIn, models: dict[str, Any], images: Tensor, labels: Tensor, rtol: float, star: Tensor, known: Tensor
) -> list[Row]:
    """Rows of the models to one tolerance; star, known: float64 equilibria, and (B,) where they were found.

    Counted by a hook on the cell: `calls` of f and their `rows`; by sample `nfe`, the calls made when its residual first
    met the tolerance, else the budget. Times are those of the whole model, in turns; nobody counts while they run.
    """
    found: list[Row] = []
    records: dict[str, CallRecord] = {}
    wanted = models[LEARNED].head(star.to(images.dtype).flatten(1)).argmax(dim=1)
    for name, model in models.items():
        states: list[Tensor] = []
        hook = model.deq.register_forward_hook(lambda _m, _i, out, states=states: states.append(out[0][-1]))
        with CallRecord(model.cell) as records[name]:
            predicted = model(images).argmax(dim=1)
        hook.remove()
        nfe, reached = records[name].evaluations_to(rtol, config.budget)
        distance = (states[0].double() - star).flatten(1).norm(dim=1) / star.flatten(1).norm(dim=1)
        counts = {
            "calls": records[name].calls,
            "rows": records[name].rows,
            "nfe": nfe.tolist(),
            "reached": reached.tolist(),
        }
        worth = {
            "accuracy": float((predicted == labels).float().mean()),
            "agreement": float((predicted == wanted)[known].float().mean()) if known.any() else None,
            "distance": float(distance[known].median()) if known.any() else None,
        }
        found.append({"row": "drop-in", "solver": name, "rtol": rtol, "batch": len(images), **counts, **short(worth)})
    cell, arguments = models[REFERENCE].cell, records[REFERENCE].arguments
    work = {**{name: (model, (images,)) for name, model in models.items()}, "f": (cell, arguments)}
    seconds = {name: np.empty(config.repeats) for name in work}
    for repeat in range(config.repeats):
        for name, (module, given) in work.items():
            began = time.perf_counter()
            module(*given)
            seconds[name][repeat] = time.perf_counter() - began
    f_time = float(np.median(seconds["f"]))
    for row in found:
        total, ratio = np.median(seconds[row["solver"]]), np.median(seconds[row["solver"]] / seconds[REFERENCE])
        taken = {"seconds": float(total), "ratio": float(ratio), "f_seconds": f_time}
        row |= short({**taken, "outside_f": float(1 - row["calls"] * f_time / total)})
    return found


def _with_solver(config: DropIn, model: Classifier, name: str, rtol: float) -> Classifier:
    """The model with another solver's name in get_deq: all that a user changes."""
    built = Classifier(config.channels, f_solver=name, f_tol=rtol, f_stop_mode="rel", f_max_iter=config.budget)
    built.load_state_dict(model.state_dict())
    return built.eval()


def _tuned(config: DropIn, model: Classifier) -> dict[str, Any]:
    """Picard and Anderson, tuned on validation images."""
    x = load_digits().validation.images[: config.tune_samples]
    f = FixedPointMap(model)
    z0 = f.initial_state(x)
    grid = [
        mb.Anderson(memory, damping, ridge)
        for memory in (5, 8)
        for damping in (1.0, 1.5, 2.0)
        for ridge in (1e-8, 1e-2, 1e-1)
    ]
    options: dict[str, Any] = {"tolerances": TOLERANCES, "max_nfe": config.budget}
    return {
        "our tuned Anderson": tune(grid, f, z0, x, **options)[0][0],
        "our tuned Picard": mb.Picard.tuned(f, z0, x, **options),
    }


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def write(folder: Path) -> Path:
    """report.md and drop_in.png, from rows alone."""
    rows, described = read_rows(folder / "rows.jsonl"), report.read_config(folder)
    seeds, config = described["seeds"], described["config"]
    first = next(iter(seeds.values()))
    known = np.mean([note["equilibria_known"] for note in seeds.values()])
    fits = "; ".join(
        f"seed {seed}: {note['fit_seconds']:.0f} s, on held-out training images {note['held_out']['mean_evaluations']:.1f} "
        f"evaluations to {note['held_out']['rtol']:g} (Broyden {note['held_out']['mean_evaluations_broyden']:.1f})"
        for seed, note in seeds.items()
    )
    tuned = "; ".join(f"{name}: `{solver}`" for name, solver in first["solvers"].items())
    sections: list[report.Section] = [
        report.made_by({**described, "provenance": first["provenance"]}, "torchdeq"),
        f"A torchdeq classifier (convolutional DEQ, {config['channels']} channels on 8×8 digits, "
        f"{first['parameters']['model']:,} parameters) is trained with torchdeq's Anderson and implicit differentiation. "
        '`fit_solver(model, train_images, layout="image", fallback=False)` fits a root finder of '
        f"{first['parameters']['learned solver']:,} parameters to it, `register` makes it known to torchdeq. Then the same "
        "weights run with one solver's name or another in "
        f"`get_deq`, on {rows[0]['batch']} test images in one batch, max_iter {config['budget']}, stop_mode rel. "
        "torchdeq's solvers have its default options.",
        f"The fit: {fits}.",
        f"Tuned on {config['tune_samples']} validation images (seed {next(iter(seeds))}): {tuned}.",
        against(rows),
        _bars(rows, folder / "drop_in.png"),
        *(_table(rows, rtol) for rtol in _tolerances(rows)),
        "Calls and rows are counted by a hook on the cell, apart from any solver's own count. torchdeq hands f over as a "
        "closure, so every call is on the whole batch, frozen samples or not, and goes on until the worst sample is done. "
        "Evaluations are a sample's own: the calls made when its residual first met the tolerance, median / 90th "
        f"percentile / share that got there within {config['budget']} (else the budget counts). Time is the whole model's, "
        f"medians over {config['repeats']} interleaved repeats; ratios are medians of paired ratios. Outside f: all but "
        "calls times the time of one. Over several seeds, means; evaluations over all samples.",
        "Distance: median, relative, to a float64 equilibrium (found for "
        f"{100 * known:.1f}% of images); agreement: with the class predicted from it. Ours leave a sample alone once it has "
        "met the tolerance, torchdeq's improve it until the worst one has: hence their smaller distances. To end as near "
        "with ours, ask for a tighter tolerance.",
    ]
    return report.write(folder, "An unmodified torchdeq model, made faster", sections)


def against(rows: Sequence[Row]) -> Table:
    """The learned solver beside each of torchdeq's own: calls of f and time over theirs, evaluations, accuracy."""
    rivals = [row for row in rows if row["solver"] in OWN]

    def cell(theirs: Sequence[Row]) -> str:
        mine = [row for row in rows if row["solver"] == LEARNED and row["rtol"] == theirs[0]["rtol"]]
        calls = _mean(mine, "calls") / _mean(theirs, "calls")
        seconds = np.mean([a["seconds"] / b["seconds"] for a, b in zip(mine, theirs, strict=True)])
        medians = [np.median(np.concatenate([row["nfe"] for row in side])) for side in (mine, theirs)]
        points = 100 * (_mean(mine, "accuracy") - _mean(theirs, "accuracy"))
        return f"{calls:.2f}×, {seconds:.2f}×, {medians[0]:g} / {medians[1]:g}, {points:+.2f} points"

    words = "The learned solver beside torchdeq's: calls of f, time, median evaluations (ours / theirs), accuracy"
    return pivot(words, rivals, lambda row: row["solver"], lambda row: f"to {row['rtol']:g}", cell)


def _table(rows: Sequence[Row], rtol: float) -> Table:
    """All solvers to a tolerance."""
    cells: dict[str, Callable[[list[Row]], str]] = {
        "accuracy": lambda found: f"{100 * _mean(found, 'accuracy'):.2f}%",
        "calls of f": lambda found: f"{_mean(found, 'calls'):g}",
        "rows of f": lambda found: f"{_mean(found, 'rows'):,.0f}",
        "evaluations": _spent,
        "time": lambda found: f"{1e3 * _mean(found, 'seconds'):.0f} ms",
        "to torchdeq Broyden": lambda found: f"{_mean(found, 'ratio'):.2f}×",
        "outside f": lambda found: f"{100 * _mean(found, 'outside_f'):.0f}%",
        "distance": lambda found: "–" if found[0]["distance"] is None else f"{_mean(found, 'distance'):.1e}",
        "agreement": lambda found: "–" if found[0]["agreement"] is None else f"{100 * _mean(found, 'agreement'):.1f}%",
    }
    body = []
    for name in dict.fromkeys(row["solver"] for row in rows):
        found = [row for row in rows if (row["solver"], row["rtol"]) == (name, rtol)]
        body.append([f"**{name}**" if name == LEARNED else name, *(cell(found) for cell in cells.values())])
    return Table(f"To {rtol:g}", ["solver", *cells], body)


def _spent(found: Sequence[Row]) -> str:
    one = Outcome.of([{key: row[key] for key in ("seed", "nfe", "reached")} for row in found])
    return f"{one.median:g} / {one.p90:g} / {100 * one.success:.1f}%"


def _bars(rows: Sequence[Row], path: Path) -> Path:
    """Calls of f and wall-clock by solver, a bar for each tolerance."""
    figure, places = figures.grid(2, 2, (5, 4.2))
    labels = {
        "calls": "calls of f, until the worst image is done",
        "seconds": "seconds for the model on the batch",
    }
    tolerances = {f"to {rtol:g}": rtol for rtol in _tolerances(rows)}
    for place, (key, label) in zip(places, labels.items(), strict=True):

        def height(solver: str, to: str, key: str = key) -> float:
            return _mean([row for row in rows if (row["solver"], row["rtol"]) == (solver, tolerances[to])], key)

        figures.bars(place, list(dict.fromkeys(row["solver"] for row in rows)), list(tolerances), height)
        place.set_ylabel(label)
    figures.legend(figure, places)
    return figures.save(figure, path)


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _tolerances(rows: Sequence[Row]) -> list[float]:
    return sorted({row["rtol"] for row in rows}, reverse=True)
