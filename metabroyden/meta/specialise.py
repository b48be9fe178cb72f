"""A few outer steps that make a solver for many DEQs, or for another one, a solver for this one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from metabroyden.learned.fingerprint import fingerprint
from metabroyden.learned.universal import Universal, specialised
from metabroyden.meta.backprop import differentiate, frozen
from metabroyden.meta.config import Unrolling
from metabroyden.meta.defaults import tasks_layout
from metabroyden.meta.orthogonal import OrthogonalAdam, is_matrix
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.trainer import Progress, mean_evaluations


@dataclass(frozen=True)
class SpecialiseConfig(Unrolling):
    """One adaptation. Adds to `Unrolling`.

    Attributes:
        steps: outer steps. unroll: solver steps of each. batch: contexts of each.
        learning_rate: of Adam, for gates, biases and whatever is no matrix.
        orthogonal_rate: of `OrthogonalAdam`, for the matrices of initializer and preconditioner. Both rates fall to zero
            linearly.
        rank, initializer: widths of the parts that a universal solver is given.
        seed: of the new parts and the batches.
        validate_every, validation_size: steps between looks at validation contexts, and how many of them.
        rtol: tolerance to which evaluations are counted there.
    """

    steps: int = 20
    unroll: int = 14
    batch: int = 96
    learning_rate: float = 1e-2
    orthogonal_rate: float = 0.08
    rank: int = 64
    initializer_width: int = 64
    seed: int = 0
    validate_every: int = 5
    validation_size: int = 64
    rtol: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("steps", "unroll", "batch", "validate_every", "validation_size")
        self._check_counts("rank", "initializer_width")
        self._check_positive("learning_rate", "orthogonal_rate", "rtol")


def specialise(
    solver: Any, tasks: TaskSet, config: SpecialiseConfig | None = None, *, progress: Progress | None = None
) -> Any:
    """A copy of a solver, adapted to one DEQ on its training contexts; in evaluation mode.

    A `Universal` without parts of its own is given an initializer and a preconditioner for the DEQ's layout, zero at first;
    another learned solver is trained on as it is, and must fit. A look at validation contexts before, every few steps and
    after decides which weights are kept, so that an adaptation that does harm is undone.
    """
    config = SpecialiseConfig() if config is None else config
    adapted: Any = _with_parts(solver, tasks, config).requires_grad_(True).train()
    own = [part for part in (adapted.initializer, getattr(adapted, "preconditioner", None)) if part is not None]
    matrices = [p for part in own for p in part.parameters() if is_matrix(p)]
    optimizer = OrthogonalAdam(
        adapted.parameters(), matrices, lr=config.learning_rate, orthogonal_rate=config.orthogonal_rate
    )
    generator = torch.Generator().manual_seed(config.seed)
    best, kept = _score(adapted, tasks, config), copy.deepcopy(adapted.state_dict())
    with frozen(tasks.f), torch.enable_grad():
        for step in range(config.steps):
            z0, x = tasks.draw(config.batch, generator)
            loss, norm = differentiate(
                adapted, tasks.f, z0, x, config, "native", steps=config.unroll, done=step / config.steps
            )
            optimizer.set_rates(1 - step / config.steps)
            if torch.isfinite(norm):
                optimizer.step()
            if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
                score = _score(adapted, tasks, config)
                if score < best:
                    best, kept = score, copy.deepcopy(adapted.state_dict())
            if progress is not None:
                progress(step + 1, f"loss {float(loss):.3f}, validation {best:.1f} evaluations")
    adapted.load_state_dict(kept)
    adapted.fingerprint = fingerprint(tasks.f)
    adapted.summary = {"specialised": {"steps": config.steps, "batch": config.batch, "unroll": config.unroll}}
    return adapted.eval().requires_grad_(False)


def _score(solver: Any, tasks: TaskSet, config: SpecialiseConfig) -> float:
    return mean_evaluations(solver, tasks, limit=config.validation_size, rtol=config.rtol)


def _with_parts(solver: Any, tasks: TaskSet, config: SpecialiseConfig) -> nn.Module:
    if not (isinstance(solver, Universal) and solver.dimension_free):
        return copy.deepcopy(solver)
    layout, channels = tasks_layout(tasks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return specialised(
            solver,
            layout,
            conditioning="input" if channels else "initial_value",
            context_channels=channels,
            rank=config.rank,
            initializer_width=config.initializer_width,
        )
