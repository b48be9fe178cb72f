"""What a training step takes: seconds forward and backward, bytes of tensors and of Python, growth of a fresh process.

`python -m experiments.bench.training` is that process.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from metabroyden import DEQ, solve
from metabroyden.comparison.clock import LiveBytes, laps, saved_bytes
from metabroyden.solution import relative_residual

K = TypeVar("K")
PARTS = ("forward", "backward", "total")
"""Of a step, in time."""


class Step:
    """A forward pass to the loss mean(model(x) ⊙ direction) and its backward pass, towards the parameters and x.

    Attributes:
        given: what is there before a step and after it.
    """

    def __init__(self, model: Any, x: Tensor, direction: Tensor) -> None:
        self.model, self.x, self.direction = model, x.requires_grad_(), direction
        self.given = [*model.parameters(), x, direction]

    def forward(self) -> Tensor:
        """The loss, with its graph."""
        return (self.model(self.x) * self.direction).mean()

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
        """Drop the gradients and what a DEQ remembers of its solves."""
        for tensor in self.given:
            tensor.grad = None
        if isinstance(self.model, DEQ):
            self.model.last_solution = self.model.last_backward_solution = None

    def bytes(self) -> dict[str, int]:
        """What a step holds, without parameters and x.

        solver: the most alive at once in a DEQ's forward solve run on its own; saved: by autograd; held: alive between
        forward and backward pass; backward: the most that the backward pass adds; peak: the most alive in the step; books:
        the most that Python and numpy add, which the others do not hold.
        """
        self.take()  # what is made once and kept is not the step's
        saved = saved_bytes(self.forward, self.model.parameters())
        self.clear()
        solver = self._of_solver() if isinstance(self.model, DEQ) else 0
        with LiveBytes(self.given) as live:
            loss = self.forward()
            held, forward = live.now, live.peak
            live.mark()
            loss.backward()
        del loss
        self.clear()
        tracemalloc.start()
        self.take()
        books = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        backward, peak = live.peak - held, max(forward, live.peak)
        return {"solver": solver, "saved": saved, "held": held, "backward": backward, "peak": peak, "books": books}

    @torch.no_grad()
    def reached(self) -> dict[str, Any]:
        """The median residual where the forward pass ends, and the evaluations that every sample spent at least."""
        z = self.model(self.x)
        found = getattr(self.model, "last_solution", None)
        spent = self.model.depth if found is None else int(found.nfe.min())
        return {"residual": float(relative_residual(z, self.model.cell(z, self.x)).median()), "spent": spent}

    def _of_solver(self) -> int:
        deq = self.model
        options = {"solver": deq.solver, "rtol": deq.rtol, "max_nfe": deq.max_nfe, "throw": False}
        with LiveBytes(self.given) as live:
            solve(deq.cell, torch.zeros_like(self.x), self.x, **options)
        return live.peak


def times(steps: Mapping[K, Step], over: Callable[[K], K], repeats: int) -> Iterator[tuple[K, dict[str, float]]]:
    """Steps that take turns: median seconds of each part, and medians of ratios to the step over(key) in the same round."""
    seconds = laps({key: step.take for key, step in steps.items()}, repeats)
    for key, taken in seconds.items():
        medians = zip(PARTS, np.median(taken, axis=0).tolist(), strict=True)
        ratios = zip(PARTS, np.median(taken / seconds[over(key)], axis=0).tolist(), strict=True)
        yield key, {**dict(medians), **{f"ratio_{part}": value for part, value in ratios}}


def growth(make: Callable[..., Step], warm: Sequence[Any], given: Sequence[Any]) -> dict[str, int]:
    """Bytes by which a fresh process grows that takes the step make(*given).

    Args:
        make: a function of a module.
        warm: arguments of a small step that is taken before, and loads libraries.
        given: arguments; all are what JSON can hold.

    Returns:
        "bytes", and "returning": the same where glibc's malloc hands every block of 64 KiB or more back as soon as it is
        free; by default it keeps them.
    """
    words = [make.__module__, make.__name__, json.dumps([warm, given])]
    command, root = [sys.executable, "-m", "experiments.bench.training", *words], Path(__file__).resolve().parents[2]
    found = {}
    for key, more in {"bytes": {}, "returning": {"MALLOC_MMAP_THRESHOLD_": str(2**16)}}.items():
        done = subprocess.run(command, cwd=root, env=os.environ | more, check=True, capture_output=True, text=True)
        found[key] = int(done.stdout)
    return found


def _size(key: str) -> int:
    """Resident size of this process: now (VmRSS) or at its peak (VmHWM); where that is not told, always the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # getrusage's peak is no use on Linux: a child inherits its parent's
    return 1024 * int(status.read_text().split(f"{key}:")[1].split()[0])


def _grown(module: str, name: str, arguments: str) -> int:
    make, (warm, given) = getattr(importlib.import_module(module), name), json.loads(arguments)
    make(*warm).take()
    gc.collect()
    before = _size("VmRSS")
    make(*given).take()
    return _size("VmHWM") - before


if __name__ == "__main__":
    print(_grown(*sys.argv[1:]))
