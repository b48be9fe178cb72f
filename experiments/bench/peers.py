"""Other libraries' solvers, run in this process and measured by an independent record of the calls they make."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metabroyden.solution import Trace, relative, residual_norms
from metabroyden.state import Packing


class Enough(Exception):
    """The stopping rule is met: the way out of a solver that has another one."""


class Recorder:
    """f with a stopwatch and, where asked, a record of its calls f(z, …).

    Recording copies points (a solver may write its next one over them) and so takes time and memory: what is timed is not
    recorded, and the other way round.

    Args:
        f: on one tensor, a sample a row.
        rtol: stop by raising once every row has met rtol; what this costs is `excused`. None: the solver stops by itself.
        max_calls: evaluations after which it is stopped in the same way.
        keep: record.
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
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

    def __call__(self, z: Tensor, *context: Any) -> Tensor:
        """f(z, …)."""
        start = time.perf_counter()
        value = self.f(z, *context)
        end = time.perf_counter()
        self.count += 1
        enough = False
        if self.keep:
            self._calls.append((z.clone(), value))
        if self.rtol is not None:
            self.last = z
            enough = bool((_residual(z, value) <= self.rtol).all()) or self.count == self.max_calls
        self._moments.append((start, end, time.perf_counter()))
        if enough:
            raise Enough
        return value

    @property
    def rows(self) -> int:
        """Samples in all calls."""
        return sum(len(value) for _, value in self._calls)

    @property
    def f_seconds(self) -> float:
        """Seconds inside f."""
        return sum(end - start for start, end, _ in self._moments)

    @property
    def excused(self) -> float:
        """Seconds spent on recording and on our stopping rule."""
        return sum(on - end for _, end, on in self._moments)

    def trace(self) -> Trace:
        """What the calls measured, and when the solver knew each outcome: when it made the next call, or now."""
        known = np.array([start for start, _, _ in self._moments[1:]] + [time.perf_counter()]) - self.began
        seconds = torch.from_numpy(known - np.cumsum([on - end for _, end, on in self._moments]))
        residual = torch.stack([_residual(z, value) for z, value in self._calls])
        nfe = torch.arange(1, len(residual) + 1)[:, None].expand(residual.shape).clone()
        return Trace(residual, nfe, seconds, torch.zeros(nfe.shape, dtype=torch.int8))


def _residual(z: Tensor, value: Tensor) -> Tensor:
    return relative(*residual_norms(z.reshape(len(z), -1), value.reshape(len(z), -1))[1:])


@contextlib.contextmanager
def recorded(cell: nn.Module) -> Iterator[Recorder]:
    """A record of the calls of a cell f(z, …) while it lasts, whoever makes them."""
    cell.forward = record = Recorder(cell.forward)
    try:
        yield record
    finally:
        del cell.forward  # the class's again


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


@dataclass(frozen=True)
class _Stopped:
    """A solver that is stopped by our rule, when the worst sample has met it."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    module: ClassVar[str] = ""

    def solve(
        self, f: Callable[[Tensor], Tensor], z0: Tensor, rtol: float, max_nfe: int, *, keep: bool = True
    ) -> tuple[Tensor, Recorder]:
        """(last point, record) on a flat state."""
        library = importlib.import_module(self.module)
        recorder = Recorder(f, rtol=rtol, max_calls=max_nfe, keep=keep)
        # they fail in several ways on what diverges
        with torch.no_grad(), warnings.catch_warnings(), contextlib.suppress(Enough, Exception):
            warnings.simplefilter("ignore")
            self.go(library, recorder, z0, max_nfe)
        return z0 if recorder.last is None else recorder.last, recorder

    def go(self, library: Any, f: Recorder, z0: Tensor, max_nfe: int) -> None:
        """Run it, never to stop by itself."""
        raise NotImplementedError


class XitorchSolver(_Stopped):
    """A solver of xitorch's `equilibrium` ("broyden1", "broyden2", "anderson_acc"): the whole batch is ONE system to it."""

    module = "xitorch.optimize"

    def go(self, library: Any, f: Recorder, z0: Tensor, max_nfe: int) -> None:
        """Run it, never to stop by itself."""
        never = {"f_tol": 1e-30, "f_rtol": 1e-30, "x_tol": 1e-30, "x_rtol": 1e-30}
        library.equilibrium(lambda z: f(z), z0, method=self.name, maxiter=max_nfe, **never, **dict(self.options))


class ScipySolver(_Stopped):
    """A solver of scipy.optimize, one sample (1, n) at a time: "broyden1", "anderson", "krylov", or MINPACK's "hybr".

    The Jacobian's initial scale is one, natural for f(z) − z.
    """

    module = "scipy.optimize"

    def go(self, library: Any, f: Recorder, z0: Tensor, max_nfe: int) -> None:
        """Run it, never to stop by itself."""

        def g(flat: np.ndarray) -> np.ndarray:
            z = torch.from_numpy(flat.reshape(1, -1)).to(z0)
            return (f(z) - z)[0].double().numpy()

        start, options = z0[0].double().numpy(), {"f_tol": 1e-300, "maxiter": max_nfe}
        if self.name == "hybr":
            library.root(g, start, method="hybr", tol=1e-300, options={"maxfev": max_nfe})
        elif self.name == "krylov":
            library.newton_krylov(g, start, **options)
        else:
            getattr(library, self.name)(g, start, alpha=1.0, **options)


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
