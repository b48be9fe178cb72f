"""What a meta-training is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from metabroyden.deprecated import OldOptions
from metabroyden.meta.objectives import Objective, ResidualObjective
from metabroyden.meta.unroll import BACKENDS


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_unroll(value: Any) -> bool:
    pair = value if isinstance(value, tuple) else (value, value)
    return len(pair) == 2 and all(map(_is_count, pair)) and pair[0] <= pair[1]


def _checked(default: Any, wanted: str, holds: Callable[[Any], bool]) -> Any:
    return field(default=default, metadata={"wanted": wanted, "holds": holds})


def count(default: Any, least: int = 1) -> Any:
    """A field that holds an integer; or None, if that is the default."""
    wanted = f"an integer of at least {least}"
    return _checked(default, wanted, lambda value: _is_count(value, least) or (default is None and value is None))


def positive(default: Any) -> Any:
    """A field that holds a positive number; or None or 0, if that is the default."""
    return _checked(
        default, "a positive number", lambda found: _is_positive(found) or (not default and found == default)
    )


def weight(default: float) -> Any:
    """A field that holds a number of at least 0."""
    return _checked(default, "a number of at least 0", lambda value: _is_positive(value) or value == 0)


def flag(default: bool) -> Any:
    """A field that holds True or False."""
    return _checked(default, "true or false", lambda value: isinstance(value, bool))


def choice(default: str, known: tuple[str, ...]) -> Any:
    """A field that holds one of several words."""
    return _checked(default, f"one of {', '.join(known)}", lambda value: value in known)


@dataclass(frozen=True)
class Unrolling(metaclass=OldOptions):
    """How the unroll of a solver is differentiated. ValueError for a field that cannot be used, here and in subclasses.

    Attributes:
        segments: unrolls of K steps one after another, each from where the last one ended and cut off from its graph
            (truncated backpropagation through time), their gradients added up. With 1 backpropagation is full.
        drop_below: samples with a smaller relative residual at the end of a segment take no part in the next ones, and of
            the others a quarter of the batch at most, those with the largest: the next segments are of hard samples, and
            cheap. 0: all samples go on.
        anchor: weight of a term that keeps solves near equilibria known beforehand, see `anchored` and
            `TaskSet.equilibria`. Where f has several, residuals alone lead to whichever is easiest to reach.
        clip: of the gradient's norm.
        objective: see `metabroyden.meta.objectives`.
        detach_features: see `metabroyden.meta.unroll.unroll`, as for checkpoint_steps and half.
    """

    segments: int = count(1)
    drop_below: float = positive(0.0)
    anchor: float = positive(0.0)
    clip: float = positive(1.0)
    objective: Objective = field(default_factory=ResidualObjective)
    detach_features: bool = flag(False)
    checkpoint_steps: bool = flag(False)
    half: bool = flag(False)

    def __post_init__(self) -> None:
        for item in fields(self):
            value, says = getattr(self, item.name), item.metadata
            if says and not says["holds"](value):
                raise ValueError(f"{type(self).__name__}: {item.name} must be {says['wanted']}, got {value!r}")


@dataclass(frozen=True)
class MetaConfig(Unrolling):
    """One meta-training. Adds to `Unrolling`:

    Attributes:
        steps: outer (Adam) steps.
        unroll: solver steps K that are backpropagated through together; a pair (low, high): K is drawn anew for each
            outer step, log-uniformly from low to high.
        batch: fixed-point problems a step, over all processes.
        learning_rate: peak rate of Adam. For a MetaBroyden `fit_solver` uses 0.005 in place of this default.
        orthogonal_rate: peak rate of the matrices, by `OrthogonalAdam`, or 0: Adam for them too. For a MetaBroyden
            `fit_solver` uses 0.05.
        decay: of both rates to zero, "cosine" or "linear".
        estimator: of the gradient, "backprop" or "pes" (see `metabroyden.meta.estimators`). With the latter an outer
            step is one segment, and `segments` of them in a row one unroll.
        sigma: size of the perturbations of "pes".
        particles: pairs of them.
        backend: of the unroll that is backpropagated through.
        seed: of all that is drawn.
        start_noise: size of normal noise on the start states of training, relative to the root mean square of f(z0).
        validate_every: outer steps between looks at validation; the weights with the best score are kept.
        validation_size: problems of a look at validation.
        validation_rtol: tolerance they are solved to.
        validation_nfe: budget of each; the score is the mean number of evaluations, a failure counting twice this.
        patience: looks at validation without improvement after which the training stops; None: never.
        seconds: time after which it stops, looks at validation and earlier sittings included; None: no limit. The rates
            go by whichever share is the larger, of the steps or of the time, so that they end at zero either way.
        budget_clock: what `seconds` are of, "wall" or "cpu" (of this process, all its threads).
        rollback_after: steps in a row without a finite gradient after which training returns to the best weights with
            half the learning rate.
        rollback_above: a score this many times the best has the same effect.
        max_rollbacks: how often at most; past that, steps without a gradient end the training.
    """

    steps: int = count(600)
    unroll: int | tuple[int, int] = _checked(
        14, "an integer of at least 1 or a pair (low, high) of them, low ≤ high", _is_unroll
    )
    batch: int = count(32)
    learning_rate: float = positive(2e-3)
    orthogonal_rate: float = positive(0.0)
    decay: str = choice("cosine", ("cosine", "linear"))
    estimator: str = choice("backprop", ("backprop", "pes"))
    sigma: float = positive(0.01)
    particles: int = count(8)
    backend: str = choice("higher", BACKENDS)
    seed: int = _checked(0, "an integer", lambda value: isinstance(value, int) and not isinstance(value, bool))
    start_noise: float = positive(0.0)
    validate_every: int = count(50)
    validation_size: int = count(256)
    validation_rtol: float = positive(1e-3)
    validation_nfe: int = count(60)
    patience: int | None = count(None)
    seconds: float | None = positive(None)
    budget_clock: str = choice("wall", ("wall", "cpu"))
    rollback_after: int = count(10)
    rollback_above: float = positive(2.0)
    max_rollbacks: int = count(3, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator == "pes" and (self.detach_features or self.checkpoint_steps):
            raise ValueError(
                f"{type(self).__name__}: detach_features and checkpoint_steps are of backpropagation, estimator is 'pes'"
            )

    @property
    def worth(self) -> int:
        """Solver steps of an unroll, its segments together, at most."""
        return self.segments * (self.unroll if isinstance(self.unroll, int) else self.unroll[1])
