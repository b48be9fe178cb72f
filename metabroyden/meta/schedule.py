"""How far a meta-training has got: its clock, its share of the way, and when it stops before the last step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from metabroyden.meta.step_guard import StepGuard

STOPS = {
    "steps": "all outer steps were taken",
    "patience": "validation had stopped improving",
    "budget": "the time budget was spent",
    "non-finite": "gradients stayed non-finite, returns to the best weights notwithstanding",
}
"""Why a meta-training stopped, by name."""


class Clock:
    """Seconds that pass while it runs, over all sittings: of the wall clock, and of this process's CPU time."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self._spent = (seconds, cpu_seconds)
        self._began: tuple[float, float] | None = None

    def start(self) -> None:
        """Run, from now on."""
        self._began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Stand still, from now on."""
        self._spent, self._began = self.read(), None

    def read(self) -> tuple[float, float]:
        """(seconds, cpu_seconds) so far."""
        wall, cpu = self._spent
        if self._began is None:
            return wall, cpu
        return wall + time.perf_counter() - self._began[0], cpu + time.process_time() - self._began[1]


def share(config: Any, step: int, spent: Sequence[float]) -> float:
    """How far the training has got, in [0, 1]: the larger of the shares of steps and of the time budget."""
    steps = step / config.steps
    return steps if config.budget_seconds is None else min(1.0, max(steps, _of_budget(config, spent)))


def cosine(done: float) -> float:
    """Share of the peak learning rate: 1 at done = 0, falling to zero at done = 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


def reason_to_stop(
    config: Any, step: int, spent: Sequence[float], history: list[dict[str, Any]], incidents: StepGuard
) -> str | None:
    """A key of `STOPS`, or None to go on. spent: what a `Clock` reads; history: the looks at validation."""
    if step >= config.steps:
        return "steps"
    if config.budget_seconds is not None and _of_budget(config, spent) >= 1:
        return "budget"
    if incidents.consecutive_skips >= config.rollback_after and len(incidents.returned) >= config.max_rollbacks:
        return "non-finite"
    if config.patience is not None and idle_looks(history) >= config.patience:
        return "patience"
    return None


def idle_looks(history: list[dict[str, Any]]) -> int:
    """Looks at validation since the one with the best score."""
    scores = [entry["score"] for entry in history]
    return len(scores) - 1 - scores.index(min(scores)) if scores else 0


def _of_budget(config: Any, spent: Sequence[float]) -> float:
    return spent[0 if config.budget_clock == "wall" else 1] / config.budget_seconds
