"""results/models: a page and figures for each family, and one report over all of them, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.report import made_by, read_config
from experiments.bench.runner import read_rows, row_files
from experiments.bench.tables import markdown as table
from experiments.models import plots
from metabroyden.storage import atomic_write

Row = dict[str, Any]
DEQ, REGULARISED = "DEQ", "DEQ, Jacobian penalty"
HARD = 12
"""A family is easy where the best classical solver's median to 1e-2 is below this (the rule of the project's headlines)."""
TOLERANCES = ("0.01", "0.001", "0.0001")


class FamilyResults:
    """The rows of one family's folder, and what is read off them.

    Attributes:
        name: the family. rows: as `experiments.models.rows` makes them. described: its config.json.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.rows: list[Row] = read_rows(folder / "rows.jsonl")
        self.described: dict[str, Any] = read_config(folder)

    def of(self, kind: str, **wanted: Any) -> list[Row]:
        """Rows of a kind with these values."""
        return [row for row in self.rows if row["row"] == kind and all(row.get(key) == wanted[key] for key in wanted)]

    @property
    def ways(self) -> list[str]:
        """The variants that were trained."""
        return [row["way"] for row in self.of("quality")]

    @property
    def higher(self) -> bool:
        """Whether more of the metric is better."""
        return self.of("quality")[0]["higher"]

    def score(self, way: str) -> float | None:
        """The test score of a variant; None where it was not trained."""
        return next((row["score"] for row in self.of("quality", way=way)), None)

    def shown(self, score: float) -> str:
        """A score as it is written."""
        return f"{100 * score:.2f}%" if self.higher else f"{score:.3f}"

    def gain(self, way: str) -> float | None:
        """By how much the DEQ is better than another variant, as a share of that one's score; negative where it is worse."""
        theirs = self.score(way)
        return None if theirs is None else self.lead(theirs)

    def lead(self, score: float) -> float:
        """By how much the DEQ is better than a score, as a share of it."""
        return (self.of("quality", way=DEQ)[0]["score"] / score - 1) * (1 if self.higher else -1)

    def summary(self, row: Row, tolerance: str) -> dict[str, float]:
        """Median, 90th percentile and success of a row of difficulty."""
        spent, reached = (np.array(row[key][tolerance]) for key in ("nfe", "reached"))
        return {
            "median": float(np.median(spent)),
            "p90": float(np.percentile(spent, 90)),
            "success": float(reached.mean()),
        }

    def best(self, way: str, tolerance: str = "0.01") -> tuple[str, dict[str, float]]:
        """The solver with the fewest evaluations (mean of medians and 90th percentiles, failures at the budget)."""
        scored = [(row["solver"], self.summary(row, tolerance)) for row in self.of("difficulty", way=way)]
        return min(scored, key=lambda pair: (pair[1]["median"], pair[1]["p90"]))

    def at_equilibrium(self, way: str = DEQ) -> tuple[Row, Row]:
        """(the row of the last depth, the row of the best score) by the way's solver, or by plain iteration."""
        rows = self.of("depth", way=way)
        methods = list(dict.fromkeys(row["method"] for row in rows))
        chosen = [row for row in rows if row["method"] == methods[0]]
        pick = max if self.higher else min
        return chosen[-1], pick(chosen, key=lambda row: row["score"])


def write_family(folder: Path) -> Path:
    """Write a family's report.md and its figures, from its rows and config.json."""
    results = FamilyResults(folder)
    figures = plots.draw(results, folder)
    shown = {path.stem: f"![{path.stem}]({path.name})" for path in figures}
    described = results.described
    training = ", ".join(f"{key} {value}" for key, value in described["training"].items())
    hashes = "\n".join(f"- `{name}`: sha256 `{value}`" for name, value in described["sha256"].items())
    sections = [
        f"# {results.name}",
        made_by(described),
        "## Quality",
        quality_table(results),
        *([ngram_line(results)] if results.of("ngram") else []),
        shown["training"],
        "## Equilibria",
        equilibrium_line(results),
        shown["depth"],
        "## Difficulty\n\nEvaluations of f: median / 90th percentile / share of samples that got there within "
        f"{described['config']['budget']}. Tuned solvers: the best of a grid on validation problems.",
        difficulty_table(results),
        *(shown[name] for name in ("units", "tokens", "parts") if name in shown),
        "## Frozen",
        f"{hashes}\n- `episodes.safetensors`: weights after epochs {', '.join(map(str, described['episodes']))}",
        "## Setting",
        f"- training began at commit {described['trained']['commit']}\n- model: {described['kind']}, {described['model']}\n"
        f"- training: {training}\n- solver in training: "
        f"`{described['solver']}` to {described['rtol']:g}; backward: `{described['backward']}`; unrolled and explicit "
        f"networks of {described['depth']} layers; weight of the Jacobian penalty {described['jacobian']:g}",
    ]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def write(folder: Path) -> Path:
    """Write report.md over all families that have results in a folder."""
    families = [FamilyResults(path.parent) for path in row_files(folder, "*/rows.jsonl")]
    sections = [
        "# Models on real data",
        "One folder a family, each with its report, figures, checkpoint, weights along training, and rows. Models were "
        "chosen by their score on validation data alone, before any solver was compared on them, and are frozen. Made by "
        "`python -m experiments models --family NAME`.",
        "## Quality on held-out data",
        "Unrolled: the same weight-tied network trained and evaluated at a fixed depth. Explicit: weights of its own in "
        "each layer, about as many parameters in all (group norms of as many groups as its width allows). Neural ODE: the "
        "flow z' = f(z, x) − z to time 1, by Runge–Kutta steps of about as many evaluations as the unrolled network's.",
        _quality_overview(families),
        *_language_overview(families),
        "## How hard the equilibria are to find",
        "Median evaluations to a relative residual (share of samples within the budget); the best classical solver, tuned "
        f"ones included. Easy: fewer than {HARD} evaluations to 1e-2; such a family proves little about solvers.",
        _difficulty_overview(families),
        *_splitting_overview(families),
        "## Real equilibria",
        "The score at the last depth, the best score on the way there, and its lead with the standard error of that "
        "(paired, over samples).",
        _equilibrium_overview(families),
        "## Cost of a training step\n\nLoss, penalty and backward of one batch, on the CPU unless said otherwise.",
        _step_overview(families),
    ]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def quality_table(results: FamilyResults) -> str:
    """Scores, parameters, training time, cost of a step."""
    steps = {row["way"]: row for row in results.of("step")}
    body = []
    for row in results.of("quality"):
        step = steps[row["way"]]
        body.append(
            [
                row["way"],
                results.shown(row["score"]),
                results.shown(row["validation"]),
                f"{row['parameters']:,}",
                f"{row['seconds']:.0f} s",
                f"{1000 * step['seconds']:.0f} ms",
                f"{step['peak_bytes'] / 2**20:.1f} MiB",
            ]
        )
    metric = results.of("quality")[0]["metric"]
    return table(["", f"{metric}, test", "validation", "parameters", "training", "step", "peak of a step"], body)


def ngram_line(results: FamilyResults) -> str:
    """The n-gram models' scores, and what solves short of the equilibrium tell of the future."""
    scores = ", ".join(f"{row['order']}: {row['score']:.3f}" for row in results.of("ngram"))
    bets = results.of("recent")
    told_of = (
        f"; betting on what followed within {bets[0]['within']} tokens, it has {bets[0]['score']:.3f}" if bets else ""
    )
    told = [f"to {row['tolerance']:g}: {row['mean']:.1e}, at most {row['most']:.1e}" for row in results.of("leak")]
    return (
        f"n-gram models of the same training data (modified Kneser–Ney), test bits by order: {scores}; best on "
        f"validation: order {chosen_ngram(results)['order']}{told_of}.\n\nReplacing the last tokens of a segment changes "
        f"the bits of those before, in the mean, solved {'; '.join(told)}. Scores are at equilibria to 1e-5."
    )


def chosen_ngram(results: FamilyResults) -> Row:
    """The n-gram model that is best on validation."""
    return min(results.of("ngram"), key=lambda row: row["validation"])


def equilibrium_line(results: FamilyResults) -> str:
    """Whether the score is best at the equilibrium, for the DEQ and for its unrolled twin."""
    lines = []
    for way in (DEQ, REGULARISED, "unrolled"):
        if results.of("depth", way=way):
            last, best = results.at_equilibrium(way)
            lines.append(
                f"- {way}: {results.shown(last['score'])} after {last['evaluations']} evaluations (median residual "
                f"{last['residual'][1]:.1e}); best on the way {results.shown(best['score'])}, after {best['evaluations']}"
            )
    return "\n".join(lines)


def difficulty_table(results: FamilyResults) -> str:
    """Every solver on every trained DEQ."""
    body = []
    for row in results.of("difficulty"):
        cells = []
        for tolerance in TOLERANCES:
            s = results.summary(row, tolerance)
            cells.append(f"{s['median']:g} / {s['p90']:g} / {100 * s['success']:.0f}%")
        body.append([row["way"], row["solver"], f"`{row['config']}`", *cells])
    lines = [table(["", "solver", "", *TOLERANCES], body)]
    for row in results.of("spectrum"):
        radius = np.array(row["radius"])
        lines.append(
            f"{row['way']}: spectral radius at the equilibrium {np.median(radius):.3f} (median; largest "
            f"{np.nanmax(radius):.3f}); {100 * row['converged']:.0f}% of equilibria found to 1e-5."
        )
    return "\n\n".join(lines)


def _quality_overview(families: Sequence[FamilyResults]) -> str:
    body = []
    for results in families:
        scores = [results.score(way) for way in (DEQ, REGULARISED, "unrolled", "explicit", "flow")]
        gain = results.gain("unrolled")
        body.append(
            [
                f"[{results.name}]({results.name}/report.md)",
                results.of("quality")[0]["metric"],
                *("" if score is None else results.shown(score) for score in scores),
                "" if gain is None else f"{100 * gain:+.2f}%",
                f"{results.of('quality')[0]['parameters']:,}",
            ]
        )
    header = ["family", "metric", "DEQ", "penalised", "unrolled", "explicit", "neural ODE", "to unrolled", "parameters"]
    return table(header, body)


def _language_overview(families: Sequence[FamilyResults]) -> list[str]:
    """Language models beside n-gram models of the same training data; nothing where there are none."""
    body = []
    for results in families:
        ours, explicit = results.score(DEQ), results.score("explicit")
        if not results.of("ngram") or ours is None or explicit is None:
            continue
        best, bets = chosen_ngram(results), results.of("recent")
        body.append(
            [
                results.name,
                f"{ours:.3f}",
                f"{2**ours:.2f}",
                f"{explicit:.3f}",
                f"{best['score']:.3f} (order {best['order']})",
                f"{100 * results.lead(best['score']):+.2f}%",
                f"{bets[0]['score']:.3f}" if bets else "",
                f"{100 * results.lead(bets[0]['score']):+.2f}%" if bets else "",
                f"{100 * results.lead(explicit):+.2f}%",
            ]
        )
    head = ["family", "DEQ", "its perplexity", "explicit", "n-gram", "to n-gram", "with bets", "to that", "to explicit"]
    words = (
        "Language models on held-out plays, in bits a token, beside n-gram models (modified Kneser–Ney); with bets: the "
        "same n-gram model when it also bets on what followed the last time, which the stems of our models are told."
    )
    return [words, table(head, body)] if body else []


def _splitting_overview(families: Sequence[FamilyResults]) -> list[str]:
    """Operator splitting on all held-out inputs of the monotone networks; nothing where there are none."""
    body = []
    for results in families:
        for way in (DEQ, REGULARISED):
            difficulty = {row["solver"]: row for row in results.of("difficulty", way=way)}
            names = ["forward-backward", "Peaceman-Rachford", "tuned Anderson", "tuned Broyden"]
            sure = {row["solver"]: row for row in results.of("guarantee", way=way)}
            if not sure:
                continue
            medians = [f"{results.summary(difficulty[name], '0.001')['median']:g}" for name in names]
            solved = [
                f"{row['samples'] - row['failures']:,} of {row['samples']:,}, at most {row['worst']}"
                for row in (sure[name] for name in names[:2])
            ]
            body.append([results.name, way, *medians, *solved])
    head = ["family", "", "forward–backward", "Peaceman–Rachford", "tuned Anderson", "tuned Broyden"]
    words = (
        "Monotone networks: median evaluations to 1e-3 (α, and the others' settings, tuned on validation problems); and how "
        "many of all held-out inputs the splitting methods solve to 1e-4, with how many evaluations for the last."
    )
    return [words, table([*head, "forward–backward, all", "Peaceman–Rachford, all"], body)] if body else []


def _difficulty_overview(families: Sequence[FamilyResults]) -> str:
    body = []
    for results in families:
        for way in (DEQ, REGULARISED):
            rows = {row["solver"]: row for row in results.of("difficulty", way=way)}
            if not rows:
                continue
            best, s = results.best(way)
            radius = np.array(results.of("spectrum", way=way)[0]["radius"])
            cells = []
            for name in ("Picard", "Anderson", "Broyden"):
                parts = [results.summary(rows[name], tolerance) for tolerance in TOLERANCES]
                cells.append("; ".join(f"{p['median']:g} ({100 * p['success']:.0f}%)" for p in parts))
            words = f"{best}: {s['median']:g} ({100 * s['success']:.0f}%)"
            easy = "easy" if s["median"] < HARD else ""
            body.append([results.name, way, *cells, words, f"{np.median(radius):.2f}", easy])
    to = "to 1e-2; 1e-3; 1e-4"
    return table(["family", "", f"Picard {to}", f"Anderson {to}", f"Broyden {to}", "best to 1e-2", "ρ", ""], body)


def _equilibrium_overview(families: Sequence[FamilyResults]) -> str:
    body = []
    for results in families:
        for way in (DEQ, "unrolled"):
            if not results.of("depth", way=way):
                continue
            last, best = results.at_equilibrium(way)
            lead = abs(best["over_last"])
            body.append(
                [
                    results.name,
                    way,
                    f"{results.shown(last['score'])} at {last['evaluations']}",
                    f"{last['residual'][1]:.1e}",
                    f"{results.shown(best['score'])} at {best['evaluations']}",
                    f"{100 * lead:.2f} ± {100 * best['over_last_error']:.2f} points"
                    if results.higher
                    else f"{lead:.4f} ± {best['over_last_error']:.4f}",
                ]
            )
    return table(["family", "", "last", "median residual", "best", "lead of the best"], body)


def _step_overview(families: Sequence[FamilyResults]) -> str:
    body = []
    for results in families:
        base = {row["way"]: row for row in results.of("step")}
        unrolled = base.get("unrolled")
        for way, row in base.items():
            words = "" if unrolled is None else f"{row['seconds'] / unrolled['seconds']:.2f}×"
            share = "" if unrolled is None else f"{row['peak_bytes'] / unrolled['peak_bytes']:.2f}×"
            spent = "" if row["evaluations"] is None else f"{row['evaluations']:g}"
            body.append([results.name, way, f"{1000 * row['seconds']:.0f} ms", words, share, spent])
    return table(["family", "", "step", "time to unrolled", "peak memory to unrolled", "evaluations forward"], body)
