"""What the owner of a trained DEQ hands over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Brought:
    """A trained DEQ with its problems.

    Attributes:
        f: the map, in the owner's own form.
        x_train: contexts for `fit_solver`.
        x_test: others, with what the metric needs.
        metric: (z, x) → (B,), higher is better.
        exact: a solver and a budget that reach the equilibrium itself.
        slack: of the metric's mean at the equilibrium, by which one says that it is reached.
        again: the test problems with their places renumbered; None where order means something.
        peers: by name, other libraries' loops on the test problems: iterations ↦ states.
        pictures: by name, what is shown beside reconstructions, (B, …) like states; none where states are no pictures.
    """

    f: Any
    x_train: Any
    x_test: Any
    metric: Callable[[Any, Any], Any]
    exact: tuple[Any, int]
    slack: float
    again: Any = None
    peers: dict[str, Callable[[int], Any]] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)
