"""What the solves of a model cost while it trains, as figures for a log: `SolveMonitor`."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from metabroyden.deq import DEQ
from metabroyden.integrations.loggers import MetricLogger
from metabroyden.solution import Solution, Status
from metabroyden.solvers.base import check_number

_FAILURES = tuple(status for status in Status if status is not Status.CONVERGED)


class SolveMonitor:
    """Evaluations, failures and solver time of every `mb.DEQ` in a model, for any training loop.

    It counts from when it is made, or reset, until it is detached: every solve, in training and in evaluation, forward and,
    where the gradients are `Implicit`, backward. Use it as a context manager to detach it at the end. It keeps counts and no
    tensors, and never waits for a device: a solve takes some 10 µs longer.

    The figures of a DEQ carry its name in the model, or `deq` where the model is a DEQ itself:

    | figure | what it says |
    | --- | --- |
    | `deq/solves` | solves, each of a batch |
    | `deq/nfe_mean`, `deq/nfe_p90`, `deq/nfe_max` | evaluations of f a sample: mean, 90% quantile, maximum |
    | `deq/failed` | share of the samples that did not converge |
    | `deq/failed_max_nfe`, … | the same by `Status`, from the first such failure on |
    | `deq/seconds` | wall-clock seconds in the solver and in f, in sum |
    | `deq/backward_solves`, … | the same of the adjoint solves |

    A sample that failed counts with the evaluations it spent.

    Args:
        model: module with at least one `mb.DEQ` in it, or a DEQ; those inside another DEQ's cell count too. A DEQ that comes
            into the model later is not watched.
        logger: what `log` hands the figures to: anything with `log(metrics, step)`, such as `TensorBoardLogger`.
        every: training steps from one entry of `log` to the next.

    Raises:
        TypeError: model is no module, or logger has no method `log`.
        ValueError: no DEQ in the model; every is not a positive whole number.

    Examples:
        >>> import torch, metabroyden as mb
        >>> deq = mb.DEQ(lambda z, x: torch.tanh(0.5 * z + x))
        >>> with mb.integrations.SolveMonitor(deq) as monitor:
        ...     z = deq(torch.ones(4, 3))
        >>> monitor.metrics()["deq/solves"], monitor.metrics()["deq/failed"]
        (1.0, 0.0)
    """

    def __init__(self, model: nn.Module, logger: MetricLogger | None = None, *, every: int = 1) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        if logger is not None and not callable(getattr(logger, "log", None)):
            raise TypeError(f"logger must have a method log(metrics, step), got {type(logger).__name__}")
        check_number("SolveMonitor", "every", every, 0, 10**9, whole=True)
        self._watched = {name or "deq": module for name, module in model.named_modules() if isinstance(module, DEQ)}
        if not self._watched:
            raise ValueError(f"SolveMonitor watches the mb.DEQ layers of a model, and {type(model).__name__} has none")
        self._logger, self._every = logger, every
        self._figures: dict[str, _Figures] = {}
        self._observers: dict[str, Any] = {}
        self._lock = threading.Lock()  # autograd and users have threads of their own
        self.attach()

    def attach(self) -> None:
        """Count again after `detach`; the figures so far stay."""
        for name, deq in self._watched.items():
            if name not in self._observers:
                self._observers[name] = partial(self._note, name)
                deq.observers.append(self._observers[name])

    def detach(self) -> None:
        """Stop counting and leave no trace in the model; the figures so far stay."""
        while self._observers:
            name, observer = self._observers.popitem()
            if observer in self._watched[name].observers:
                self._watched[name].observers.remove(observer)

    def metrics(self) -> dict[str, float]:
        """The figures since the last reset, by name; none of a DEQ that has solved nothing."""
        with self._lock:
            return {name: value for prefix, figures in self._figures.items() for name, value in figures.named(prefix)}

    def reset(self) -> None:
        """Begin anew."""
        with self._lock:
            for figures in self._figures.values():
                figures.reset()

    def log(self, step: int) -> None:
        """Call this once a training step: it logs the figures, and resets them, where step is a multiple of `every`.

        ValueError where there is no logger.
        """
        if self._logger is None:
            raise ValueError(
                "this SolveMonitor has no logger: give one, SolveMonitor(model, TensorBoardLogger('runs/1'))"
            )
        if step % self._every == 0:
            self._logger.log(self.metrics(), step)
            self.reset()

    def __enter__(self) -> SolveMonitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the figures. It watches nothing and logs nowhere: a copied DEQ has no observers."""
        return {**self.__dict__, "_watched": {}, "_observers": {}, "_logger": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _note(self, name: str, direction: str, solution: Solution) -> None:
        key = f"{name}/" if direction == "forward" else f"{name}/{direction}_"
        with self._lock:
            self._figures.setdefault(key, _Figures()).add(solution)


class _Figures:
    """Counts of the solves of one DEQ in one direction."""

    def __init__(self) -> None:
        self._occurred: set[Status] = set()
        self.reset()

    def reset(self) -> None:
        """Forget all but which statuses have occurred, so that a log's columns stay."""
        self._solves, self._seconds = 0, 0.0
        self._nfe = np.zeros(1, dtype=np.int64)  # samples by evaluations
        self._status = np.zeros(len(Status), dtype=np.int64)  # samples by status

    def add(self, solution: Solution) -> None:
        """Count a solve."""
        self._solves += 1
        self._seconds += solution.seconds
        nfe = np.bincount(solution.nfe.cpu().numpy(), minlength=len(self._nfe))
        nfe[: len(self._nfe)] += self._nfe
        self._nfe = nfe
        self._status += np.bincount(solution.status.cpu().numpy(), minlength=len(Status))

    def named(self, prefix: str) -> list[tuple[str, float]]:
        """(name, figure) of each figure; none where nothing was solved."""
        if not self._solves:
            return []
        figures: dict[str, float] = {"solves": self._solves, "seconds": self._seconds}
        samples = int(self._nfe.sum())
        if samples:
            upto = self._nfe.cumsum()
            figures["nfe_mean"] = float(self._nfe @ np.arange(len(self._nfe))) / samples
            figures["nfe_p90"] = int(np.searchsorted(upto, 0.9 * samples))
            figures["nfe_max"] = int(np.searchsorted(upto, samples))
            figures["failed"] = 1 - self._status[Status.CONVERGED] / samples
            self._occurred.update(status for status in _FAILURES if self._status[status])
            for status in sorted(self._occurred):
                figures[f"failed_{status.name.lower()}"] = self._status[status] / samples
        return [(prefix + name, float(value)) for name, value in figures.items()]
