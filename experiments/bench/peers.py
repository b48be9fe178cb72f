"""Other libraries' solvers, run in this process and measured by an independent record of the calls they make."""

from __future__ import annotations

import contextlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metabroyden.solution import Trace, relative, residual_norms
from metabroyden.state import Packing

Cell = Callable[[Tensor, Any], Tensor]


class Enough(Exception):
    """The stopping rule is met: the way out of a solver that has another one."""


class Recorder:
    """f with a stopwatch and, where asked, a record of its calls.

    Recording copies points (a solver may write its next one over them) and so takes time and memory: what is timed is not
    recorded, and the other way round.

    Args:
        f: on a flat state.
        rtol: stop by raising once every row of the batch has met rtol, or the calls are used up; what this costs is no
            time of the solver's, see `excused`. None: the solver stops by itself.
        max_calls: evaluations after which it is stopped in the same way.
        keep: record.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        *,
        rtol: float | None = None,
        max_calls: int | None = None,
        keep: bool = True,
    ) -> None:
        self.f, self.rtol, self.max_calls, self.keep = f, rtol, max_calls, keep
        self.count = 0
        self.last: Tensor | None = None
        self._calls: list[tuple[Tensor, Tensor]] = []
        self._moments: list[tuple[float, float, float]] = []  # f begins, f ends, the solver goes on
        self.began = time.perf_counter()

    def __call__(self, z: Tensor) -> Tensor:
        """f(z)."""
        start = time.perf_counter()
        value = self.f(z)
        end = time.perf_counter()
        self.count += 1
        enough = False
        if self.keep:
            self._calls.append((z.clone(), value))
        if self.rtol is not None:
            self.last = z
            residual = relative(*residual_norms(z.reshape(len(z), -1), value.reshape(len(z), -1))[1:])
            enough = bool((residual <= self.rtol).all()) or self.count == self.max_calls
        self._moments.append((start, end, time.perf_counter()))
        if enough:
            raise Enough
        return value

    @property
    def f_seconds(self) -> float:
        """Seconds inside f."""
        return sum(end - start for start, end, _ in self._moments)

    @property
    def excused(self) -> float:
        """Seconds spent on recording and on our stopping rule."""
        return sum(on - end for _, end, on in self._moments)

    @property
    def gaps(self) -> np.ndarray:
        """(calls − 1,) seconds of the solver's between calls."""
        starts, _, on = np.array(self._moments).T
        return starts[1:] - on[:-1]

    def seconds(self, done: float) -> Tensor:
        """(calls,) when the solver knew the outcome of each call: when it made the next one, or was done."""
        known = np.array([start for start, _, _ in self._moments[1:]] + [done]) - self.began
        return torch.from_numpy(known - np.cumsum([on - end for _, end, on in self._moments]))

    def trace(self) -> Trace:
        """What the calls measured."""
        seconds = self.seconds(time.perf_counter())
        rows = [relative(*residual_norms(z.reshape(len(z), -1), v.reshape(len(z), -1))[1:]) for z, v in self._calls]
        residual = torch.stack(rows)
        nfe = torch.arange(1, len(rows) + 1)[:, None].expand(residual.shape).clone()
        return Trace(residual, nfe, seconds, torch.zeros(nfe.shape, dtype=torch.int8))


@dataclass(frozen=True)
class TorchDEQSolver:
    """A solver of torchdeq by name ("broyden", "anderson", "fixed_point_iter"), with its own options."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def solve(
        self, f: Callable[[Tensor], Tensor], z0: Tensor, rtol: float, max_nfe: int, *, keep: bool = True
    ) -> tuple[Tensor, Recorder]:
        """(z, record) on a flat state. torchdeq stops when the batch's worst sample is done; its Broyden makes one call more
        than it is allowed steps, which is taken into account."""
        from torchdeq.solver import get_solver

        steps = max_nfe - (self.name == "broyden")
        recorder = Recorder(f, keep=keep)
        with torch.no_grad():
            z, _, _ = get_solver(self.name)(
                recorder, z0, max_iter=steps, tol=rtol, stop_mode="rel", **dict(self.options)
            )
        return z, recorder

    def run(self, f: Cell, z0: Tensor, x: Any, rtol: float, max_nfe: int) -> tuple[Tensor, Trace]:
        """(z, trace): every call counts for every sample."""
        z, recorder = self.solve(lambda flat: f(flat.reshape(z0.shape), x).flatten(1), z0.flatten(1), rtol, max_nfe)
        return z.reshape(z0.shape), recorder.trace()

    def clock(self, f: Cell, z0: Tensor, x: Any, rtol: float, max_nfe: int) -> Tensor:
        """(calls,) seconds of a solve that nobody records, as in `Trace.seconds`."""
        flat = z0.flatten(1)
        _, recorder = self.solve(lambda z: f(z.reshape(z0.shape), x).flatten(1), flat, rtol, max_nfe, keep=False)
        return recorder.seconds(time.perf_counter())


@dataclass(frozen=True)
class XitorchSolver:
    """A solver of xitorch's `equilibrium` ("broyden1", "broyden2", "anderson_acc"): the whole batch is ONE system to it.

    It is stopped by our rule, when the worst sample has met it.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def solve(
        self, f: Callable[[Tensor], Tensor], z0: Tensor, rtol: float, max_nfe: int, *, keep: bool = True
    ) -> tuple[Tensor, Recorder]:
        """(last point, record) on a flat state."""
        from xitorch.optimize import equilibrium

        never = {"f_tol": 1e-30, "f_rtol": 1e-30, "x_tol": 1e-30, "x_rtol": 1e-30}
        recorder = Recorder(f, rtol=rtol, max_calls=max_nfe, keep=keep)
        # it fails in several ways on what diverges
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            contextlib.suppress(Enough, RuntimeError, ValueError, TypeError),
        ):
            warnings.simplefilter("ignore")
            equilibrium(lambda z: recorder(z), z0, method=self.name, maxiter=max_nfe, **never, **dict(self.options))
        return z0 if recorder.last is None else recorder.last, recorder


@dataclass(frozen=True)
class ScipySolver:
    """A solver of scipy.optimize, one sample at a time: "broyden1", "anderson", "krylov", or MINPACK's "hybr".

    It is stopped by our rule. The Jacobian's initial scale is one, natural for f(z) − z.
    """

    name: str

    def solve(
        self, f: Callable[[Tensor], Tensor], z0: Tensor, rtol: float, max_nfe: int, *, keep: bool = True
    ) -> tuple[Tensor, Recorder]:
        """(last point, record) on the flat state (1, n) of one sample."""
        from scipy import optimize

        recorder = Recorder(f, rtol=rtol, max_calls=max_nfe, keep=keep)

        def g(flat: np.ndarray) -> np.ndarray:
            z = torch.from_numpy(flat.reshape(1, -1)).to(z0)
            return (recorder(z) - z)[0].double().numpy()

        start = z0[0].double().numpy()
        options: dict[str, Any] = {"f_tol": 1e-300, "maxiter": max_nfe}
        # scipy raises NoConvergence and, on what diverges, several other errors
        with torch.no_grad(), warnings.catch_warnings(), contextlib.suppress(Enough, Exception):
            warnings.simplefilter("ignore")
            if self.name == "hybr":
                optimize.root(g, start, method="hybr", tol=1e-300, options={"maxfev": max_nfe})
            elif self.name == "krylov":
                optimize.newton_krylov(g, start, **options)
            else:
                getattr(optimize, self.name)(g, start, alpha=1.0, **options)
        return z0 if recorder.last is None else recorder.last, recorder


def solve_state(
    peer: Any, f: Callable[..., Any], z0: Any, context: Any, rtol: float, max_nfe: int, *, keep: bool = True
) -> tuple[Any, Recorder]:
    """(z, record) of a peer on a state of one tensor or several, which it meets as (B, n); f(z, context).

    A peer with a true attribute `conditioned` is shown the context, too, as `condition`.
    """
    packing = Packing.of(z0)
    flat = packing.pack(z0)
    seen = {"condition": context} if getattr(peer, "conditioned", False) else {}
    z, recorder = peer.solve(
        lambda z: packing.pack(f(packing.unpack(z), context)), flat, rtol, max_nfe, keep=keep, **seen
    )
    return packing.unpack(z), recorder


def available(package: str) -> bool:
    """Whether a peer's package is installed."""
    return importlib.util.find_spec(package) is not None
