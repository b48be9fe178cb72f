"""The published library's solvers, measured by an independent count of the calls they make."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metabroyden.solution import Trace, relative, residual_norms


@dataclass(frozen=True)
class TorchDEQSolver:
    """A solver of torchdeq by name ("broyden", "anderson", "fixed_point_iter"), with its own options."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def run(
        self, f: Callable[[Tensor, Tensor], Tensor], z0: Tensor, x: Tensor, rtol: float, max_nfe: int
    ) -> tuple[Tensor, Trace]:
        """(z, trace): torchdeq stops when the batch's worst sample is done, so every call counts for every sample."""
        from torchdeq.solver import get_solver

        calls: list[tuple[Tensor, Tensor]] = []
        moments: list[float] = []
        began = time.perf_counter()

        def recorded(flat: Tensor) -> Tensor:
            value = f(flat.reshape(z0.shape), x).flatten(1)
            calls.append((flat, value))
            moments.append(time.perf_counter() - began)
            return value

        with torch.no_grad():
            z, _, _ = get_solver(self.name)(
                recorded, z0.flatten(1), max_iter=max_nfe, tol=rtol, stop_mode="rel", **dict(self.options)
            )
            moments.append(time.perf_counter() - began)
            rows = [relative(*residual_norms(point, value)[1:]) for point, value in calls]
        residual = torch.stack(rows)
        nfe = torch.arange(1, len(rows) + 1)[:, None].expand(-1, len(z0))
        seconds = torch.tensor(moments[1:], dtype=torch.float64)  # a call's outcome is used by the next
        return z.reshape(z0.shape), Trace(residual, nfe, seconds, torch.zeros(nfe.shape, dtype=torch.int8))


def torchdeq_available() -> bool:
    """Whether torchdeq can be imported."""
    try:
        import torchdeq.solver  # noqa: F401
    except ImportError:
        return False
    return True
