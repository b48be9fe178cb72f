"""What went wrong in a meta-training, step by step, and what was done about it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

EXPLODED = 1e3
"""Gradients longer than this many times the norm they are clipped to are reported as explosions."""


@dataclass
class StepGuard:
    """Outer steps by number.

    Attributes:
        skipped: not taken, by why. exploded: taken with a gradient that was clipped by more than `EXPLODED`.
        returned: after which training went back to the best weights, with half the learning rate.
        consecutive_skips: steps skipped in a row until now.
    """

    skipped: dict[str, list[int]] = field(default_factory=dict)
    exploded: list[int] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)
    consecutive_skips: int = 0

    def note_return(self, step: int) -> None:
        """Training went back to the best weights."""
        self.returned.append(step)
        self.consecutive_skips = 0

    def accept(self, step: int, loss: float, norm: float, clip: float) -> bool:
        """Whether the step may be taken; what is unusual about it is noted."""
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
        """Whether all that is noted can have happened in so many steps."""
        noted = [*self.exploded, *self.returned, *(number for numbers in self.skipped.values() for number in numbers)]
        return all(0 <= number <= step for number in noted) and 0 <= self.consecutive_skips <= self.count


def in_words(incidents: dict[str, Any]) -> str:
    """A sentence on what `StepGuard.describe` tells; "" where nothing happened."""
    parts = [f"{_steps(steps)} skipped ({why})" for why, steps in incidents["skipped"].items()]
    if incidents["exploded"]:
        parts.append(f"{_steps(incidents['exploded'])} taken with a gradient {EXPLODED:g} times what it was clipped to")
    if incidents["returned"]:
        parts.append(f"back to the best weights with half the learning rate after {_steps(incidents['returned'])}")
    return "; ".join(parts)


def _steps(steps: list[int], most: int = 5) -> str:
    shown = ", ".join(map(str, steps[:most])) + (f" and {len(steps) - most} more" if len(steps) > most else "")
    return f"step{'s' * (len(steps) > 1)} {shown}"
