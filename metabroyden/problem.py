"""What a solver sees of a fixed-point problem, and the counted problem of `solve`."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metabroyden.evaluator import Evaluator, Rows, to_device
from metabroyden.function import part_of, rewrap
from metabroyden.solution import Cell
from metabroyden.state import callers_context, in_dtype_of


class Problem(ABC):
    """What a solver sees of a fixed-point problem: some rows of the batch, flat. R rows, n coordinates.

    `solve`, `FixedBudget` and `unroll` each implement it. `residual` and `jvp` can be asked for a part of the rows, `among`
    (R,) bool on the host. Without decisions on the host every row is evaluated.

    The methods for parts of f serve operator splitting. They are not a map of their own on which any solver might run, since
    a solve stops on the residual of f, which such a step knows at no evaluation of f.

    Attributes:
        decides_on_host: whether a solver may read values on the host and spend evaluations accordingly.
        context: the context of these rows, in the dtype of the iterates (None where f takes none).
        shape: per-sample shape of the state, or a tuple of shapes for a state of several tensors.
        steps_left: no row can make more steps than this.
        keep_inverse: whether a solver must keep what its `inverse` is made of, beside what its own steps need.
        hands_over: whether a sample may be handed to another solver, for which `SolverBase.trail` is to be kept.
        alive: see `CountedProblem`; where a solver may decide on the host only.
        budget: evaluations each row can still afford, likewise.
        affordable_jvps: Jacobian products each row can still afford, likewise.
    """

    decides_on_host = False
    context: Any
    shape: Any
    steps_left: int = sys.maxsize
    keep_inverse: bool = True
    hands_over: bool = False
    alive: Any
    budget: Any
    affordable_jvps: Any

    @abstractmethod
    def origin(self) -> Tensor:
        """f(z0), (R, n): the context that every solver has."""

    @abstractmethod
    def residual(self, z: Tensor, among: np.ndarray | None = None) -> Tensor:
        """g = f(z) − z at z (R, n): one evaluation of f."""

    def image(self, z: Tensor, g: Tensor) -> Tensor:
        """f(z), (R, n), where g = f(z) − z is known: to the last bit where z is the point evaluated last, else z + g."""
        return z + g

    def jvp(self, z: Tensor, v: Tensor, fz: Tensor, among: np.ndarray | None = None) -> Tensor:
        """J_f(z) v for z, v of shape (R, n) and fz = f(z): one evaluation."""
        raise NotImplementedError

    def method(self, name: str, *settings: Any) -> Cell:
        """The cell's method of this name, or, with settings, the map that the method makes of them, at no evaluation.

        The weights are f's own, pinned ones where there are any. TypeError where the cell has no such method, ValueError
        where it would not run as f does (see `Evaluator.method`).
        """
        raise NotImplementedError

    def evaluate_method(self, method: Cell, z: Tensor) -> Tensor:
        """method(z, context) at z (R, n), packed: counts as an evaluation of f."""
        raise NotImplementedError

    def elementwise(self, name: str, v: Tensor) -> Tensor:
        """The cell's elementwise method of this name at v (R, n): not counted, as it costs next to nothing."""
        raise NotImplementedError

    def record_residual(self, z: Tensor, fz: Tensor) -> Tensor:
        """g = f(z) − z at z (R, n) where f(z) follows from methods already counted: recorded, at no evaluation."""
        raise NotImplementedError


class CountedProblem(Problem):
    """The problem of `solve`: there is no way round the counter.

    `live` are the positions among the rows that are still being solved: a solver may carry rows that have stopped, and
    those cost no evaluation (their residual comes back as zero).
    """

    decides_on_host = True

    def __init__(self, evaluator: Evaluator, rows: Rows, live: np.ndarray | None = None) -> None:
        self._evaluator, self._rows, self._live = evaluator, rows, live
        self.keep_inverse, self.hands_over = evaluator.keep_inverse, evaluator.best_g is not None
        self.live_index = None if live is None else to_device(live, evaluator.z0.device)
        self.live_rows = rows if live is None else evaluator.rows(rows.host[live])

    @property
    def shape(self) -> Any:
        """See `Problem`."""
        return self._evaluator.packing.shape

    @property
    def context(self) -> Any:
        """See `Problem`."""
        return seen_context(self._evaluator.given_to(self._rows).context, self._evaluator.z0)

    @property
    def alive(self) -> np.ndarray:
        """(R,) bool, on the host: the rows that are still being solved."""
        if self._live is None:
            return np.ones(len(self._rows), dtype=bool)
        return np.isin(np.arange(len(self._rows)), self._live)

    @property
    def budget(self) -> np.ndarray:
        """(R,) on the host: evaluations each row can still afford; 0 for rows that have stopped."""
        return np.where(self.alive, self._evaluator.max_nfe - self._evaluator.nfe[self._rows.pick], 0)

    @property
    def steps_left(self) -> int:  # type: ignore[override]
        """See `Problem`."""
        spent = self._evaluator.nfe[self.live_rows.pick]
        return self._evaluator.max_nfe - int(spent.min()) if len(spent) else 0

    @property
    def affordable_jvps(self) -> np.ndarray:
        """(R,) on the host: Jacobian products each row can still afford; the first may cost two evaluations (see `jvp`)."""
        return self.budget - (self._evaluator.forward_ad is None)

    def origin(self) -> Tensor:
        """f(z0), (R, n): by the first evaluation, or evaluated, and counted for the whole batch, when first asked."""
        evaluator = self._evaluator
        origin = evaluator.origin()
        if origin is None:
            evaluator.evaluate(evaluator.z0, evaluator.rows(np.arange(len(evaluator.nfe))))
            origin = evaluator.origin()
        assert origin is not None
        return origin if self._rows.index is None else origin.index_select(0, self._rows.index)

    def image(self, z: Tensor, g: Tensor) -> Tensor:
        """See `Problem`."""
        last = self._evaluator.last
        return last[1].clone() if last is not None and last[0] is z else z + g

    def residual(self, z: Tensor, among: np.ndarray | None = None) -> Tensor:
        """g = f(z) − z at z (R, n): one counted evaluation on each live row (of those `among`; zero elsewhere)."""
        rows, index = self._chosen(among)
        if index is None:
            return self._evaluator.evaluate(z, rows)
        g = self._evaluator.evaluate(z.index_select(0, index), rows)
        return torch.zeros_like(z).index_copy(0, index, g)

    def jvp(self, z: Tensor, v: Tensor, fz: Tensor, among: np.ndarray | None = None) -> Tensor:
        """J_f(z) v for z, v of shape (R, n) and fz = f(z): one counted evaluation on each live row (of those `among`).

        Forward AD, or finite differences from fz where the first product of a solve finds that f has none; finding that
        out costs one more. What f raises later is passed on.
        """
        rows, index = self._chosen(among)
        if index is not None:
            z, v, fz = (tensor.index_select(0, index) for tensor in (z, v, fz))
        evaluator = self._evaluator
        product = None
        if evaluator.forward_ad is not False:
            evaluator.spend(rows)
            points = z.contiguous(), v.contiguous()  # forward AD refuses expanded memory
            f = partial(evaluator.call, rows=rows, differentiable=True)
            try:
                product = torch.func.jvp(f, points[:1], points[1:])[1]
            except (NotImplementedError, RuntimeError):  # no forward AD; or f's own error, which will recur
                if evaluator.forward_ad:
                    raise
            evaluator.forward_ad = product is not None
        if product is None:
            evaluator.spend(rows)
            eps = torch.finfo(z.dtype if evaluator.f_dtype is None else evaluator.f_dtype).eps ** 0.5
            size = eps * (1 + z.norm(dim=1, keepdim=True)) / v.norm(dim=1, keepdim=True).clamp_min(1e-30)
            product = (evaluator.call(z + size * v, rows) - fz) / size
        if index is None:
            return product
        return product.new_zeros(len(self._rows), product.shape[1]).index_copy(0, index, product)

    def method(self, name: str, *settings: Any) -> Cell:
        """See `Problem`."""
        method = self._evaluator.method(name)
        return rewrap(self._evaluator.f, method(*settings)) if settings else method

    def evaluate_method(self, method: Cell, z: Tensor) -> Tensor:
        """method(z, context) at z (R, n), packed: one counted evaluation on each live row, zero elsewhere."""
        value = self._evaluator.evaluate_method(method, self._live_of(z), self.live_rows)
        return self._spread(value, z)

    def elementwise(self, name: str, v: Tensor) -> Tensor:
        """See `Problem`."""
        return self._evaluator.function(v, function=part_of(self._evaluator.f, name))

    def record_residual(self, z: Tensor, fz: Tensor) -> Tensor:
        """See `Problem`."""
        return self._spread(self._evaluator.record(self._live_of(z), self._live_of(fz), self.live_rows), z)

    def _live_of(self, z: Tensor) -> Tensor:
        return z if self.live_index is None else z.index_select(0, self.live_index)

    def _spread(self, value: Tensor, like: Tensor) -> Tensor:
        """Values of the live rows as values of all rows, zero elsewhere."""
        return value if self.live_index is None else torch.zeros_like(like).index_copy(0, self.live_index, value)

    def _chosen(self, among: np.ndarray | None) -> tuple[Rows, Tensor | None]:
        """The rows to evaluate and their positions on the device; None: all of them."""
        if among is None:
            return self.live_rows, self.live_index
        places = np.flatnonzero(among) if self._live is None else self._live[among[self._live]]
        if len(places) == len(self._rows):
            return self._rows, None
        return self._evaluator.rows(self._rows.host[places]), to_device(places, self._evaluator.z0.device)


def seen_context(context: Any, z: Tensor) -> Any:
    """The context as a solver sees it, in the dtype of the iterates z."""
    return in_dtype_of(callers_context(context), z)
