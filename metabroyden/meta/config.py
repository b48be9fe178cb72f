"""What a meta-training is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from metabroyden.meta.objectives import Objective, ResidualObjective
from metabroyden.meta.unroll import BACKENDS


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Unrolling:
    """How an unrolled solver is differentiated.

    Attributes:
        segments: unrolls of K steps one after another, each from where the last one ended and cut off from its graph
            (truncated backpropagation through time), their gradients added up. With 1 backpropagation is full.
        clip: of the gradient's norm. objective: see `metabroyden.meta.objectives`.
        detach_features, checkpoint_steps, half: see `metabroyden.meta.unroll.unroll`.
    """

    segments: int = 1
    clip: float = 1.0
    objective: Objective = field(default_factory=ResidualObjective)
    detach_features: bool = False
    checkpoint_steps: bool = False
    half: bool = False

    def __post_init__(self) -> None:
        self._check_counts("segments")
        self._check_positive("clip")
        for name in ("detach_features", "checkpoint_steps", "half"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{type(self).__name__}: {name} must be true or false, got {getattr(self, name)!r}")

    def _check_counts(self, *names: str, least: int = 1) -> None:
        for name in names:
            if not _is_count(getattr(self, name), least):
                raise ValueError(
                    f"{type(self).__name__}: {name} must be an integer of at least {least}, got {getattr(self, name)!r}"
                )

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{type(self).__name__}: {name} must be a positive number, got {value!r}")


@dataclass(frozen=True)
class MetaConfig(Unrolling):
    """One meta-training. Adds to `Unrolling`.

    Attributes:
        steps: outer (Adam) steps.
        unroll: solver steps K that are backpropagated through together; a pair (low, high): K is drawn anew for each outer
            step, log-uniformly from low to high.
        batch: fixed-point problems a step, over all processes. learning_rate: of Adam, peak, cosine to zero.
        orthogonal_rate: peak of that of the matrices, by `OrthogonalAdam`, or 0: Adam for them too.
        estimator: of the gradient, "backprop" or "pes" (see `metabroyden.meta.pes`). With the latter an outer step is one
            segment, and `segments` of them in a row one unroll. sigma: of its perturbations. particles: pairs of them.
        backend: of the unroll that is backpropagated through. seed: of all that is drawn.
        start_noise: size of normal noise on the start states of training, relative to the root mean square of f(z0).
        validate_every: outer steps between looks at validation; the best weights seen there are the ones kept.
        validation_size: problems of the validation split used for that.
        validation_rtol, validation_nfe: tolerance and budget of that look; its score is the mean number of evaluations,
            a failure counting twice the budget.
        patience: looks at validation without improvement after which the training stops; None: never.
        budget_seconds: time after which it stops, looks at validation and earlier sittings included; None: no limit. The
            schedule goes by whichever share is the larger, of the steps or of the time, so that it ends at zero either way.
        budget_clock: what that budget is of, "wall" or "cpu" (of this process, all its threads).
        rollback_after: steps in a row without a finite gradient after which training returns to the best weights with half
            the learning rate. rollback_above: so it does after a score this many times the best. max_rollbacks: how often
            at most; past that, steps without a gradient end the training.
    """

    steps: int = 600
    unroll: int | tuple[int, int] = 14
    batch: int = 32
    learning_rate: float = 2e-3
    orthogonal_rate: float = 0.0
    estimator: str = "backprop"
    sigma: float = 0.01
    particles: int = 8
    backend: str = "higher"
    seed: int = 0
    start_noise: float = 0.0
    validate_every: int = 50
    validation_size: int = 256
    validation_rtol: float = 1e-3
    validation_nfe: int = 60
    patience: int | None = None
    budget_seconds: float | None = None
    budget_clock: str = "wall"
    rollback_after: int = 10
    rollback_above: float = 2.0
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts(
            "steps", "batch", "validate_every", "validation_size", "validation_nfe", "particles", "rollback_after"
        )
        self._check_counts("max_rollbacks", least=0)
        self._check_positive("learning_rate", "validation_rtol", "sigma", "rollback_above")
        pair = self.unroll if isinstance(self.unroll, tuple) else (self.unroll, self.unroll)
        if len(pair) != 2 or not all(map(_is_count, pair)) or pair[0] > pair[1]:
            raise ValueError(
                "MetaConfig: unroll must be an integer of at least 1 or a pair (low, high) of them, low ≤ high, "
                f"got {self.unroll!r}"
            )
        if self.patience is not None:
            self._check_counts("patience")
        if self.budget_seconds is not None:
            self._check_positive("budget_seconds")
        for name in ("start_noise", "orthogonal_rate"):
            if getattr(self, name) != 0:
                self._check_positive(name)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"MetaConfig: seed must be an integer, got {self.seed!r}")
        choices = {"backend": BACKENDS, "estimator": ("backprop", "pes"), "budget_clock": ("wall", "cpu")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"MetaConfig: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.estimator == "pes" and (self.detach_features or self.checkpoint_steps):
            raise ValueError(
                "MetaConfig: detach_features and checkpoint_steps are of backpropagation, estimator is 'pes'"
            )
