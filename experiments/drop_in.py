"""Drop-in: an unmodified torchdeq model, trained by torchdeq, made faster by a root finder fitted to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import metabroyden as mb
from experiments.bench import figures, report
from experiments.bench.clock import laps
from experiments.bench.options import Budgeted, Seeded, Timed
from experiments.bench.peers import available
from experiments.bench.problems import HeldOut, double_equilibria
from experiments.bench.runner import Row, Run, ticks
from experiments.bench.statistics import Outcome
from experiments.bench.tables import Table, chosen, grouped, listed, mean, pivot, short
from metabroyden import checkpoint
from metabroyden.integrations.torchdeq import FixedPointMap, register
from metabroyden.meta.progress import progress_bar
from metabroyden.solution import relative_residual
from metabroyden.solvers.tuning import tune
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.models import Images, Training, train
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
    """Counts the calls of a cell f(z, …) while it lasts, with the residuals that they measured."""

    def __init__(self, cell: nn.Module) -> None:
        self.calls = self.rows = 0
        self.residuals: list[Tensor] = []
        self.arguments: tuple[Tensor, ...] = ()
        self._hook = cell.register_forward_hook(self._note)

    def __enter__(self) -> CallRecord:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _note(self, _: nn.Module, arguments: tuple[Tensor, ...], value: Tensor) -> None:
        self.calls, self.rows, self.arguments = self.calls + 1, self.rows + len(value), arguments
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
        note, *found = job.unit("evaluation", lambda: evaluated(config, seed, job.work))  # noqa: B023 (called at once)
        rows += [{"seed": seed, **row} for row in found]
        notes[str(seed)] = note
    job = Run(config, free=free, shared=(), always=f"--seed {config.seed} --seeds {config.seeds}")
    job.finish(rows, write, seeds=notes)


TRAINED: dict[str, Any] = {
    # most early solves stop at the budget, which is what training wants: gradients need no more
    "ift": True, "f_solver": "anderson", "f_max_iter": 30, "f_tol": 1e-3, "f_stop_mode": "rel",
    "b_solver": "broyden", "b_max_iter": 15, "b_tol": 1e-2, "b_stop_mode": "rel",
}  # fmt: skip
"""How the model is trained: torchdeq's own solvers and implicit differentiation."""


def trained(config: DropIn, seed: int, work: Path) -> Classifier:
    """a. The model, read where it was trained before."""
    path, training = work / "model.safetensors", Training(epochs=config.epochs, seed=seed)
    if path.exists():
        model = Classifier(config.channels, **TRAINED).eval()
        checkpoint.load_weights(model, checkpoint.read(path, "model")[0], path)
        return model
    with progress_bar("training with torchdeq", config.epochs, show=config.progress) as bar:
        model = train(
            lambda: Classifier(config.channels, **TRAINED), Images(load_digits()), training,
            path=path.with_suffix(".training.safetensors"), report=by_epoch(bar, "accuracy"),
        )  # fmt: skip
    checkpoint.write(path, "model/torchdeq-classifier", model.state_dict(), {"training": asdict(training)})
    return model


def fitted(config: DropIn, seed: int, model: Classifier, work: Path) -> Any:
    """b. One call: a root finder for the model as it is, from its training images alone."""
    path = work / "learned.safetensors"
    if not path.exists():
        options: dict[str, Any] = {"steps": config.steps, "seed": seed, "progress": config.progress}
        options["checkpoint"] = path.with_suffix(".training.safetensors")
        # measured below, whatever it is worth
        solver = mb.fit_solver(model, load_digits().train.images, layout="image", fallback=False, **options)
        mb.save_solver(solver, path)
    return mb.load_solver(path)


def evaluated(config: DropIn, seed: int, work: Path) -> Iterator[Row]:
    """c. The same model with one solver after the other in its DEQ, on test images: notes, then rows."""
    model = trained(config, seed, work)
    learned = fitted(config, seed, model, work)
    data, f = load_digits(), FixedPointMap(model)
    images, labels = (part[: config.test_samples] for part in (data.test.images, data.test.labels))
    ours = {LEARNED: learned, "our Broyden": mb.Broyden(memory=config.budget), **tuned(config, f)}
    for name, solver in ours.items():
        register(name, solver)
    held = HeldOut(f, f.initial_state(images), images, lambda z, index: torch.zeros(len(index)))
    star, known = double_equilibria(f, held, rtol=1e-7, max_nfe=300)
    sizes = {
        name: sum(p.numel() for p in one.parameters()) for name, one in (("model", model), ("learned solver", learned))
    }
    yield {
        "solvers": {name: repr(solver) for name, solver in ours.items() if name != LEARNED},
        "held_out": learned.summary["held_out"], "fit_seconds": learned.summary["seconds"], "parameters": sizes,
        "equilibria_known": float(known.float().mean()),
    }  # fmt: skip
    with ticks("comparing", len(TOLERANCES), show=config.progress) as done:
        for rtol in TOLERANCES:
            options: dict[str, Any] = {"f_tol": rtol, "f_stop_mode": "rel", "f_max_iter": config.budget}
            models = {}
            for name in (LEARNED, *OWN, *ours):  # another name in get_deq: all that a user changes
                models[name] = Classifier(config.channels, f_solver=OWN.get(name, name), **options).eval()
                models[name].load_state_dict(model.state_dict())
            yield from compared(
                config, models, images, labels, rtol, star.view(len(images), config.channels, 8, 8), known
            )
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
    config: DropIn, models: dict[str, Any], images: Tensor, labels: Tensor, rtol: float, star: Tensor, known: Tensor
) -> Iterator[Row]:
    """Rows of the models to one tolerance; star, known: float64 equilibria, and (B,) where they were found.

    Counted by a hook on the cell: `calls` of f and their `rows`; by sample the calls made when its residual
    first met the tolerance, else the budget. Times are those of the whole model, in turns; nobody counts while they run.
    """
    counts: dict[str, Row] = {}
    wanted = models[LEARNED].head(star.to(images.dtype).flatten(1)).argmax(dim=1)
    for name, model in models.items():
        states: list[Tensor] = []
        hook = model.deq.register_forward_hook(lambda _m, _i, out, states=states: states.append(out[0][-1]))
        with CallRecord(model.cell) as record:
            predicted = model(images).argmax(dim=1)
        hook.remove()
        nfe, reached = record.evaluations_to(rtol, config.budget)
        distance = (states[0].double() - star).flatten(1).norm(dim=1) / star.flatten(1).norm(dim=1)
        there = known.any()
        counts[name] = {
            "calls": record.calls, "rows": record.rows, "evaluations": nfe.tolist(),
            "status": "".join("C" if hit else "B" for hit in reached),
            "accuracy": short(float((predicted == labels).float().mean())),
            "agreement": short(float((predicted == wanted)[known].float().mean())) if there else None,
            "distance": short(float(distance[known].median())) if there else None,
        }  # fmt: skip
        if name == REFERENCE:
            alone = partial(model.cell, *record.arguments)
    seconds = laps({**{name: partial(model, images) for name, model in models.items()}, "f": alone}, config.repeats)
    f_time = float(np.median(seconds["f"]))
    for name, row in counts.items():
        total, ratio = float(np.median(seconds[name])), float(np.median(seconds[name] / seconds[REFERENCE]))
        taken = {"seconds": total, "ratio": ratio, "f_seconds": f_time, "outside_f": 1 - row["calls"] * f_time / total}
        yield {"row": "drop-in", "solver": name, "rtol": rtol, "batch": len(images), **row, **short(taken)}


@report.of_rows("An unmodified torchdeq model, made faster", "torchdeq")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and drop_in.png, from rows alone."""
    seeds, config = described["seeds"], described["config"]
    first, tolerances = next(iter(seeds)), sorted({row["rtol"] for row in rows}, reverse=True)
    sizes = seeds[first]["parameters"]
    known = np.mean([note["equilibria_known"] for note in seeds.values()])
    fits = "; ".join(
        f"seed {seed}: {note['fit_seconds']:.0f} s, on held-out training images {note['held_out']['mean_evaluations']:.1f} "
        f"evaluations to {note['held_out']['rtol']:g} (Broyden {note['held_out']['mean_evaluations_broyden']:.1f})"
        for seed, note in seeds.items()
    )
    grids = "; ".join(f"{name}: `{solver}`" for name, solver in seeds[first]["solvers"].items())
    return [
        f"A torchdeq classifier (convolutional DEQ, {config['channels']} channels on 8×8 digits, {sizes['model']:,} "
        "parameters) is trained with torchdeq's Anderson and implicit differentiation. "
        '`fit_solver(model, train_images, layout="image", fallback=False)` fits a root finder of '
        f"{sizes['learned solver']:,} parameters to it, `register` makes it known to torchdeq. Then the same "
        "weights run with one solver's name or another in "
        f"`get_deq`, on {rows[0]['batch']} test images in one batch, max_iter {config['budget']}, stop_mode rel. "
        "torchdeq's solvers have its default options.",
        f"The fit: {fits}.",
        f"Tuned on {config['tune_samples']} validation images (seed {first}): {grids}.",
        against(rows),
        _bars(rows, folder / "drop_in.png"),
        *(_table(chosen(rows, "drop-in", rtol=rtol)) for rtol in tolerances),
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
    """All solvers to a tolerance; means over seeds."""
    keys = ("accuracy", "calls", "rows", "seconds", "ratio", "outside_f", "distance", "agreement")
    known = rows[0]["distance"] is not None
    items: list[Row] = []
    for of in grouped(rows, "solver"):
        one, name = Outcome.of(of), of[0]["solver"]
        items.append({
            "solver": f"**{name}**" if name == LEARNED else name,
            "evaluations": f"{one.median:g} / {one.p90:g} / {one.success:.1%}",
            **{key: mean(of, key) for key in keys if known or key not in ("distance", "agreement")},
        })  # fmt: skip
    return listed(f"To {rows[0]['rtol']:g}", items, [
        ("solver", "{solver}"), ("accuracy", "{accuracy:.2%}"), ("calls of f", "{calls:g}"), ("rows of f", "{rows:,.0f}"),
        ("evaluations", "{evaluations}"), ("time", lambda item: f"{1e3 * item['seconds']:.0f} ms"),
        ("to torchdeq Broyden", "{ratio:.2f}×"), ("outside f", "{outside_f:.0%}"),
        ("distance", "{distance:.1e}" if known else "–"), ("agreement", "{agreement:.1%}" if known else "–"),
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
