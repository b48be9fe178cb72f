"""Inference with a trained solver as users run it: samples per second and score, against the fastest classical solver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import metabroyden as mb
from experiments.bench import report, runner, solvers
from experiments.bench.figures import axes, log_ticks, save
from experiments.bench.options import Budgeted, OnFamily
from experiments.bench.problems import Family
from experiments.bench.runner import Row, at_least_one, read_rows, row_files, ticks
from experiments.bench.tables import Table
from experiments.throughput.laps import Throughput as Measurement
from experiments.throughput.laps import raw_inputs

FREE = ("family", "models", "meta", "compiled")
_TUNED_ON = 64  # validation problems


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
    """The whole job for one family, tuned solvers apart, and the report over all families that there are."""
    at_least_one(config, "samples", "rounds", "budget", "threads")
    if min(config.batches, default=0) < 1:
        raise ValueError(f"batches must be of at least 1 sample, got {config.batches}")
    family, learned = Family(config.family, config.models), _learned(config)
    job = runner.Run(config, free=FREE, shared=(), inputs=[family.path], always=f"--family {config.family}")
    with runner.threads(config.threads):
        inputs = raw_inputs(family.model(), family.criterion, config.samples)
        if max(config.batches) > len(inputs):
            raise ValueError(f"a batch of {max(config.batches)} is more than the {len(inputs)} test samples")
        options = {"rtol": config.rtol, "max_nfe": config.budget}
        every = {config.solver: learned, **_classical(config, family)}
        models = {name: family.model(solver=solver, **options) for name, solver in every.items()}
        with ticks(config.family, len(config.batches), show=config.progress) as done:
            rows = Measurement(models, config.solver, inputs, config.rounds, done).rows(
                config.batches, compiled=config.compiled
            )
        more = {"metric": family.criterion.metric, "model_sha256": runner.sha256(family.path)}
        described = job.described(**more)
    runner.publish(job.folder / config.family, [{"family": config.family, **row} for row in rows], described)
    runner.show(write(job.folder))


def _learned(config: Throughput) -> Any:
    if config.solver in mb.list_pretrained():
        return mb.load_solver(config.solver)
    path = config.meta / config.family / config.solver / "solver.safetensors"
    if not path.exists():
        kind, _, seed = config.solver.rpartition("-seed")
        if not (kind and seed.isdigit()):
            shipped = ", ".join(mb.list_pretrained())
            raise ValueError(f"solver must be NAME-seedNUMBER or a shipped one ({shipped}), got {config.solver!r}")
        command = f"python -m experiments meta --family {config.family} --solver {kind} --seed {seed}"
        raise FileNotFoundError(f"{path} is missing: train it with `{command}`")
    return mb.load_solver(path)


def _classical(config: Throughput, family: Family) -> dict[str, Any]:
    """The tuned ones, found once and kept."""
    folder = config.runs / config.family / runner.digest(family.path, config.budget, _TUNED_ON)
    if not folder.exists():
        found = solvers.tuned(family.problems("validation", _TUNED_ON), config.budget, splitting=family.splitting)
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        for name, solver in found.items():
            mb.save_solver(solver, unfinished / f"{name}.solver")
        unfinished.rename(folder)
    return {file.stem: mb.load_solver(file) for file in sorted(folder.glob("*.solver"))}


_MARKS = (("o", "#D55E00"), ("s", "#0072B2"), ("^", "#009E73"), ("D", "#CC79A7"), ("v", "#000000"))
_HEAD = [
    "",
    "batch",
    "learned /s",
    "classical /s",
    "ratio (quartiles)",
    "score",
    "evaluations",
    "solved",
    "same answers",
]


class Pair(NamedTuple):
    """The learned solver, the classical one it is held against, and the other ones, at one batch size of a family."""

    family: str
    batch: int
    learned: Row
    classical: Row
    others: list[Row]
    reference: Row

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Quartiles over rounds of the learned solver's samples per second over the classical one's."""
        return _quartiles(np.array(self.learned["rate"]) / np.array(self.classical["rate"]))

    @property
    def verdict(self) -> str:
        """By whether the quartiles lie on one side of 1."""
        low, _, high = self.ratios
        return "faster" if low > 1 else "slower" if high < 1 else "neither faster nor slower"


def write(folder: Path) -> Path:
    """report.md and throughput.png over all families in a folder, from rows alone."""
    runs = {path.parent.name: read_rows(path) for path in row_files(folder, "*/rows.jsonl")}
    described = {name: report.read_config(folder / name) for name in runs}
    pairs, fixed = (
        [pair for name, rows in runs.items() for pair in _pairs(name, rows, kind)] for kind in ("throughput", "fixed")
    )
    words = (
        "A trained DEQ with its trained solver, and with the classical one that is fastest at that batch size among those "
        "tuned on validation problems that solve as many samples (within a standard error): raw inputs to predictions, "
        "same inputs, same tolerance. Samples (segments of a text, with the memory of the one before) per second: medians "
        "of rounds in which all solvers take turns. Ratio: the learned solver's over the classical one's in the same "
        "round, above 1 where it is faster; bold where the quartiles are, too. Then, of both: score (accuracy, "
        "or bits a token; reference: at 1e-5), mean and most evaluations (the budget where it failed), share solved, share "
        "of predictions that are the reference's, where that was found."
    )
    table, figure = Table("", _HEAD, [_cells(pair) for pair in pairs]), _dots(pairs, folder / "throughput.png")
    sections: list[report.Section] = [words, table, figure]
    sections += _fixed_section(fixed) if fixed else []
    sections += [*_said(runs), "## Made by", "\n".join(_made(name, one) for name, one in described.items())]
    return report.write(folder, "Throughput of inference", sections)


def _pairs(family: str, rows: list[Row], kind: str) -> Iterator[Pair]:
    (reference,) = (row for row in rows if row["row"] == "reference")
    for batch in dict.fromkeys(row["batch"] for row in rows if row["row"] == kind):
        here = [row for row in rows if row["row"] == kind and row["batch"] == batch and "refused" not in row]
        ours = [row for row in here if row["learned"]]
        theirs = [row for row in here if not row["learned"] and row.get("best", True)]
        if ours and theirs:
            others = [row for row in here if row not in (ours[0], theirs[0])]
            yield Pair(family, batch, ours[0], theirs[0], others, reference)


def _quartiles(values: np.ndarray) -> tuple[float, float, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(low), float(median), float(high)


def _cells(pair: Pair) -> list[str]:
    ours, theirs = pair.learned, pair.classical
    low, median, high = pair.ratios
    ratio = f"**{median:.2f}×**" if pair.verdict == "faster" else f"{median:.2f}×"
    return [
        pair.family,
        f"{pair.batch}",
        f"{np.median(ours['rate']):,.0f}",
        f"{np.median(theirs['rate']):,.0f} {theirs['solver']}",
        f"{ratio} ({low:.2f}–{high:.2f})",
        f"{ours['score']:.4f}, {theirs['score']:.4f} (reference {pair.reference['score']:.4f})",
        f"{ours['evaluations']:.1f} most {ours['most']}, {theirs['evaluations']:.1f} most {theirs['most']}",
        f"{ours['solved']:.1%}, {theirs['solved']:.1%}",
        ", ".join("—" if row["agrees"] is None else f"{row['agrees']:.1%}" for row in (ours, theirs)),
    ]


def _fixed_section(pairs: list[Pair]) -> list[Any]:
    body = []
    for pair in pairs:
        gains = [f"{np.median(np.array(row['rate']) / row['ordinary']):.2f}×" for row in (pair.learned, pair.classical)]
        took = [f"{row['compile_seconds']:.0f} s" for row in (pair.learned, pair.classical)]
        body.append([*_cells(pair), ", ".join(gains), ", ".join(took)])
    return [
        "`metabroyden.FixedBudget`: every sample gets as many evaluations as the median sample of that solver needs, in one "
        "compiled graph. Gain: over the ordinary solve of the same solver, in the same rounds.",
        Table("With a fixed budget, compiled", [*_HEAD, "gain", "compiling"], body),
    ]


def _said(runs: dict[str, list[Row]]) -> list[str]:
    """What could not be compiled, a sentence each."""
    found = [(family, row) for family, rows in runs.items() for row in rows if row["row"] == "fixed"]
    refused = {f"{family}, {row['solver']}: {row['refused']}." for family, row in found if "refused" in row}
    failed = {f"{family}: {row['uncompiled']}." for family, row in found if row.get("uncompiled")}
    return sorted(refused | failed)


def _made(name: str, described: dict[str, Any]) -> str:
    made = described["provenance"]
    return f"- {name}: `{described['command']}`, torch {made['versions']['torch']}, commit {made['commit']}"


def _dots(pairs: list[Pair], path: Path) -> Path:
    families, batches = (list(dict.fromkeys(getattr(pair, key) for pair in pairs)) for key in ("family", "batch"))
    figure, place = axes(max(6.4, 0.75 * len(families) + 1.5))
    for number, batch in enumerate(batches):
        chosen = [pair for pair in pairs if pair.batch == batch]
        low, median, high = np.array([pair.ratios for pair in chosen]).T
        x = [families.index(pair.family) + 0.22 * (number - (len(batches) - 1) / 2) for pair in chosen]
        mark, colour = _MARKS[number % len(_MARKS)]
        spread = np.array([median - low, high - median])
        place.errorbar(x, median, spread, fmt=mark, color=colour, markersize=5, elinewidth=1, label=f"batch {batch}")
    place.axhline(1, color="0.4", linewidth=1)
    ticks = [
        tick for tick in (0.25, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8) if place.get_ylim()[0] <= tick <= place.get_ylim()[1]
    ]
    log_ticks(place, ticks, "y", "×")
    place.set_xticks(range(len(families)), families, rotation=30, ha="right")
    place.set(ylabel="samples per second, learned over\nfastest classical (median, quartiles)")
    place.legend(frameon=False, fontsize=8)
    return save(figure, path)
