"""results/throughput/report.md and its figure, from rows alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.bench.runner import read_rows, row_files
from experiments.legacy.plots import new_axes, save_figure
from experiments.legacy.report import table
from metabroyden.storage import atomic_write

Row = dict[str, Any]
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
    """Write report.md and throughput.png over all families in a folder."""
    runs = {path.parent.name: read_rows(path) for path in row_files(folder, "*/rows.jsonl")}
    described = {name: json.loads((folder / name / "config.json").read_text()) for name in runs}
    pairs = [pair for name, rows in runs.items() for pair in _pairs(name, rows, "throughput")]
    fixed = [pair for name, rows in runs.items() for pair in _pairs(name, rows, "fixed")]
    figure = _dots(pairs, folder / "throughput.png")
    sections = [
        "# Throughput of inference",
        "A trained DEQ with its trained solver, and with the classical one that is fastest at that batch size among those "
        "tuned on validation problems that solve as many samples (within a standard error): raw inputs to predictions, "
        "same inputs, same tolerance. Samples (segments of a text, with the memory of the one before) per second: medians "
        "of rounds in which all solvers take turns. Ratio: the learned solver's over the classical one's in the same "
        "round, above 1 where it is faster. Then, learned and classical: score (accuracy, or bits a token; reference: "
        "at 1e-5), mean and most evaluations (the budget where it failed), share solved, share of predictions that are "
        "the reference's, where that was found.",
        table(_HEAD, [_cells(pair) for pair in pairs]),
        *(_verdicts(pairs, verdict) for verdict in ("faster", "neither faster nor slower", "slower")),
        _frail(pairs),
        f"![{figure.stem}]({figure.name})",
        *(_fixed_section(fixed) if fixed else ()),
        *_said(runs),
        "## Made by",
        "\n".join(_made(name, one) for name, one in described.items()),
    ]
    return atomic_write(folder / "report.md", "\n\n".join(section for section in sections if section) + "\n")


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


def _verdicts(pairs: list[Pair], verdict: str) -> str:
    found: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.verdict == verdict:
            found.setdefault(pair.family, []).append(str(pair.batch))
    named = "; ".join(f"{family} (batch {', '.join(batches)})" for family, batches in found.items())
    return f"The learned solver is {verdict}, by the quartiles of its ratio, on: {named or 'none'}."


def _frail(pairs: list[Pair]) -> str:
    """Classical solvers that solve too few to be held against, and are faster than the learned one all the same."""
    found = []
    for pair in pairs:
        for row in pair.others:
            ratio = float(np.median(np.array(pair.learned["rate"]) / row["rate"]))
            if ratio < min(1, pair.ratios[1]):
                solves = f"solves {row['solved']:.1%}, the learned one {pair.learned['solved']:.1%}"
                found.append(f"{pair.family}, batch {pair.batch}: {row['solver']} ({ratio:.2f}×; {solves})")
    return f"Faster than the learned solver, but solving too few to be held against it: {'; '.join(found) or 'none'}."


def _fixed_section(pairs: list[Pair]) -> list[str]:
    body = []
    for pair in pairs:
        gains = [f"{np.median(np.array(row['rate']) / row['ordinary']):.2f}×" for row in (pair.learned, pair.classical)]
        took = [f"{row['compile_seconds']:.0f} s" for row in (pair.learned, pair.classical)]
        body.append([*_cells(pair), ", ".join(gains), ", ".join(took)])
    return [
        "## With a fixed budget, compiled",
        "`metabroyden.FixedBudget`: every sample gets as many evaluations as the median sample of that solver needs, in one "
        "compiled graph. Gain: over the ordinary solve of the same solver, in the same rounds.",
        table([*_HEAD, "gain", "compiling"], body),
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
    figure, axes = new_axes(max(6.4, 0.75 * len(families) + 1.5))
    for number, batch in enumerate(batches):
        chosen = [pair for pair in pairs if pair.batch == batch]
        low, median, high = np.array([pair.ratios for pair in chosen]).T
        x = [families.index(pair.family) + 0.22 * (number - (len(batches) - 1) / 2) for pair in chosen]
        mark, colour = _MARKS[number % len(_MARKS)]
        spread = np.array([median - low, high - median])
        axes.errorbar(x, median, spread, fmt=mark, color=colour, markersize=5, elinewidth=1, label=f"batch {batch}")
    axes.axhline(1, color="0.4", linewidth=1)
    axes.set_yscale("log")
    ticks = [
        tick for tick in (0.25, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8) if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]
    ]
    axes.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_xticks(range(len(families)), families, rotation=30, ha="right")
    axes.set(ylabel="samples per second, learned over\nfastest classical (median, quartiles)")
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)
