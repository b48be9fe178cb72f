"""Handing a learned solve over to a classical one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metabroyden.solver import Phase
from metabroyden.solvers.broyden import Broyden


@dataclass(frozen=True)
class Safeguard:
    """When a learned solver hands a sample to Broyden, and how far that is trusted. `solve` does the handing over.

    A sample leaves the learned phase when its best residual is above the `envelope`, has not made progress for `patience`
    evaluations, when it turns non-finite, or after `horizon` steps. Broyden carries on from the best iterate, whose residual
    is known, with the secant pairs of the last steps. Where the best residual is above `resume_below`, or is not halved in
    `resumed_patience` evaluations, plain Broyden starts again from z0. So, with a horizon or a patience for progress below
    1, and given max_nfe plus what was already spent, a learned solve does not fail where its fallback converges.

    Attributes:
        horizon: learned steps at most; None: no limit.
        patience: evaluations without progress; None: no limit.
        progress: the factor by which the best residual must fall to count as progress; below 1 where there is no horizon,
            or a sample that creeps stays for ever.
        memory: of the fallback.
        resumed_patience: evaluations in which the resumed phase must halve the best residual.
        resume_below: relative residual up to which the best iterate is worth carrying on from.
        envelope: largest relative residual of the best iterate after 0, 1, … learned steps with which a sample stays; after
            its last entry, any. Made by `fit_solver` of what its validation problems reach.
    """

    horizon: int | None = 20
    patience: int | None = 5
    memory: int = 30
    resumed_patience: int = 20
    progress: float = 1.0
    resume_below: float = 0.5
    envelope: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.envelope, tuple) or not all(isinstance(v, float) and v > 0 for v in self.envelope):
            raise ValueError(f"Safeguard: envelope must be a tuple of positive numbers, got {self.envelope!r:.80}")
        for name in ("horizon", "patience", "memory", "resumed_patience"):
            value = getattr(self, name)
            if name in ("horizon", "patience") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Safeguard: {name} must be an integer of at least 1, got {value!r}")
        if (
            isinstance(self.resume_below, bool)
            or not isinstance(self.resume_below, int | float)
            or self.resume_below <= 0
        ):
            raise ValueError(f"Safeguard: resume_below must be a positive number, got {self.resume_below!r}")
        if isinstance(self.progress, bool) or not isinstance(self.progress, int | float) or not 0 < self.progress <= 1:
            raise ValueError(f"Safeguard: progress must be in (0, 1], got {self.progress!r}")

    def fallback(self) -> Broyden:
        """The classical solver the guarantee speaks of."""
        return Broyden(memory=self.memory)

    def learned_phase(self, solver: Any) -> Phase:
        """The learned steps."""
        return Phase(
            solver, horizon=self.horizon, patience=self.patience, progress=self.progress, envelope=self.envelope
        )

    def phases(self, solver: Any, initial: Any = None) -> list[Phase]:
        """Learned steps, Broyden on top of the learned inverse Jacobian `initial` (if any), plain Broyden from z0."""
        broyden = Broyden(memory=self.memory, initial=initial)
        resumed = Phase(
            broyden, origin="best", enter_below=self.resume_below, patience=self.resumed_patience, progress=0.5
        )
        return [self.learned_phase(solver), resumed, Phase(self.fallback())]


BY_PROGRESS = Safeguard(horizon=None, patience=15, progress=0.8)
"""For solvers that may go on as long as they take a fifth off the residual every fifteen evaluations."""
