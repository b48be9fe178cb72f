"""Report and figures of the digits, of one seed or several, from rows and config.json alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import figures
from experiments.bench.report import Section, read_config, write
from experiments.bench.runner import Row, read_rows
from experiments.bench.statistics import Outcome, best
from experiments.bench.tables import Table, by_name, pivot

GROUPED, COORDINATEWISE, REFERENCE = "grouped LSTM", "coordinatewise LSTM", "Broyden"
CLASSICAL = ("Picard", "Anderson", "Broyden", "tuned Broyden")
"""Ours, among which the best is sought."""
SHOWN = (GROUPED, COORDINATEWISE, "Broyden", "Anderson", "Picard")
"""Solvers in the figures."""
SHORT = 8
"""Evaluations at which accuracy is held against the converged one."""
READINGS = ("half of the batch", "90%", "all")


class Results:
    """The rows of some seeds' folders, and what is read off them."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.rows = [row for folder in folders for row in read_rows(folder / "rows.jsonl")]
        self.solves = self.of("solve")
        self.solvers = list(dict.fromkeys(row["solver"] for row in self.solves))
        self.tolerances = sorted({row["tolerance"] for row in self.solves}, reverse=True)
        self.seeds = sorted({row["seed"] for row in self.rows})

    def of(self, kind: str, **wanted: Any) -> list[Row]:
        """Rows of a kind with these values; None: any."""
        chosen = {"row": kind, **{key: value for key, value in wanted.items() if value is not None}}
        return [row for row in self.rows if all(row[key] == value for key, value in chosen.items())]

    def outcome(self, solver: str, tolerance: float, seed: int | None = None) -> Outcome:
        """A solver's evaluations to a tolerance, on one seed's samples or on all."""
        return Outcome.of(self.of("solve", solver=solver, tolerance=tolerance, seed=seed))

    def accuracy(self, solver: str, evaluations: int, seed: int | None = None) -> float:
        """After so many evaluations, in percent; mean over seeds."""
        return 100 * _mean(self.of("depth", solver=solver, evaluations=evaluations, seed=seed), "score")

    @property
    def budgets(self) -> list[int]:
        """Evaluations after which accuracy is known."""
        return sorted({row["evaluations"] for row in self.of("depth")})


def _mean(rows: list[Row], key: str) -> Any:
    """Over seeds, of a number or of each of several."""
    return np.mean([row[key] for row in rows], axis=0)


def _joined(rows: list[Row], key: str) -> np.ndarray:
    """The samples of several rows; those without a value are left out."""
    return np.array([value for row in rows for value in row[key] if value is not None])


def evaluations_table(results: Results) -> Table:
    """Evaluations to each tolerance."""

    def cell(solver: str, tolerance: float) -> str:
        found = results.outcome(solver, tolerance)
        return f"{found.median:g} / {found.p90:g} / {found.success:.1%}"

    body = [[name, *(cell(name, tolerance) for tolerance in results.tolerances)] for name in results.solvers]
    return Table("", ["solver", *(f"{tolerance:g}" for tolerance in results.tolerances)], body)


def claims_table(results: Results, learned: str = GROUPED) -> Table:
    """A learned solver against Broyden's method and the best classical one, each seed and all together."""
    body = []
    for tolerance in results.tolerances:
        for seed in (*(results.seeds if len(results.seeds) > 1 else ()), None):
            ours = results.outcome(learned, tolerance, seed)
            known = {name: results.outcome(name, tolerance, seed) for name in CLASSICAL}
            name = best(known)
            cells = [f"{one.median:g} ({one.success:.1%})" for one in (ours, known[REFERENCE], known[name])]
            ratios = [f"{ours.median / known[one].median:.2f}×" for one in (REFERENCE, name)]
            where = "all" if seed is None else str(seed)
            body.append([f"{tolerance:g}", where, *cells[:2], ratios[0], f"{cells[2]}, {name}", ratios[1]])
    return Table("", ["tolerance", "seed", learned, REFERENCE, "ratio", "best classical", "ratio"], body)


def clock_table(results: Results, tolerance: float) -> Table:
    """Wall-clock to a tolerance: milliseconds and ratio to Broyden's method, and the share outside f."""
    body = []
    for name in results.solvers:
        rows = results.of("clock", solver=name, tolerance=tolerance)
        pairs = zip(_mean(rows, "seconds"), _mean(rows, "ratios"), strict=True)
        body.append([name, *(f"{1e3 * s:.0f} ms ({r:.2f}×)" for s, r in pairs), f"{_mean(rows, 'outside_f'):.0%}"])
    return Table("", ["solver", *READINGS, "time outside f"], body)


def parts_table(results: Results) -> Table:
    """What each learned part takes."""
    body = []
    for solver, part in dict.fromkeys((row["solver"], row["part"]) for row in results.of("part")):
        rows = results.of("part", solver=solver, part=part)
        body.append([solver, part, f"{1e3 * _mean(rows, 'seconds'):.2f} ms", f"{_mean(rows, 'f_equivalents'):.2f}"])
    return Table("", ["solver", "part", "time", "f-equivalents"], body)


def equilibrium_table(results: Results) -> Table:
    """What each solver returned when asked for the tightest tolerance."""
    rows = {name: results.of("solve", solver=name, tolerance=results.tolerances[-1]) for name in results.solvers}
    return by_name("", results.solvers, [
        ("solver", str),
        ("median distance", lambda name: f"{np.median(_joined(rows[name], 'distance')):.1e}"),
        ("90th percentile", lambda name: f"{np.percentile(_joined(rows[name], 'distance'), 90):.1e}"),
        ("same class as at z*", lambda name: f"{_joined(rows[name], 'agrees').mean():.2%}"),
        ("accuracy", lambda name: f"{_joined(rows[name], 'score').mean():.2%}"),
        ("handed over", lambda name: f"{_mean(rows[name], 'handed_over') / len(rows[name][0]['status']):.1%}"),
    ])  # fmt: skip


def short_table(results: Results) -> Table:
    """Accuracy with few evaluations, beside the converged one, seed by seed."""
    body, last = [], results.budgets[-1]
    for seed in results.seeds:
        converged = results.accuracy(REFERENCE, last, seed)
        found = [results.accuracy(name, SHORT, seed) for name in (GROUPED, COORDINATEWISE)]
        body.append([str(seed), f"{converged:.2f}%", *(f"{one:.2f}% ({one - converged:+.2f} points)" for one in found)])
    return Table("", ["seed", f"{REFERENCE}, {last}", *(f"{n}, {SHORT}" for n in (GROUPED, COORDINATEWISE))], body)


def _setting(item: Row) -> str:
    """A seed's line: tuned solvers, equilibria found, training time, commit."""
    seconds = ", ".join(f"{value:g} s ({name})" for name, value in item["meta_training_seconds"].items())
    commit, _, mark = item["provenance"]["commit"].partition(" ")
    return (
        f"- seed {item['config']['seed']}: tuned {', '.join(item['tuned'].values())}; float64 equilibrium found for "
        f"{item['equilibria_known']:.1%} of {item['test_samples']} test samples; meta-training took {seconds}; "
        f"commit {commit[:12]} {mark}, {item['provenance']['cores']} cores"
    )


def write_report(folder: Path, seeds: list[Path]) -> Path:
    """Write report.md and the figures into a folder, from the rows and config.json of each seed's folder."""
    results, described = Results(seeds), [read_config(seed) for seed in seeds]
    commands = "\n".join(item["command"] for item in described)
    accuracy = pivot("", results.of("depth"), lambda row: row["solver"], lambda row: str(row["evaluations"]),
                     lambda rows: f"{_mean(rows, 'score'):.2%}", corner="solver")  # fmt: skip
    clocked = sorted({row["tolerance"] for row in results.of("clock")}, reverse=True)
    sections: list[Section] = [
        f"A convolutional DEQ on 8×8 digits; {len(results.seeds)} seed(s) of DEQ and meta-training; held-out test samples, "
        "read once a run. A sample that does not get there within the budget counts as the budget. Made by",
        f"```\n{commands}\n```",
        "## Evaluations to a tolerance\n\nMedian / 90th percentile / success rate.", evaluations_table(results),
        by_evaluations(results, folder), to_tolerance(results, folder),
        "## Learned against classical\n\nMedian evaluations (success rate). Best classical: among ours whose success is "
        "within a standard error of the highest, the one of the smallest median.",
        claims_table(results), claims_table(results, COORDINATEWISE), by_image(results, folder),
        f"## Wall-clock\n\nThe whole batch of {results.of('clock')[0]['batch']}, interleaved repeats in one process, "
        f"medians; in brackets the ratio to {REFERENCE}, below one is faster. "
        "torchdeq stops a batch when its worst sample is done.",
        *(part for tolerance in clocked for part in (f"To {tolerance:g}:", clock_table(results, tolerance))),
        by_time(results, folder),
        "What each learned part costs on the whole batch (start: initializer, once a solve; init: gates, once a solve; "
        "step: once an evaluation). An f-equivalent is the time of one evaluation of f on the same batch.",
        parts_table(results),
        "## Same equilibrium\n\nRelative distance to the float64 equilibrium of what each solver returned when asked for "
        "the tightest tolerance; whether the class is the one predicted there; accuracy; samples the safeguard handed to "
        "Broyden.", equilibrium_table(results),
        "## Accuracy against evaluations", accuracy, by_accuracy(results, folder),
        f"With {SHORT} evaluations allowed, against the converged one:", short_table(results),
        "## Setting", "\n".join(_setting(item) for item in described),
    ]  # fmt: skip
    return write(folder, "Digits: learned root finders against classical ones", sections)


def _line(place: Any, name: str, *values: Any) -> None:
    figures.line(place, name.removesuffix(" LSTM"), *values)


def by_evaluations(results: Results, folder: Path) -> Path:
    """Median and middle half of the residual by evaluations; geometric mean over seeds."""
    figure, place = figures.axes(xlabel="evaluations of f", ylabel="relative residual (best so far)", yscale="log")
    for name in SHOWN:
        at: dict[int, list[tuple[float, ...]]] = {}
        for row in results.of("curve", solver=name):
            for k, *bands in zip(*(row[key] for key in ("evaluations", "low", "median", "high")), strict=True):
                at.setdefault(k, []).append(tuple(bands))
        low, median, high = np.array([np.exp(np.log(np.maximum(at[k], 1e-12)).mean(axis=0)) for k in sorted(at)]).T
        _line(place, name, sorted(at), median, (low, high))
    place.legend(frameon=False)
    return figures.save(figure, folder / "residual_by_evaluations.png")


def by_time(results: Results, folder: Path) -> Path:
    """Median residual of the first seed's batch by time."""
    words: dict[str, Any] = {"xlabel": "milliseconds, whole batch", "ylabel": "median relative residual (best so far)"}
    figure, place = figures.axes(yscale="log", title=f"Wall-clock, seed {results.seeds[0]}", **words)
    for row in results.of("curve", seed=results.seeds[0]):
        if row["solver"] in SHOWN:
            _line(place, row["solver"], 1e3 * np.array(row["seconds"]), row["by_time"])
    place.legend(frameon=False)
    return figures.save(figure, folder / "residual_by_time.png")


def by_accuracy(results: Results, folder: Path) -> Path:
    """Accuracy by evaluations allowed, mean over seeds."""
    figure, place = figures.axes(xlabel="evaluations of f allowed", ylabel="accuracy on held-out images (%)")
    for name in SHOWN:
        _line(place, name, results.budgets, [results.accuracy(name, k) for k in results.budgets])
    figures.log_ticks(place, (1, 2, 3, 5, 8, 12, 20, 30, 60))
    place.legend(frameon=False)
    return figures.save(figure, folder / "accuracy_by_evaluations.png")


def to_tolerance(results: Results, folder: Path) -> Path:
    """Median evaluations to each tolerance; the share solved above where not all are."""
    figure, place = figures.axes(8.4, xlabel="relative residual", ylabel="evaluations of f (median)")
    names = {name.removesuffix(" LSTM"): name for name in SHOWN}
    groups = [f"{tolerance:g}" for tolerance in results.tolerances]
    figures.bars(place, groups, list(names), lambda group, name: results.outcome(names[name], float(group)))
    place.legend(frameon=False, fontsize=8)
    return figures.save(figure, folder / "evaluations_to_tolerance.png")


def by_image(results: Results, folder: Path) -> Path:
    """One point an image: evaluations of the grouped LSTM against Broyden's method, to 1e-2; and their ratio."""
    theirs, ours = (results.outcome(name, 1e-2).evaluations.ravel() for name in (REFERENCE, GROUPED))
    figure, (left, right) = figures.grid(2, 2, (4.2, 4.0))
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, (2, len(ours)))
    left.plot(theirs + jitter[0], ours + jitter[1], ".", color=figures.colour("grouped"), alpha=0.35, markersize=4)
    left.axline((0, 0), slope=1, color="0.4", linewidth=1)
    left.set(xlabel=f"{REFERENCE}: evaluations to 0.01", ylabel=f"{GROUPED}: evaluations to 0.01")
    right.hist(theirs / ours, bins=30, color=figures.colour("grouped"), alpha=0.85)
    right.set(xlabel=f"times fewer evaluations than {REFERENCE}", ylabel="images")
    right.set_title(
        f"median {np.median(theirs / ours):.2f}×, fewer on {np.mean(theirs > ours):.0%} of images", fontsize=9
    )
    figure.tight_layout()
    return figures.save(figure, folder / "reduction_by_image.png")
