"""The report over all meta-trained solvers of a folder."""

from __future__ import annotations

from pathlib import Path

from experiments.bench import report
from experiments.bench.runner import Row
from experiments.meta.job import CLASSICAL
from metabroyden.comparison.statistics import BEST, Field, against
from metabroyden.comparison.tables import chosen, grouped, listed, middle

SHOWN = (1e-2, 1e-3)


def write(folder: Path) -> Path:
    """report.md over all solvers of all families in a folder, from rows alone."""
    rows: list[Row] = []
    trained: dict[tuple[str, str], list[Row]] = {}
    for described, found in report.runs_below(folder, "*/*/rows.jsonl"):
        config = described.get("config", {})
        if "solver" not in config:  # other experiments publish here, too
            continue
        # older rows leave these to their folder
        stamp = {"family": config["family"], "seed": config["seed"]}
        stamp["kind"] = "classical" if config["solver"] == CLASSICAL else "learned"
        rows += [{**row, **stamp} for row in found if row["row"] in ("solve", "horizon")]
        if "summary" in described:
            trained.setdefault((config["family"], config["solver"]), []).append(described)
    field = Field(rows)
    words = (
        "Median evaluations over held-out samples and seeds (share solved), a failure counting the whole budget, and "
        "the ratio to the best classical solver. Times, scores and other comparisons: [the race](../race/report.md)."
    )
    learned = field.solvers(None, "learned")
    tables = [against(field, f"To {at:g}", learned, BEST, at, BEST) for at in SHOWN]
    horizon = listed(
        "Four times past the trained horizon, to 0.001, all seeds: samples that the fallback solves, and those lost",
        [_summed(found) for found in grouped(chosen(rows, "horizon", tolerance=1e-3), "family", "solver")],
        [("family", "{family}"), ("solver", "{solver}"), ("evaluations", "{steps}"), ("samples", "{samples}"),
         ("fallback solves", "{fallback}"), ("lost", "{lost}"), ("with what was spent before", "{broken}"),
         ("handed over", "{triggered}")],
    )  # fmt: skip
    training = listed(
        "Training (CPU time: median over seeds)",
        [_training(*place, found) for place, found in trained.items()],
        [("family", "{family}"), ("solver", "{solver}"), ("seeds", "{seeds}"),
         ("steps", "{steps} × {unroll}, {segments} segments of {batch}"), ("parameters", "{parameters:,}"),
         ("CPU", "{cpu:.0f} s")],
    )  # fmt: skip
    return report.write(folder, "Meta-trained solvers", [words, *tables, horizon, training])


def _summed(found: list[Row]) -> Row:
    counts = ("samples", "fallback", "lost", "broken", "triggered")
    return {**found[0], **{key: sum(row[key] for row in found) for key in counts}}


def _training(family: str, solver: str, found: list[Row]) -> Row:
    seeds = " ".join(str(one["config"]["seed"]) for one in found)
    cpu = middle(one["summary"].get("cpu_seconds") for one in found)
    told, parameters = found[0]["summary"]["meta_training"], found[0]["parameters"]
    return {**told, "family": family, "solver": solver, "seeds": seeds, "parameters": parameters, "cpu": cpu}
