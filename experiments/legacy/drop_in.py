"""One model with one solver or another in its torchdeq DEQ: calls of f, time, and what its answers are worth.

A row is a JSON object, one for a solver and a tolerance. Counted from outside, by a hook on the cell: `calls` of f and
their `rows`; and for each sample, `nfe`, the calls made when its residual first met the tolerance (the budget where it did
not, then `reached` is false). torchdeq hands f over as a closure, so that every call is on the whole batch.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.legacy.metrics import short
from metabroyden.solution import relative_residual

Row = dict[str, Any]


class CallRecord:
    """While it lasts, every call of a cell f(z, …) is counted, with the residuals it measured."""

    def __init__(self, cell: nn.Module) -> None:
        self.calls = self.rows = 0
        self.residuals: list[Tensor] = []
        self.arguments: tuple[Tensor, ...] = ()
        self._cell = cell

    def __enter__(self) -> CallRecord:
        self._hook = self._cell.register_forward_hook(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _note(self, _: nn.Module, arguments: tuple[Tensor, ...], value: Tensor) -> None:
        self.calls += 1
        self.rows += len(value)
        self.arguments = arguments
        self.residuals.append(relative_residual(arguments[0], value))

    def evaluations_to(self, rtol: float, budget: int) -> tuple[np.ndarray, np.ndarray]:
        """(evaluations, reached), (B,) each, as `Trace.evaluations_to`."""
        hit = (torch.stack(self.residuals)[:budget] <= rtol).numpy()
        reached = hit.any(axis=0)
        return np.where(reached, hit.argmax(axis=0) + 1, budget), reached


@torch.no_grad()
def rows(
    models: dict[str, Any],
    images: Tensor,
    labels: Tensor,
    *,
    rtol: float,
    budget: int,
    repeats: int,
    reference: str,
    star: Tensor,
    known: Tensor,
) -> list[Row]:
    """Rows of the models, which differ in their solver only: each has a `cell`, a torchdeq `deq` and a `head`.

    Args:
        models: in evaluation mode, by the solver's name.
        rtol, budget: of their DEQs.
        repeats: interleaved timing repeats of the whole model on all images; nobody counts while they run.
        reference: the model to which times are compared, by the median of paired ratios.
        star, known: float64 equilibria, and (B,) where they were found.
    """
    found: list[Row] = []
    records: dict[str, CallRecord] = {}
    head = next(iter(models.values())).head
    wanted = head(star.to(images.dtype).flatten(1)).argmax(dim=1)
    for name, model in models.items():
        states: list[Tensor] = []
        hook = model.deq.register_forward_hook(lambda _m, _i, out, states=states: states.append(out[0][-1]))
        with CallRecord(model.cell) as records[name]:
            predicted = model(images).argmax(dim=1)
        hook.remove()
        record = records[name]
        nfe, reached = record.evaluations_to(rtol, budget)
        distance = (states[0].double() - star).flatten(1).norm(dim=1) / star.flatten(1).norm(dim=1)
        found.append(
            {
                "row": "drop-in",
                "solver": name,
                "rtol": rtol,
                "batch": len(images),
                "calls": record.calls,
                "rows": record.rows,
                "nfe": nfe.tolist(),
                "reached": reached.tolist(),
                "accuracy": short(float((predicted == labels).float().mean())),
                "agreement": short(float((predicted == wanted)[known].float().mean())) if known.any() else None,
                "distance": short(float(distance[known].median())) if known.any() else None,
            }
        )
    seconds = {name: np.empty(repeats) for name in models}
    f_seconds = np.empty(repeats)
    arguments = records[reference].arguments
    for repeat in range(repeats):
        for name, model in models.items():
            began = time.perf_counter()
            model(images)
            seconds[name][repeat] = time.perf_counter() - began
        began = time.perf_counter()
        models[reference].cell(*arguments)
        f_seconds[repeat] = time.perf_counter() - began
    f_time = float(np.median(f_seconds))
    for row in found:
        total = float(np.median(seconds[row["solver"]]))
        row["seconds"] = short(total)
        row["ratio"] = short(float(np.median(seconds[row["solver"]] / seconds[reference])))
        row["f_seconds"] = short(f_time)
        row["outside_f"] = short(1 - row["calls"] * f_time / total)
    return found
