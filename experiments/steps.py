"""What a training step holds in memory and how long it takes, implicit against unrolled: rows. Nothing here draws or judges.

A training step is a forward pass to a scalar loss and its backward pass, with gradients towards the cell's parameters and
the injection. A row is a JSON object with a key "row" that says what it tells:
  bytes     one way of training at one number of evaluations: bytes of tensors, and of Python's objects
  resident  the same: growth of the resident size of a process that does nothing else
  time      the same: seconds forward and backward, and ratios to the unrolled network of that depth

`python -m experiments.steps JSON` makes one step of the `Training` that the JSON describes and prints by how
many bytes its process grew: `resident_bytes` starts it.
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experiments.bench.clock import LiveBytes
from experiments.bench.runner import Row
from metabroyden.deq import DEQ
from metabroyden.gradients import Implicit
from metabroyden.solution import relative_residual
from metabroyden.solve import solve
from metabroyden.solvers import Broyden
from metabroyden.zoo.models import CausalCell, ConvCell

CELLS: dict[str, Callable[[int], nn.Module]] = {"conv": lambda c: ConvCell(c, c, math.gcd(c, 8)), "causal": CausalCell}
"""The cells that are trained, made from their number of channels."""
WAYS = ("implicit", "implicit, full memory", "unrolled", "unrolled, checkpoints")


@dataclass(frozen=True)
class Training:
    """One way of training one cell at one number of evaluations.

    Attributes:
        cell: "conv" (state (batch, channels, extent, extent)) or "causal" (state (batch, channels, extent)).
        way: one of `WAYS`. "unrolled" applies the cell `evaluations` times under plain backpropagation; "checkpoints"
            does so with the activations of ⌈√evaluations⌉ segments computed again (Chen et al. 2016).
        evaluations: of the cell in the forward pass; exactly so many, for the tolerance is zero.
        memory: updates that Broyden's method keeps, forward and backward; with full memory, forward as many as there are
            evaluations. The ring buffer is full from evaluation memory + 2 on.
        backward_nfe: products with the transposed Jacobian in the implicit backward pass.
        gain: what the initial weight matrices are multiplied with, so that no sample comes to rest within the budget.
        seed: of weights, injection and loss.
    """

    cell: str
    way: str
    evaluations: int
    batch: int = 32
    channels: int = 32
    extent: int = 16
    memory: int = 6
    backward_nfe: int = 20
    gain: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cell not in CELLS or self.way not in WAYS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)} and way one of {WAYS}, got {self}")

    def build(self) -> Step:
        """The step, ready to be taken; the same weights and injection for every way."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            cell = CELLS[self.cell](self.channels)
            with torch.no_grad():
                for parameter in cell.parameters():
                    parameter.mul_(self.gain if parameter.dim() > 1 else 1.0)
            shape = (self.batch, self.channels, *[self.extent] * (2 if self.cell == "conv" else 1))
            return Step(self, cell, torch.randn(shape).requires_grad_(), torch.randn(shape))


class Step:
    """A training step of the loss mean(z ⊙ direction), z the (approximate) equilibrium for the injection x."""

    def __init__(self, training: Training, cell: nn.Module, x: Tensor, direction: Tensor) -> None:
        self.training, self.cell, self.x, self.direction = training, cell, x, direction
        self.solver = Broyden(memory=training.memory)
        backward = Implicit(solver=self.solver, rtol=0.0, max_nfe=training.backward_nfe)
        if training.way == "implicit, full memory":
            self.solver = replace(self.solver, memory=training.evaluations)
        self.deq = DEQ(cell, solver=self.solver, backward=backward, rtol=0.0, max_nfe=training.evaluations, warn=False)

    @property
    def implicit(self) -> bool:
        """Whether there is a solve."""
        return self.training.way.startswith("implicit")

    @property
    def given(self) -> list[Tensor]:
        """The tensors that are there before the step."""
        return [*self.cell.parameters(), self.x, self.direction]

    def forward(self) -> Tensor:
        """The loss, with its graph."""
        return (self.state() * self.direction).mean()

    def state(self) -> Tensor:
        """Where the forward pass ends, shaped like x."""
        if self.implicit:
            return self.deq(self.x)
        depth, z = self.training.evaluations, torch.zeros_like(self.x)
        if self.training.way == "unrolled":
            return self._unroll(z, depth)
        segment = math.ceil(math.sqrt(depth))
        for done in range(0, depth, segment):
            z = checkpoint(self._unroll, z, min(segment, depth - done), use_reentrant=False, preserve_rng_state=False)
        return z

    def _unroll(self, z: Tensor, depth: int) -> Tensor:
        for _ in range(depth):
            z = self.cell(z, self.x)
        return z

    def take(self) -> tuple[float, float]:
        """The whole step; seconds forward and backward. Nothing of it is left afterwards."""
        began = time.perf_counter()
        loss = self.forward()
        between = time.perf_counter()
        loss.backward()
        ended = time.perf_counter()
        self.clear()
        return between - began, ended - between

    def clear(self) -> None:
        """Drop the gradients and what the layer remembers of its solves."""
        for tensor in self.given:
            tensor.grad = None
        self.deq.last_solution = self.deq.last_backward_solution = None


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves for the backward pass of forward().

    Every distinct storage counts once; the parameters' do not count, the inputs' do where they are saved. What a
    checkpoint keeps by other means is not seen.

    >>> x = torch.ones(10, requires_grad=True)
    >>> saved_bytes(lambda: (x * x).sum())
    40
    """
    without = {parameter.untyped_storage()._cdata for parameter in parameters}
    seen: dict[int, torch.UntypedStorage] = {}  # kept, so that no other storage can come to stand at its address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in without:
            seen[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(storage.nbytes() for storage in seen.values())


def byte_row(training: Training) -> Row:
    """A row "bytes".

    saved: by autograd, see `saved_bytes`. solver: the most that is alive at once while the forward solve runs on its own
    (iterates, ring buffers, what f and the solver's arithmetic need for a moment). held: alive between forward and
    backward pass. backward: the most that the backward pass adds to that. peak: the most alive at once in the step. All
    without parameters and injection, with gradients. books: the most that Python and numpy add during the step
    (tracemalloc), the trace among it. spent: the fewest evaluations of a sample. residual: median, relative.
    """
    step = training.build()
    step.take()  # what is made once and kept is not the step's
    row: Row = {
        "row": "bytes",
        **_described(training),
        "solver": 0,
        "saved": saved_bytes(step.forward, step.given[:-2]),
    }
    step.clear()
    if step.implicit:
        with LiveBytes(step.given) as live:
            solve(
                step.cell, torch.zeros_like(step.x), step.x,
                solver=step.solver, rtol=0.0, max_nfe=training.evaluations, throw=False,
            )  # fmt: skip
        row["solver"] = live.peak
    with LiveBytes(step.given) as live:
        loss = step.forward()
        row["held"], forward = live.now, live.peak
        live.mark()
        loss.backward()
    row |= {"backward": live.peak - row["held"], "peak": max(forward, live.peak)}
    del loss
    step.clear()
    tracemalloc.start()
    try:
        step.take()
        row["books"] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with torch.no_grad():
        z = step.state()
        row["residual"] = float(relative_residual(z.flatten(1), step.cell(z, step.x).flatten(1)).median())
    solution = step.deq.last_solution
    row["spent"] = training.evaluations if solution is None else int(solution.nfe.min())
    return row


def resident_bytes(training: Training, *, returning: bool = False) -> int:
    """By how much a fresh process grows that builds the cell and takes one step (a small one went before it).

    returning: have glibc's malloc hand every block of 64 KiB or more back as soon as it is free. By default it keeps
    them, and what lies between blocks in use stays resident.
    """
    command = [sys.executable, "-m", "experiments.steps", json.dumps(asdict(training))]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": str(2**16)} if returning else {})}
    done = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout)


def resident_row(training: Training) -> Row:
    """A row "resident": bytes with malloc as it comes, returning with malloc that hands blocks back."""
    row = {"row": "resident", **_described(training)}
    return row | {"bytes": resident_bytes(training), "returning": resident_bytes(training, returning=True)}


def time_rows(trainings: Sequence[Training], repeats: int) -> list[Row]:
    """Rows "time": medians over interleaved repeats; ratios are medians of paired ratios to the unrolled network."""
    steps = [training.build() for training in trainings]
    rounds = [[step.take() for step in steps] for _ in range(1 + repeats)]
    taken = np.array(rounds[1:])  # (repeats, steps, 2); the first round warms up
    seconds = np.concatenate([taken, taken.sum(axis=2, keepdims=True)], axis=2)
    unrolled = {training.evaluations: k for k, training in enumerate(trainings) if training.way == "unrolled"}
    rows = []
    for k, training in enumerate(trainings):
        middle = np.median(seconds[:, k], axis=0).tolist()
        ratios = np.median(seconds[:, k] / seconds[:, unrolled[training.evaluations]], axis=0).tolist()
        parts = ("forward", "backward", "total")
        found = dict(zip(parts, middle, strict=True)) | {f"ratio_{p}": r for p, r in zip(parts, ratios, strict=True)}
        rows.append({"row": "time", **_described(training), **found})
    return rows


def _described(training: Training) -> Row:
    return {key: getattr(training, key) for key in ("cell", "way", "evaluations")}


def _sizes() -> tuple[int, int]:
    """Resident size of this process, now and at its peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return most, most
    # getrusage's peak is no use on Linux: a child inherits its parent's
    found = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    now, most = (1024 * int(found[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    return now, most


if __name__ == "__main__":
    asked = Training(**json.loads(sys.argv[1]))
    replace(asked, evaluations=3, batch=1, memory=2, backward_nfe=3).build().take()  # loads libraries
    gc.collect()
    before, _ = _sizes()
    asked.build().take()
    print(_sizes()[1] - before)
