"""What the three kinds of physics share: their libraries, and a rival of the field's own as a contestant."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.bench.solvers import Peer
from metabroyden.comparison.measure import Found
from metabroyden.comparison.tables import Row
from metabroyden.foreign import required
from metabroyden.solution import State, Trace

PACKAGES = {"power": "pandapower", "water": "epyt", "scf": "pyscf"}
"""What each kind of problem needs."""


def library(name: str) -> Any:
    """A module of pandapower, pyscf or epyt; ImportError that says what to install where it is missing."""
    return required(name, "'metabroyden[physics]'")


Iteration = Callable[[Tensor, float, int], tuple[Tensor, list[float]]]
"""(context of one sample, tolerance, budget) → (its best or its last iterate, shaped like a state, and the relative
residual ‖f(z) − z‖ / ‖f(z)‖ of every iterate)."""


@dataclass(frozen=True)
class Own(Peer):
    """A field's own method, which sees more than f and runs in its own loop. Its `solver` is an `Iteration`.

    What stands for an evaluation is one of its iterations.
    """

    def timed(
        self, f: Any, z0: State, x: Any, tolerance: float, budget: int, *, keep: bool = True
    ) -> tuple[Found, Row]:
        """A solve of all samples, one after the other, and its seconds."""
        began = time.perf_counter()
        states, histories = zip(*(self.solver(context, tolerance, budget) for context in x), strict=True)
        total = time.perf_counter() - began
        residual = torch.full((max(map(len, histories)), len(histories)), torch.nan, dtype=torch.float64)
        for sample, history in enumerate(histories):
            residual[: len(history), sample] = torch.tensor(history, dtype=torch.float64)
        there = residual.isfinite()
        nfe = torch.arange(1, len(residual) + 1)[:, None] * there
        seconds = torch.linspace(0, total, len(residual) + 1, dtype=torch.float64)[1:]
        trace = Trace(residual, nfe, seconds, (there.long() - 1).to(torch.int8))
        evaluations, solved = trace.evaluations_to(tolerance, budget)
        smallest = residual.nan_to_num(torch.inf).min(dim=0).values.tolist()
        status = "".join("C" if hit else "B" for hit in solved)
        taken = {"total": total, "f": None, "solver": total, "bookkeeping": 0.0}
        return Found(torch.stack(states), evaluations, smallest, status, 0, trace), taken
