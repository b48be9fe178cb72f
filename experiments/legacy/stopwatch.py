"""Where the time of a solve goes: calls of f, the solver, and all else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from metabroyden.function import FunctionWrapper, rewrap
from metabroyden.solution import State
from metabroyden.solver import Phase

_WORK = ("start", "init", "step", "gather")


def now(device: torch.device) -> float:
    """Seconds, when a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Seconds spent in f and in a solver while these run through it. What f takes inside of a solver's step is f's.

    Attributes:
        f, solver: seconds since the start or the last `clear`. calls: of f.

    >>> import torch, metabroyden as mb
    >>> watch = Stopwatch(torch.device("cpu"))
    >>> found = mb.solve(watch.of_f(torch.cos), torch.zeros(1, 1), solver=watch.of_solver(mb.Picard()), rtol=0.1)
    >>> watch.calls == int(found.nfe), watch.f > 0, watch.solver > 0
    (True, True, True)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.f = self.solver = 0.0
        self.calls = 0

    def of_f(self, f: Callable[..., State]) -> Callable[..., State]:
        """f, timed; parts of the cell behind it are not."""
        return _TimedMap(f, self)

    def of_solver(self, solver: Any) -> Any:
        """A solver, timed, with those that its safeguard hands over to."""
        return _TimedSolver(solver, self)


class _TimedMap(FunctionWrapper):
    def __init__(self, f: Callable[..., State], watch: Stopwatch) -> None:
        self.inner, self.watch = f, watch

    def rewrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """This function as the map inside is run."""
        return rewrap(self.inner, function)

    def __call__(self, *arguments: Any) -> State:
        watch = self.watch
        began = now(watch.device)
        value = self.inner(*arguments)
        watch.f += now(watch.device) - began
        watch.calls += 1
        return value


class _TimedSolver:
    def __init__(self, solver: Any, watch: Stopwatch) -> None:
        self.solver, self.watch = solver, watch

    def __getattr__(self, name: str) -> Any:
        value, watch = getattr(self.solver, name), self.watch
        if name not in _WORK:
            return value

        def timed(*arguments: Any) -> Any:
            began, in_f = now(watch.device), watch.f
            found = value(*arguments)
            watch.solver += now(watch.device) - began - (watch.f - in_f)
            return found

        return timed

    def __repr__(self) -> str:
        return repr(self.solver)

    def phases(self) -> list[Phase]:
        """The solver's phases, timed."""
        return [replace(phase, solver=_TimedSolver(phase.solver, self.watch)) for phase in self.solver.phases()]
