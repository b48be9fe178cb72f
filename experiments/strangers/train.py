"""Training of the strangers, each in under two minutes on one thread, and the files of what came out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

import metabroyden as mb
from experiments.bench.descent import descend
from experiments.bench.runner import Row, threads
from experiments.strangers.data import load_data
from experiments.strangers.generated import IGNORED, Data
from experiments.strangers.model import Model, build, start
from experiments.strangers.suite import Spec
from metabroyden import checkpoint

BATCH = 64
MODELS = Path("results/strangers/models")
FACTS_AT, FACTS_NFE, FACTS_ON = 1e-3, 100, 128
"""Tolerance, budget and test samples of what a file says of the classical solvers on its model."""


def path_of(name: str, folder: Path = MODELS) -> Path:
    """The file of a trained stranger."""
    return folder / f"{name}.safetensors"


def train_missing(specs: Iterable[Spec], folder: Path = MODELS) -> None:
    """Train those whose files are not there."""
    for spec in specs:
        path = path_of(spec.name, folder)
        if not path.exists():
            with threads(1):
                model, facts = trained(spec, load_data(spec.data))
            checkpoint.write(path, f"stranger/{spec.cell}", model.state_dict(), {"facts": facts})
            print(spec.name, facts, flush=True)


def trained(spec: Spec, data: Data) -> tuple[Model, Row]:
    """A model trained by implicit gradients, in evaluation mode, and the facts about it."""
    model, began = build(spec, data).train(), time.perf_counter()
    generator = torch.Generator().manual_seed(spec.seed)

    def loss_of(step: int) -> Tensor:
        index = torch.randint(len(data.train_targets), (BATCH,), generator=generator)
        return _loss(model, take(data.train, index), data.train_targets[index], spec.penalty, generator)

    descend(model.parameters(), spec.steps, spec.rate, loss_of)
    seconds = round(time.perf_counter() - began, 1)
    model.eval().requires_grad_(False)
    return model, {"training_seconds": seconds, **_score(model, data), **_cost(model, data)}


def take(inputs: Any, index: Any) -> Any:
    """These samples of a pytree."""
    return pytree.tree_map(lambda part: part[index], inputs)


def _loss(model: Model, inputs: Any, targets: Tensor, penalty: float, generator: torch.Generator) -> Tensor:
    x = model.inject(inputs)
    loss = _error(model.of(x), targets)
    if penalty and model.deq.last_solution is not None:
        loss = loss + penalty * mb.jacobian_penalty(model.deq.cell, model.deq.last_solution.z, x, generator=generator)
    return loss


def _error(outputs: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return 10 * functional.mse_loss(outputs, targets)
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def _score(model: Model, data: Data) -> Row:
    """What the task says on test samples: accuracy, or the share of the variance that is explained."""
    outputs, targets = model(data.test), data.test_targets
    if targets.is_floating_point():
        left = functional.mse_loss(outputs, targets) / targets.var()
        return {"score": round(1 - float(left), 4), "measure": "explained variance"}
    counted = targets != IGNORED
    hits = outputs.argmax(dim=-1)[counted] == targets[counted]
    return {"score": round(float(hits.float().mean()), 4), "measure": "accuracy"}


@torch.no_grad()
def _cost(model: Model, data: Data) -> Row:
    """What three classical solvers need: mean and 90th percentile of evaluations, a failure as the budget, share solved."""
    f, x = model.deq.cell, model.inject(take(data.test, slice(FACTS_ON)))
    z0 = start(f, x)
    if z0 is None:
        z0 = f.initial_state(x) if hasattr(f, "initial_state") else torch.zeros_like(x)
    found: Row = {}
    for solver in (mb.Picard(), mb.Anderson(), mb.Broyden()):
        solution = mb.solve(f, z0, x, solver=solver, rtol=FACTS_AT, max_nfe=FACTS_NFE, throw=False)
        spent = torch.where(solution.converged, solution.nfe, FACTS_NFE).double()
        found[type(solver).__name__] = {
            "mean": round(float(spent.mean()), 2), "p90": round(float(spent.quantile(0.9)), 1),
            "solved": round(float(solution.converged.double().mean()), 4),
        }  # fmt: skip
    return found
