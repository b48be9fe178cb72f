"""What a fit can afford where f is dear: samples of each phase, and problems of an outer step."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from metabroyden.comparison.clock import now
from metabroyden.gradients.base import parts_of
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.estimators import ESTIMATORS, TaskDraws
from metabroyden.meta.tasks import KNOWN, TaskSet
from metabroyden.solution import State

BATCHES = (32, 16, 8, 4)
"""Problems of an outer step: the first with which `WANTED` steps can be afforded."""
WANTED = 300
"""Outer steps that a fit should have."""
LOOKS = 8
"""Looks at validation of a training that the clock ends."""
_CALLS = 3  # of f that are timed


@dataclass(frozen=True)
class Budget:
    """Samples of each phase, at most.

    Attributes:
        tuned: validation problems that classical solvers are tuned on.
        anchored: training problems whose equilibria are found beforehand.
        looked: validation problems of a look.
        compared: test problems.
    """

    tuned: int = 32
    anchored: int = KNOWN
    looked: int = 256
    compared: int = 128

    @classmethod
    def of(cls, seconds: float, call: float) -> Budget:
        """What can be afforded within so many seconds where f takes `call` seconds for a sample.

        Each phase has a share of the time, and needs so many calls a sample: tuning 32 options of classical solvers and
        four step lengths; an equilibrium, to a tenth of the tolerance; a look; and five solvers in four timed rounds.
        """

        def many(share: float, calls: int, least: int, most: int) -> int:
            return min(most, max(least, int(share * seconds / (calls * max(call, 1e-9)))))

        return cls(
            tuned=many(0.15, 1500, 6, cls.tuned), anchored=many(0.1, 50, 16, cls.anchored),
            looked=many(0.02, 40, 16, cls.looked), compared=many(0.2, 1000, 16, cls.compared),
        )  # fmt: skip


def call_seconds(f: Any, z0: State, x: Any) -> float:
    """Seconds of f for a sample, of a batch: the shortest of several calls, after one that warms up."""
    size, device, taken = len(parts_of(z0)[0]), parts_of(z0)[0].device, []
    with torch.no_grad():
        for _ in range(1 + _CALLS):
            began = now(device)
            f(z0) if x is None else f(z0, x)
            taken.append(now(device) - began)
    return min(taken[1:]) / size


def within(training: MetaConfig, learned: Any, tasks: TaskSet, seconds: float) -> MetaConfig:
    """A training's batch, and how often it looks at validation, so that some hundred steps fit into so many seconds.

    One outer step on the smallest batch is timed, on a copy of the solver; a larger batch takes in proportion, at most.
    """
    least = BATCHES[-1]
    trial = copy.deepcopy(learned).requires_grad_(True).train()
    small = replace(training, batch=least)
    estimator = ESTIMATORS[training.estimator](trial, TaskDraws(tasks, small), small)
    began = time.perf_counter()
    with torch.enable_grad():
        float(estimator(0, 0.0)[0])  # waits for a GPU
    each = (time.perf_counter() - began) / least
    batch = next((size for size in BATCHES if size * each * WANTED <= seconds), least)
    steps = max(1, int(seconds / (batch * each)))
    return replace(training, batch=batch, validate_every=max(1, min(training.validate_every, steps // LOOKS)))
