"""Episodes: a solver's weights are adapted to a DEQ on some of its contexts and judged on others.

Algorithm 1 of Ravi & Larochelle, "Optimization as a model for few-shot learning" (ICLR 2017), with a DEQ for a data set: its
D_train and D_test are disjoint contexts, the learner is a root finder, and T inner updates on D_train make its fast
weights; the loss of its solves on D_test trains where it starts from and how it is updated.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from metabroyden.meta.backprop import frozen
from metabroyden.meta.inner import UPDATES, InnerUpdate, Weights
from metabroyden.meta.objectives import Objective, ResidualObjective
from metabroyden.meta.tasks import TaskSet, as_learn2learn, count, rows
from metabroyden.meta.trainer import Progress
from metabroyden.meta.unroll import unroll

LIBRARY = ("maml", "meta-sgd")
"""Inner steps of learn2learn; those of `UPDATES` are ours."""


@dataclass(frozen=True)
class EpisodeConfig:
    """One meta-training on episodes.

    Attributes:
        inner: updates of the fast weights, T ≥ 1.
        update: the inner step: "gated" or "rates" (see `metabroyden.meta.inner`), or learn2learn's "maml" or "meta-sgd".
        first_order: whether inner gradients are constants for the outer one.
        shots: contexts of a D_train batch; D_test has as many.
        unroll: solver steps of a loss.
        inner_rate: what learning rates begin with. learning_rate: of the outer Adam, cosine to zero. clip: of its norm.
        steps: outer steps, one episode each. seed: of all draws.
        objective: of a rollout; none that needs equilibria.
    """

    inner: int = 3
    update: str = "gated"
    first_order: bool = True
    shots: int = 16
    unroll: int = 8
    inner_rate: float = 1e-2
    learning_rate: float = 2e-3
    clip: float = 1.0
    steps: int = 200
    seed: int = 0
    objective: Objective = field(default_factory=ResidualObjective)

    def __post_init__(self) -> None:
        for name in ("inner", "shots", "unroll", "steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"EpisodeConfig: {name} must be an integer of at least 1, got {value!r}")
        for name in ("inner_rate", "learning_rate", "clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"EpisodeConfig: {name} must be a positive number, got {value!r}")
        if self.update not in (*UPDATES, *LIBRARY):
            raise ValueError(f"update must be one of {', '.join((*UPDATES, *LIBRARY))}, got {self.update!r}")
        if self.objective.needs_star:
            raise ValueError("episodes take objectives that need no equilibria")


class Episode(NamedTuple):
    """One DEQ with T batches (z0, x) of D_train and one of D_test; numbers are theirs, (T + 1, shots), in the raw split."""

    number: int
    f: Any
    train: list[tuple[Any, Any]]
    test: tuple[Any, Any]
    numbers: Tensor


class _Numbered:
    """What learn2learn's task sets need of a `TaskSet`: row numbers in the place of contexts of any shape."""

    def __init__(self, tasks: TaskSet) -> None:
        self.tasks = tasks

    def split(self, name: str) -> Tensor:
        return torch.arange(count(self.tasks.split(name)))


class EpisodeSet:
    """Episodes of several DEQs, drawn by learn2learn's task sets without repetition within an episode.

    Args:
        task_sets: the DEQs: weights along a training, seeds, families.
        config: how many contexts an episode wants.
        split: of the task sets, from which D_train and D_test are both drawn.

    ImportError where learn2learn is missing; ValueError where a split is too small.
    """

    def __init__(self, task_sets: Sequence[TaskSet], config: EpisodeConfig, *, split: str = "train") -> None:
        self.task_sets, self.config, self.split = list(task_sets), config, split
        wanted = (config.inner + 1) * config.shots
        for tasks in self.task_sets:
            there = count(tasks.split(split))
            if there < wanted:
                raise ValueError(f"an episode takes {wanted} contexts, (inner + 1)·shots; a {split} split has {there}")
        numbered: Any = [_Numbered(tasks) for tasks in self.task_sets]
        self.dataset = as_learn2learn(numbered, split, shots=wanted)

    def draw(self, step: int) -> Episode:
        """The episode of a step: the same for the same seed, whatever was drawn before."""
        with _seeded(f"{self.config.seed}-{step}"):
            numbers, labels = self.dataset.sample()
        number = int(labels[0])
        tasks = self.task_sets[number]
        parts = numbers.reshape(self.config.inner + 1, self.config.shots)
        raw = tasks.split(self.split)
        batches = [tasks.prepare(rows(raw, part)) for part in parts]
        return Episode(number, tasks.f, batches[:-1], batches[-1], parts)


class EpisodeTrainer:
    """Trains a solver's first weights and its inner step on episodes.

    Args:
        solver: a `LearnedSolver`; its weights are where every episode starts from. config: see `EpisodeConfig`.
    """

    def __init__(self, solver: nn.Module, episodes: EpisodeSet, config: EpisodeConfig) -> None:
        self.solver, self.episodes, self.config = solver, episodes, config
        self.solver.requires_grad_(True)
        self.learner: Any = None
        if config.update in LIBRARY:
            self.learner = _library(config, solver)
        self.inner: InnerUpdate | None = (
            UPDATES[config.update](solver, config.inner_rate) if config.update in UPDATES else None
        )
        source = self.learner if self.inner is None else nn.ModuleList([solver, self.inner])
        self.parameters = list({id(p): p for p in source.parameters()}.values())
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate)
        self.step, self.skipped = 0, 0
        self.history: list[float] = []

    def run(self, progress: Progress | None = None) -> Any:
        """All outer steps; the solver as every new episode will start from it. `history` has the losses on D_test."""
        config = self.config
        while self.step < config.steps:
            episode = self.episodes.draw(self.step)
            with frozen(episode.f), torch.enable_grad():
                loss = self.loss(episode)
                grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            for parameter, grad in zip(self.parameters, grads, strict=True):
                parameter.grad = grad
            if bool(torch.isfinite(nn.utils.clip_grad_norm_(self.parameters, config.clip))):
                for group in self.optimizer.param_groups:
                    group["lr"] = 0.5 * config.learning_rate * (1 + math.cos(math.pi * self.step / config.steps))
                self.optimizer.step()
            else:
                self.skipped += 1
            self.step += 1
            self.history.append(float(loss.detach()))
            if progress is not None:
                progress(self.step, f"loss after adaptation {self.history[-1]:.3f}")
        return self.solver

    def loss(self, episode: Episode, inner: int | None = None) -> Tensor:
        """The loss on D_test after so many inner updates on D_train (default: all of the episode's batches)."""
        batches = episode.train if inner is None else episode.train[:inner]
        if self.inner is None:
            learner = self.learner.clone()
            for batch in batches:
                learner.adapt(self.loss_of(learner.module, episode.f, batch))
            return self.loss_of(learner.module, episode.f, episode.test)
        weights = self._adapted(episode.f, batches, create_graph=not self.config.first_order)
        return self._loss_with(weights, episode.f, episode.test)

    def loss_value(self, episode: Episode, inner: int | None = None) -> float:
        """`loss` as a number."""
        with frozen(episode.f), torch.enable_grad():
            return float(self.loss(episode, inner).detach())

    def adapted(self, f: Any, batches: Sequence[tuple[Any, Any]]) -> Any:
        """A copy of the solver with its weights adapted to f on these batches (z0, x), in evaluation mode."""
        made = copy.deepcopy(self.solver)
        with frozen(f), torch.enable_grad():
            if self.inner is None:
                learner = self.learner.clone()
                for batch in batches:
                    learner.adapt(self.loss_of(learner.module, f, batch))
                weights = dict(learner.module.named_parameters())
            else:
                weights = self._adapted(f, batches, create_graph=False)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.copy_(weights[name])
        return made.eval().requires_grad_(False)

    def _adapted(self, f: Any, batches: Sequence[tuple[Any, Any]], *, create_graph: bool) -> Weights:
        assert self.inner is not None
        weights: Weights = dict(self.solver.named_parameters())
        memory = self.inner.begin(weights)
        for batch in batches:
            loss = self._loss_with(weights, f, batch)
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, create_graph=create_graph)
            grads = {
                name: torch.zeros_like(value) if grad is None else torch.nan_to_num(grad, 0.0, 0.0, 0.0)
                for (name, value), grad in zip(weights.items(), found, strict=True)
            }
            weights, memory = self.inner(weights, grads, loss.detach(), memory)
        return weights

    def loss_of(self, solver: Any, f: Any, batch: tuple[Any, Any]) -> Tensor:
        """The loss of a solver on a batch (z0, x)."""
        config = self.config
        return config.objective.loss(unroll(solver, f, *batch, steps=config.unroll, backend="native"), None, 0.0)

    def _loss_with(self, weights: Weights, f: Any, batch: tuple[Any, Any]) -> Tensor:
        named = {f"solver.{name}": value for name, value in weights.items()}
        return torch.func.functional_call(_Run(self.solver, self.loss_of), named, (f, batch))


class _Run(nn.Module):
    """A loss of a solver as a module's forward, so that it can be called with other weights."""

    def __init__(self, solver: nn.Module, loss: Any) -> None:
        super().__init__()
        self.solver, self.loss = solver, loss

    def forward(self, f: Any, batch: tuple[Any, Any]) -> Tensor:
        """The loss of a batch."""
        return self.loss(self.solver, f, batch)


def _library(config: EpisodeConfig, solver: nn.Module) -> Any:
    from metabroyden.meta.learn2learn import load

    algorithms = load().algorithms
    if config.update == "maml":
        return algorithms.MAML(solver, lr=config.inner_rate, first_order=config.first_order)
    return algorithms.MetaSGD(solver, lr=config.inner_rate, first_order=config.first_order)


@contextmanager
def _seeded(key: str) -> Iterator[None]:
    """While it lasts, the generators that learn2learn draws from follow from the key; afterwards they are as before."""
    kept, kept_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(key)
    np.random.seed(random.getrandbits(32))  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(kept)
        np.random.set_state(kept_numpy)  # noqa: NPY002
