"""What a meta-training is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from metabroyden.meta.objectives import Objective, ResidualObjective
from metabroyden.meta.unroll import BACKENDS


@dataclass(frozen=True)
class MetaConfig:
    """One meta-training.

    Attributes:
        steps: outer (Adam) steps. unroll: solver steps K that are backpropagated through together.
        segments: unrolls of K steps one after another, each from where the last one ended and cut off from its graph
            (truncated backpropagation through time), their gradients added up. With 1 backpropagation is full.
        batch: fixed-point problems a step. learning_rate: peak, cosine to zero. clip: of the gradient's norm.
        objective: see `metabroyden.meta.objectives`. backend: of the unroll. seed: of the batches.
        validate_every: outer steps between looks at validation; the best weights seen there are the ones kept.
        validation_size: problems of the validation split used for that.
        validation_rtol, validation_nfe: tolerance and budget of that look; its score is the mean number of evaluations,
            a failure counting twice the budget.
        patience: looks at validation without improvement after which the training stops; None: never.
        budget_seconds: time after which it stops, looks at validation and earlier sittings included; None: no limit. The
            schedule goes by whichever share is the larger, of the steps or of the time, so that it ends at zero either way.
        budget_clock: what that budget is of, "wall" or "cpu" (of this process, all its threads).
    """

    steps: int = 600
    unroll: int = 14
    segments: int = 1
    batch: int = 32
    learning_rate: float = 2e-3
    clip: float = 1.0
    objective: Objective = field(default_factory=ResidualObjective)
    backend: str = "higher"
    seed: int = 0
    validate_every: int = 50
    validation_size: int = 256
    validation_rtol: float = 1e-3
    validation_nfe: int = 60
    patience: int | None = None
    budget_seconds: float | None = None
    budget_clock: str = "wall"

    def __post_init__(self) -> None:
        for name in ("steps", "unroll", "segments", "batch", "validate_every", "validation_size", "validation_nfe"):
            self._check_count(name)
        if self.patience is not None:
            self._check_count("patience")
        for name in ("learning_rate", "clip", "validation_rtol"):
            self._check_positive(name)
        if self.budget_seconds is not None:
            self._check_positive("budget_seconds")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"MetaConfig: seed must be an integer, got {self.seed!r}")
        for name, known in (("backend", BACKENDS), ("budget_clock", ("wall", "cpu"))):
            if getattr(self, name) not in known:
                raise ValueError(f"MetaConfig: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"MetaConfig: {name} must be an integer of at least 1, got {value!r}")

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ValueError(f"MetaConfig: {name} must be a positive number, got {value!r}")
