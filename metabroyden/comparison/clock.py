"""What a solve takes: seconds in f, in the solver and in all else, and bytes of tensors that are alive at once."""

from __future__ import annotations

import platform
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metabroyden.function import FunctionWrapper, rewrap
from metabroyden.gradients.base import parts_of
from metabroyden.solution import Cell, Solution, State
from metabroyden.solve import solve
from metabroyden.solver import Phase

K = TypeVar("K")
T = TypeVar("T")
_WORK = ("start", "init", "step", "gather")


def now(device: torch.device) -> float:
    """Seconds, when a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def clocked(rounds: int, device: torch.device) -> str:
    """What times are of, in words: rounds; threads and processor, or the GPU; and torch's version.

    Examples:
        >>> clocked(0, torch.device("cpu"))
        'nothing was timed'
    """
    if not rounds:
        return "nothing was timed"
    times = f"medians of {rounds} rounds" if rounds > 1 else "of one round"
    if device.type == "cuda":
        where = f"on a {torch.cuda.get_device_name(device)}"
    else:
        threads = torch.get_num_threads()
        kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
        where = f"on {threads} thread{'s' if threads > 1 else ''} of a processor ({kind})"
    return f"times are {times} in which the solvers take turns, {where}, torch {torch.__version__.split('+')[0]}"


def turns(names: Sequence[T], rounds: int) -> Iterator[T]:
    """Every name once a round, another one first each round."""
    for number in range(rounds):
        first = number % len(names)
        yield from (*names[first:], *names[:first])


def timed(f: Cell, z0: State, context: Any, **options: Any) -> tuple[Solution, float]:
    """(solution, seconds) of one solve; arguments as for `solve`."""
    device = parts_of(z0)[0].device
    began = now(device)
    solution = solve(f, z0, context, throw=False, **options)
    return solution, now(device) - began


def laps(jobs: Mapping[K, Callable[[], Any]], rounds: int) -> dict[K, np.ndarray]:
    """(rounds, …) readings of jobs that take turns, after a round that warms up.

    A job's reading is the number or the tuple of numbers that it returns; of one that returns anything else, its seconds.
    """
    found: dict[K, list[Any]] = {key: [] for key in jobs}
    for key in turns(list(jobs), rounds + 1):
        began = time.perf_counter()
        reading = jobs[key]()
        seconds = time.perf_counter() - began
        found[key].append(reading if isinstance(reading, float) or type(reading) is tuple else seconds)
    return {key: np.array(values[1:]) for key, values in found.items()}


class Stopwatch:
    """Seconds spent in f and in a solver while these run through it. What f takes inside of a solver's step is f's.

    Attributes:
        f: seconds.
        solver: seconds.
        calls: of f.

    Examples:
        >>> import torch, metabroyden as mb
        >>> watch = Stopwatch(torch.device("cpu"))
        >>> found = mb.solve(watch.of_f(torch.cos), torch.zeros(1, 1), solver=watch.of_solver(mb.Picard()), rtol=0.1)
        >>> watch.calls == int(found.nfe), watch.f > 0, watch.solver > 0
        (True, True, True)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations under it make, for as long as they live.

    A storage counts once, however many views of it there are, from the operation that first sees it until the last
    tensor on it is gone. What a kernel allocates inside itself, and numpy's arrays, are not seen.

    Attributes:
        now: bytes alive.
        peak: the most there were at once since the start or the last `mark`.

    Examples:
        >>> with LiveBytes() as live:
        ...     a = torch.ones(10)
        ...     b = a.view(2, 5) + 1
        ...     del a
        >>> live.now, live.peak
        (40, 80)
    """

    def __init__(self, outside: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in outside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made."""
        made = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves((args, kwargs, made)):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return made

    def mark(self) -> None:
        """Begin a new peak."""
        self.peak = self.now

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            size = self._known[key] = storage.nbytes()
            weakref.finalize(storage, self._forget, key).atexit = False
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves for the backward pass of forward().

    Every distinct storage counts once; the parameters' do not count, the inputs' do where they are saved. What a
    checkpoint keeps by other means is not seen.

    Examples:
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
