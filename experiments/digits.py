"""First light: a convolutional DEQ on handwritten digits, two learned root finders, and the race against Broyden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

import metabroyden as mb
from experiments.bench import batch, measure, problems, report
from experiments.bench import solvers as known
from experiments.bench.options import Budgeted, Seeded, Timed, Unrolled
from experiments.bench.runner import Row, Run, publish, read_rows, show
from metabroyden.comparison import figures
from metabroyden.comparison.statistics import Field, Outcome
from metabroyden.comparison.tables import Table, chosen, listed, mean, pivot
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.meta.fit import make_learned
from metabroyden.progress import progress_bar
from metabroyden.storage import atomic_write
from metabroyden.zoo import models
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.models.fit import by_epoch
from metabroyden.zoo.tasks import family_tasks

LEARNED: dict[str, Row] = {"grouped LSTM": {"hidden": 20, "rank": 32}, "coordinatewise LSTM": {"hidden": 6}}
"""By their names in the report, the options of the learned solvers."""
GROUPED, REFERENCE = "grouped LSTM", "Broyden"
SHOWN = (*LEARNED, "Broyden", "Anderson", "Picard")
"""In the figure, and in the table of accuracy."""
TOLERANCES, CLOCKED = (1e-1, 1e-2, 1e-3, 1e-4), (1e-2, 1e-3)
BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60)


@dataclass(frozen=True)
class Digits(Seeded, Unrolled, Budgeted, Timed, command="digits", repeats=7):
    """Train a DEQ on digits, meta-train its root finder, compare it with the classical solvers."""

    epochs: int = 16
    """Epochs of the DEQ's training."""
    grouped_steps: int = 600
    """Outer steps of the grouped LSTM's meta-training."""
    coordinatewise_steps: int = 400
    """Outer steps of the coordinatewise LSTM's meta-training."""
    unroll: int = 14
    """Solver steps in each unroll, full backpropagation through time."""
    test_samples: int = 300
    """Held-out images used (of 300)."""


def run(config: Digits) -> None:
    """The whole job. Interrupted, it goes on where it stopped; finished, it only shows its results again."""
    job = Run(config, free=("seed",), shared=(), always=f"--seed {config.seed}")
    model = _trained(config, job.work / "model.safetensors")
    learned = {name: _meta_trained(config, name, model, job.work) for name in LEARNED}
    rows = job.unit("compared", lambda: _compared(config, model, learned))
    tuned = {
        row["solver"]: row["options"]
        for row in [row for row in rows if row.get("kind") == "classical" and "options" in row]
    }
    folder = publish(job.folder / f"seed{config.seed}", rows, job.described(tuned=tuned))
    for name in ("model", *map(_kind, LEARNED)):
        atomic_write(folder / f"{name}.safetensors", (job.work / f"{name}.safetensors").read_bytes())
    show(write(folder, [folder]))
    console = Console()
    console.print(Markdown(f"## The saved solver, reloaded into the reloaded DEQ\n\n{_reloaded(folder)}"))
    over_all = write(job.folder, sorted(job.folder.glob("seed*/")))
    console.print(f"Figures and report: {folder / 'report.md'}; over all seeds: {over_all}")


def _kind(name: str) -> str:
    return name.removesuffix(" LSTM")


def _trained(config: Digits, path: Path) -> Any:
    """The DEQ: forward root solve by Anderson, backward by implicit differentiation."""
    if path.exists():
        return models.load_model(path)
    solver, data = mb.Anderson(memory=5), load_digits()
    # most early solves stop at the budget, which is what training wants: gradients need no more
    backward = mb.Implicit(solver=solver, rtol=1e-2, max_nfe=20)
    options: Row = {"solver": solver, "backward": backward, "rtol": 1e-3, "max_nfe": 40, "warn": False}
    training, kept = models.Training(epochs=config.epochs, seed=config.seed), path.with_suffix(".training.safetensors")
    with progress_bar("training the DEQ", config.epochs, show=config.progress) as bar:
        model = models.train(
            lambda: models.ConvClassifier(models.ConvClassifierConfig(), **options),
            models.Images(data), training, path=kept, report=by_epoch(bar, "accuracy"),
        )  # fmt: skip
    found = {"validation_accuracy": models.accuracy(model, data.validation), "training": asdict(training)}
    models.save_model(model, path, found)
    return model


def _meta_trained(config: Digits, name: str, model: Any, work: Path) -> Any:
    """A learned solver, trained through unrolled solves, chosen on validation."""
    kind, shape = _kind(name), (model.config.channels, model.config.side, model.config.side)
    path, steps = work / f"{kind}.safetensors", getattr(config, f"{kind}_steps")
    if path.exists():
        return mb.load_solver(path)
    solver = make_learned(kind, mb.Layout("image", shape), seed=config.seed, conditioning="input", **LEARNED[name])
    meta = mb.MetaConfig(steps=steps, unroll=config.unroll, backend=config.backend, seed=config.seed)
    tasks, kept = family_tasks(model, models.Images(load_digits())), path.with_suffix(".training.safetensors")
    with progress_bar(f"meta-training, {kind}", steps, show=config.progress) as bar:
        mb.MetaTrainer(solver, tasks, meta, checkpoint=kept).run(bar)
    solver.fingerprint = fingerprint(model.cell)
    mb.save_solver(solver, path)
    return solver


def _compared(config: Digits, model: Any, learned: dict[str, Any]) -> list[Row]:
    """Baselines tuned on validation, then everything once on the test split."""
    criterion, budget, count = models.Images(load_digits()), config.budget, config.test_samples
    tuned = known.tuned(problems.held_out(model.requires_grad_(False), criterion, "validation", count), budget)
    picard, anderson, broyden = (tuned[f"tuned {name}"] for name in ("Picard", "Anderson", "Broyden"))
    solvers = {"Picard": picard, "Anderson": anderson, "Broyden": mb.Broyden(memory=budget), "tuned Broyden": broyden,
               "Anderson + learned start": mb.LearnedStart.of(learned[GROUPED], anderson),
               "Broyden + learned start": mb.LearnedStart.of(learned[GROUPED], broyden)}  # fmt: skip
    every = known.contestants(**learned, **solvers) + known.torchdeq("Anderson", "Broyden")
    contestants = [replace(one, seed=config.seed) for one in every]
    held = replace(problems.held_out(model, criterion, "test", count), name="digits")
    star, found = problems.double_equilibria(model.cell, held)
    held, stamp = replace(held, star=star, known=found), measure.stamp_of(held)
    rules, depths = measure.Rules(TOLERANCES, budget, block=len(held)), [depth for depth in BUDGETS if depth <= budget]
    rows = measure.measure(held, contestants, rules, stamp, progress=config.progress)
    for one in (one for one in contestants if one.name in SHOWN):
        rows += [{**stamp(one), **row} for row in measure.depth_rows(held, one.solver, depths)]
    for tolerance in CLOCKED:
        options: Row = {"budget": budget, "repeats": config.repeats, "reference": REFERENCE}
        rows += batch.clock_rows(held, contestants, stamp, tolerance=tolerance, **options)
    parts = batch.part_rows(held, [one for one in contestants if one.name in learned], repeats=3 * config.repeats)
    return rows + [{"seed": config.seed, **row} for row in parts]


def _reloaded(folder: Path) -> Table:
    """The saved solver at work inside the reloaded DEQ."""
    saved, body = mb.load_solver(folder / "grouped.safetensors"), []
    for words, solver, budget in (
        ("Broyden to 1e-3", mb.Broyden(memory=60), 60),
        ("saved solver to 1e-3", saved, 60),
        ("saved solver, 8 evaluations at most", saved, 8),
    ):
        model = models.load_model(folder / "model.safetensors", solver=solver, rtol=1e-3, max_nfe=budget, warn=False)
        right, spent = models.accuracy(model, load_digits().test), model.deq.last_solution.nfe.float()
        body.append([words, f"{right:.2%}", f"{spent.mean():.1f}", f"{spent.median():g}"])
    return Table("", ["forward solve", "test accuracy", "mean evaluations", "median"], body)


def _spread(rows: list[Row]) -> str:
    return "{0.median:g} / {0.p90:g} / {0.success:.1%}".format(Outcome.of(rows))


def _clock(rows: list[Row]) -> str:
    seconds, ratios = (np.mean([row[key] for row in rows], axis=0) for key in ("seconds", "ratios"))  # over seeds
    pairs = zip(1e3 * seconds, ratios, strict=True)
    return " / ".join(f"{ms:.0f} ms ({ratio:.2f}×)" for ms, ratio in pairs) + f", {mean(rows, 'outside_f'):.0%}"


def claims(rows: list[Row], learned: str) -> Table:
    """A learned solver against Broyden's method and the best classical one, each seed and all together."""
    seeds, body = sorted({row["seed"] for row in rows}), []
    fields = {str(seed): Field(chosen(rows, "solve", seed=seed)) for seed in seeds if len(seeds) > 1}
    fields["all"] = Field(chosen(rows, "solve"))
    for tolerance, seed in product(TOLERANCES, fields):
        best = fields[seed].named("digits", "best classical", tolerance)
        ours, *others = (fields[seed].must("digits", name, tolerance) for name in (learned, REFERENCE, best))
        first, second, third = (f"{one.median:g} ({one.success:.1%})" for one in (ours, *others))
        ratios = [f"{ours.median / one.median:.2f}×" for one in others]
        fewer = f"{np.median(others[0].evaluations / ours.evaluations):.2f}"
        body.append([f"{tolerance:g}", seed, first, second, ratios[0], fewer, f"{third}, {best}", ratios[1]])
    head = ["tolerance", "seed", learned, REFERENCE, "ratio", "times fewer, median image", "best classical", "ratio"]
    return Table("", head, body)


def equilibria(rows: list[Row]) -> Table:
    """What each solver returned when asked for the tightest tolerance."""
    last = chosen(rows, "solve", tolerance=TOLERANCES[-1])
    field = Field(last)
    of, count = partial(field.samples, "digits", tolerance=TOLERANCES[-1]), len(last[0]["status"])
    return listed("", field.solvers(), [
        ("solver", str),
        ("median distance", lambda name: f"{np.nanmedian(of(name, key='distance')):.1e}"),
        ("90th percentile", lambda name: f"{np.nanpercentile(of(name, key='distance'), 90):.1e}"),
        ("same class as at z*", lambda name: f"{np.nanmean(of(name, key='agrees')):.2%}"),
        ("accuracy", lambda name: f"{np.nanmean(of(name, key='score')):.2%}"),
        ("handed over", lambda name: f"{mean(chosen(last, 'solve', solver=name), 'handed_over') / count:.1%}"),
    ])  # fmt: skip


def curves(folder: Path) -> Path:
    """Of a seed, residual by evaluations (median, middle half) and by time (median), and accuracy by evaluations."""
    figure, (spent, timed, right) = figures.grid(3, 3, (4.6, 3.8))
    rows = read_rows(folder / "rows.jsonl")
    for name in SHOWN:
        (curve,), depths, words = chosen(rows, "curve", solver=name), chosen(rows, "depth", solver=name), _kind(name)
        figures.line(spent, words, curve["evaluations"], curve["median"], (curve["low"], curve["high"]))
        figures.line(timed, words, [1e3 * second for second in curve["seconds"]], curve["by_time"])
        figures.line(right, words, [row["evaluations"] for row in depths], [100 * row["score"] for row in depths])
    spent.set(xlabel="evaluations of f", ylabel="relative residual (best so far)", yscale="log")
    timed.set(xlabel="milliseconds, whole batch", ylabel="relative residual (best so far)", yscale="log")
    right.set(xlabel="evaluations of f allowed", ylabel="accuracy on held-out images (%)")
    figures.log_ticks(right, (1, 3, 10, 30))
    figures.legend(figure, [spent])
    return figures.save(figure, folder / "curves.png")


def write(folder: Path, seeds: Sequence[Path]) -> Path:
    """Write report.md into a folder, from the rows and config.json of the seeds; a seed's own has its figure drawn."""
    rows = [row for seed in seeds for row in read_rows(seed / "rows.jsonl")]
    commands = "\n".join(report.read_config(seed)["command"] for seed in seeds)
    drawn = [curves(seed) if seed == folder else seed / "curves.png" for seed in seeds]
    return report.write(folder, "Digits: learned root finders against classical ones", [
        f"A convolutional DEQ on 8×8 digits; {len(seeds)} seed(s) of DEQ and meta-training; held-out test samples, read "
        "once a run. A sample that does not get there within the budget counts as the budget. Settings of the tuned "
        f"solvers, machine and commit: config.json of each seed. Made by\n\n```\n{commands}\n```",
        "## Evaluations to a tolerance\n\nMedian / 90th percentile / success rate.",
        pivot("", chosen(rows, "solve"), "{solver}", "{tolerance:g}", _spread, corner="solver"), *drawn,
        "## Learned against classical\n\nMedian evaluations (success rate). Best classical: among ours whose success is "
        "within a standard error of the highest, the one of the smallest median.",
        *(claims(rows, name) for name in LEARNED),
        f"## Wall-clock\n\nUntil half / 90% / all of the batch of {chosen(rows, 'clock')[0]['batch']} are done, interleaved "
        f"repeats in one process, medians; in brackets the ratio to {REFERENCE}, below one is faster; then the time outside "
        "f. torchdeq stops a batch when its worst sample is done.", 
        pivot("", chosen(rows, "clock"), "{solver}", "{tolerance:g}", _clock, corner="solver"),
        "What each learned part costs on the whole batch (start: initializer, once a solve; init: gates, once a solve; "
        "step: once an evaluation). In brackets f-equivalents: times of one evaluation of f on the same batch.",
        pivot("", chosen(rows, "part"), "{solver}", "{part}", lambda found:
              f"{1e3 * mean(found, 'seconds'):.2f} ms ({mean(found, 'f_equivalents'):.2f})", corner="solver"),
        "## Same equilibrium\n\nRelative distance to the float64 equilibrium of what each solver returned when asked for "
        "the tightest tolerance; whether the class is the one predicted there; accuracy; samples the safeguard handed to "
        "Broyden.", equilibria(rows), "## Accuracy against evaluations",
        pivot("", chosen(rows, "depth"), "{solver}", "{evaluations}",
              lambda found: f"{mean(found, 'score'):.2%}", corner="solver"),
    ])  # fmt: skip
