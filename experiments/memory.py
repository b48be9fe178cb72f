"""Memory and time of a training step through an equilibrium, against the weight-tied network unrolled to a depth.

Rows of a cell, a way and a number of evaluations:
  bytes     of tensors and of Python's objects, see `Step.bytes`; the residual, and evaluations that every sample spent
  resident  growth of a process that takes one step and does nothing else, also with a malloc that hands free blocks back
  time      forward, backward and in total, median seconds and medians of paired ratios to the unrolled network
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from experiments.bench import report
from experiments.bench.options import Seeded, Timed
from experiments.bench.runner import Row, Run, plain
from experiments.bench.training import PARTS, growth, times
from experiments.configs.networks import CELLS, IMPLICIT, UNROLLED, WAYS, step
from metabroyden.comparison import figures
from metabroyden.comparison.tables import Table, chosen, grouped, listed, scaled
from metabroyden.progress import ticks

SIZES = ("saved", "solver", "held", "backward", "peak", "books", "bytes", "returning")


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


def run(config: Memory) -> None:
    """The whole job. Interrupted, it goes on with the next cell."""
    job = Run(config)
    with ticks("measuring", len(CELLS) * len(WAYS) * len(config.evaluations), show=config.progress) as done:
        units = [job.unit(cell, lambda: measured(config, cell, done)) for cell in CELLS]  # noqa: B023 (called at once)
    job.finish([row for unit in units for row in unit], write)


def measured(config: Memory, cell: str, done: Callable[..., None]) -> Iterator[Row]:
    """The rows of a cell."""
    options = plain(config)
    steps = {place: step(options, cell, *place) for place in product(WAYS, sorted(config.evaluations))}
    for (way, count), one in steps.items():
        place = {"cell": cell, "way": way, "evaluations": count}
        small = {**options, "batch": 1, "memory": 2, "backward": 3}
        yield {"row": "bytes", **place, **one.bytes(), **one.reached()}
        yield {"row": "resident", **place, **growth(step, [small, cell, way, 3], [options, cell, way, count])}
        done(f"{cell}, {way}")
    for (way, count), taken in times(steps, lambda place: (UNROLLED, place[1]), config.repeats):
        yield {"row": "time", "cell": cell, "way": way, "evaluations": count, **taken}


@report.of_rows("Memory and time of training")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and its figures, from rows alone; conclusion.md says what the columns are."""
    of_steps = grouped(rows, "cell", "way", "evaluations")
    sizes = [{**resident, **counted, "both": counted["saved"] + counted["solver"]} for counted, resident, _ in of_steps]
    sizes, timed = scaled(sizes, 2**-20, *SIZES), scaled(chosen(rows, "time"), 1e3, *PARTS)
    place: list[Any] = [(key, f"{{{key}}}") for key in ("cell", "way", "evaluations")]
    return [
        _growth(sizes),
        _panels(sizes, folder / "memory_by_evaluations.png", "MiB in a training step", "peak", "bytes"),
        listed("Bytes", sizes, [
            *place, *((key, f"{{{key}:.1f}}") for key in SIZES[:5]), ("books", lambda row: f"{1024 * row['books']:.0f} KiB"),
            ("process", "{bytes:.0f} ({returning:.0f})"), ("residual", "{residual:.1e}"),
        ]),
        _panels(timed, folder / "time_by_evaluations.png", "milliseconds a step", "total", "forward"),
        listed("Time", timed, [
            *place, ("forward", "{forward:.0f} ms ({ratio_forward:.2f}×)"),
            ("backward", "{backward:.0f} ms ({ratio_backward:.2f}×)"), ("both", "{total:.0f} ms ({ratio_total:.2f}×)"),
        ]),
    ]  # fmt: skip


def _growth(rows: Sequence[Row]) -> Table:
    """From the fewest to the most evaluations: what the implicit step saves and holds, and the peaks of all ways."""
    implicit = {cell: max(row["peak"] for row in chosen(rows, "bytes", cell=cell, way=IMPLICIT)) for cell in CELLS}
    words = f"Growth from {rows[0]['evaluations']} to {rows[-1]['evaluations']} evaluations"
    return listed(words, grouped(rows, "cell", "way"), [
        ("cell", "{cell}"), ("way", "{way}"),
        ("saved + solver", lambda of: f"{max(row['both'] for row in of) / min(row['both'] for row in of) - 1:.1%}"),
        ("peak", lambda of: f"{of[-1]['peak'] / of[0]['peak']:.2f}×"),
        ("peak, to the implicit one's at most", lambda of: f"{of[-1]['peak'] / implicit[of[0]['cell']]:.1f}×"),
        ("held", lambda of: f"{1024 * (of[-1]['held'] - of[0]['held']):.0f} KiB"),
    ])  # fmt: skip


def _panels(rows: Sequence[Row], path: Path, ylabel: str, solid: str, dotted: str) -> Path:
    """Two readings against evaluations, a panel a cell."""

    def draw(place: Any, of: list[Row]) -> None:
        figures.lines(place, of, "way", "evaluations", dotted, marked=True, linestyle=":", label=None)
        figures.lines(place, of, "way", "evaluations", solid, marked=True)
        place.set(yscale="log")
        figures.log_ticks(place, sorted({row["evaluations"] for row in of}))

    words: dict[str, Any] = {"xlabel": "evaluations of the cell (unrolled: depth)", "title": "{[0][cell]}"}
    figure = figures.panels(grouped(rows, "cell"), draw, ylabel=ylabel, columns=2, size=(4.9, 4.4), **words)
    return figures.save(figure, path)
