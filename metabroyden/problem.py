"""The counted view of f that a solver works on: there is no way round the counter.

`Ledger` belongs to one solve: it calls f, counts the calls per sample on the host, keeps the best iterate and the
trace. `Problem` is what a solver sees of it: a set of samples ("rows"), their context, the residual, Jacobian products.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metabroyden.solution import State, Trace, relative, residual_norms
from metabroyden.state import Packing, gather

F = Callable[..., State]


class Rows:
    """Some samples of a batch, in order: their numbers on the host and, where it is not the whole batch, on the device."""

    def __init__(self, host: np.ndarray, device: torch.device, batch: int) -> None:
        self.host = host
        whole = len(host) == batch and bool((host == np.arange(batch)).all())  # all of them, and in order
        self.index = None if whole else torch.as_tensor(host, device=device)
        self._context: Any = None

    def __len__(self) -> int:
        return len(self.host)

    def context(self, full: Any) -> Any:
        """The context of these rows, gathered once."""
        if self.index is None or full is None:
            return full
        if self._context is None:
            self._context = gather(full, self.index)
        return self._context


class Ledger:
    """Calls f for a whole solve and writes down what it cost and what it found.

    Attributes:
        nfe: (B,) evaluations spent, on the host. best_z: (B, n); best_g: its g, None where nothing will be handed over.
        best: (B,) relative residual of best_z, NaN before the first finite evaluation. converged, finite: (B,) bool on
        the device; finite speaks of the sample's last evaluation. phase: (B,) host, the phase of the driver a sample is in.
    """

    def __init__(
        self,
        f: F,
        packing: Packing,
        z0: Tensor,
        context: Any,
        *,
        rtol: float,
        atol: float,
        max_nfe: int,
        keep_g: bool = True,
    ) -> None:
        self.f, self.packing, self.context, self.max_nfe = f, packing, context, max_nfe
        self.rtol, self.atol = rtol, atol
        batch = len(z0)
        self.nfe = np.zeros(batch, dtype=np.int64)
        self.phase = np.zeros(batch, dtype=np.int8)
        self.z0 = z0
        self.forward_ad: bool | None = None  # whether f has forward AD; None: not tried yet
        self.origin: Tensor | None = None
        self.best_z = z0
        self.best_g = torch.zeros_like(z0) if keep_g else None
        self.best = z0.new_full((batch,), torch.nan)
        self.converged = torch.zeros(batch, dtype=torch.bool, device=z0.device)
        self.finite = torch.ones(batch, dtype=torch.bool, device=z0.device)
        self._events: list[tuple[np.ndarray, Tensor | None, Tensor, np.ndarray, np.ndarray]] = []
        self._seconds: list[float] = []
        self._began = time.perf_counter()

    def rows(self, host: np.ndarray) -> Rows:
        """The samples with these numbers."""
        return Rows(host, self.best_z.device, len(self.nfe))

    def spend(self, rows: Rows) -> None:
        """Count one evaluation on each row; RuntimeError when a solver would overdraw the budget."""
        if (self.nfe[rows.host] >= self.max_nfe).any():
            raise RuntimeError(
                f"a solver asked for more than max_nfe={self.max_nfe} evaluations on a sample; "
                "its min_nfe must say how many one step needs"
            )
        self.nfe[rows.host] += 1

    def call(self, z: Tensor, rows: Rows) -> Tensor:
        """f at z (R, n) for the given rows, flat (R, n). With no context f sees the full batch, the rest at its best."""
        if self.context is not None:
            return self.packing.take(self.f(self.packing.unpack(z), rows.context(self.context)), z)
        if rows.index is None:
            return self.packing.take(self.f(self.packing.unpack(z)), z)
        full = self.best_z.index_copy(0, rows.index, z)
        return self.packing.take(self.f(self.packing.unpack(full)), full).index_select(0, rows.index)

    def evaluate(self, z: Tensor, rows: Rows) -> Tensor:
        """g = f(z) − z at z (R, n), counted, traced, tested for convergence and for being the best so far."""
        self.spend(rows)
        version = None if z.is_inference() else z._version
        fz = self.call(z, rows)
        if version is not None and z._version != version:
            raise ValueError("f changed its argument z in place: a fixed-point map must leave z as it was")
        g, g_norm, f_norm = residual_norms(z, fz)
        residual = relative(g_norm, f_norm)
        finite = torch.isfinite(g_norm) & torch.isfinite(f_norm)
        reached = finite & (g_norm <= self.atol + self.rtol * f_norm)
        index = rows.index
        best, done = (self.best, self.converged) if index is None else (self.best[index], self.converged[index])
        better = ~done & (reached | (finite & ~(residual >= best)))
        best, done = torch.where(better, residual, best), done | reached
        mask = better[:, None]
        if index is None:
            self.best, self.converged, self.finite = best, done, finite
            self.best_z = torch.where(mask, z, self.best_z)
            self.best_g = None if self.best_g is None else torch.where(mask, g, self.best_g)
        else:
            self.best = self.best.index_copy(0, index, best)
            self.converged = self.converged.index_copy(0, index, done)
            self.finite = self.finite.index_copy(0, index, finite)
            self.best_z = self.best_z.index_copy(0, index, torch.where(mask, z, self.best_z[index]))
            if self.best_g is not None:
                self.best_g = self.best_g.index_copy(0, index, torch.where(mask, g, self.best_g[index]))
        if self.origin is None and z is self.z0:
            self.origin = z + g
        host = rows.host
        self._events.append((host, index, residual, self.nfe[host].copy(), self.phase[host].copy()))
        return g

    def stamp(self) -> None:
        """Note the time for the evaluations made since the last stamp; the driver calls it once it has their outcome."""
        now = time.perf_counter() - self._began
        self._seconds.extend([now] * (len(self._events) - len(self._seconds)))

    def trace(self) -> Trace:
        """All evaluations so far, unpadded."""
        self.stamp()
        calls, batch = len(self._events), len(self.nfe)
        residual = self.best.new_full((calls, batch), torch.nan)
        nfe, phase = np.zeros((calls, batch), dtype=np.int64), np.full((calls, batch), -1, dtype=np.int8)
        for k, (host, index, value, spent, where) in enumerate(self._events):
            residual[k, slice(None) if index is None else index] = value
            nfe[k, host], phase[k, host] = spent, where
        return Trace(
            residual, torch.from_numpy(nfe), torch.tensor(self._seconds, dtype=torch.float64), torch.from_numpy(phase)
        )


class Problem:
    """What a solver sees of a solve: some rows of the batch, flat. R rows, n coordinates.

    `live` are the positions among the rows that are still being solved: a solver may carry rows that have stopped, and
    those cost no evaluation (their residual comes back as zero).
    """

    def __init__(self, ledger: Ledger, rows: Rows, live: np.ndarray | None = None) -> None:
        self._ledger, self._rows = ledger, rows
        self.live_index = None if live is None else torch.as_tensor(live, device=ledger.best_z.device)
        self.live_rows = rows if live is None else ledger.rows(rows.host[live])

    @property
    def shape(self) -> torch.Size | tuple[torch.Size, ...]:
        """Per-sample shape of the state, or a tuple of shapes for a state of several tensors."""
        return self._ledger.packing.shape

    @property
    def context(self) -> Any:
        """The context of these rows (None where f takes none)."""
        return self._rows.context(self._ledger.context)

    @property
    def remaining(self) -> int:
        """Evaluations that every live row can still afford."""
        return int(self._ledger.max_nfe - self._ledger.nfe[self.live_rows.host].max())

    @property
    def affordable_jvps(self) -> int:
        """Jacobian products that every live row can still afford; the first may cost two evaluations (see `jvp`)."""
        return self.remaining - (self._ledger.forward_ad is None)

    def unpack(self, flat: Tensor) -> State:
        """The (R, n) matrix as f's state."""
        return self._ledger.packing.unpack(flat)

    def origin(self) -> Tensor:
        """f(z0), (R, n): the context every solver has, known from the solve's first evaluation.

        Where the solve did not begin at z0, it is evaluated, and counted for the whole batch, when first asked for.
        """
        ledger = self._ledger
        if ledger.origin is None:
            ledger.evaluate(ledger.z0, ledger.rows(np.arange(len(ledger.nfe))))
        assert ledger.origin is not None
        return ledger.origin if self._rows.index is None else ledger.origin.index_select(0, self._rows.index)

    def residual(self, z: Tensor) -> Tensor:
        """g = f(z) − z at z (R, n): one counted evaluation on each live row."""
        if self.live_index is None:
            return self._ledger.evaluate(z, self._rows)
        g = self._ledger.evaluate(z.index_select(0, self.live_index), self.live_rows)
        return torch.zeros_like(z).index_copy(0, self.live_index, g)

    def jvp(self, z: Tensor, v: Tensor, fz: Tensor) -> Tensor:
        """J_f(z) v for z, v of shape (R, n) and fz = f(z): one counted evaluation.

        Forward AD, or a finite difference from fz where f has none; finding that out costs one more, once a solve.
        """
        if self.live_index is not None:
            z, v, fz = (tensor.index_select(0, self.live_index) for tensor in (z, v, fz))
        ledger = self._ledger
        product = None
        if ledger.forward_ad is not False:
            ledger.spend(self.live_rows)
            # raised by an operation without forward AD: f was called in vain
            with contextlib.suppress(NotImplementedError, RuntimeError):
                product = torch.func.jvp(lambda point: ledger.call(point, self.live_rows), (z,), (v,))[1]
            ledger.forward_ad = product is not None
        if product is None:
            ledger.spend(self.live_rows)
            eps = torch.finfo(z.dtype).eps ** 0.5
            size = eps * (1 + z.norm(dim=1, keepdim=True)) / v.norm(dim=1, keepdim=True).clamp_min(1e-30)
            product = (ledger.call(z + size * v, self.live_rows) - fz) / size
        if self.live_index is None:
            return product
        return product.new_zeros(len(self._rows), product.shape[1]).index_copy(0, self.live_index, product)
