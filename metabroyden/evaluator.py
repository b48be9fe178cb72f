"""The books of one solve: calls of f counted per sample on the host, the best iterate, the trace."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metabroyden.function import Given, GuardedFunction, part_of, rewrap
from metabroyden.solution import SAFE_NORMS, Cell, Trace, scaled_norm
from metabroyden.state import Packing, gather

_HOST_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}  # of states


class Rows:
    """Some samples of a batch, in order: their numbers on the host and, where it is not the whole batch, on the device.

    `pick` selects them from a (B,) host array: a slice where they are the whole batch, in order.
    """

    def __init__(self, host: np.ndarray, device: torch.device, batch: int) -> None:
        self.host = host
        whole = len(host) == batch and bool((host == np.arange(batch)).all())
        self.index = None if whole else to_device(host, device)
        self.pick: Any = slice(None) if whole else host
        self._norms: tuple[Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.host)

    def norms(self, like: Tensor, *, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(2, R) for two norms a row, and its two rows; the same memory every time unless a fresh one is asked for."""
        if self._norms is None or fresh:
            both = like.new_empty(2, len(self.host))
            self._norms = both, both[0], both[1]
        return self._norms


class _Evaluation(NamedTuple):
    """An evaluation whose outcome the host has not seen yet."""

    rows: Rows
    z: Tensor  # (R, n)
    fz: Tensor
    g: Tensor
    norms: Tensor  # (2, R) ‖g‖, ‖f(z)‖ on the device
    nfe: np.ndarray | None  # (R,) spent so far; for the trace, as is the phase
    phase: np.ndarray | int
    round: int


class Evaluator:
    """Calls f for a whole solve and writes down what it cost and what it found.

    The best iterate of a sample is the first that reached the tolerance, else that of smallest ‖f(z) − z‖: a size of the
    residual against one fixed scale. ‖f(z) − z‖/‖f(z)‖, by which convergence is judged, falls where z merely grows.

    Evaluations are judged on the host, when `synchronize` is called: what they converged to, which are the best. That is the
    one host synchronisation; until then they wait, with their iterates. The usual case, every row finite and better than
    before, takes a dozen operations on (R,) arrays.

    keep_inverse: whether the driver will ask the solver for its inverse Jacobian, see `Problem.keep_inverse`.

    Attributes (host arrays over the B samples):
        nfe: evaluations spent; no entry above `most`. phase: the phase of the driver a sample is in.
        best: ‖f(z) − z‖ of the best iterate, infinite before the first finite evaluation; best_residual: its relative
            residual, NaN before. converged.
        lowest: smallest relative residual, infinite before; kept only where samples may be handed over.
        broken: not finite at the end of a round (what a line search tries and drops does not count).
        residual, residual_before: of the sample's last evaluation and of the one before.
    On the device: best_z (B, n); best_g: its g, None where nothing will be handed over; g0: f(z0) − z0, once known.
    Of the last `synchronize`: `news`, something converged or is not finite; `idle`, something did not improve.
    """

    def __init__(
        self,
        f: Cell,
        packing: Packing,
        z0: Tensor,
        context: Any,
        *,
        rtol: float,
        atol: float,
        max_nfe: int,
        keep_g: bool = True,
        f_dtype: torch.dtype | None = None,
        trace: bool = True,
        keep_inverse: bool = False,
    ) -> None:
        self.f, self.packing, self.max_nfe = f, packing, max_nfe
        self.rtol, self.atol, self.f_dtype, self.keep_inverse = rtol, atol, f_dtype, keep_inverse
        self.function = GuardedFunction(f, packing, f_dtype=f_dtype)
        self._given = Given(context)
        self._gathered: tuple[Rows | None, Given] = None, self._given  # the rows gathered last: contexts may be large
        batch = len(z0)
        self.nfe = np.zeros(batch, dtype=np.int64)
        self.most = 0
        self.phase, self.phased = np.zeros(batch, dtype=np.int8), False
        self.z0 = z0
        self.forward_ad: bool | None = None  # whether f has forward AD; None: not tried yet
        self.g0: Tensor | None = None
        self._origin: Tensor | None = None
        self.last: tuple[Tensor, Tensor] | None = None  # the last point and its image, in f's own memory
        self.best_z, self._owned = z0, False  # owned: no iterate shares best_z's memory, it may be written to
        self.best_g = z0.new_zeros(z0.shape) if keep_g else None
        self.best, self.best_residual = np.full(batch, np.inf), np.full(batch, np.nan)
        self.lowest = np.full(batch, np.inf)
        self.converged = np.zeros(batch, dtype=bool)
        self.broken = np.zeros(batch, dtype=bool)
        self._finite = np.ones(batch, dtype=bool)  # the last evaluation
        self._all_finite, self._any_converged = True, False
        self.round = self._judged_round = 0  # the driver's, to which evaluations belong
        self.news = self.idle = False
        self.residual, self.residual_before = np.full((2, batch), np.nan)
        self._trusted = SAFE_NORMS[z0.dtype]
        self._pending: list[_Evaluation] = []
        self._owned_images = False  # whether the images that wait are all in memory of ours
        self._taken: list[tuple[int, Rows, Tensor]] = []
        # by round: rows, and whether what they took is finite
        self._verdicts: dict[int, list[tuple[Rows, np.ndarray]]] = {}
        self._traced = trace
        self._events: list[tuple[Rows, np.ndarray, np.ndarray, Any, np.ndarray | int]] = []  # see `trace`
        self._seconds: list[float] = []
        self._began = time.perf_counter()

    def rows(self, host: np.ndarray) -> Rows:
        """The samples with these numbers."""
        return Rows(host, self.z0.device, len(self.nfe))

    def spend(self, rows: Rows) -> None:
        """Count one evaluation on each row; RuntimeError when a solver would overdraw the budget."""
        if self.most >= self.max_nfe:
            if self.nfe[rows.pick].max() >= self.max_nfe:
                raise RuntimeError(
                    f"a solver asked for more than max_nfe={self.max_nfe} evaluations on a sample; "
                    "its min_nfe must say how many one step needs"
                )
            self.most = int(self.nfe.max())
        self.nfe[rows.pick] += 1
        self.most += 1

    def given_to(self, rows: Rows) -> Given:
        """What f is given beside the state of these rows: their context, gathered; the one gathered before is let go."""
        if rows.index is None or self._given.context is None:
            return self._given
        if self._gathered[0] is not rows:
            self._gathered = None, self._given
            self._gathered = rows, Given(gather(self._given.context, rows.index))
        return self._gathered[1]

    def call(self, z: Tensor, rows: Rows, *, differentiable: bool = False) -> Tensor:
        """f at z (R, n) for the given rows, flat (R, n). With no context f sees the full batch, the rest at its best."""
        if self._pending and not self._owned_images:  # f may write its next value where it wrote the last
            self._pending[-1] = self._pending[-1]._replace(fz=self._pending[-1].fz.clone())
            self._owned_images = True
        if rows.index is None:
            return self.function(z, self._given, differentiable=differentiable)
        if self._given.context is not None:
            return self.function(z, self.given_to(rows), differentiable=differentiable)
        whole = self.best_z.index_copy(0, rows.index, z)
        return self.function(whole, differentiable=differentiable).index_select(0, rows.index)

    def evaluate(self, z: Tensor, rows: Rows) -> Tensor:
        """g = f(z) − z at z (R, n): counted at once, judged when `synchronize` is called."""
        self.spend(rows)
        return self.record(z, self.call(z, rows), rows)

    def record(self, z: Tensor, fz: Tensor, rows: Rows) -> Tensor:
        """g = f(z) − z where f(z) (R, n) is known and was counted: written down, judged when `synchronize` is called."""
        g = fz - z
        norms, g_norm, f_norm = rows.norms(z, fresh=bool(self._pending))
        torch.linalg.vector_norm(g, dim=1, out=g_norm)
        torch.linalg.vector_norm(fz, dim=1, out=f_norm)
        if self.g0 is None and z is self.z0:
            self.g0 = g
        self.write_down(z, fz, g, norms, rows)
        return g

    def write_down(self, z: Tensor, fz: Tensor, g: Tensor, norms: Tensor, rows: Rows) -> None:
        """An evaluation that was counted, with its g and its norms (2, R): judged when `synchronize` is called."""
        self.last = z, fz
        nfe, phase = None, 0
        if self._traced:
            nfe, phase = self.nfe[rows.pick].copy(), self.phase[rows.pick].copy() if self.phased else 0
        self._pending.append(_Evaluation(rows, z, fz, g, norms, nfe, phase, self.round))
        self._owned_images = False

    def method(self, name: str) -> Callable[..., Any]:
        """A method of the cell behind f, run as f is run. TypeError where the cell has none of this name.

        ValueError where f is to run in another precision than the solver, as what a solver concludes from a part of f
        would not be true of f, or where there is no context.
        """
        method = part_of(self.f, name)
        if getattr(self.f, "autocast", False):
            raise ValueError("a solver that uses parts of f needs f in its own precision: no autocast")
        if self._given.context is None:
            raise ValueError("a solver that uses parts of f needs a context: f(z, context), not f(z)")
        return rewrap(self.f, method)

    def evaluate_method(self, part: Cell, z: Tensor, rows: Rows) -> Tensor:
        """part(z, context) at z (R, n) for the given rows, flat (R, n): counts as one evaluation of f."""
        self.spend(rows)
        return self.function(z, self.given_to(rows), part)

    def origin(self) -> Tensor | None:
        """f(z0), (B, n), where it has been evaluated; in memory of ours, for f may use its own again."""
        if self._origin is None and self.g0 is not None:
            self._origin = self.z0 + self.g0
        return self._origin

    def take(self, g: Tensor, rows: Rows) -> None:
        """A step has evaluated several points and goes on from one with this g (R, n): whether that is finite counts."""
        self._taken.append((self.round, rows, g.abs().amax(dim=1)))

    def synchronize(self) -> None:
        """Judge the evaluations made since the last call, in their order. One host synchronisation for all of them."""
        self.news = self.idle = False
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        taken, self._taken = self._taken, []
        seen = to_host([evaluation.norms for evaluation in pending] + [largest for _, _, largest in taken])
        for (number, rows, _), largest in zip(taken, seen[len(pending) :], strict=True):
            self._verdicts.setdefault(number, []).append((rows, np.isfinite(largest)))
        for evaluation, norms in zip(pending, seen, strict=False):
            if evaluation.round != self._judged_round:
                self._close_round()
                self._judged_round = evaluation.round
            self._update_best(evaluation, norms)
        self._close_round()
        now = time.perf_counter() - self._began
        self._seconds.extend([now] * len(pending))

    def _update_best(self, evaluation: _Evaluation, norms: np.ndarray) -> None:
        """Is it finite, has it converged, is it the best so far? A norm far from one is measured again, scaled."""
        rows, z, fz, g, _, nfe, phase, _ = evaluation
        pick, count = rows.pick, len(rows)
        best, (g_norm, f_norm) = self.best[pick], norms
        low, high = self._trusted
        # never where there is a NaN
        trusted = np.minimum.reduce(norms, axis=None) > low and np.maximum.reduce(norms, axis=None) < high
        if trusted:
            bound = self.rtol * f_norm if self.atol == 0 else self.atol + self.rtol * f_norm
            residual = g_norm / f_norm
            reached, better = g_norm <= bound, g_norm < best
        else:
            far = ~((norms > low) & (norms < high)).all(axis=0)
            g_norm, f_norm = np.where(far, to_host([scaled_norm(g), scaled_norm(fz)]), norms)
            finite = np.isfinite(g_norm) & np.isfinite(f_norm)
            residual = np.where(finite, np.where(g_norm == 0, 0.0, g_norm / f_norm), np.nan)
            reached = finite & (g_norm <= self.atol + self.rtol * f_norm)
            better = finite & (g_norm < best)
        if not (trusted and self._all_finite):
            self._finite[pick] = trusted or finite
            self._all_finite = bool(self._finite.all())
            self.news = True
        if np.count_nonzero(reached) or self._any_converged:
            done = self.converged[pick]
            better = ~done & (reached | better)
            self.converged[pick] = done | reached
            self._any_converged = self.news = True
        self.residual_before = self.residual
        if rows.index is None:
            self.residual = residual
        else:
            self.residual = self.residual.copy()
            self.residual[pick] = residual
        if self.best_g is not None:
            self.lowest[pick] = np.fmin(self.lowest[pick], residual)
        if self._traced:
            self._events.append((rows, residual, g_norm, nfe, phase))
        gained = np.count_nonzero(better)
        self.idle = self.idle or gained < count
        if gained:
            self._keep_best(rows, None if gained == count else better, z, g, g_norm, residual)

    def _close_round(self) -> None:
        """At the end of a round: what stands at a point that is not finite is broken."""
        for rows, finite in self._verdicts.pop(self._judged_round, ()):
            self._finite[rows.pick] = finite
            self._all_finite = bool(self._finite.all())
        if not self._all_finite:
            self.broken |= ~self._finite

    def _keep_best(
        self, rows: Rows, better: np.ndarray | None, z: Tensor, g: Tensor, g_norm: np.ndarray, residual: np.ndarray
    ) -> None:
        """Take over the iterates that are `better` (None: all): for all of a full batch, without a copy."""
        pick = rows.pick
        if better is None:
            self.best[pick], self.best_residual[pick] = g_norm, residual
        else:
            self.best[pick] = np.where(better, g_norm, self.best[pick])
            self.best_residual[pick] = np.where(better, residual, self.best_residual[pick])
        if better is None and rows.index is None:
            self.best_z, self._owned = z, False
            self.best_g = None if self.best_g is None else g
            return
        if not self._owned:
            self.best_z, self._owned = self.best_z.clone(), True
            self.best_g = None if self.best_g is None else self.best_g.clone()
        chosen = None if better is None else to_device(np.flatnonzero(better), z.device)
        target = rows.index
        if chosen is not None:
            z = z.index_select(0, chosen)
            g = g if self.best_g is None else g.index_select(0, chosen)
            target = chosen if target is None else target.index_select(0, chosen)
        assert target is not None
        self.best_z.index_copy_(0, target, z)
        if self.best_g is not None:
            self.best_g.index_copy_(0, target, g)

    def enter(self, host: np.ndarray, phase: int) -> None:
        """These samples begin a phase, from a finite iterate."""
        self.phase[host], self.phased = phase, True
        self.broken[host], self._finite[host] = False, True

    def trace(self) -> Trace:
        """All evaluations so far, unpadded; none where none were written down."""
        self.synchronize()
        calls, batch = len(self._events), len(self.nfe)
        both = np.full((2, calls, batch), np.nan, dtype=_HOST_DTYPES[self.z0.dtype])
        nfe, phase = np.zeros((calls, batch), dtype=np.int64), np.full((calls, batch), -1, dtype=np.int8)
        for k, (rows, value, size, spent, where) in enumerate(self._events):
            pick = rows.pick
            both[0, k, pick], nfe[k, pick], phase[k, pick] = value, spent, where
            both[1, k, pick] = np.where(np.isnan(value), np.nan, size)
        residual, absolute = torch.from_numpy(both).to(self.z0.device)
        seconds = torch.tensor(self._seconds[:calls], dtype=torch.float64)
        return Trace(residual, torch.from_numpy(nfe), seconds, torch.from_numpy(phase), absolute)


def to_device(host: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device, without a wait for what that has to do: the driver copies it aside before this returns."""
    return torch.from_numpy(host).to(device, non_blocking=True)


def to_host(tensors: list[Tensor]) -> list[np.ndarray]:
    """The values of some tensors in float64, for one wait for the device: the only place where a solve waits."""
    if tensors[0].device.type == "cpu":
        return [tensor.numpy().astype(np.float64) for tensor in tensors]
    whole = torch.cat([tensor.flatten().double() for tensor in tensors]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
    return [part.reshape(tensor.shape) for part, tensor in zip(np.split(whole, ends), tensors, strict=True)]
