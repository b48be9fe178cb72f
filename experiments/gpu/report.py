"""results/gpu/report.md and its figure, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import report
from experiments.bench.runner import Row, read_rows
from metabroyden.comparison import figures
from metabroyden.comparison.figures import FLAGSHIP
from metabroyden.comparison.statistics import Outcome, best, fastest
from metabroyden.comparison.tables import Table, chosen, grouped, listed, middle, number

WORDS = """\
A mean over the problems of a batch; a problem that is not solved counts as the budget. The best classical solver is, of
those that solve most give or take a standard error, the one of the fewest evaluations in the median; the fastest is, of the
same, the one of the least time. Times are medians of rounds in which the solvers take turns; of single problems, over eight
of them. Batches that are larger than the problems there are repeat these."""
FIGURE = """\
*Evaluations of the learned solver over those of the best classical one (dotted) and its time over the fastest one's
(solid), to 1e-2, by batch size. Below 1 is less. Where f is dear the two lines meet.*"""
COMPILED = """\
The same solves as graphs, beside the usual ones of the same solver: seconds over the usual one's. "fixed" is a fixed
budget as one graph (a CUDA graph), of as many evaluations as nine in ten problems need; "chunked" is
`solve(compiled=True)`."""


def _ran(cell: Any) -> Any:
    """A cell of solves as graphs; nothing where they could not be had."""
    return lambda row: "" if "refused" in row else cell(row)


GRAPHS: list[Any] = [
    ("", "{name}"),
    ("", "{row}"),
    ("batch", "{batch}"),
    ("solver", lambda row: figures.label(row["solver"])),
    ("budget", "{budget}"),
    ("time over the usual", lambda row: row.get("refused") or number(_ratio(row["seconds"], row["usual"]))),
    ("ms", _ran(lambda row: f"{1e3 * middle(row['seconds']):.2f}")),
    ("solved", _ran(lambda row: f"{row['solved']:.1%}")),
    ("compiling, s", _ran(lambda row: f"{row['compile_seconds']:.1f}")),
]
FITS: list[Any] = [
    ("", "{name}"),
    ("outer steps", "{steps}"),
    ("a second", lambda row: f"{row['steps'] / row['training_seconds']:.1f}"),
    ("seconds of the call", "{seconds:.0f}"),
    ("returned", lambda row: "yes" if row["returned"] else "; ".join(row["reasons"])),
]


def write(folder: Path) -> Path:
    """The report of a folder."""
    rows, described = read_rows(folder / "rows.jsonl"), report.read_config(folder)
    pairs = [pair for of in grouped(chosen(rows, "solve"), "name", "batch", "tolerance") for pair in _pairs(of, rows)]
    names = list(dict.fromkeys(pair["name"] for pair in pairs))
    versions = described["provenance"]["versions"]
    sections: list[report.Section] = [
        f"On {described['card']}, torch {versions['torch']}, CUDA {described['cuda'] or 'none'}; "
        f"{described['provenance']['cores']} cores.",
        report.made_by(described),
        *(f"Left out, since the time was over: {name}." for name in described["left_out"]),
        *([] if any(row["kind"] == "peer" for row in chosen(rows, "solve")) else ["torchdeq is not installed there."]),
        *map(_told, chosen(rows, "tests")),
        WORDS,
    ]
    if names:
        sections += [figures.save(_figure(pairs, names), folder / "batches.png"), FIGURE, _table(pairs)]
    graphs = [row for kind in ("fixed", "chunked") for row in chosen(rows, kind)]
    sections += [COMPILED, listed("", graphs, GRAPHS)]
    sections += ["Meta-training there: one call of `fit_solver` each.", listed("", chosen(rows, "fit"), FITS)]
    return report.write(folder, "On a GPU", sections)


def _told(row: Row) -> str:
    return (
        f"Tests marked cuda: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped, "
        f"exit code {row['code']}, {row['seconds']:.0f} s."
    )


def _pairs(of: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The learned solver beside the best and the fastest classical one and torchdeq's; none where one is missing."""
    found = {
        row["solver"]: Outcome(*(np.array([row[key]]) for key in ("evaluations", "solved", "seconds"))) for row in of
    }
    classical = {row["solver"]: found[row["solver"]] for row in of if row["kind"] == "classical"}
    if FLAGSHIP not in found or not classical:
        return []
    first, ours, fewest, quickest = of[0], found[FLAGSHIP], best(classical), fastest(classical)
    key = {name: first[name] for name in ("name", "batch")}
    peers = {row["solver"]: _over(ours, found[row["solver"]]) for row in of if row["kind"] == "peer"}
    return [{
        **key, "tolerance": first["tolerance"], "ours": ours, "best": fewest, "theirs": classical[fewest],
        "fastest": quickest, "evaluations": ours.mean / classical[fewest].mean, "time": _over(ours, classical[quickest]),
        "peers": peers, "f": middle(chosen(rows, "f", **key)[0]["seconds"]),
    }]  # fmt: skip


def _over(ours: Outcome, theirs: Outcome) -> float:
    return _ratio(ours.seconds, theirs.seconds)


def _ratio(ours: Any, theirs: Any) -> float:
    """Median of the ratios of rounds."""
    return float(np.median(np.divide(ours, theirs)))


def _table(pairs: Sequence[Row]) -> Table:
    def each(row: Row) -> float:
        """Milliseconds of the learned solver for an evaluation of the batch's slowest problem."""
        return 1e3 * float(np.median(row["ours"].seconds)) / float(row["ours"].evaluations.max())

    return listed("", pairs, [
        ("", "{name}"), ("batch", "{batch}"), ("to", "{tolerance:g}"), ("f, ms", lambda row: f"{1e3 * row['f']:.2f}"),
        ("an evaluation, ms", lambda row: f"{each(row):.2f}"),
        ("learned", lambda row: f"{row['ours'].mean:.1f} ({row['ours'].success:.1%})"),
        ("best classical", lambda row: f"{row['theirs'].mean:.1f} ({row['theirs'].success:.1%}) {row['best']}"),
        ("evaluations", lambda row: number(row["evaluations"])),
        ("time", lambda row: f"{number(row['time'])} {row['fastest']}"),
        ("time over torchdeq's", lambda row: ", ".join(f"{number(one)} {name}" for name, one in row["peers"].items())),
    ])  # fmt: skip


def _figure(pairs: Sequence[Row], names: Sequence[str]) -> Any:
    def draw(place: Any, name: str) -> None:
        those = [
            pair for pair in pairs if pair["name"] == name and pair["tolerance"] == max(p["tolerance"] for p in pairs)
        ]
        at, style = [pair["batch"] for pair in those], {"marker": "o", "color": figures.colour(FLAGSHIP)}
        place.plot(at, [pair["time"] for pair in those], label="time", **style)
        place.plot(at, [pair["evaluations"] for pair in those], label="evaluations", linestyle=":", **style)
        place.axhline(1, color="black", linewidth=0.8)
        place.set(xscale="log", yscale="log")
        figures.log_ticks(place, at)
        figures.log_ticks(place, (0.1, 0.2, 0.3, 0.5, 1, 2), axis="y")

    return figures.panels(names, draw, "problems solved at once", "learned over classical")
