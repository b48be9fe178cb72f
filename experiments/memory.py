"""Memory and time of a training step through an equilibrium, against the weight-tied network unrolled to a depth.

A step is a forward pass to a scalar loss and its backward pass, with gradients towards the cell's parameters and the
injection. Rows: "bytes" of tensors and of Python's objects, "resident" growth of a process that takes one step and does
nothing else (`python -m experiments.memory JSON` is that process), "time".
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experiments.bench import figures, report
from experiments.bench.clock import LiveBytes, laps, saved_bytes
from experiments.bench.options import Seeded, Timed
from experiments.bench.runner import Row, Run, plain, ticks
from experiments.bench.tables import Table, chosen, grouped, listed
from metabroyden import DEQ, Broyden, Implicit, solve
from metabroyden.solution import relative_residual
from metabroyden.zoo.models import CausalCell, ConvCell

CELLS: dict[str, Callable[[int], nn.Module]] = {"conv": lambda c: ConvCell(c, c, math.gcd(c, 8)), "causal": CausalCell}
"""The cells that are trained, made from their number of channels."""
IMPLICIT, FULL, UNROLLED, CHECKPOINTS = WAYS = (
    "implicit", "implicit, full memory", "unrolled", "unrolled, checkpoints",
)  # fmt: skip
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


def run(config: Memory) -> None:
    """The whole job. Interrupted, it goes on with the next cell."""
    job, rows = Run(config), []
    with ticks("measuring", len(CELLS) * (len(WAYS) * len(config.evaluations) + 1), show=config.progress) as done:
        for cell in CELLS:
            rows += job.unit(cell, lambda: measured(config, cell, done))  # noqa: B023 (called at once)
    job.finish(rows, write)


def measured(config: Memory, cell: str, done: Callable[..., None] = lambda words: None) -> Iterator[Row]:
    """The rows of a cell."""
    steps = {(way, count): Step(config, cell, way, count) for way in WAYS for count in config.evaluations}
    for (way, count), step in steps.items():
        place = {"cell": cell, "way": way, "evaluations": count}
        yield {"row": "bytes", **place, **bytes_of(step)}
        grown = {key: resident_bytes(config, cell, way, count, key == "returning") for key in ("bytes", "returning")}
        yield {"row": "resident", **place, **grown}
        done(f"{cell}, {way}")
    parts = ("forward", "backward", "total")
    seconds = laps({place: step.take for place, step in steps.items()}, config.repeats)
    for (way, count), taken in seconds.items():
        middle = np.median(taken, axis=0).tolist()
        ratios = np.median(taken / seconds[UNROLLED, count], axis=0).tolist()
        found = dict(zip((*parts, *(f"ratio_{part}" for part in parts)), (*middle, *ratios), strict=True))
        yield {"row": "time", "cell": cell, "way": way, "evaluations": count, **found}
    done(f"{cell}: time")


class Step:
    """A training step of the loss mean(z ⊙ direction), z the (approximate) equilibrium for the injection x.

    The tolerance is zero, so that exactly `evaluations` are spent. Broyden's ring buffer is full from evaluation memory + 2
    on. Unrolled, the cell is applied as many times; with checkpoints, the activations of ⌈√evaluations⌉ segments are
    computed again (Chen et al. 2016). Weights and injection are the same for every way.
    """

    def __init__(self, config: Memory, cell: str, way: str, evaluations: int) -> None:
        if cell not in CELLS or way not in WAYS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)} and way one of {WAYS}, got {cell}, {way}")
        shape = (config.channels, config.side, config.side) if cell == "conv" else (config.width, config.tokens)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.cell = CELLS[cell](shape[0])
            for parameter in self.cell.parameters():
                parameter.data.mul_(config.gain if parameter.dim() > 1 else 1.0)
            self.x = torch.randn(config.batch, *shape).requires_grad_()
            self.direction = torch.randn(config.batch, *shape)
        self.way, self.evaluations, limited = way, evaluations, Broyden(memory=config.memory)
        backward = Implicit(solver=limited, rtol=0.0, max_nfe=config.backward)
        self.solver = replace(limited, memory=evaluations) if way == FULL else limited
        self.deq = DEQ(self.cell, solver=self.solver, backward=backward, rtol=0.0, max_nfe=evaluations, warn=False)
        self.given = [*self.cell.parameters(), self.x, self.direction]

    def forward(self) -> Tensor:
        """The loss, with its graph."""
        return (self.state() * self.direction).mean()

    def state(self) -> Tensor:
        """Where the forward pass ends, shaped like x."""
        if self.way in (IMPLICIT, FULL):
            return self.deq(self.x)
        depth, z = self.evaluations, torch.zeros_like(self.x)
        if self.way == UNROLLED:
            return self._unroll(z, depth)
        segment = math.ceil(math.sqrt(depth))
        for done in range(0, depth, segment):
            z = checkpoint(self._unroll, z, min(segment, depth - done), use_reentrant=False, preserve_rng_state=False)
        return z

    def _unroll(self, z: Tensor, depth: int) -> Tensor:
        for _ in range(depth):
            z = self.cell(z, self.x)
        return z

    def take(self) -> tuple[float, float, float]:
        """The whole step; seconds forward, backward and both. Nothing of it is left afterwards."""
        began = time.perf_counter()
        loss = self.forward()
        between = time.perf_counter()
        loss.backward()
        ended = time.perf_counter()
        self.clear()
        return between - began, ended - between, ended - began

    def clear(self) -> None:
        """Drop the gradients and what the layer remembers of its solves."""
        for tensor in self.given:
            tensor.grad = None
        self.deq.last_solution = self.deq.last_backward_solution = None


def bytes_of(step: Step) -> Row:
    """What a step holds, without parameters and injection; the columns are explained in the report."""
    step.take()  # what is made once and kept is not the step's
    saved = saved_bytes(step.forward, step.given[:-2])
    step.clear()
    solver = 0
    if step.way in (IMPLICIT, FULL):
        with LiveBytes(step.given) as live:
            z0, options = torch.zeros_like(step.x), {"rtol": 0.0, "max_nfe": step.evaluations, "throw": False}
            solve(step.cell, z0, step.x, solver=step.solver, **options)  # type: ignore[arg-type]
        solver = live.peak
    with LiveBytes(step.given) as live:
        loss = step.forward()
        held, forward = live.now, live.peak
        live.mark()
        loss.backward()
    del loss
    step.clear()
    tracemalloc.start()
    step.take()
    books = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with torch.no_grad():
        z = step.state()
        residual = float(relative_residual(z.flatten(1), step.cell(z, step.x).flatten(1)).median())
    solution = step.deq.last_solution
    spent = step.evaluations if solution is None else int(solution.nfe.min())
    return {"solver": solver, "saved": saved, "held": held, "backward": live.peak - held, "peak": max(forward, live.peak),
            "books": books, "residual": residual, "spent": spent}  # fmt: skip


def resident_bytes(config: Memory, cell: str, way: str, evaluations: int, returning: bool = False) -> int:
    """By how much a fresh process grows that takes one step (a small one went before it).

    returning: have glibc's malloc hand every block of 64 KiB or more back as soon as it is free; by default it keeps them.
    """
    command = [sys.executable, "-m", "experiments.memory", json.dumps([plain(config), cell, way, evaluations])]
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": str(2**16)} if returning else {})}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout)


def _size(key: str) -> int:
    """Resident size of this process: now (VmRSS) or at its peak (VmHWM); where that is not told, always the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # getrusage's peak is no use on Linux: a child inherits its parent's
    return 1024 * int(status.read_text().split(f"{key}:")[1].split()[0])


@report.of_rows("Memory and time of training")
def write(rows: list[Row], described: Row, folder: Path) -> list[report.Section]:
    """report.md and its figures, from rows alone."""
    config, counted, timed = described["config"], chosen(rows, "bytes"), chosen(rows, "time")
    short = [row for row in counted if row["spent"] < row["evaluations"]]
    grown = {
        _key(row): f"{row['bytes'] / _MIB:.0f} ({row['returning'] / _MIB:.0f})" for row in chosen(rows, "resident")
    }
    place: list[Any] = [("cell", "{cell}"), ("way", "{way}"), ("evaluations", "{evaluations}")]
    mebibytes = [(key, partial(_mebibytes, key)) for key in ("saved", "solver", "held", "backward", "peak")]
    rest = [("books", lambda row: f"{row['books'] / 1024:.0f} KiB"), ("process", lambda row: grown[_key(row)])]
    both = [
        ("forward", partial(_time, "forward")),
        ("backward", partial(_time, "backward")),
        ("both", partial(_time, "total")),
    ]
    return [
        "One training step: a forward pass to a scalar loss and its backward pass, with gradients towards the cell's "
        f"parameters and the injection. conv: `ConvCell`, batch {config['batch']}, {config['channels']} channels, "
        f"{config['side']}×{config['side']}. causal: `CausalCell`, batch {config['batch']}, {config['width']} channels, "
        f"{config['tokens']} tokens. float32; initial weights times {config['gain']:g}, tolerance zero: in {len(short)} of "
        f"{len(counted)} runs a sample came to rest before its evaluations were spent. Implicit: `DEQ` with "
        f"Broyden's method of memory {config['memory']}, backward {config['backward']} products with Jᵀ, with the same "
        "memory; with full memory the forward solve keeps every update. Unrolled: the cell applied as many times, by plain "
        "backpropagation; with checkpoints, the activations of segments of √depth applications are computed again "
        "(Chen et al. 2016). Equal evaluations are not equal accuracy: the residual stands beside them.",
        _growth(counted),
        _panels(rows, folder / "memory_by_evaluations.png", "MiB in a training step", 1 / _MIB, "bytes peak",
                "resident bytes"),
        "Solid: the most bytes of tensors alive at once in the step, all that the dispatcher sees (saved tensors, solver, "
        "temporaries, gradients; neither parameters nor injection, nor what a kernel allocates within itself). Dotted: by "
        "how much a fresh process grew.",
        listed("Bytes", counted, [*place, *mebibytes, *rest, ("residual", "{residual:.1e}")]),
        "MiB, books in KiB. saved: by autograd, distinct storages, parameters left out. solver: the most alive at once in "
        "the forward solve run on its own: iterates, ring buffers, temporaries of f and of the solver's arithmetic. held: "
        "alive between forward and backward pass. backward: the most that the backward pass adds. peak: the most alive in "
        "the step. books: the most that Python and numpy add (the trace is among it), which the other columns do not hold. "
        "process: growth of a fresh process; in brackets with a malloc that hands free blocks back at once "
        "(MALLOC_MMAP_THRESHOLD_=65536): the rest is what glibc keeps.",
        _panels(rows, folder / "time_by_evaluations.png", "milliseconds a step", 1e3, "time total", "time forward"),
        f"Medians of {config['repeats']} interleaved steps in one process; ratios are medians of paired ratios to the "
        "unrolled network of as many evaluations. Solid: forward and backward. Dotted: forward alone.",
        listed("Time", timed, [*place, *both]),
    ]  # fmt: skip


def _key(row: Row) -> tuple[str, str, int]:
    return row["cell"], row["way"], row["evaluations"]


def _mebibytes(key: str, row: Row) -> str:
    return f"{row[key] / _MIB:.1f}"


def _time(part: str, row: Row) -> str:
    return f"{1e3 * row[part]:.0f} ms ({row[f'ratio_{part}']:.2f}×)"


def _growth(rows: Sequence[Row]) -> Table:
    """From the fewest to the most evaluations: what the implicit step saves and holds, and the peaks of all ways."""

    def growth(found: list[Row]) -> dict[str, Any]:
        both, peaks = [row["saved"] + row["solver"] for row in found], [row["peak"] for row in found]
        other = [row["peak"] for row in chosen(rows, "bytes", cell=found[0]["cell"], way=IMPLICIT)]
        return {**found[0], "both": max(both) / min(both) - 1, "peak": peaks[-1] / peaks[0], "most": peaks[-1] / max(other),
                "held": (found[-1]["held"] - found[0]["held"]) / 1024}  # fmt: skip

    found = [sorted(of, key=lambda row: row["evaluations"]) for of in grouped(rows, "cell", "way")]
    words = "Growth from {} to {} evaluations".format(*(found[0][at]["evaluations"] for at in (0, -1)))
    return listed(words, map(growth, found), [
        ("cell", "{cell}"), ("way", "{way}"), ("saved + solver", "{both:.1%}"), ("peak", "{peak:.2f}×"),
        ("peak, to the implicit one's at most", "{most:.1f}×"), ("held", "{held:.0f} KiB"),
    ])  # fmt: skip


def _panels(rows: Sequence[Row], path: Path, ylabel: str, scale: float, solid: str, dotted: str) -> Path:
    """Two readings, "KIND KEY", against evaluations, a panel a cell."""

    def draw(place: Any, cell: str) -> None:
        for number, way in enumerate(WAYS):
            styles: dict[str, Any] = {dotted: {"linestyle": ":", "label": None}, solid: {}}
            for reading, style in styles.items():
                kind, key = reading.split()
                points = [(row["evaluations"], scale * row[key]) for row in chosen(rows, kind, cell=cell, way=way)]
                figures.line(place, way, *zip(*points, strict=True), number=number, marked=True, **style)
        place.set(yscale="log")
        figures.log_ticks(place, sorted({row["evaluations"] for row in rows}))

    words = "evaluations of the cell (unrolled: depth)"
    return figures.save(figures.panels(list(CELLS), draw, words, ylabel, columns=2, size=(4.9, 4.4)), path)


if __name__ == "__main__":
    options, cell, way, evaluations = json.loads(sys.argv[1])
    asked = Memory(**options)
    Step(replace(asked, batch=1, memory=2, backward=3), cell, way, 3).take()  # loads libraries
    gc.collect()
    before = _size("VmRSS")
    Step(asked, cell, way, evaluations).take()
    print(_size("VmHWM") - before)
