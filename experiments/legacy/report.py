"""Tables and report.md from rows. Nothing here solves anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.legacy import plots
from experiments.legacy.metrics import summarise

Row = dict[str, Any]


def made_by(command: str, made: dict[str, Any], *packages: str) -> str:
    """The command that made a report, and on what: machine, versions of torch and of these packages, commit."""
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", *packages))
    return (
        f"Made by\n\n```\n{command}\n```\n\non {made['cores']} cores, {made['threads']} threads; {versions}; "
        f"commit {made['commit']}."
    )


def table(header: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


class Results:
    """Rows of one family, of one seed or several, and what is read off them."""

    def __init__(self, rows: list[Row]) -> None:
        if not rows:
            raise ValueError("there are no rows to report on")
        self.rows = rows
        self.samples = self.of("sample")
        self.solvers = list(dict.fromkeys(row["solver"] for row in self.samples))
        self.tolerances = sorted(self.samples[0]["nfe"], key=float, reverse=True)
        self.seeds = sorted({row["seed"] for row in rows})

    def of(self, kind: str, **wanted: Any) -> list[Row]:
        """Rows of a kind with these values."""
        return [row for row in self.rows if row["row"] == kind and all(row[key] == wanted[key] for key in wanted)]

    def summary(self, solver: str, tolerance: str, seed: int | None = None) -> dict[str, float]:
        """Median, 90th percentile and success rate, over all seeds' samples or one seed's."""
        rows = [row for row in self.samples if row["solver"] == solver and seed in (None, row["seed"])]
        spent = np.array([row["nfe"][tolerance] for row in rows])
        return summarise(spent, np.array([row["reached"][tolerance] for row in rows]))

    def mean(self, kind: str, value: str, **wanted: Any) -> float:
        """Mean over seeds of a value in rows of a kind; NaN where there are none."""
        found = [row[value] for row in self.of(kind, **wanted)]
        return float(np.mean(found)) if found else float("nan")


def evaluations_table(results: Results) -> str:
    """Evaluations to each tolerance: median / 90th percentile / success."""
    body = []
    for solver in results.solvers:
        cells = []
        for tolerance in results.tolerances:
            s = results.summary(solver, tolerance)
            cells.append(f"{s['median']:g} / {s['p90']:g} / {100 * s['success']:.1f}%")
        body.append([solver, *cells])
    return table(["solver", *(f"{float(t):g}" for t in results.tolerances)], body)


def equilibrium_table(results: Results) -> str:
    """Distance to the float64 equilibrium, agreement of predictions, accuracy, share handed over."""
    body = []
    for solver in results.solvers:
        rows = results.of("sample", solver=solver)
        known = [row for row in rows if row["distance"] is not None]
        distance = np.array([row["distance"] for row in known])
        body.append(
            [
                solver,
                f"{np.median(distance):.1e}",
                f"{np.percentile(distance, 90):.1e}",
                f"{100 * np.mean([row['agrees'] for row in known]):.2f}%",
                f"{100 * np.mean([row['correct'] for row in rows]):.2f}%",
                f"{100 * np.mean([row['handed_over'] for row in rows]):.1f}%",
            ]
        )
    header = ["solver", "median distance", "90th percentile", "same class as at z*", "accuracy", "handed over"]
    return table(header, body)


def clock_table(results: Results, rtol: float) -> str:
    """Wall-clock to a tolerance: milliseconds and ratio to Broyden, three readings, and the share outside f."""
    body = []
    for solver in dict.fromkeys(row["solver"] for row in results.of("clock", rtol=rtol)):
        get = {
            key: results.mean("clock", key, solver=solver, rtol=rtol)
            for key in ("half", "most", "all", "ratio_half", "ratio_most", "ratio_all", "outside_f")
        }
        readings = [f"{1e3 * get[key]:.0f} ms ({get['ratio_' + key]:.2f}×)" for key in ("half", "most", "all")]
        body.append([solver, *readings, f"{100 * get['outside_f']:.0f}%"])
    return table(["solver", "half of the batch", "90%", "all", "time outside f"], body)


def parts_table(results: Results) -> str:
    """What each learned part costs."""
    body = []
    for solver, part in dict.fromkeys((row["solver"], row["part"]) for row in results.of("part")):
        seconds = results.mean("part", "seconds", solver=solver, part=part)
        equivalents = results.mean("part", "f_equivalents", solver=solver, part=part)
        body.append([solver, part, f"{1e3 * seconds:.2f} ms", f"{equivalents:.2f}"])
    return table(["solver", "part", "time", "f-equivalents"], body)


def accuracy_table(results: Results, budgets: Sequence[int]) -> str:
    """Accuracy at a budget of evaluations."""
    body = []
    for solver in dict.fromkeys(row["solver"] for row in results.of("accuracy")):
        cells = [f"{100 * results.mean('accuracy', 'accuracy', solver=solver, nfe=nfe):.2f}%" for nfe in budgets]
        body.append([solver, *cells])
    return table(["solver", *(str(nfe) for nfe in budgets)], body)


def short_budget_table(results: Results, learned: Sequence[str], reference: str, nfe: int) -> str:
    """Accuracy with so many evaluations allowed, beside the converged one, seed by seed."""
    converged = max(row["nfe"] for row in results.of("accuracy"))
    body = []
    for seed in results.seeds:
        last = results.mean("accuracy", "accuracy", solver=reference, nfe=converged, seed=seed)
        cells = [results.mean("accuracy", "accuracy", solver=name, nfe=nfe, seed=seed) for name in learned]
        points = [f"{100 * cell:.2f}% ({100 * (cell - last):+.2f} points)" for cell in cells]
        body.append([seed, f"{100 * last:.2f}%", *points])
    return table(["seed", f"{reference}, {converged}", *(f"{name}, {nfe}" for name in learned)], body)


def claims_table(results: Results, learned: str, classical: Sequence[str], reference: str) -> str:
    """The learned solver against Broyden and the best classical solver, each seed and all together."""
    body = []
    for tolerance in results.tolerances:
        for seed in (*results.seeds, None):
            if seed is not None and len(results.seeds) == 1:
                continue
            ours = results.summary(learned, tolerance, seed)
            broyden = results.summary(reference, tolerance, seed)
            # the best classical solver is the one of fewest median evaluations, ties to the higher success rate
            scored = {name: results.summary(name, tolerance, seed) for name in classical}
            best = min(scored, key=lambda name: (scored[name]["median"], -scored[name]["success"]))
            body.append(
                [
                    f"{float(tolerance):g}",
                    "all" if seed is None else seed,
                    f"{ours['median']:g} ({100 * ours['success']:.1f}%)",
                    f"{broyden['median']:g} ({100 * broyden['success']:.1f}%)",
                    f"{ours['median'] / broyden['median']:.2f}×",
                    f"{scored[best]['median']:g} ({100 * scored[best]['success']:.1f}%), {best}",
                    f"{ours['median'] / scored[best]['median']:.2f}×",
                ]
            )
    header = ["tolerance", "seed", learned, reference, "ratio", "best classical", "ratio"]
    return table(header, body)


def write_figures(results: Results, folder: Path, *, main: Sequence[str], learned: str, reference: str) -> list[Path]:
    """All figures of a family; `main` are the solvers shown in them."""
    shown = [name for name in main if name in results.solvers]
    rows = results.rows
    return [
        plots.residual_by_evaluations(rows, shown, folder / "residual_by_evaluations.png"),
        plots.residual_by_time(rows, shown, folder / "residual_by_time.png"),
        plots.evaluations_to_tolerance(rows, shown, results.tolerances, folder / "evaluations_to_tolerance.png"),
        plots.accuracy_by_evaluations(rows, shown, folder / "accuracy_by_evaluations.png"),
        plots.reduction_by_image(rows, learned, reference, "0.01", folder / "reduction_by_image.png"),
    ]
