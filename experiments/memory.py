"""Memory and time of training through an equilibrium, against the weight-tied network unrolled to a depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments import steps
from experiments.bench import figures, report
from experiments.bench.options import Seeded, Timed
from experiments.bench.runner import Row, Run, read_rows, ticks
from experiments.bench.tables import Table

_MIB = 2**20


@dataclass(frozen=True)
class Memory(Seeded, Timed, command="memory", repeats=3):
    """Measure training steps, implicit and unrolled, at several numbers of evaluations and write results/memory/."""

    evaluations: tuple[int, ...] = (10, 30, 100)
    """Evaluations of the cell in the forward pass; for the unrolled network its depth."""
    batch: int = 32
    """Samples in a batch."""
    channels: int = 32
    """Channels of the convolutional cell."""
    side: int = 16
    """Height and width of its state."""
    width: int = 64
    """Channels of the sequence cell."""
    tokens: int = 64
    """Tokens of its state."""
    memory: int = 6
    """Updates that Broyden's method keeps; fewer by four than the fewest evaluations, so that every run drops some."""
    backward: int = 20
    """Products with the transposed Jacobian in the implicit backward pass."""
    gain: float = 5.0
    """What initial weight matrices are multiplied with, so that no sample comes to rest within the evaluations."""
    resident: bool = True
    """Measure resident sizes too, each in a process of its own."""


def run(config: Memory) -> None:
    """The whole job. Interrupted, it goes on with the next cell."""
    job, rows = Run(config), []
    shapes = {"conv": (config.channels, config.side), "causal": (config.width, config.tokens)}
    count = len(shapes) * (len(steps.WAYS) * len(config.evaluations) * (1 + config.resident) + 1)
    with ticks("measuring", count, show=config.progress) as done:
        for cell, (channels, extent) in shapes.items():
            rows += job.unit(cell, partial(_measured, config, cell, channels, extent, done))
    job.finish(rows, write)


def _measured(config: Memory, cell: str, channels: int, extent: int, done: Callable[..., None]) -> Iterator[Row]:
    trainings = [
        steps.Training(
            cell, way, evaluations, batch=config.batch, channels=channels, extent=extent, memory=config.memory,
            backward_nfe=config.backward, gain=config.gain, seed=config.seed,
        )
        for way in steps.WAYS
        for evaluations in config.evaluations
    ]  # fmt: skip
    for reading in (steps.byte_row, steps.resident_row) if config.resident else (steps.byte_row,):
        for training in trainings:
            yield reading(training)
            done(cell)
    yield from steps.time_rows(trainings, config.repeats)
    done(f"{cell}: time")


def write(folder: Path) -> Path:
    """report.md and its figures, from rows alone."""
    rows, described = read_rows(folder / "rows.jsonl"), report.read_config(folder)
    config, counted = described["config"], _of(rows, "bytes")
    short = [row for row in counted if row["spent"] < row["evaluations"]]
    sections: list[report.Section] = [
        report.made_by(described),
        "One training step: a forward pass to a scalar loss and its backward pass, with gradients towards the cell's "
        f"parameters and the injection. conv: `ConvCell`, batch {config['batch']}, {config['channels']} channels, "
        f"{config['side']}×{config['side']}. causal: `CausalCell`, batch {config['batch']}, {config['width']} channels, "
        f"{config['tokens']} tokens. float32; initial weights times {config['gain']:g}, tolerance zero: in {len(short)} of "
        f"{len(counted)} runs a sample came to rest before its evaluations were spent. Implicit: `DEQ` with "
        f"Broyden's method of memory {config['memory']}, backward {config['backward']} products with Jᵀ, with the same "
        "memory; with full memory the forward solve keeps every update. Unrolled: the cell applied as many times, by plain "
        "backpropagation; with checkpoints, the activations of segments of √depth applications are computed again "
        "(Chen et al. 2016). Equal evaluations are not equal accuracy: the residual stands beside them.",
        _growth(rows),
        _panels(
            rows,
            folder / "memory_by_evaluations.png",
            "MiB in a training step",
            1 / _MIB,
            "bytes peak",
            "resident bytes",
        ),
        "Solid: the most bytes of tensors alive at once in the step, all that the dispatcher sees (saved tensors, solver, "
        "temporaries, gradients; neither parameters nor injection, nor what a kernel allocates within itself). Dotted: by "
        "how much a fresh process grew.",
        _bytes(rows),
        "MiB, books in KiB. saved: by autograd, distinct storages, parameters left out. solver: the most alive at once in "
        "the forward solve run on its own: iterates, ring buffers, temporaries of f and of the solver's arithmetic. held: "
        "alive between forward and backward pass. backward: the most that the backward pass adds. peak: the most alive in "
        "the step. books: the most that Python and numpy add (the trace is among it), which the other columns do not hold. "
        "process: growth of a fresh process; in brackets with a malloc that hands free blocks back at once "
        "(MALLOC_MMAP_THRESHOLD_=65536): the rest is what glibc keeps.",
        _panels(rows, folder / "time_by_evaluations.png", "milliseconds a step", 1e3, "time total", "time forward"),
        f"Medians of {config['repeats']} interleaved steps in one process; ratios are medians of paired ratios to the "
        "unrolled network of as many evaluations. Solid: forward and backward. Dotted: forward alone.",
        _times(rows),
    ]
    return report.write(folder, "Memory and time of training", sections)


def _of(rows: Sequence[Row], kind: str, **wanted: Any) -> list[Row]:
    return [row for row in rows if row["row"] == kind and all(row[key] == value for key, value in wanted.items())]


def _growth(rows: Sequence[Row]) -> Table:
    """From the fewest to the most evaluations: what the implicit step saves and holds, and the peaks of all ways."""
    body = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        for way in steps.WAYS:
            found = sorted(_of(rows, "bytes", cell=cell, way=way), key=lambda row: row["evaluations"])
            both, peaks = [row["saved"] + row["solver"] for row in found], [row["peak"] for row in found]
            other = [row["peak"] for row in _of(rows, "bytes", cell=cell, way="implicit")]
            body.append(
                [cell, way, f"{100 * (max(both) / min(both) - 1):.1f}%", f"{peaks[-1] / peaks[0]:.2f}×",
                 f"{peaks[-1] / max(other):.1f}×", f"{(found[-1]['held'] - found[0]['held']) / 1024:.0f} KiB"]
            )  # fmt: skip
    evaluations = sorted({row["evaluations"] for row in rows})
    words = f"Growth from {evaluations[0]} to {evaluations[-1]} evaluations"
    return Table(words, ["cell", "way", "saved + solver", "peak", "peak, to the implicit one's at most", "held"], body)


def _bytes(rows: Sequence[Row]) -> Table:
    grown = {_key(row): f"{row['bytes'] / _MIB:.0f} ({row['returning'] / _MIB:.0f})" for row in _of(rows, "resident")}
    readings = ("saved", "solver", "held", "backward", "peak")
    body = [
        [*_key(row), *(f"{row[key] / _MIB:.1f}" for key in readings), f"{row['books'] / 1024:.0f} KiB",
         grown.get(_key(row), "–"), f"{row['residual']:.1e}"]
        for row in _of(rows, "bytes")
    ]  # fmt: skip
    return Table("Bytes", ["cell", "way", "evaluations", *readings, "books", "process", "residual"], body)


def _times(rows: Sequence[Row]) -> Table:
    body = [
        [*_key(row), *(f"{1e3 * row[p]:.0f} ms ({row[f'ratio_{p}']:.2f}×)" for p in ("forward", "backward", "total"))]
        for row in _of(rows, "time")
    ]
    return Table("Time", ["cell", "way", "evaluations", "forward", "backward", "both"], body)


def _key(row: Row) -> tuple[str, str, str]:
    return row["cell"], row["way"], str(row["evaluations"])


def _panels(rows: Sequence[Row], path: Path, ylabel: str, scale: float, solid: str, dotted: str) -> Path:
    """Two readings, "KIND KEY", against evaluations, a panel a cell."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    figure, places = figures.grid(len(cells), len(cells), (4.9, 4.4))
    for place, cell in zip(places, cells, strict=True):
        for number, way in enumerate(steps.WAYS):
            for reading, style in ((dotted, {"linestyle": ":", "label": None}), (solid, {})):
                more: Any = style
                kind, key = reading.split()
                points = [(row["evaluations"], scale * row[key]) for row in _of(rows, kind, cell=cell, way=way)]
                if points:
                    figures.line(place, way, *zip(*points, strict=True), number=number, marked=True, **more)
        place.set(yscale="log", ylabel=ylabel, xlabel="evaluations of the cell (unrolled: depth)", title=cell)
        figures.log_ticks(place, sorted({row["evaluations"] for row in rows}))
    figures.legend(figure, places)
    return figures.save(figure, path)
