"""A few outer steps that make a solver for many DEQs, or for another one, a solver for this one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from metabroyden.learned.fingerprint import fingerprint
from metabroyden.learned.universal import Universal, specialised
from metabroyden.meta.config import MetaConfig, count
from metabroyden.meta.defaults import tasks_layout
from metabroyden.meta.estimators import BackpropEstimator, MixedDraws
from metabroyden.meta.orthogonal import OrthogonalAdam, is_matrix
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.trainer import Trainer
from metabroyden.progress import Progress


@dataclass(frozen=True)
class SpecialiseConfig(MetaConfig):
    """One adaptation: `MetaConfig` with other defaults; the rates fall linearly. `unroll` is one number.

    Attributes:
        rank: inner channels of a universal solver's new preconditioner; their matrices move by `orthogonal_rate`.
        initializer_width: width of its start.
    """

    steps: int = count(20)
    batch: int = count(96)
    learning_rate: float = 1e-2
    orthogonal_rate: float = 0.08
    decay: str = "linear"
    backend: str = "native"
    validate_every: int = count(5)
    validation_size: int = count(64)
    validation_rtol: float = 1e-2
    rollback_above: float = 1e9  # a look at validation decides, at the end
    rank: int = count(64)
    initializer_width: int = count(64)


def specialise(
    solver: Any, tasks: TaskSet, config: SpecialiseConfig | None = None, *, progress: Progress | None = None
) -> Any:
    """A copy of a solver, adapted to one DEQ on its training contexts; in evaluation mode.

    A `Universal` without parts of its own is given an initializer and a preconditioner for the DEQ's layout, zero at first;
    another learned solver is trained on as it is, and must fit. A look at validation contexts before, every few steps and
    after decides which weights are kept, so that an adaptation that does harm is undone.
    """
    config = SpecialiseConfig() if config is None else config
    assert isinstance(config.unroll, int)
    adapted: Any = _with_parts(solver, tasks, config)
    own = [part for part in (adapted.initializer, getattr(adapted, "preconditioner", None)) if part is not None]
    matrices = [p for part in own for p in part.parameters() if is_matrix(p)]
    rates = {"lr": config.learning_rate, "orthogonal_rate": config.orthogonal_rate}
    draws = MixedDraws([(1.0, tasks)], config.batch, (config.unroll, config.unroll), config.seed)
    adam = OrthogonalAdam(adapted.requires_grad_(True).parameters(), matrices, **rates)
    estimator = partial(BackpropEstimator, adapted, draws, config)
    Trainer(adapted, config, estimator, validation=[tasks], optimizer=adam).run(progress)
    adapted.fingerprint = fingerprint(tasks.f)
    adapted.summary = {"specialised": {"steps": config.steps, "batch": config.batch, "unroll": config.unroll}}
    return adapted


def _with_parts(solver: Any, tasks: TaskSet, config: SpecialiseConfig) -> nn.Module:
    if not (isinstance(solver, Universal) and solver.dimension_free):
        return copy.deepcopy(solver)
    layout, channels = tasks_layout(tasks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        seen = {"conditioning": "input" if channels else "initial_value", "context_channels": channels}
        return specialised(solver, layout, rank=config.rank, initializer_width=config.initializer_width, **seen)
