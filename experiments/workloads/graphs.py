"""Implicit graph networks: chains of up to 200 nodes, random trees, a karate club."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import metabroyden as mb
from experiments.bench.descent import descend
from experiments.bench.runner import Row
from experiments.workloads.brought import Brought
from metabroyden.zoo.data.graphs import NodeTask, chains, karate, renumbered, trees
from metabroyden.zoo.models.graph import GraphClassifier

TRAIN, TEST, ORDER = 1, 2, 3
"""Seeds of contexts to fit to, of those to measure on, of their other order."""
CONTEXTS = 600
BATCH = 32


@dataclass(frozen=True)
class Task:
    """One kind of graphs, its model and its training.

    Attributes:
        words: what it is.
        draw: (count, seed, held) ↦ graphs; seeds from 1,000 are of training, held is of what training has not seen.
        classes: of nodes.
        bound: of the cell, see `GraphCell`.
        steps: of training.
        rate: of Adam.
        growth: (count, seed, share of the training) ↦ graphs of training; None: as `draw`.
    """

    words: str
    draw: Callable[[int, int, bool], NodeTask]
    classes: int
    bound: float
    steps: int
    rate: float = 5e-3
    growth: Callable[[int, int, float], NodeTask] | None = None

    def build(self) -> GraphClassifier:
        """The untrained model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return GraphClassifier(self.classes, self.classes, bound=self.bound, rtol=1e-3, max_nfe=200, warn=False)

    def train(self, model: GraphClassifier) -> Row:
        """Train it by implicit gradients, solved by Picard's iteration where news goes one way, else by Anderson's."""
        began, grown = time.perf_counter(), self.growth
        solver: Any = mb.Anderson() if grown is None else mb.Picard()
        model.deq.solver, model.deq.backward_mode = solver, mb.Implicit(solver=solver, rtol=1e-3, max_nfe=200)

        def loss_of(step: int) -> Tensor:
            seed = 1000 + step
            task = self.draw(BATCH, seed, False) if grown is None else grown(BATCH, seed, step / self.steps)
            return functional.cross_entropy(model(task.x, task.edge_index, task.batch), task.y)

        loss = descend(model.parameters(), self.steps, self.rate, loss_of)
        return {"seconds": round(time.perf_counter() - began), "steps": self.steps, "loss": round(loss, 4)}

    @torch.no_grad()
    def bring(self, model: GraphClassifier, samples: int) -> Brought:
        """The cell with contexts of the stem."""
        test = self.draw(samples, TEST, True)
        contexts = [model.inject(*task) for task in (self.draw(CONTEXTS, TRAIN, False), test, renumbered(test, ORDER))]
        x_train, x_test, again = contexts

        def accuracy(z: Tensor, x: mb.Graphs) -> Tensor:
            right = (model.head(z).argmax(2) == x.y) & x.mask
            return right.sum(1) / x.mask.sum(1)

        return Brought(model.deq.cell, x_train, x_test, accuracy, (mb.Picard(), 2000), 0.005, again)


def _longer(count: int, seed: int, share: float) -> NodeTask:
    low, high = 30, 200
    return chains(count, seed, lengths=(20, round(low + (high - low) * min(1.0, 1.5 * share))))


TASKS = {
    "chains": Task(
        "directed chains of 20 to 200 nodes, numbered at random, whose first node alone knows the class; tested on lengths "
        "that were not trained on", lambda count, seed, held: chains(count, seed, held=held), 4, 1.0, 800, 3e-3, _longer,
    ),
    "trees": Task(
        "random trees of 20 to 100 nodes, edges both ways, where one node in twenty knows the class of all",
        lambda count, seed, held: trees(count, seed), 4, 0.99, 200,
    ),
    "karate": Task(
        "Zachary's karate club, of whose 34 members from two to eight are known; one graph",
        lambda count, seed, held: karate(count, seed), 2, 0.99, 200,
    ),
}  # fmt: skip
"""By kind."""
