"""The report over what was measured of the strangers: report.md in the folder of the results, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench import report
from experiments.bench.runner import Row
from metabroyden.comparison.statistics import geometric, standard_error
from metabroyden.comparison.tables import Table, chosen, grouped, listed, number

HARD = 10
"""Mean evaluations of the best classical solver from which on a pair counts."""
WORDS = """\
`fit_solver`, one call with its defaults on each of a suite of deep equilibrium models (`experiments/strangers/suite.py`),
then measured on test samples that the call never saw. A pair is one model and one tolerance. A hash of their names
decides which models are of the part `held`; that part is run once, at the end of the work on `dev`. A sample that is
not solved counts as the budget. The best classical solver is, of the tuned ones that solve most, give or take a
standard error, the one of the fewest evaluations in the median; the fastest is, of the same, the one of the least time."""
SUMMARY = f"""\
Pairs whose best classical solver needs at least {HARD} evaluations in the mean. Ratios are geometric means over the pairs on
which the fitted solver was returned, and in brackets over all on which one was trained: mean evaluations over the best
classical solver's, 90th percentile over its 90th percentile, time over the fastest one's. Success: the share solved by
what was returned minus that of the classical solver that solves most, in standard errors, of the worst of all pairs."""
PAIRS = """\
All pairs: mean evaluations / 90th percentile (share solved) of the fitted solver and of the best classical one; time over
the fastest one's; seconds of the whole call, and in brackets of the training in it."""
ROBUST = """\
Fitted solvers where they do not fit: with their weights in another order, on injections scaled by 1.5, on the untrained
cell of another seed. Counted are pairs on which a solver solves fewer samples than its fallback, Broyden's method from
z0, by more than one standard error; then the worst difference, in standard errors, and the samples that only one of
the two solves."""

MODELS = """\
The models: their task's score on test samples, seconds of training, mean evaluations to 1e-3 and share solved within 100 of
the solvers with their default options, and milliseconds of one evaluation of f on all test samples that were used."""


def write(folder: Path) -> Path:
    """report.md over all runs in a folder."""
    runs = report.runs_below(folder, "*/rows.jsonl")
    rows = [row for _, found in runs for row in found]
    fits, robust = chosen(rows, "fit"), chosen(rows, "robust")
    made = [f"- `{described['command']}`, commit {described['provenance']['commit']}" for described, _ in runs]
    sections: list[report.Section] = [WORDS, "\n".join(made), SUMMARY, summary(fits), PAIRS, _pairs(fits)]
    if robust:
        sections += [ROBUST, _robust(robust)]
    sections += [MODELS, _models([of[0] for of in grouped(chosen(rows, "model"), "name")])]
    return report.write(folder, "Strangers", sections)


def hard(row: Row) -> bool:
    """Whether a pair counts."""
    return row["best"]["mean"] >= HARD


def summary(fits: Sequence[Row]) -> Table:
    """A row for each half and tolerance."""
    return listed("", grouped(fits, "part", "rtol"), [
        ("part", lambda of: of[0]["part"]),
        ("rtol", lambda of: f"{of[0]['rtol']:g}"),
        ("pairs", lambda of: f"{sum(map(hard, of))} of {len(of)}"),
        ("returned", lambda of: _share([_returned(row) for row in of if hard(row)])),
        ("evaluations", lambda of: _both(of, lambda row: row["ours"]["mean"] / row["best"]["mean"])),
        ("90%", lambda of: _both(of, lambda row: row["ours"]["p90"] / row["best"]["p90"])),
        ("time", lambda of: _both(of, lambda row: row["ours"]["time_over_fastest"])),
        ("success, at worst", lambda of: f"{min(map(success_difference, of)):+.1f}"),
    ])  # fmt: skip


def success_difference(row: Row) -> float:
    """Share solved of what was returned minus the highest of a classical solver, in standard errors of that one."""
    found = row["ours"] if _returned(row) else row["fastest"]
    return (found["solved"] - row["surest"]) / standard_error(row["surest"], row["samples"])


def _returned(row: Row) -> bool:
    return row["returned"] == "fitted"


def _share(hits: Sequence[bool]) -> str:
    return f"{sum(hits) / len(hits):.0%}" if hits else ""


def _both(of: Sequence[Row], ratio: Any) -> str:
    there = [row for row in of if hard(row) and row["trained"]]
    kept = number(geometric(ratio(row) for row in there if _returned(row)))
    return f"{kept or '–'} ({number(geometric(map(ratio, there))) or '–'})"


def _pairs(fits: Sequence[Row]) -> Table:
    def cost(one: Row | None) -> str:
        return "" if one is None else f"{one['mean']:.1f} / {one['p90']:.0f} ({one['solved']:.1%})"

    return listed("", fits, [
        ("", "{name}"),
        ("part", "{part}"),
        ("rtol", "{rtol:g}"),
        ("seed", "{seed}"),
        ("returned", lambda row: "**fitted**" if _returned(row) else row["returned"]),
        ("fitted", lambda row: cost(row["ours"])),
        ("best classical", lambda row: f"{cost(row['best'])} {row['best']['name']}"),
        ("time", lambda row: "" if row["ours"] is None else f"{row['ours']['time_over_fastest']:.2f}"),
        ("seconds", lambda row: f"{row['seconds']:.0f} ({row['training_seconds']:.0f})"),
        ("reasons", lambda row: "; ".join(row["reasons"])),
    ])  # fmt: skip


def _robust(rows: Sequence[Row]) -> Table:
    def worse(row: Row) -> float:
        return (row["learned"] - row["fallback"]) / row["error"]

    return listed("", grouped(rows, "part", "case", "rtol"), [
        ("part", lambda of: of[0]["part"]),
        ("", lambda of: of[0]["case"]),
        ("rtol", lambda of: f"{of[0]['rtol']:g}"),
        ("solves fewer", lambda of: f"{sum(worse(row) < -1 for row in of)} of {len(of)}"),
        ("at worst", lambda of: f"{min(map(worse, of)):+.1f} {min(of, key=worse)['name']}"),
        ("only the fallback", lambda of: sum(row["lost"] for row in of)),
        ("only the fitted", lambda of: sum(row["gained"] for row in of)),
    ])  # fmt: skip


def _models(rows: Sequence[Row]) -> Table:
    def classical(name: str) -> tuple[str, Any]:
        return name, lambda row: f"{row[name]['mean']:.1f} ({row[name]['solved']:.0%})"

    return listed("", rows, [
        ("", "{name}"),
        ("part", "{part}"),
        ("score", "{score:.3f}, {measure}"),
        ("training", "{training_seconds:.0f} s"),
        *map(classical, ("Picard", "Anderson", "Broyden")),
        ("f", "{f_milliseconds:.2g} ms"),
    ])  # fmt: skip
