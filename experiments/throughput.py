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

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import metabroyden as mb
from experiments.bench import figures, report, runner, solvers
from experiments.bench.measure import solved_to
from experiments.bench.options import Budgeted, OnFamily
from experiments.bench.problems import Family, bits_of
from experiments.bench.runner import Row, read_rows
from experiments.bench.statistics import Interval, Outcome, fastest
from experiments.bench.tables import listed, short
from metabroyden.deq import initial_state
from metabroyden.nn.pin import pin
from metabroyden.solvers.clock import turns
from metabroyden.state import gather
from metabroyden.zoo.models.criteria import Images
from metabroyden.zoo.tasks import read_on, text_windows

FREE = ("family", "models", "meta", "compiled")
"""Options that make no other setting: a report is over all families, with compiled solves where they were measured."""
EXACT, MOST, SECONDS = 1e-5, 4, 20.0
"""What the reference is solved to; more rounds than asked for, up to so many times, while they take less than so long."""


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
    family, learned = Family(config.family, config.models), _learned(config)
    job = runner.Run(config, free=FREE, shared=(), inputs=[family.path], always=f"--family {config.family}")
    inputs = raw_inputs(family.model(), family.criterion, config.samples)
    if max(config.batches) > len(inputs.answers):
        raise ValueError(f"a batch of {max(config.batches)} is more than the {len(inputs.answers)} test samples")

    def rows() -> Iterator[Row]:
        tuned = solvers.tuned(family.problems("validation", 64), config.budget, splitting=family.splitting)
        options: Row = {"rtol": config.rtol, "max_nfe": config.budget}
        models = {name: family.model(solver=one, **options) for name, one in {config.solver: learned, **tuned}.items()}
        yield find_reference(models[config.solver], inputs, (mb.Broyden(100), *tuned.values()))
        with runner.ticks(config.family, len(config.batches), show=config.progress) as done:
            for batch in config.batches:
                yield from measured(models, config.solver, inputs, batch, config.rounds, compiled=config.compiled)
                done()

    with runner.threads(config.threads):
        found = job.unit("compiled" if config.compiled else "ordinary", rows)
        described = job.described(metric=family.criterion.metric, model_sha256=runner.sha256(family.path))
    runner.publish(job.folder / config.family, [{"family": config.family, **row} for row in found], described)
    runner.show(write(job.folder))


def _learned(config: Throughput) -> Any:
    if config.solver in mb.list_pretrained():
        return mb.load_solver(config.solver)
    path = config.meta / config.family / config.solver / "solver.safetensors"
    kind, _, seed = config.solver.rpartition("-seed")
    if not (kind and seed.isdigit()):
        shipped = ", ".join(mb.list_pretrained())
        raise ValueError(f"solver must be NAME-seedNUMBER or a shipped one ({shipped}), got {config.solver!r}")
    if not path.exists():
        command = f"python -m experiments meta --family {config.family} --solver {kind} --seed {seed}"
        raise FileNotFoundError(f"{path} is missing: train it with `{command}`")
    return mb.load_solver(path)


class Inputs(NamedTuple):
    """Held-out inputs, batch first: images alone, or tokens and the memory of the segment before."""

    given: tuple[Any, ...]
    answers: Tensor
    reference: Tensor  # what is predicted at the reference; -1 where that was not found

    def score(self, logits: Tensor, index: Tensor) -> Tensor:
        """(B,) 1 or 0 for a right or wrong class, or bits per token, of the samples `index`."""
        answers = self.answers[index]
        return (logits.argmax(1) == answers).float() if answers.ndim == 1 else bits_of(logits, answers).mean(1)


def raw_inputs(model: Any, criterion: Any, count: int) -> Inputs:
    """What `problems.held_out(model, criterion, "test", count)` is made of; the model itself solves a text's memory."""
    if isinstance(criterion, Images):
        images, labels = criterion.data.test.images[:count], criterion.data.test.labels[:count]
        return Inputs((images,), labels, torch.full_like(labels, -1))
    windows, answers = text_windows(criterion.data, "test", criterion.length, model.stem.back)
    chosen = torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()
    answers, given = answers[chosen], read_on(model, windows[chosen], criterion.length)
    return Inputs(tuple(given), answers, torch.full_like(answers, -1))


@torch.no_grad()
def find_reference(model: Any, inputs: Inputs, solvers: Iterable[Any]) -> Row:
    """Note what is predicted at states found to 1e-5 by one of the solvers; the row of these."""
    usual, score, known = model.deq.solver, torch.zeros(len(inputs.answers)), torch.zeros(len(inputs.answers)) > 0
    with solved_to(model, EXACT):
        for model.deq.solver in solvers:
            todo = (~known).nonzero().squeeze(1)
            for index in todo.split(64) if len(todo) else ():
                logits, converged = model(*gather(inputs.given, index)), model.deq.last_solution.converged
                score[index], known[index] = inputs.score(logits, index), converged
                inputs.reference[index[converged]] = logits.argmax(-1)[converged]
    model.deq.solver = usual
    shares = {"score": float(score.mean()), "solved": float(known.float().mean())}
    return {"row": "reference", "samples": len(score), **short(shares)}


Laps = tuple[np.ndarray, np.ndarray]
"""Of one model, samples per second by round; (4, N) evaluations (the budget where it failed), success, score, and share of
predictions that are the reference's (NaN where that is not known)."""


def race(models: dict[str, Any], inputs: Inputs, batch: int, rounds: int) -> dict[str, Laps]:
    """Every model in turns; round by round other inputs, of which all see the same, and together all that fill a batch."""
    count = len(inputs.answers) // batch * batch
    pieces = list(torch.arange(count).split(batch))
    groups = [pieces[k::rounds] or [pieces[k % len(pieces)]] for k in range(rounds)]
    for model in models.values():
        _lap(model, inputs, pieces[:1])  # warms up
    spent = sum(_lap(model, inputs, groups[0])[0] for model in models.values())
    passes = int(min(MOST, max(1, SECONDS / max(spent, 1e-9) / rounds)))  # whole ones through the groups
    rates: dict[str, list[float]] = {name: [] for name in models}
    seen = {name: torch.zeros(4, count, dtype=torch.double) for name in models}
    for number, name in enumerate(turns(list(models), passes * rounds)):
        group = groups[number // len(models) % rounds]
        seconds, found = _lap(models[name], inputs, group)
        rates[name].append(len(group) * batch / seconds)
        for index, (logits, solution) in zip(group, found, strict=True):
            nfe = torch.where(solution.converged, solution.nfe, models[name].deq.max_nfe)
            wanted = inputs.reference[index].reshape(batch, -1)
            same = (logits.argmax(-1).reshape(batch, -1) == wanted).float().mean(1).where(wanted[:, 0] >= 0, torch.nan)
            columns = (nfe, solution.converged, inputs.score(logits, index), same)
            seen[name][:, index] = torch.stack([column.double() for column in columns])
    return {name: (np.array(rates[name]), seen[name].numpy()) for name in models}


@torch.no_grad()
def _lap(model: Any, inputs: Inputs, group: Sequence[Tensor]) -> tuple[float, list[tuple[Tensor, Any]]]:
    """(seconds, (logits, solution) of each batch) of some batches one after another, raw inputs to logits."""
    given = [gather(inputs.given, index) for index in group]
    began = time.perf_counter()
    found = [(model(*one), model.deq.last_solution) for one in given]
    return time.perf_counter() - began, found


def _row(laps: Laps, **more: Any) -> Row:
    rate, (evaluations, solved, score, agrees) = laps
    means = {"score": float(score.mean()), "evaluations": float(evaluations.mean()), "most": int(evaluations.max())}
    same = None if np.isnan(agrees).all() else float(np.nanmean(agrees))
    found = {"rate": rate.tolist(), **means, "solved": float(solved.mean()), "agrees": same}
    return {**more, "samples": len(score), **short(found)}


def measured(
    models: dict[str, Any], learned: str, inputs: Inputs, batch: int, rounds: int, *, compiled: bool = False
) -> Iterator[Row]:
    """The rows of one batch size, models by the names of their solvers; compiled: with the fixed budget too."""
    laps = race(models, inputs, batch, rounds)
    outcomes = {name: Outcome(by[None, 0], by[None, 1], 1 / rate[None, None]) for name, (rate, by) in laps.items()}
    best = fastest({name: one for name, one in outcomes.items() if name != learned})
    for name, lap in laps.items():
        solver = models[name].deq.solver
        config = type(solver).__name__ if isinstance(solver, nn.Module) else repr(solver)
        who = {"solver": name, "config": config, "learned": name == learned, "best": name == best}
        yield _row(lap, row="throughput", batch=batch, **who)
    if compiled:
        torch.compiler.reset()  # there is a limit on what may be compiled of one function
        budgets = {name: int(outcomes[name].median) for name in (learned, best)}
        yield from _fixed({name: models[name] for name in budgets}, learned, budgets, inputs, batch, rounds)


def _fixed(
    models: dict[str, Any], learned: str, budgets: dict[str, int], inputs: Inputs, batch: int, rounds: int
) -> Iterator[Row]:
    """Compiled solves of as many evaluations as the median sample needs, beside ordinary ones."""
    every, fixed = dict(models), {}
    for name, model in models.items():
        twin = copy.deepcopy(model)
        try:
            twin.deq = _FixedLayer(model.deq, budgets[name])
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="FixedBudget runs uncompiled")
                _lap(twin, inputs, [torch.arange(batch)])  # compiles
        except (ValueError, UserWarning) as error:
            yield {"row": "fixed", "batch": batch, "solver": name, "refused": str(error)}
        else:
            every[f"{name}, fixed"] = fixed[name] = twin
    laps = race(every, inputs, batch, rounds) if fixed else {}
    for name, twin in fixed.items():
        about = {"solver": name, "learned": name == learned, "budget": budgets[name]}
        took = {"ordinary": laps[name][0].tolist(), "compile_seconds": twin.deq.runs.compile_seconds}
        yield _row(laps[f"{name}, fixed"], row="fixed", batch=batch, **about, **short(took))


class _FixedLayer(nn.Module):
    """A DEQ's equilibria by `FixedBudget`; ValueError where it cannot be had."""

    def __init__(self, deq: Any, budget: int) -> None:
        super().__init__()
        self.cell, self.max_nfe, self.pinned, self.last_solution = deq.cell, budget, False, deq.last_solution
        self.made = lambda f: mb.FixedBudget(f, deq.solver, max_nfe=budget, rtol=deq.rtol)
        self.runs = self.made(deq.cell)

    def forward(self, x: Any) -> Any:
        """The best of the iterates."""
        z0 = initial_state(self.cell, x)
        if not self.pinned:  # computed weights stay what they are
            self.runs, self.pinned = self.made(pin(self.cell, x, z0)[0]), True
        self.last_solution = self.runs(z0, x)
        return self.last_solution.z


Pair = tuple[Row, Row]
"""Of a family and a batch size the learned solver's row, and that of the classical one it is held against."""
Column = tuple[str, Callable[[Pair], str]]


def ratio(pair: Pair) -> Interval:
    """Median and quartiles over rounds of the learned solver's samples per second over the classical one's."""
    return Interval(*np.quantile(np.divide(pair[0]["rate"], pair[1]["rate"]), [0.5, 0.25, 0.75]))


def _marked(pair: Pair) -> str:
    median, low, high = ratio(pair)
    mark = "**" if low > 1 else ""
    return f"{mark}{median:.2f}×{mark} ({low:.2f}–{high:.2f})"


def _each(head: str, cell: str | Callable[[Row], str]) -> Column:
    """A column with what it says of both."""
    return head, lambda pair: ", ".join(cell.format_map(row) if isinstance(cell, str) else cell(row) for row in pair)


COLUMNS: list[Column] = [
    ("", lambda pair: pair[0]["family"]),
    ("batch", lambda pair: f"{pair[0]['batch']}"),
    ("learned /s", lambda pair: f"{np.median(pair[0]['rate']):,.0f}"),
    ("classical /s", lambda pair: f"{np.median(pair[1]['rate']):,.0f} {pair[1]['solver']}"),
    ("ratio (quartiles)", _marked),
    _each("score", "{score:.4f}"),
    ("reference", lambda pair: f"{pair[0]['reference']:.4f}"),
    _each("evaluations", "{evaluations:.1f} most {most}"),
    _each("solved", "{solved:.1%}"),
    _each("same answers", lambda row: "—" if row["agrees"] is None else f"{row['agrees']:.1%}"),
]
FIXED = [
    *COLUMNS,
    _each("gain", lambda row: f"{np.median(np.divide(row['rate'], row['ordinary'])):.2f}×"),
    _each("compiling", "{compile_seconds:.0f} s"),
]


def pairs(rows: list[Row], kind: str) -> list[Pair]:
    """All that there are."""
    reference = {row["family"]: row["score"] for row in rows if row["row"] == "reference"}
    found: dict[Any, dict[bool, Row]] = {}
    for row in (row for row in rows if row["row"] == kind and "refused" not in row):
        if row["learned"] or row.get("best", True):
            place = found.setdefault((row["family"], row["batch"]), {})
            place[row["learned"]] = {**row, "reference": reference[row["family"]]}
    return [(both[True], both[False]) for both in found.values() if len(both) == 2]


def write(folder: Path) -> Path:
    """report.md and throughput.png over all families in a folder, from rows alone."""
    rows = [row for path in runner.row_files(folder, "*/rows.jsonl") for row in read_rows(path)]
    ordinary, fixed = pairs(rows, "throughput"), pairs(rows, "fixed")
    ratios = {(pair[0]["family"], f"{pair[0]['batch']}"): ratio(pair) for pair in ordinary}
    families, batches = (list(dict.fromkeys(place[side] for place in ratios)) for side in (0, 1))
    figure, place = figures.axes(7, 1.5 + 0.45 * len(families))
    figures.intervals(place, families, batches, lambda *at: ratios.get(at), "batch ")
    figures.log_ticks(place, (0.5, 0.7, 1, 1.4, 2, 3, 4), suffix="×")
    place.set(xlabel="samples per second, learned over fastest classical (median, quartiles)")
    place.legend(frameon=False, fontsize=8)
    refused = {f"{row['family']}, {row['solver']}: {row['refused']}." for row in rows if "refused" in row}
    return report.write(folder, "Throughput of inference", [
        "A trained DEQ with its trained solver, and with the classical one that is fastest at that batch size among those "
        "tuned on validation problems that solve as many samples (within a standard error): raw inputs to predictions, "
        "same inputs, same tolerance. Samples (segments of a text, with the memory of the one before) per second: medians "
        "of rounds in which all solvers take turns. Ratio: the learned solver's over the classical one's in the same "
        "round, above 1 where it is faster; bold where the quartiles are, too. Then, of both: score (accuracy, "
        "or bits a token; reference: of either at 1e-5), mean and most evaluations (the budget where it failed), share "
        "solved, share of predictions that are the reference's, where that was found. Made by `python -m experiments "
        "throughput --family NAME`; config.json in a family's folder has options, versions, machine and commit.",
        listed("", ordinary, COLUMNS),
        figures.save(figure, folder / "throughput.png"),
        ("`metabroyden.FixedBudget`: every sample gets as many evaluations as the median sample of that solver needs, in "
         "one compiled graph. Gain: over the ordinary solve of the same solver, in the same rounds.") if fixed else "",
        listed("With a fixed budget, compiled", fixed, FIXED),
        *sorted(refused),
    ])  # fmt: skip
