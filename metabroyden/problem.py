"""The counted view of f that a solver works on: there is no way round the counter.

`Ledger` belongs to one solve: it calls f, counts the calls per sample on the host, keeps the best iterate and the
trace. `Problem` is what a solver sees of it: a set of samples ("rows"), their context, the residual, Jacobian products.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metabroyden.solution import State, Trace, scaled_norm
from metabroyden.state import Packing, gather

F = Callable[..., State]


class Rows:
    """Some samples of a batch, in order: their numbers on the host and, where it is not the whole batch, on the device.

    `pick` selects them from a (B,) host array: a slice where they are the whole batch, in order.
    """

    def __init__(self, host: np.ndarray, device: torch.device, batch: int) -> None:
        self.host = host
        whole = len(host) == batch and bool((host == np.arange(batch)).all())
        self.index = None if whole else torch.as_tensor(host, device=device)
        self.pick: Any = slice(None) if whole else host
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


class _Evaluation(NamedTuple):
    """An evaluation whose outcome the host has not seen yet."""

    rows: Rows
    z: Tensor  # (R, n)
    fz: Tensor
    g: Tensor
    norms: tuple[Tensor, Tensor]  # ‖g‖, ‖f(z)‖, (R,) each, on the device
    nfe: np.ndarray  # (R,) spent so far
    phase: np.ndarray
    round: int


class Ledger:
    """Calls f for a whole solve and writes down what it cost and what it found.

    Evaluations are judged on the host, when `settle` is called: what they converged to, which are the best. That is the
    one host synchronisation; until then they wait, with their iterates.

    Attributes (host arrays over the B samples):
        nfe: evaluations spent. phase: the phase of the driver a sample is in.
        best: relative residual of the best iterate, infinite before the first finite evaluation. converged.
        broken: not finite at the end of a round (what a line search tries and drops does not count).
        residual, f_norm, f_norm_before: of the sample's last evaluation (and of the one before).
    On the device: best_z (B, n); best_g: its g, None where nothing will be handed over.
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
        f_dtype: torch.dtype | None = None,
    ) -> None:
        self.f, self.packing, self.context, self.max_nfe = f, packing, context, max_nfe
        self.rtol, self.atol, self.f_dtype = rtol, atol, f_dtype
        batch = len(z0)
        self.nfe = np.zeros(batch, dtype=np.int64)
        self.phase = np.zeros(batch, dtype=np.int8)
        self.z0 = z0
        self.forward_ad: bool | None = None  # whether f has forward AD; None: not tried yet
        self.origin: Tensor | None = None
        self.best_z, self._owned = z0, False  # owned: no iterate shares best_z's memory, it may be written to
        self.best_g = z0.new_zeros(z0.shape) if keep_g else None
        self.best = np.full(batch, np.inf)
        self.converged = np.zeros(batch, dtype=bool)
        self.broken = np.zeros(batch, dtype=bool)
        self._finite = np.ones(batch, dtype=bool)  # the last evaluation
        self.round = self._judged_round = 0  # the driver's, to which evaluations belong
        self.residual = np.full(batch, np.nan)
        self.f_norm = np.full(batch, np.nan)
        self.f_norm_before = np.full(batch, np.nan)
        # squares of norms outside this range may have over- or underflowed
        self._trusted = (1e-15, 1e15) if z0.dtype == torch.float32 else (1e-140, 1e140)
        self._pending: list[_Evaluation] = []
        self._events: list[tuple[Rows, np.ndarray, np.ndarray, np.ndarray]] = []
        self._seconds: list[float] = []
        self._began = time.perf_counter()

    def rows(self, host: np.ndarray) -> Rows:
        """The samples with these numbers."""
        return Rows(host, self.z0.device, len(self.nfe))

    def spend(self, rows: Rows) -> None:
        """Count one evaluation on each row; RuntimeError when a solver would overdraw the budget."""
        spent = self.nfe[rows.pick] + 1
        if spent.max() > self.max_nfe:
            raise RuntimeError(
                f"a solver asked for more than max_nfe={self.max_nfe} evaluations on a sample; "
                "its min_nfe must say how many one step needs"
            )
        self.nfe[rows.pick] = spent

    def call(self, z: Tensor, rows: Rows) -> Tensor:
        """f at z (R, n) for the given rows, flat (R, n). With no context f sees the full batch, the rest at its best."""
        if self.context is not None:
            return self._image(z, rows.context(self.context))
        if rows.index is None:
            return self._image(z)
        return self._image(self.best_z.index_copy(0, rows.index, z)).index_select(0, rows.index)

    def _image(self, z: Tensor, *context: Any) -> Tensor:
        point = z if self.f_dtype is None else z.to(self.f_dtype)
        return self.packing.take(self.f(self.packing.unpack(point), *context), z)

    def evaluate(self, z: Tensor, rows: Rows) -> Tensor:
        """g = f(z) − z at z (R, n): counted at once, judged when `settle` is called."""
        self.spend(rows)
        version = None if z.is_inference() else z._version
        fz = self.call(z, rows)
        if version is not None and z._version != version:
            raise ValueError("f changed its argument z in place: a fixed-point map must leave z as it was")
        g = fz - z
        norms = torch.linalg.vector_norm(g, dim=1), torch.linalg.vector_norm(fz, dim=1)
        if self.origin is None and z is self.z0:
            self.origin = fz
        pick = rows.pick
        spent, phase = self.nfe[pick].copy(), self.phase[pick].copy()
        self._pending.append(_Evaluation(rows, z, fz, g, norms, spent, phase, self.round))
        return g

    def settle(self) -> None:
        """Judge the evaluations made since the last call, in their order. One host synchronisation for all of them."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        norms = to_host([norm for evaluation in pending for norm in evaluation.norms])
        for k, evaluation in enumerate(pending):
            self._judge(evaluation, norms[2 * k], norms[2 * k + 1])
        if not self._finite.all():
            self.broken |= ~self._finite
        now = time.perf_counter() - self._began
        self._seconds.extend([now] * len(pending))

    def _judge(self, evaluation: _Evaluation, g_norm: np.ndarray, f_norm: np.ndarray) -> None:
        """Is it finite, has it converged, is it the best so far? A norm far from one is measured again, scaled."""
        rows, z, fz, g, _, nfe, phase, number = evaluation
        if number != self._judged_round:
            self.broken |= ~self._finite
            self._judged_round = number
        low, high = self._trusted
        pick = rows.pick
        trusted = g_norm.min() > low and f_norm.min() > low and g_norm.max() < high and f_norm.max() < high
        if trusted:
            residual = g_norm / f_norm
            better = residual <= self.best[pick]
            finite: Any = True
        else:
            g_norm, f_norm = to_host([scaled_norm(g), scaled_norm(fz)])
            finite = np.isfinite(g_norm + f_norm)
            residual = np.where((g_norm == 0) & finite, 0.0, g_norm / f_norm)
            better = finite & (residual <= self.best[pick])
        self._finite[pick] = finite
        reached = finite & (g_norm <= self.atol + self.rtol * f_norm)
        if reached.any() or self.converged.any():
            done = self.converged[pick]
            better = ~done & (reached | better)
            self.converged[pick] = done | reached
        if rows.index is None:
            self.residual, self.f_norm, self.f_norm_before = residual, f_norm, self.f_norm
        else:
            self.residual[pick], self.f_norm_before[pick], self.f_norm[pick] = residual, self.f_norm[pick], f_norm
        self._events.append((rows, residual.copy(), nfe, phase))
        if better.all():
            self.best[pick] = residual
            self._keep_best(rows, None, z, g)
        elif better.any():
            self.best[pick] = np.where(better, residual, self.best[pick])
            self._keep_best(rows, better, z, g)

    def _keep_best(self, rows: Rows, better: np.ndarray | None, z: Tensor, g: Tensor) -> None:
        """Take over the iterates that are `better` (None: all): for all of a full batch, without a copy."""
        if rows.index is None and better is None:
            self.best_z, self._owned = z, False
            self.best_g = None if self.best_g is None else g
            return
        mask = None if better is None else torch.from_numpy(better).to(z.device)[:, None]
        if rows.index is None:
            self.best_z, self._owned = torch.where(mask, z, self.best_z), True
            self.best_g = None if self.best_g is None else torch.where(mask, g, self.best_g)
            return
        if not self._owned:
            self.best_z, self._owned = self.best_z.clone(), True
            self.best_g = None if self.best_g is None else self.best_g.clone()
        for store, value in ((self.best_z, z), (self.best_g, g)):
            if store is not None:
                kept = value if mask is None else torch.where(mask, value, store.index_select(0, rows.index))
                store.index_copy_(0, rows.index, kept)

    def forgive(self, host: np.ndarray) -> None:
        """These samples go on from a finite iterate."""
        self.broken[host], self._finite[host] = False, True

    def outcome(self) -> np.ndarray:
        """(B,) relative residual of the best iterates; NaN where no evaluation was finite."""
        best = self.best.copy()
        for sample in np.flatnonzero(np.isinf(best)):  # an infinite ratio of finite norms, or nothing finite at all
            seen = [value[rows.host == sample] for rows, value, _, _ in self._events]
            best[sample] = np.inf if np.isposinf(np.concatenate(seen)).any() else np.nan
        return best

    def trace(self) -> Trace:
        """All evaluations so far, unpadded."""
        self.settle()
        calls, batch = len(self._events), len(self.nfe)
        residual = np.full((calls, batch), np.nan)
        nfe, phase = np.zeros((calls, batch), dtype=np.int64), np.full((calls, batch), -1, dtype=np.int8)
        for k, (rows, value, spent, where) in enumerate(self._events):
            residual[k, rows.pick], nfe[k, rows.pick], phase[k, rows.pick] = value, spent, where
        return Trace(
            torch.from_numpy(residual).to(self.z0),
            torch.from_numpy(nfe),
            torch.tensor(self._seconds, dtype=torch.float64),
            torch.from_numpy(phase),
        )


class Problem:
    """What a solver sees of a solve: some rows of the batch, flat. R rows, n coordinates.

    `live` are the positions among the rows that are still being solved: a solver may carry rows that have stopped, and
    those cost no evaluation (their residual comes back as zero). `residual` and `jvp` can be asked for a part of the
    rows, `among` (R,) bool on the host: only the live ones of these are evaluated and counted.
    """

    def __init__(self, ledger: Ledger, rows: Rows, live: np.ndarray | None = None) -> None:
        self._ledger, self._rows, self._live = ledger, rows, live
        self.live_index = None if live is None else torch.as_tensor(live, device=ledger.z0.device)
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
    def budget(self) -> np.ndarray:
        """(R,) evaluations each row can still afford; 0 for rows that have stopped."""
        left = self._ledger.max_nfe - self._ledger.nfe[self._rows.pick]
        if self._live is None:
            return left
        alive = np.zeros(len(left), dtype=bool)
        alive[self._live] = True
        return np.where(alive, left, 0)

    @property
    def affordable_jvps(self) -> int:
        """Jacobian products that every live row can still afford; the first may cost two evaluations (see `jvp`)."""
        left = self._ledger.max_nfe - self._ledger.nfe[self.live_rows.pick].max()
        return int(left) - (self._ledger.forward_ad is None)

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

    def residual(self, z: Tensor, among: np.ndarray | None = None) -> Tensor:
        """g = f(z) − z at z (R, n): one counted evaluation on each live row (of those `among`; zero elsewhere)."""
        rows, index = self._chosen(among)
        if index is None:
            return self._ledger.evaluate(z, rows)
        g = self._ledger.evaluate(z.index_select(0, index), rows)
        return torch.zeros_like(z).index_copy(0, index, g)

    def jvp(self, z: Tensor, v: Tensor, fz: Tensor, among: np.ndarray | None = None) -> Tensor:
        """J_f(z) v for z, v of shape (R, n) and fz = f(z): one counted evaluation on each live row (of those `among`).

        Forward AD, or a finite difference from fz where f has none; finding that out costs one more, once a solve.
        """
        rows, index = self._chosen(among)
        if index is not None:
            z, v, fz = (tensor.index_select(0, index) for tensor in (z, v, fz))
        ledger = self._ledger
        product = None
        if ledger.forward_ad is not False:
            ledger.spend(rows)
            # raised by an operation without forward AD: f was called in vain
            with contextlib.suppress(NotImplementedError, RuntimeError):
                product = torch.func.jvp(lambda point: ledger.call(point, rows), (z,), (v,))[1]
            ledger.forward_ad = product is not None
        if product is None:
            ledger.spend(rows)
            eps = torch.finfo(z.dtype if ledger.f_dtype is None else ledger.f_dtype).eps ** 0.5
            size = eps * (1 + z.norm(dim=1, keepdim=True)) / v.norm(dim=1, keepdim=True).clamp_min(1e-30)
            product = (ledger.call(z + size * v, rows) - fz) / size
        if index is None:
            return product
        return product.new_zeros(len(self._rows), product.shape[1]).index_copy(0, index, product)

    def _chosen(self, among: np.ndarray | None) -> tuple[Rows, Tensor | None]:
        """The rows to evaluate and their positions on the device; None: all of them."""
        if among is None:
            return self.live_rows, self.live_index
        places = np.flatnonzero(among) if self._live is None else self._live[among[self._live]]
        if len(places) == len(self._rows):
            return self._rows, None
        return self._ledger.rows(self._rows.host[places]), torch.as_tensor(places, device=self._ledger.z0.device)


def to_host(tensors: list[Tensor]) -> list[np.ndarray]:
    """Tensors of one dimension on the host, real numbers in float64: the only place where a solve waits for the device."""
    if tensors[0].is_cuda:
        sizes = [len(tensor) for tensor in tensors]
        whole = torch.cat([tensor.double() for tensor in tensors]).cpu().numpy()
        return np.split(whole, np.cumsum(sizes)[:-1])
    return [tensor.cpu().numpy().astype(np.float64) for tensor in tensors]
