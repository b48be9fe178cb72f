"""report.md and figures of memory and time of training, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from experiments.legacy.plots import save_figure
from experiments.legacy.report import made_by, table
from metabroyden.storage import atomic_write

Row = dict[str, Any]
_MIB = 2**20
_DRAWN = {
    "implicit": {"color": "#0072B2", "marker": "o", "linewidth": 2.4},
    "implicit, full memory": {"color": "#56B4E9", "marker": "s", "linewidth": 1.6},
    "unrolled": {"color": "#D55E00", "marker": "^", "linewidth": 2.0},
    "unrolled, checkpoints": {"color": "#000000", "marker": "D", "linewidth": 1.6},
}


def write(folder: Path, rows: Sequence[Row], described: dict[str, Any]) -> Path:
    """Write report.md and its figures into the folder."""
    figures = [
        memory_by_evaluations(rows, folder / "memory_by_evaluations.png"),
        time_by_evaluations(rows, folder / "time_by_evaluations.png"),
    ]
    memory, seconds = (f"![{path.stem}]({path.name})" for path in figures)
    config = described["config"]
    counted = _of(rows, "bytes")
    short = [row for row in counted if row["spent"] < row["evaluations"]]
    spent = (
        "every sample spent all the evaluations of the forward pass"
        if not short
        else f"in {len(short)} of {len(counted)} runs a sample came to rest before its evaluations were spent"
    )
    sections = [
        "# Memory and time of training",
        made_by(described["command"], described["provenance"]),
        "One training step: a forward pass to a scalar loss and its backward pass, with gradients towards the cell's "
        f"parameters and the injection. conv: `ConvCell`, batch {config['batch']}, {config['channels']} channels, "
        f"{config['side']}×{config['side']}. causal: `CausalCell`, batch {config['batch']}, {config['width']} channels, "
        f"{config['tokens']} tokens. float32; initial weights times {config['gain']:g}, "
        f"tolerance zero: {spent}. Implicit: `DEQ` with "
        f"Broyden's method of memory {config['memory']}, backward {config['backward']} products with Jᵀ, with the same "
        "memory; with full memory the forward solve keeps every update. Unrolled: the cell applied as many times, by plain "
        "backpropagation; with checkpoints, the activations of segments of √depth applications are computed again "
        "(Chen et al. 2016). Equal evaluations are not equal accuracy: the residual stands beside them.",
        "## What was asked",
        verdicts(rows),
        "## Bytes",
        memory,
        "Solid: the most bytes of tensors alive at once in the step, all that the dispatcher sees (saved tensors, solver, "
        "temporaries, gradients; neither parameters nor injection, nor what a kernel allocates within itself). Dotted: by "
        "how much a fresh process grew.",
        bytes_table(rows),
        "saved: by autograd, distinct storages, parameters left out. solver: the most alive at once in the forward solve "
        "run on its own: iterates, ring buffers, temporaries of f and of the solver's arithmetic. held: alive between "
        "forward and backward pass. backward: the most that the backward pass adds. peak: the most alive in the step. "
        "books: the most that Python and numpy add (the trace is among it), which the other columns do not hold. "
        "process: growth of a fresh process; in brackets with a malloc that hands free blocks back at once "
        "(MALLOC_MMAP_THRESHOLD_=65536): the rest is what glibc keeps.",
        growth(rows),
        "## Time",
        seconds,
        f"Medians of {config['repeats']} interleaved steps in one process; ratios are medians of paired ratios to the "
        "unrolled network of as many evaluations. Solid: forward and backward. Dotted: forward alone.",
        time_table(rows),
    ]
    return atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def _of(rows: Sequence[Row], kind: str, **wanted: Any) -> list[Row]:
    return [row for row in rows if row["row"] == kind and all(row[key] == value for key, value in wanted.items())]


def _cells(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["cell"] for row in rows))


def spread(values: Sequence[float]) -> float:
    """By how much the largest value exceeds the smallest, relative."""
    return max(values) / min(values) - 1


def verdicts(rows: Sequence[Row]) -> str:
    """The promise, and what was measured."""
    body = []
    for cell in _cells(rows):
        found = {way: _of(rows, "bytes", cell=cell, way=way) for way in _DRAWN}
        at = [row["evaluations"] for row in found["implicit"]]
        fewest, most = min(at), max(at)
        span = f"at {', '.join(map(str, sorted(at)))} evaluations"
        both = [row["saved"] + row["solver"] for row in found["implicit"]]
        body.append([f"{cell}, implicit: saved + solver, {span}", "within 5%", f"{100 * spread(both):.1f}%"])
        peaks = {way: {row["evaluations"]: row["peak"] for row in found[way]} for way in found}
        body.append([f"{cell}, implicit: peak, {span}", "", f"{100 * spread(list(peaks['implicit'].values())):.1f}%"])
        for way in ("unrolled", "unrolled, checkpoints", "implicit, full memory"):
            factor = peaks[way][most] / peaks[way][fewest]
            body.append(
                [
                    f"{cell}, {way}: peak from {fewest} to {most} evaluations ({most / fewest:g}×)",
                    "grows" if way == "unrolled" else "",
                    f"{factor:.2f}×",
                ]
            )
        body.append(
            [
                f"{cell}: peak of the unrolled network at {most}, to the implicit one's",
                "",
                f"{peaks['unrolled'][most] / peaks['implicit'][most]:.1f}×",
            ]
        )
    return table(["", "target", "measured"], body)


def growth(rows: Sequence[Row]) -> str:
    """What does grow with the evaluations in implicit training, in words."""
    lines = ["From the fewest to the most evaluations, implicit training with limited memory grows:\n"]
    for cell in _cells(rows):
        found = sorted(_of(rows, "bytes", cell=cell, way="implicit"), key=lambda row: row["evaluations"])
        held, books, solver = (found[-1][key] - found[0][key] for key in ("held", "books", "solver"))
        words = f"- {cell}: held by {held / 1024:.0f} KiB (the trace, some numbers a sample and evaluation), books by "
        words += f"{books / 1024:.0f} KiB"
        if solver > _MIB / 10:
            words += (
                f", the solver by {solver / _MIB:.1f} MiB (a copy of the best iterates, made when for the first time "
            )
            words += "some samples' residuals rise while others' fall)"
        lines.append(words + ".")
    return "\n".join(lines)


def bytes_table(rows: Sequence[Row]) -> str:
    """Every reading of bytes, MiB but for the books."""
    processes = {(row["cell"], row["way"], row["evaluations"]): row for row in _of(rows, "resident")}
    body = []
    for row in _of(rows, "bytes"):
        process = processes.get((row["cell"], row["way"], row["evaluations"]))
        grown = "–" if process is None else f"{process['bytes'] / _MIB:.0f} ({process['returning'] / _MIB:.0f})"
        body.append(
            [
                row["cell"],
                row["way"],
                row["evaluations"],
                *(f"{row[key] / _MIB:.1f}" for key in ("saved", "solver", "held", "backward", "peak")),
                f"{row['books'] / 1024:.0f} KiB",
                grown,
                f"{row['residual']:.1e}",
            ]
        )
    header = [
        "cell",
        "way",
        "evaluations",
        "saved",
        "solver",
        "held",
        "backward",
        "peak",
        "books",
        "process",
        "residual",
    ]
    return "MiB:\n\n" + table(header, body)


def time_table(rows: Sequence[Row]) -> str:
    """Seconds and ratios."""
    body = [
        [
            row["cell"],
            row["way"],
            row["evaluations"],
            *(f"{1e3 * row[part]:.0f} ms ({row[f'ratio_{part}']:.2f}×)" for part in ("forward", "backward", "total")),
        ]
        for row in _of(rows, "time")
    ]
    return table(["cell", "way", "evaluations", "forward", "backward", "both"], body)


def memory_by_evaluations(rows: Sequence[Row], path: Path) -> Path:
    """Peak of live tensors, and growth of the process, against evaluations."""
    return _panels(
        rows,
        path,
        solid=("bytes", "peak", 1 / _MIB),
        dotted=("resident", "bytes", 1 / _MIB),
        ylabel="MiB in a training step",
        title="solid: tensors alive at the peak; dotted: growth of the process",
    )


def time_by_evaluations(rows: Sequence[Row], path: Path) -> Path:
    """Seconds of a step, and of its forward pass, against evaluations."""
    return _panels(
        rows,
        path,
        solid=("time", "total", 1e3),
        dotted=("time", "forward", 1e3),
        ylabel="milliseconds a training step",
        title="solid: forward and backward; dotted: forward alone",
    )


def _panels(
    rows: Sequence[Row],
    path: Path,
    *,
    solid: tuple[str, str, float],
    dotted: tuple[str, str, float],
    ylabel: str,
    title: str,
) -> Path:
    cells = _cells(rows)
    figure, panels = plt.subplots(1, len(cells), figsize=(4.9 * len(cells), 4.4), sharey=True, squeeze=False)
    for axes, cell in zip(panels[0], cells, strict=True):
        for way, style in _DRAWN.items():
            for (kind, value, scale), line in ((dotted, ":"), (solid, "-")):
                points = [(row["evaluations"], scale * row[value]) for row in _of(rows, kind, cell=cell, way=way)]
                thin = {"linewidth": 1.2, "markersize": 3} if line == ":" else {"label": way, "markersize": 5}
                if points:
                    axes.loglog(*zip(*points, strict=True), **{**style, "linestyle": line, **thin})
        ticks = sorted({row["evaluations"] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set(xlabel="evaluations of the cell (unrolled: depth)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(cell, fontsize=10)
    panels[0][0].set_ylabel(ylabel)
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)
