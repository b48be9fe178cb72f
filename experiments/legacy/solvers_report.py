"""report.md and figures of the race of classical solvers, from rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.legacy.plots import new_axes, save_figure
from experiments.legacy.report import made_by, table
from metabroyden.storage import atomic_write

Row = dict[str, Any]
_COLOURS = {
    "Broyden": "#0072B2",
    "Anderson": "#009E73",
    "Picard": "#000000",
    "bad Broyden": "#56B4E9",
    "Newton": "#D55E00",
}
_PEERS = {"torchdeq": "--", "scipy": ":", "xitorch": "-."}
_PROFILED = (
    "Picard",
    "Anderson",
    "Broyden",
    "Newton",
    "torchdeq Picard",
    "torchdeq Anderson",
    "torchdeq Broyden",
    "scipy broyden1",
    "scipy hybr",
)


def write(folder: Path, rows: Sequence[Row], described: dict[str, Any]) -> Path:
    """Write report.md and its figures into the folder."""
    figures = [
        gaps(rows, folder / "overhead_by_history.png"),
        overhead_by_size(rows, folder / "overhead_by_size.png"),
        anatomy(rows, folder / "anatomy.png"),
        profiles(rows, folder / "performance_profiles.png"),
        work_precision(rows, folder / "work_precision.png"),
    ]
    history, size, parts, profile, work = (f"![{path.stem}]({path.name})" for path in figures)
    limited = [row for row in rows if row["row"] == "limited"]
    budget, batch = described["config"]["budget"], described["config"]["batch"]
    sections = [
        "# Classical solvers against their peers",
        made_by(described["command"], described["provenance"], "torchdeq", "xitorch", "scipy"),
        "Overhead is time outside f per call of f, measured with a stopwatch round f. Contestants take turns in one "
        "process; figures are medians over repeats, ratios medians of paired ratios. Evaluations are a sample's own, up "
        "to the first that measured the tolerance; a failed sample counts as the budget. torchdeq and xitorch stop when "
        "the worst sample is done; xitorch takes the whole batch for one system. torchdeq's solvers have its default "
        f"options; its Anderson's m = 6 iterates are our memory of 5 differences. At most {budget} evaluations; f in "
        "float32.",
        "## What was asked",
        verdicts(rows),
        "## Race",
        f"dense: batches of {batch}, 256 coordinates. conv: batches of {batch // 2}, 16×32×32. Weights of the given norm. "
        f"Evaluations on {described['config']['seeds']} batches, time on one of them.",
        *(part for method in ("Broyden", "Anderson", "Picard") for part in (f"### {method}", race_table(rows, method))),
        "## Where the time goes",
        parts,
        anatomy_table(rows),
        "Time outside f before the k-th call, on dense norm-3 cells (nothing converges, so that all samples are at work):",
        history,
        "and by batch (memory 10) and memory (batch 64), once the memory is full:",
        size,
        "## Limited memory",
        "Symmetric cells. Of the samples that Broyden with full memory solves within 200 evaluations, those that the solver "
        "with memory 10 solves within twice as many; in brackets samples whose last iterate was not finite.",
        limited_table(limited),
        "## The registered problems",
        f"Eight samples of each of {len({row['problem'] for row in rows if row['row'] == 'sample'})} problems, float64, at "
        "most 200 evaluations (Jacobian products included). Broyden has full memory unless it says otherwise. scipy solves "
        "one sample at a time. The share of samples solved within so many times the evaluations of the best solver on it:",
        profile,
        work,
        registry_table(rows, "1e-06"),
        "## A fixed budget, compiled",
        "`FixedBudget` against `solve` with the same budget: full batch, one graph.",
        compiled_table(rows),
    ]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def _of(rows: Iterable[Row], kind: str, **wanted: Any) -> list[Row]:
    return [row for row in rows if row["row"] == kind and all(row[key] == value for key, value in wanted.items())]


def _geometric(values: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))


def verdicts(rows: Sequence[Row]) -> str:
    """The targets, and what was measured."""
    body = []
    for method, target in (("Broyden", 0.35), ("Anderson", 0.6), ("Picard", 0.6)):
        ours = _of(rows, "race", method=method, solver="ours")
        ratio = _geometric(row["ratio_overhead"] for row in ours)
        body.append(
            [f"{method}: overhead per call against torchdeq's, geometric mean", f"at most {target}", f"{ratio:.2f}"]
        )
    theirs = {(row["problem"], row["rtol"], row["method"]): row for row in _of(rows, "race", solver="torchdeq")}
    for method in ("Broyden", "Anderson", "Picard"):
        ours = _of(rows, "race", method=method, solver="ours")
        light = [row for row in ours if theirs[row["problem"], row["rtol"], method]["f_share"] < 0.5]
        worst = max((row["ratio_total"] for row in light), default=float("nan"))
        mean = _geometric(row["ratio_total"] for row in light) if light else float("nan")
        body.append(
            [
                f"{method}: total time against torchdeq's where f is less than half of it, {len(light)} cases",
                "at most 0.5",
                f"mean {mean:.2f}, worst {worst:.2f}",
            ]
        )
    ours = _of(rows, "race", method="Broyden", solver="ours")
    pairs = [(row, theirs[row["problem"], row["rtol"], "Broyden"]) for row in ours]
    more = [
        f"{row['problem']} {row['rtol']:g}: {row['median']:g} against {peer['median']:g}"
        for row, peer in pairs
        if row["median"] > peer["median"]
    ]
    lower = [
        f"{row['problem']} {row['rtol']:g}: {_solved(row)} against {_solved(peer)}"
        for row, peer in pairs
        if row["success"] < peer["success"]
    ]
    total = [sum(row["success"] * row["samples"] for row in side) for side in zip(*pairs, strict=True)]
    body.append(["Broyden: median evaluations above torchdeq's", "nowhere", "; ".join(more) or "nowhere"])
    body.append(["Broyden: success below torchdeq's", "nowhere", "; ".join(lower) or "nowhere"])
    body.append(
        [
            "Broyden: samples solved in all cases, ours and torchdeq's",
            "no fewer",
            " and ".join(f"{n:.0f}" for n in total),
        ]
    )
    for norm in (0.95, 1.5):
        limited = _of(rows, "limited", norm=norm, solver="Broyden")
        kept, full = (sum(row[key] for row in limited) for key in ("kept", "full"))
        body.append(
            [
                f"memory 10, symmetric norm {norm:g}: solved of what full memory solves",
                "at least 90%",
                f"{100 * kept / full:.1f}%",
            ]
        )
    return table(["", "target", "measured"], body)


def _solved(row: Row) -> str:
    return f"{row['success'] * row['samples']:.0f} of {row['samples']}"


def race_table(rows: Sequence[Row], method: str) -> str:
    """One method on every problem and tolerance, ours beside its peers."""
    body = [
        [
            row["problem"],
            f"{row['rtol']:g}",
            row["solver"],
            f"{row['median']:g} / {row['p90']:g} / {100 * row['success']:.0f}%",
            row["calls"],
            f"{1e3 * row['total']:.1f} ms",
            f"{100 * row['f_share']:.0f}%",
            f"{1e6 * row['overhead']:.0f} µs",
            f"{row['ratio_overhead']:.2f}×",
            f"{row['ratio_total']:.2f}×",
        ]
        for row in _of(rows, "race", method=method)
    ]
    header = ["problem", "rtol", "solver", "evaluations: median / p90 / success", "calls", "total", "in f", "overhead"]
    return table([*header, "overhead ratio", "total ratio"], body)


def anatomy_table(rows: Sequence[Row]) -> str:
    """f, the solver's arithmetic, the driver, per call of f."""
    body = []
    for row in _of(rows, "anatomy"):
        cells = [f"{1e6 * row[part]:.0f} µs" for part in ("f", "step", "driver")]
        body.append([row["problem"], row["solver"], *cells])
    return table(["problem", "solver", "f", "the solver's own arithmetic", "driver"], body)


def limited_table(rows: Sequence[Row]) -> str:
    """Limited memory against full memory."""
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    body = []
    for norm, rtol in dict.fromkeys((row["norm"], row["rtol"]) for row in rows):
        found = {row["solver"]: row for row in rows if (row["norm"], row["rtol"]) == (norm, rtol)}
        first = found[solvers[0]]
        cells = [
            f"{100 * found[name]['kept'] / max(found[name]['full'], 1):.1f}% ({found[name]['not_finite']})"
            for name in solvers
        ]
        body.append([f"{norm:g}", f"{rtol:g}", f"{first['full']} of {first['samples']}", *cells])
    return table(["norm", "rtol", "solved with full memory", *solvers], body)


def registry_table(rows: Sequence[Row], tolerance: str) -> str:
    """Median evaluations and success on each registered problem."""
    samples = _of(rows, "sample")
    solvers = list(dict.fromkeys(row["solver"] for row in samples))
    body = []
    for problem in dict.fromkeys(row["problem"] for row in samples):
        cells = []
        for solver in solvers:
            found = _of(samples, "sample", problem=problem, solver=solver)
            reached = np.mean([row["reached"][tolerance] for row in found])
            spent = np.median([row["nfe"][tolerance] for row in found])
            cells.append("–" if reached == 0 else f"{spent:g}" + ("" if reached == 1 else f" ({100 * reached:.0f}%)"))
        body.append([problem, *cells])
    heading = f"Median evaluations to {float(tolerance):g}; in brackets the share of samples solved, where not all.\n\n"
    return heading + table(["problem", *solvers], body)


def compiled_table(rows: Sequence[Row]) -> str:
    """The compiled fixed budget."""
    body = [
        [
            row["problem"],
            row["solver"],
            row["budget"],
            f"{row['compile_seconds']:.0f} s",
            f"{1e3 * row['compiled']:.2f} ms",
            f"{1e3 * row['solve']:.2f} ms",
            f"{row['ratio']:.2f}×",
            f"{row['difference']:.1e}",
        ]
        for row in _of(rows, "compiled")
    ]
    header = ["problem", "solver", "evaluations", "compiling", "compiled", "solve", "ratio", "relative difference of z"]
    return table(header, body)


def _drawn(name: str) -> dict[str, Any]:
    method = next((known for known in _COLOURS if name.endswith(known)), "")
    line = next((style for peer, style in _PEERS.items() if name.startswith(peer)), "-")
    colour = _COLOURS.get(method, {"scipy broyden1": "#0072B2", "scipy hybr": "#D55E00"}.get(name, "#999999"))
    return {"color": colour, "linestyle": line, "linewidth": 2.0 if line == "-" else 1.4}


def gaps(rows: Sequence[Row], path: Path) -> Path:
    """Time outside f before each call of f."""
    figure, axes = new_axes()
    found = _of(rows, "gap", by="step")
    for solver in dict.fromkeys(row["solver"] for row in found):
        points = [(row["value"], 1e6 * row["seconds"]) for row in found if row["solver"] == solver]
        axes.semilogy(*np.array(points).T, label=solver, **_drawn(solver))
    axes.set(xlabel="call of f", ylabel="microseconds outside f before it")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.set_title("Overhead by step: batch 64, 256 coordinates, full memory (Anderson: 5)", fontsize=10)
    return save_figure(figure, path)


def overhead_by_size(rows: Sequence[Row], path: Path) -> Path:
    """Time outside f by batch and by memory."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.0), sharey=True)
    for axes, by in zip(panels, ("batch", "memory"), strict=True):
        found = _of(rows, "gap", by=by)
        for solver in dict.fromkeys(row["solver"] for row in found):
            points = [(row["value"], 1e6 * row["seconds"]) for row in found if row["solver"] == solver]
            axes.loglog(*np.array(points).T, marker="o", markersize=3.5, label=solver, **_drawn(solver))
        values = sorted({row["value"] for row in found})
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.set(xlabel=by)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("microseconds outside f per call")
    panels[0].legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def anatomy(rows: Sequence[Row], path: Path) -> Path:
    """Stacked bars: f, arithmetic, driver."""
    found = _of(rows, "anatomy")
    problems = list(dict.fromkeys(row["problem"] for row in found))
    figure, panels = plt.subplots(1, len(problems), figsize=(4.6 * len(problems), 3.8), squeeze=False)
    for axes, problem in zip(panels[0], problems, strict=True):
        chosen = [row for row in found if row["problem"] == problem]
        bottom = np.zeros(len(chosen))
        parts = (("f", "f", "#999999"), ("step", "solver's arithmetic", "#0072B2"), ("driver", "driver", "#E69F00"))
        for part, label, colour in parts:
            height = np.array([1e6 * row[part] for row in chosen])
            axes.bar([row["solver"] for row in chosen], height, bottom=bottom, color=colour, label=label, width=0.6)
            bottom += height
        axes.set_title(problem, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("microseconds per call of f")
    panels[0][0].legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def profiles(rows: Sequence[Row], path: Path, tolerances: Sequence[str] = ("0.001", "1e-06")) -> Path:
    """Performance profiles (Dolan & Moré 2002) over all samples of all problems that somebody solved."""
    samples = _of(rows, "sample")
    solvers = [name for name in _PROFILED if any(row["solver"] == name for row in samples)]
    figure, panels = plt.subplots(1, len(tolerances), figsize=(5.0 * len(tolerances), 4.0), sharey=True)
    for axes, tolerance in zip(panels, tolerances, strict=True):
        cost: dict[tuple[str, int], dict[str, float]] = {}
        for row in samples:
            if row["solver"] in solvers:
                spent = row["nfe"][tolerance] if row["reached"][tolerance] else np.inf
                cost.setdefault((row["problem"], row["sample"]), {})[row["solver"]] = spent
        solved = [item for item in cost.values() if np.isfinite(min(item.values()))]
        factors = np.geomspace(1, 32, 200)
        for name in solvers:
            ratio = np.array([item[name] / min(item.values()) for item in solved])
            axes.plot(factors, [np.mean(ratio <= factor + 1e-9) for factor in factors], label=name, **_drawn(name))
        axes.set(xscale="log", xlabel="times the evaluations of the best", ylim=(0, 1.02))
        axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"to {float(tolerance):g}: {len(solved)} samples", fontsize=10)
    panels[0].set_ylabel("share of samples solved")
    panels[-1].legend(frameon=False, fontsize=7.5, loc="lower right")
    return save_figure(figure, path)


def work_precision(
    rows: Sequence[Row],
    path: Path,
    problems: Sequence[str] = ("tanh_symmetric_1.5", "power_flow_118", "h_equation_singular", "linear_expansive"),
) -> Path:
    """Median evaluations against the tolerance reached, on four problems."""
    samples = _of(rows, "sample")
    solvers = [name for name in _PROFILED if any(row["solver"] == name for row in samples)]
    figure, panels = plt.subplots(2, 2, figsize=(9.6, 7.2))
    for axes, problem in zip(panels.flat, problems, strict=True):
        for name in solvers:
            found = [row for row in samples if row["problem"] == problem and row["solver"] == name]
            if not found:
                continue
            points = [
                (np.median([row["nfe"][tolerance] for row in found]), float(tolerance))
                for tolerance in sorted(found[0]["nfe"], key=float, reverse=True)
                if np.mean([row["reached"][tolerance] for row in found]) >= 0.5
            ]
            if points:
                axes.loglog(*np.array(points).T, marker="o", markersize=3, label=name, **_drawn(name))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(problem, fontsize=10)
    for axes in panels[1]:
        axes.set_xlabel("evaluations of f (median; at least half of the samples solved)")
    for axes in panels[:, 0]:
        axes.set_ylabel("relative residual")
    panels[0][0].legend(frameon=False, fontsize=7)
    return save_figure(figure, path)
