"""Episodes: a solver's weights are adapted to a DEQ on some of its contexts and judged on others.

Algorithm 1 of Ravi & Larochelle, "Optimization as a model for few-shot learning" (ICLR 2017), with a DEQ for a data set: its
D_train and D_test are disjoint contexts, the learner is a root finder, and T inner updates on D_train make its fast
weights; the loss of its solves on D_test trains where it starts from and how it is updated.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from metabroyden.foreign import load
from metabroyden.meta.config import MetaConfig, choice, flag, positive
from metabroyden.meta.config import count as count_field
from metabroyden.meta.inner import UPDATES, Weights
from metabroyden.meta.target import frozen
from metabroyden.meta.tasks import TaskSet, count, rows
from metabroyden.meta.trainer import Trainer
from metabroyden.meta.unroll import unroll

LIBRARY = ("maml", "meta-sgd")  # inner steps of learn2learn; those of `UPDATES` are ours


@dataclass(frozen=True)
class EpisodeConfig(MetaConfig):
    """One meta-training on episodes, one each outer step: `MetaConfig` without validation. `unroll` is one number.

    Attributes:
        inner: updates of the fast weights, T ≥ 1.
        update: the inner step: "gated" or "rates" (see `metabroyden.meta.inner`), or learn2learn's "maml" or "meta-sgd".
        first_order: whether inner gradients are constants for the outer one.
        shots: contexts of a D_train batch; D_test has as many.
        inner_rate: what learning rates begin with.
        objective: of a rollout; none that needs equilibria.
    """

    steps: int = count_field(200)
    unroll: int = count_field(8)
    inner: int = count_field(3)
    update: str = choice("gated", (*UPDATES, *LIBRARY))
    first_order: bool = flag(True)
    shots: int = count_field(16)
    inner_rate: float = positive(1e-2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective.needs_star:
            raise ValueError("episodes take objectives that need no equilibria")


class Episode(NamedTuple):
    """One DEQ with T batches (z0, x) of D_train and one of D_test; numbers are theirs, (T + 1, shots), in the raw split."""

    number: int
    f: Any
    train: list[tuple[Any, Any]]
    test: tuple[Any, Any]
    numbers: Tensor


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
        numbers = [torch.arange(count(tasks.split(split))) for tasks in self.task_sets]
        self.dataset = _learn2learn_tasks(numbers, shots=wanted)

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


class EpisodeTrainer(Trainer):
    """Trains a solver's first weights and its inner step on episodes; `losses` are those on D_test.

    Args:
        solver: a `LearnedSolver`; its weights are where every episode starts from.
        episodes: what is drawn from.
        config: see `EpisodeConfig`.
        checkpoint: file for the training's state, or None.
    """

    config: EpisodeConfig

    def __init__(
        self, solver: nn.Module, episodes: EpisodeSet, config: EpisodeConfig, *, checkpoint: str | Path | None = None
    ) -> None:
        solver.requires_grad_(True)
        self.episodes = episodes
        self.inner: Any = None
        self.learner: Any = None
        if config.update in UPDATES:
            self.inner = UPDATES[config.update](solver, config.inner_rate)
        else:
            make = getattr(learn2learn().algorithms, {"maml": "MAML", "meta-sgd": "MetaSGD"}[config.update])
            self.learner = make(solver, lr=config.inner_rate, first_order=config.first_order)
        module = self.learner if self.inner is None else nn.ModuleList([solver, self.inner])
        self.losses: list[float] = []
        problems = episodes.task_sets
        super().__init__(solver, config, lambda: self, problems=problems, module=module, checkpoint=checkpoint)

    def settled(self, step: int) -> bool:
        """Nothing persists from one episode to the next."""
        return True

    def __call__(self, step: int, done: float) -> tuple[Tensor, Tensor]:
        """Leave the clipped gradient of a step's episode in all parameters; (loss, norm before clipping)."""
        episode, parameters = self.episodes.draw(step), list(self.module.parameters())
        with frozen(episode.f):
            loss = self.loss(episode)
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        self.losses.append(float(loss.detach()))
        return loss.detach(), nn.utils.clip_grad_norm_(parameters, self.config.clip)

    def _finish(self) -> None:
        """The solver stays as every new episode will start from it."""

    def loss(self, episode: Episode, inner: int | None = None) -> Tensor:
        """The loss on D_test after so many inner updates on D_train (default: all of the episode's batches)."""
        weights = self._adapted(episode.f, episode.train[:inner], create_graph=not self.config.first_order)
        return self._loss_with(weights, episode.f, episode.test)

    def adapted(self, f: Any, batches: Sequence[tuple[Any, Any]]) -> Any:
        """A copy of the solver with its weights adapted to f on these batches (z0, x), in evaluation mode."""
        made = copy.deepcopy(self.solver)
        with frozen(f), torch.enable_grad():
            weights = self._adapted(f, batches, create_graph=False)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.copy_(weights[name])
        return made.eval().requires_grad_(False)

    def _adapted(self, f: Any, batches: Sequence[tuple[Any, Any]], *, create_graph: bool) -> Weights:
        if self.inner is None:
            learner = self.learner.clone()
            for batch in batches:
                learner.adapt(self.loss_of(learner.module, f, batch))
            return dict(learner.module.named_parameters())
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
        return self.loss(self.solver, f, batch)


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


def as_learn2learn(task_sets: Sequence[TaskSet], split: str, *, shots: int, num_tasks: int = -1) -> Any:
    """A `learn2learn.data.Taskset` over DEQs: each task is `shots` raw contexts of one of them.

    Items are (contexts (shots, ...), labels (shots,)), the label being the number of the task set in `task_sets`.
    ImportError, saying what to install, where learn2learn is missing.
    """
    if not task_sets:
        raise ValueError("task_sets must hold at least one TaskSet")
    raws = [task_set.split(split) for task_set in task_sets]
    if not all(isinstance(raw, Tensor) for raw in raws):
        raise TypeError(f"learn2learn takes raw contexts of one tensor, got {[type(raw).__name__ for raw in raws]}")
    return _learn2learn_tasks(raws, shots=shots, num_tasks=num_tasks)


def _learn2learn_tasks(raws: Sequence[Tensor], *, shots: int, num_tasks: int = -1) -> Any:
    l2l = learn2learn()
    labels = torch.cat([torch.full((len(raw),), number) for number, raw in enumerate(raws)])
    dataset = l2l.data.MetaDataset(torch.utils.data.TensorDataset(torch.cat(list(raws)), labels))
    make = l2l.data.transforms
    transforms = [make.NWays(dataset, n=1), make.KShots(dataset, k=shots), make.LoadData(dataset)]
    return l2l.data.Taskset(dataset, transforms, num_tasks=num_tasks)


def learn2learn() -> Any:
    """The learn2learn package; ImportError that says what to do where it is missing or does not load."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load("learn2learn")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            "learn2learn is needed here and could not be imported: install it with a C compiler present, "
            "pip install learn2learn==0.2.0 --config-settings='--build-option=build_ext' "
            f"({type(error).__name__}: {error})"
        ) from error
