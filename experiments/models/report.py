"""Pages of results/models: one a family with its figures, one over all, from rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import report
from experiments.bench.runner import Row, read_rows, row_files
from experiments.models.rows import DEQ, REGULARISED, TOLERANCES
from metabroyden.comparison import figures
from metabroyden.comparison.statistics import BEST, HEADLINE, Field, Outcome
from metabroyden.comparison.tables import Table, chosen, listed, pivot

HEADS = {DEQ: "DEQ", REGULARISED: "penalised", "unrolled": "unrolled", "explicit": "explicit", "flow": "neural ODE"}
LOOKS = {DEQ: ("#D55E00", "-"), REGULARISED: ("#E69F00", "--"), "unrolled": ("#0072B2", "-."), "explicit": ("#000000", ":"),
         "flow": ("#009E73", "--")}  # fmt: skip
"""Colour and line of each variant."""


class Results:
    """The rows of one family's folder, and its config.json.

    Attributes:
        quality: rows of that kind by variant.
        field: the classical solvers' outcomes, variants being its families.
    """

    def __init__(self, folder: Path) -> None:
        self.name, self.described = folder.name, report.read_config(folder)
        self.rows = read_rows(folder / "rows.jsonl")
        self.quality = {row["way"]: row for row in self.of("quality")}
        self.field, first = Field(self.of("solve")), self.quality[DEQ]
        self.metric, self.higher = first["metric"], first["higher"]

    def of(self, kind: str, **wanted: Any) -> list[Row]:
        """Rows of a kind with these values."""
        return chosen(self.rows, kind, **wanted)

    def shown(self, score: float) -> str:
        """A score as it is written."""
        return f"{100 * score:.2f}%" if self.higher else f"{score:.3f}"

    def score(self, way: str) -> str:
        """Of a variant on the test split, where it was trained."""
        return self.shown(self.quality[way]["score"]) if way in self.quality else ""

    def lead(self, score: float) -> str:
        """By how much the DEQ is better than a score, as a share of it."""
        return f"{100 * (self.quality[DEQ]['score'] / score - 1) * (1 if self.higher else -1):+.2f}%"

    def on_the_way(self, way: str) -> tuple[Row, Row]:
        """(the row of the last depth, the row of the best score) by the variant's solver, or by plain iteration."""
        rows = self.of("depth", way=way)
        rows = [row for row in rows if row["method"] == rows[0]["method"]]
        return rows[-1], (max if self.higher else min)(rows, key=lambda row: row["score"])


def ngrams(families: Sequence[Results]) -> Table:
    """Language models beside n-gram models."""

    def counted(one: Results) -> Row:
        return min(one.of("ngram"), key=lambda row: row["validation"])

    return listed("", [one for one in families if one.of("ngram")], [
        ("family", lambda one: one.name),
        ("DEQ", lambda one: one.score(DEQ)),
        ("its perplexity", lambda one: f"{2 ** one.quality[DEQ]['score']:.2f}"),
        ("explicit", lambda one: one.score("explicit")),
        ("n-gram", lambda one: "{score:.3f} (order {order})".format_map(counted(one))),
        ("to n-gram", lambda one: one.lead(counted(one)["score"])),
        ("with bets", lambda one: "{score:.3f}".format_map(one.of("recent")[0])),
        ("to that", lambda one: one.lead(one.of("recent")[0]["score"])),
        ("to explicit", lambda one: one.lead(one.quality["explicit"]["score"])),
    ])  # fmt: skip


def difficulty(families: Sequence[Results]) -> Table:
    """How hard the equilibria are to find."""
    body, names = [], ("Picard", "Anderson", "Broyden")
    for one, way in _variants(families):
        cells = ["; ".join(one.field.shown(way, name, tolerance) for tolerance in TOLERANCES) for name in names]
        best, (spectrum,) = one.field.must(way, BEST, 1e-2), one.of("spectrum", way=way)
        cells += [f"{one.field.named(way, BEST, 1e-2)}: {best}", f"{np.median(spectrum['radius']):.2f}"]
        body.append([one.name, way, *cells, "easy" if best.median < HEADLINE else ""])
    return Table("", ["family", "", *(f"{name} to 1e-2; 1e-3; 1e-4" for name in names), "best to 1e-2", "ρ", ""], body)


def splitting(families: Sequence[Results]) -> Table:
    """Operator splitting on all held-out inputs of the monotone networks."""
    body, names = [], {"forward-backward": "forward–backward", "Peaceman-Rachford": "Peaceman–Rachford"}
    every = {**names, "tuned Anderson": "tuned Anderson", "tuned Broyden": "tuned Broyden"}
    for one, way in _variants([one for one in families if one.of("guarantee")]):
        sure = [row for name in names for row in one.of("guarantee", way=way, solver=name)]
        solved = [f"{row['samples'] - row['failures']:,} of {row['samples']:,}, at most {row['worst']}" for row in sure]
        body.append([one.name, way, *(f"{one.field.must(way, name, 1e-3).median:g}" for name in every), *solved])
    return Table("", ["family", "", *every.values(), *(f"{name}, all" for name in names.values())], body)


def equilibria(families: Sequence[Results], *ways: str) -> Table:
    """Whether the score is best at the equilibrium."""
    body = []
    for one, way in _variants(families, *ways):
        last, best = one.on_the_way(way)
        lead, error = abs(best["over_last"]), best["over_last_error"]
        ahead = f"{100 * lead:.2f} ± {100 * error:.2f} points" if one.higher else f"{lead:.4f} ± {error:.4f}"
        scores = [f"{one.shown(row['score'])} at {row['evaluations']}" for row in (last, best)]
        body.append([one.name, way, scores[0], f"{last['residual'][1]:.1e}", scores[1], ahead])
    return Table("", ["family", "", "last", "median residual", "best", "lead of the best"], body)


def steps(families: Sequence[Results]) -> Table:
    """Cost of a training step."""
    body = []
    for one, way in _variants(families, *HEADS):
        (row,), unrolled = one.of("step", way=way), one.of("step", way="unrolled")
        ratios = [f"{row[key] / other[key]:.2f}×" for key in ("seconds", "peak_bytes") for other in unrolled]
        spent = "" if row["evaluations"] is None else f"{row['evaluations']:g}"
        body.append([one.name, way, f"{1000 * row['seconds']:.0f} ms", *(ratios or ["", ""]), spent])
    return Table("", ["family", "", "step", "time to unrolled", "peak memory to unrolled", "evaluations forward"], body)


def _variants(families: Iterable[Results], *ways: str) -> list[tuple[Results, str]]:
    """The trained variants of these names, or those that classical solvers ran on."""
    return [(one, way) for one in families for way in ways or one.field.families if way in one.quality]


def _where(words: str, table: Table) -> list[report.Section]:
    """A table with its words, or neither where it is empty."""
    return [words, table] if table.body else []


def write(folder: Path) -> Path:
    """Write report.md over all families that have results in a folder."""
    families = [Results(path.parent) for path in row_files(folder, "*/rows.jsonl")]
    return report.write(folder, "Models on real data", [
        "One folder a family, each with its report, figures, checkpoint, weights along training, and rows. Models were "
        "chosen by their score on validation data alone, before any solver was compared on them, and are frozen. Made by "
        "`python -m experiments models --family NAME`.",
        "## Quality on held-out data\n\nUnrolled: the same weight-tied network trained and evaluated at a fixed depth. "
        "Explicit: weights of its own in each layer, about as many parameters in all (group norms of as many groups as its "
        "width allows). Neural ODE: the flow z' = f(z, x) − z to time 1, by Runge–Kutta steps of about as many evaluations "
        "as the unrolled network's.",
        listed("", families, [
            ("family", lambda one: f"[{one.name}]({one.name}/report.md)"), ("metric", lambda one: one.metric),
            *((head, partial(Results.score, way=way)) for way, head in HEADS.items()),
            ("to unrolled", lambda one: one.lead(one.quality["unrolled"]["score"]) if "unrolled" in one.quality else ""),
            ("parameters", lambda one: f"{one.quality[DEQ]['parameters']:,}"),
        ]),
        *_where(
            "Language models on held-out plays, in bits a token, beside n-gram models (modified Kneser–Ney); with bets: the "
            "same n-gram model when it also bets on what followed the last time, which the stems of our models are told.",
            ngrams(families),
        ),
        "## How hard the equilibria are to find\n\nMedian evaluations to a relative residual (share of samples within the "
        "budget); the best classical solver, tuned ones included: among those whose success is within a standard error of "
        f"the highest, the smallest median. Easy: fewer than {HEADLINE} evaluations to 1e-2; such a family proves "
        "little about solvers.",
        difficulty(families),
        *_where(
            "Monotone networks: median evaluations to 1e-3 (α, and the others' settings, tuned on validation problems); and "
            "how many of all held-out inputs the splitting methods solve to 1e-4, with how many evaluations for the last.",
            splitting(families),
        ),
        "## Real equilibria\n\nThe score at the last depth, the best score on the way there, and its lead with the standard "
        "error of that (paired, over samples).",
        equilibria(families, DEQ, "unrolled"),
        "## Cost of a training step\n\nLoss, penalty and backward of one batch, on the CPU unless said otherwise.",
        steps(families),
    ])  # fmt: skip


def write_family(folder: Path) -> Path:
    """Write a family's report.md and its figures, from its rows and config.json."""
    one = Results(folder)
    taken = {row["way"]: row for row in one.of("step")}

    def spread(rows: list[Row]) -> str:
        found = Outcome.of(rows)
        return f"{found.median:g} / {found.p90:g} / {100 * found.success:.0f}%"

    return report.write(folder, one.name, [
        report.made_by(one.described),
        listed("Quality", list(one.quality.values()), [
            ("", "{way}"),
            (f"{one.metric}, test", lambda row: one.shown(row["score"])),
            ("validation", lambda row: one.shown(row["validation"])),
            ("parameters", "{parameters:,}"),
            ("training", "{seconds:.0f} s"),
            ("step", lambda row: f"{1000 * taken[row['way']]['seconds']:.0f} ms"),
            ("peak of a step", lambda row: f"{taken[row['way']]['peak_bytes'] / 2**20:.1f} MiB"),
        ]),
        training(one, folder / "training.png"),
        listed("n-gram models of the same training data, and the best on validation with bets on recent repeats",
               one.of("ngram") + one.of("recent"), [("", "{row}"), ("order", "{order}"), ("test", "{score:.3f}")]),
        listed("Bits by which earlier predictions change when the last tokens are replaced", one.of("leak"), [
            ("solved to", "{tolerance:g}"), ("mean", "{mean:.1e}"), ("most", "{most:.1e}")]),
        "## Equilibria", equilibria([one], DEQ, REGULARISED, "unrolled"), depth(one, folder / "depth.png"),
        f"## Difficulty\n\nEvaluations of f: median / 90th percentile / share of samples that got there within "
        f"{one.field.budget}. Tuned solvers: the best of a grid on validation problems.",
        pivot("", one.of("solve"), "{family}, {solver}: `{options}`", "{tolerance:g}", spread),
        listed("Spectral radius at the equilibrium", one.of("spectrum"), [
            ("", "{way}"),
            ("median", lambda row: f"{np.median(row['radius']):.3f}"),
            ("largest", lambda row: f"{np.nanmax(row['radius']):.3f}"),
            ("found to 1e-5", lambda row: f"{100 * row['converged']:.0f}%")]),
        *([units(one, folder / "units.png")] if one.of("units") else []),
        "## Frozen\n\nModel, training and its solver: config.json.",
        "\n".join(f"- `{name}`: sha256 `{value}`" for name, value in one.described["sha256"].items()),
        f"- `episodes.safetensors`: weights after epochs {', '.join(map(str, one.described['episodes']))}",
    ])  # fmt: skip


def _line(place: Any, way: str, x: Any, y: Any, **more: Any) -> None:
    colour, dashes = LOOKS[way]
    figures.line(place, way, x, y, **{"color": colour, "linestyle": dashes, "linewidth": 1.9, **more})


def training(one: Results, path: Path) -> Path:
    """Validation score by epoch of every variant."""
    figure, place = figures.axes(xlabel="epoch", ylabel=f"{one.metric}, validation", title=f"{one.name}: training")
    for way in one.quality:
        _line(place, way, *zip(*((row["epoch"], row["score"]) for row in one.of("epoch", way=way)), strict=True))
    place.legend(frameon=False, fontsize=8)
    return figures.save(figure, path)


def depth(one: Results, path: Path) -> Path:
    """Score and residual against evaluations, of the solver and of plain iteration."""
    figure, (left, right) = figures.grid(2, 2, (4.8, 4.0))
    for way, method in dict.fromkeys((row["way"], row["method"]) for row in one.of("depth")):
        rows, style = one.of("depth", way=way, method=method), dict[str, Any](label=f"{way}, {method}")
        if method == "plain iteration" and way != "unrolled":
            style |= {"alpha": 0.5, "linewidth": 1.3}
        k, residual = [row["evaluations"] for row in rows], np.array([row["residual"][1] for row in rows], dtype=float)
        _line(left, way, k, [row["score"] for row in rows], **style)
        _line(right, way, k, np.where(np.isfinite(residual), residual, np.nan), **style)
    left.axvline(one.described["depth"], color="0.6", linewidth=0.8)
    left.set_title("line: depth of the unrolled network", fontsize=9)
    left.set(xlabel="evaluations of f", ylabel=f"{one.metric}, test", xscale="log")
    right.set(xlabel="evaluations of f", ylabel="relative residual, median", xscale="log", yscale="log")
    right.set_ylim(top=min(right.get_ylim()[1], 10))  # what diverges leaves the picture
    right.legend(frameon=False, fontsize=7)
    return figures.save(figure, path)


def units(one: Results, path: Path) -> Path:
    """Activations by depth with their fixed points, and the distance to the fixed point, of DEQ and unrolled network."""
    rows = one.of("units")
    figure, (*places, last) = figures.grid(len(rows) + 1, len(rows) + 1, (4.4, 3.8))
    for place, row in zip(places, rows, strict=True):
        for number, (curve, star) in enumerate(zip(row["activations"], row["fixed_point"], strict=True)):
            place.plot(curve, color=f"C{number}", linewidth=1.3)
            place.axhline(star, color=f"C{number}", linewidth=0.7, linestyle=":")
        place.set(xlabel="depth", ylabel="activation")
        place.set_title(f"{row['way']}: dotted, the fixed point (residual {row['residual']:.0e})", fontsize=9)
        _line(last, row["way"], range(len(row["distance"])), row["distance"])
    last.set(xlabel="depth", ylabel="relative distance to the fixed point", yscale="log")
    last.legend(frameon=False, fontsize=8)
    return figures.save(figure, path)
