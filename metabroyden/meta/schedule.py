"""How far a meta-training has got, what went wrong in it, and when it stops before the last step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

STOPS = {
    "steps": "all outer steps were taken",
    "patience": "validation had stopped improving",
    "budget": "the time budget was spent",
    "callback": "a callback asked for it",
    "non-finite": "gradients stayed non-finite, returns to the best weights notwithstanding",
}
"""Why a meta-training stopped, by name."""
EXPLODED = 1e3  # gradients longer than this many times the norm they are clipped to are reported as explosions


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


@dataclass
class StepGuard:
    """What went wrong, by the numbers of outer steps."""

    skipped: dict[str, list[int]] = field(default_factory=dict)  # by reason
    exploded: list[int] = field(default_factory=list)  # taken with a gradient that was clipped by more than `EXPLODED`
    returned: list[int] = field(
        default_factory=list
    )  # after which training went back to the best weights, at half the rate
    consecutive_skips: int = 0  # until now

    def accept(self, step: int, loss: float, norm: float, clip: float) -> bool:
        """Whether the step may be taken; what is unusual about it is recorded."""
        why = "loss" if not math.isfinite(loss) else "gradient" if not math.isfinite(norm) else None
        if why is not None:
            self.skipped.setdefault(f"{why} not finite", []).append(step)
            self.consecutive_skips += 1
            return False
        self.consecutive_skips = 0
        if norm > EXPLODED * clip:
            self.exploded.append(step)
        return True

    @property
    def count(self) -> int:
        """Steps skipped in all."""
        return sum(len(steps) for steps in self.skipped.values())

    def words(self) -> str:
        """A few, for a progress bar; none where nothing happened."""
        counts = {"skipped": self.count, "exploded": len(self.exploded), "returns to the best": len(self.returned)}
        return "".join(f", {count} {what}" for what, count in counts.items() if count)

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def before(self, step: int) -> bool:
        """Whether all that is recorded can have happened in so many steps."""
        recorded = [*self.exploded, *self.returned, *(number for steps in self.skipped.values() for number in steps)]
        return all(0 <= number <= step for number in recorded) and 0 <= self.consecutive_skips <= self.count


def in_words(incidents: dict[str, Any]) -> str:
    """A sentence on what `StepGuard.describe` gives; "" where nothing happened."""
    parts = [f"{_steps(steps)} skipped ({why})" for why, steps in incidents["skipped"].items()]
    if incidents["exploded"]:
        parts.append(f"{_steps(incidents['exploded'])} taken with a gradient {EXPLODED:g} times what it was clipped to")
    if incidents["returned"]:
        parts.append(f"back to the best weights with half the learning rate after {_steps(incidents['returned'])}")
    return "; ".join(parts)


def _steps(steps: list[int], most: int = 5) -> str:
    shown = ", ".join(map(str, steps[:most])) + (f" and {len(steps) - most} more" if len(steps) > most else "")
    return f"step{'s' * (len(steps) > 1)} {shown}"


def share(config: Any, step: int, spent: Sequence[float]) -> float:
    """How far the training has got, in [0, 1]: the larger of the shares of steps and of the time budget."""
    steps = step / config.steps
    return steps if config.seconds is None else min(1.0, max(steps, _of_budget(config, spent)))


def cosine(done: float) -> float:
    """Share of the peak learning rate: 1 at done = 0, falling to zero at done = 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


def reason_to_stop(
    config: Any, step: int, spent: Sequence[float], history: list[dict[str, Any]], incidents: StepGuard
) -> str | None:
    """A key of `STOPS`, or None to go on. spent: what a `Clock` reads; history: the looks at validation."""
    if step >= config.steps:
        return "steps"
    if config.seconds is not None and _of_budget(config, spent) >= 1:
        return "budget"
    if incidents.consecutive_skips >= config.rollback_after and len(incidents.returned) >= config.max_rollbacks:
        return "non-finite"
    scores = [entry["score"] for entry in history]
    idle = len(scores) - 1 - scores.index(min(scores)) if scores else 0
    return "patience" if config.patience is not None and idle >= config.patience else None


def _of_budget(config: Any, spent: Sequence[float]) -> float:
    return spent[0 if config.budget_clock == "wall" else 1] / config.seconds
