"""Inference with a trained solver as users run it: samples per second and score, against the fastest classical solver.

Rows:
  reference   score at states found to 1e-5 by Broyden's method, else by a classical one of the others; share found
  throughput  one solver at one batch size: samples per second by round, in turns with the others; the score of the task,
              evaluations, share solved, share of predictions that are those at the reference; `best`: the classical solver
              that the learned one is held against
  fixed       the same of a compiled `FixedBudget`, with the rates of the same solver in an ordinary solve in these rounds;
              `refused`: why it cannot be had, with no figures
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import metabroyden as mb
from experiments.bench import report, runner, solvers
from experiments.bench.inference import Inputs, compiled_to, find_reference, race, raw_inputs, summary
from experiments.bench.options import Budgeted, OnFamily
from experiments.bench.problems import Family
from experiments.bench.runner import Row, read_rows
from metabroyden.comparison import figures
from metabroyden.comparison.statistics import Interval, Outcome, fastest
from metabroyden.comparison.tables import chosen, grouped, listed, short
from metabroyden.progress import ticks

FREE = ("family", "models", "meta", "compiled")
"""Options that make no other setting: a report is over all families, with compiled solves where they were measured."""


@dataclass(frozen=True)
class Throughput(Budgeted, OnFamily, command="throughput"):
    """Run a trained DEQ with its trained solver and with tuned classical ones: samples per second and score."""

    solver: str = "meta-broyden-seed0"
    """A folder of a trained solver in results/meta/FAMILY, or a shipped solver's name, such as universal."""
    rtol: float = 1e-2
    """Tolerance of all solves."""
    batches: tuple[int, ...] = (1, 32, 256)
    """Samples (of a text: segments) given to the model at once."""
    samples: int = 256
    """Test samples; all of a round's solvers see the same ones, the rounds together all that fill a batch."""
    rounds: int = 8
    """Timed rounds of a batch size; up to four times as many where they are short."""
    threads: int = 1
    """Of the CPU."""
    compiled: bool = False
    """Time compiled solves with a fixed budget, too; compiling takes half a minute a solver and batch size."""
    meta: Path = Path("results/meta")
    """Where the trained solvers are."""


def run(config: Throughput) -> None:
    """One family, batch size by batch size, and the report over all families that there are."""
    runner.at_least_one(config, "samples", "rounds", "budget", "threads")
    if min(config.batches, default=0) < 1:
        raise ValueError(f"batches must be of at least 1 sample, got {config.batches}")
    family = Family(config.family, config.models)
    learned = solvers.trained(config.meta, config.family, config.solver)
    job = runner.Run(config, free=FREE, shared=(), inputs=[family.path], always=f"--family {config.family}")
    inputs = raw_inputs(family.model(), family.criterion, config.samples)
    if max(config.batches) > len(inputs.answers):
        raise ValueError(f"a batch of {max(config.batches)} is more than the {len(inputs.answers)} test samples")

    def rows() -> Iterator[Row]:
        tuned = solvers.tuned(family.problems("validation", 64), config.budget, splitting=family.splitting)
        options: Row = {"rtol": config.rtol, "max_nfe": config.budget}
        models = {name: family.model(solver=one, **options) for name, one in {config.solver: learned, **tuned}.items()}
        yield find_reference(models[config.solver], inputs, (mb.Broyden(100), *tuned.values()))
        with ticks(config.family, len(config.batches), show=config.progress) as done:
            for batch in config.batches:
                yield from measured(models, config.solver, inputs, batch, config.rounds, compiled=config.compiled)
                done()

    with runner.threads(config.threads):
        found = job.unit("compiled" if config.compiled else "ordinary", rows)
        described = job.described(metric=family.criterion.metric, model_sha256=runner.sha256(family.path))
    runner.publish(job.folder / config.family, [{"family": config.family, **row} for row in found], described)
    runner.show(write(job.folder))


def measured(
    models: dict[str, Any], learned: str, inputs: Inputs, batch: int, rounds: int, *, compiled: bool = False
) -> Iterator[Row]:
    """The rows of one batch size, models by the names of their solvers; compiled: with the fixed budget too."""
    laps = race(models, inputs, batch, rounds)
    outcomes = {name: Outcome(by[None, 0], by[None, 1], 1 / rate[None, None]) for name, (rate, by) in laps.items()}
    best = fastest({name: one for name, one in outcomes.items() if name != learned})
    for name, found in laps.items():
        solver = models[name].deq.solver
        config = type(solver).__name__ if isinstance(solver, nn.Module) else repr(solver)
        who = {"solver": name, "config": config, "learned": name == learned, "best": name == best}
        yield {"row": "throughput", "batch": batch, **who, **summary(found)}
    if compiled:
        torch.compiler.reset()  # there is a limit on what may be compiled of one function
        budgets = {name: int(outcomes[name].median) for name in (learned, best)}
        for row in _fixed(models, budgets, inputs, batch, rounds):
            yield {"row": "fixed", "batch": batch, "learned": row["solver"] == learned, **row}


def _fixed(models: dict[str, Any], budgets: Row, inputs: Inputs, batch: int, rounds: int) -> Iterator[Row]:
    """Compiled solves of as many evaluations as the median sample needs, beside ordinary ones."""
    every, twins = {name: models[name] for name in budgets}, {}
    for name, budget in budgets.items():
        try:
            every[f"{name}, fixed"] = twins[name] = compiled_to(models[name], budget, inputs, batch)
        except (ValueError, UserWarning) as error:
            yield {"solver": name, "refused": str(error)}
    laps = race(every, inputs, batch, rounds) if twins else {}
    for name, twin in twins.items():
        took = {"ordinary": laps[name][0].tolist(), "compile_seconds": twin.deq.runs.compile_seconds}
        yield {"solver": name, "budget": budgets[name], **short(took), **summary(laps[f"{name}, fixed"])}


COLUMNS = [
    ("", "{family}"),
    ("batch", "{batch}"),
    ("learned /s", "{ours[middle]:,.0f}"),
    ("classical /s", "{theirs[middle]:,.0f} {theirs[solver]}"),
    ("ratio (quartiles)", "{marked} ({ratio.low:.2f}–{ratio.high:.2f})"),
    ("score", "{ours[score]:.4f}, {theirs[score]:.4f}"),
    ("reference", "{reference:.4f}"),
    ("evaluations", "{ours[evaluations]:.1f} most {ours[most]}, {theirs[evaluations]:.1f} most {theirs[most]}"),
    ("solved", "{ours[solved]:.1%}, {theirs[solved]:.1%}"),
    ("same answers", "{ours[same]}, {theirs[same]}"),
]
FIXED = [
    *COLUMNS,
    ("gain", "{ours[gain]:.2f}×, {theirs[gain]:.2f}×"),
    ("compiling", "{ours[compile_seconds]:.0f} s, {theirs[compile_seconds]:.0f} s"),
]


def pairs(rows: list[Row], kind: str) -> list[Row]:
    """By family and batch size the learned solver's row beside that of the classical one that it is held against.

    ratio: median and quartiles over rounds of the learned one's samples per second over the other's.
    """
    score, found = {row["family"]: row["score"] for row in chosen(rows, "reference")}, []
    for of in grouped((_shown(row) for row in chosen(rows, kind) if "refused" not in row), "family", "batch"):
        rivals = [row for row in of if not row["learned"] and row.get("best", True)]
        for ours, theirs in product((row for row in of if row["learned"]), rivals):
            ratio = Interval(*np.quantile(np.divide(ours["rate"], theirs["rate"]), [0.5, 0.25, 0.75]))
            marked = f"**{ratio.value:.2f}×**" if ratio.low > 1 else f"{ratio.value:.2f}×"
            both = {"ours": ours, "theirs": theirs, "ratio": ratio, "marked": marked}
            found.append({"family": ours["family"], "batch": ours["batch"], "reference": score[ours["family"]], **both})
    return found


def _shown(row: Row) -> Row:
    same, gain = row["agrees"], np.divide(row["rate"], row.get("ordinary") or row["rate"])
    shown = {"middle": np.median(row["rate"]), "gain": np.median(gain), "same": "—" if same is None else f"{same:.1%}"}
    return {**row, **shown}


def write(folder: Path) -> Path:
    """report.md and throughput.png over all families in a folder, from rows alone."""
    rows = [row for path in runner.row_files(folder, "*/rows.jsonl") for row in read_rows(path)]
    ordinary, fixed = pairs(rows, "throughput"), pairs(rows, "fixed")
    ratios = {(pair["family"], f"{pair['batch']}"): pair["ratio"] for pair in ordinary}
    families, batches = (list(dict.fromkeys(place[side] for place in ratios)) for side in (0, 1))
    figure, place = figures.axes(7, 1.5 + 0.45 * len(families))
    figures.intervals(place, families, batches, lambda *at: ratios.get(at), "batch ")
    figures.log_ticks(place, (0.5, 0.7, 1, 1.4, 2, 3, 4), suffix="×")
    place.set(xlabel="samples per second, learned over fastest classical (median, quartiles)")
    place.legend(frameon=False, fontsize=8)
    refused = {f"{row['family']}, {row['solver']}: {row['refused']}." for row in rows if "refused" in row}
    tables = listed("", ordinary, COLUMNS), listed("With a fixed budget, compiled", fixed, FIXED)
    drawn = figures.save(figure, folder / "throughput.png")
    return report.write(folder, "Throughput of inference", [tables[0], drawn, tables[1], *sorted(refused)])
