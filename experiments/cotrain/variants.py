"""Ways of training a trained model further: with its solver, as it was trained, and with a penalty on its Jacobian."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from experiments.bench.problems import Family, held_out
from metabroyden import Broyden
from metabroyden.meta import TaskSet
from metabroyden.meta.calibrate import calibrate
from metabroyden.meta.cotrainer import CoTrainConfig
from metabroyden.meta.finetune import CLIP, Look, fine_tune, habits, learning_share, untrained
from metabroyden.meta.fit import as_it_is
from metabroyden.meta.judging import Judged, Standard
from metabroyden.meta.plan import measure_classical, plan
from metabroyden.meta.target import Target
from metabroyden.meta.trainer import MetaTrainer
from metabroyden.nn.jacobian import jacobian_penalty
from metabroyden.solve import solve
from metabroyden.zoo.models.families import get_family
from metabroyden.zoo.tasks import family_tasks

ORIGINAL, CO_TRAINED, CONTINUED, PENALISED = "original", "co-trained", "continued", "Jacobian penalty"
"""What is done to a model: nothing; fine-tuned by `fine_tune`; trained on as it was; the same with a Jacobian penalty."""
RTOL, BUDGET, HELD, TEXTS = 1e-3, 60, 2048, 256
"""Of solves at which scores are taken; images and texts of a look at validation, at most."""
MOVED = {False: 1024, True: 32}
"""Images and texts whose outputs are compared with the original's."""
POOL = 1024
"""Texts whose contexts are made beforehand for the fit of a solver."""


class Amount(NamedTuple):
    """How a family is trained on: `steps` take about 15% of the time that its training took; `rate` is Adam's peak.

    `tolerance` is what the score may lose on validation; None: a standard error of the difference.
    """

    steps: int
    rate: float = 5e-4
    tolerance: float | None = None


FAMILIES = {
    "conv-digits": Amount(170),
    "conv-fashion": Amount(400),
    "multiscale-fashion": Amount(420),
    "trellisnet-words": Amount(75, tolerance=0.005),
    "transformer-shakespeare": Amount(180, 2e-4, tolerance=0.005),
}
"""By name."""


@dataclass(frozen=True)
class Variant:
    """One way and its seed.

    Attributes:
        way: what is done.
        seed: of batches, weights of the solver, and draws.
        steps: of training.
        weight: of the residuals, held fast, or of the Jacobian penalty; None: as `cotrain` adapts it, or none.
    """

    way: str
    seed: int
    steps: int
    weight: float | None = None

    @property
    def key(self) -> str:
        """Its name as that of a file."""
        weight = "" if self.weight is None else f"-{self.weight:g}"
        return f"{self.way.replace(' ', '-')}{weight}-seed{self.seed}"


class Trained(NamedTuple):
    """A model in evaluation mode, its solver (None for those trained without), seconds of training, looks at validation.

    refused: whether no look would do, so that the model is the original.
    """

    model: Any
    solver: Any
    seconds: float
    fit_seconds: float
    looks: tuple[Look, ...]
    refused: bool = False


def load(family: Family) -> Any:
    """The trained model, as its family trains it."""
    known = get_family(family.name)
    options = {"solver": known.solver, "backward": known.backward, "rtol": known.rtol, "max_nfe": known.max_nfe}
    return family.model(**options)


def trained(family: Family, variant: Variant) -> Trained:
    """The model of a variant."""
    model = load(family)
    if variant.way == ORIGINAL:
        return Trained(model, None, 0.0, 0.0, ())
    losses, optimizer = _losses(family, model, variant.seed), _optimizer(family)
    if variant.way != CO_TRAINED:
        seconds = continued(model, losses, optimizer, variant, FAMILIES[family.name].rate)
        return Trained(model.eval().requires_grad_(False), None, seconds, 0.0, ())
    held = TEXTS if family.texts else HELD
    first = held_out(model, family.criterion, "validation", 32, None)
    solver = untrained(Target(first.f), first.x, start=first.z0, seed=variant.seed)
    config = CoTrainConfig(**habits(variant.steps))
    standard: Standard | None = None
    if variant.weight is None:
        standard = Standard(_before(family, held), FAMILIES[family.name].tolerance)
    else:
        config = replace(config, residual_weight=variant.weight)
    looks, best, seconds = fine_tune(
        model, solver, losses, partial(judged, family, held), standard, steps=variant.steps, config=config,
        learning_rate=FAMILIES[family.name].rate, optimizer=optimizer, seed=variant.seed,
    )  # fmt: skip
    if best is None:  # as `cotrain` does: the original, and a solver for it
        model, solver = load(family), untrained(Target(first.f), first.x, start=first.z0, seed=variant.seed)
    began = time.perf_counter()
    solver = refitted(family, model, solver, variant.seed)
    return Trained(model, solver, seconds, time.perf_counter() - began, tuple(looks), refused=best is None)


def continued(model: Any, losses: Iterator[Tensor], optimizer: Any, variant: Variant, rate: float) -> float:
    """Train on as the family does, with a penalty on the Jacobian at equilibria where the variant has one; seconds."""
    found: list[Any] = []
    model.requires_grad_(True).train()
    model.deq.hooks.append(lambda f, x, z: found.append((f, x, z)))
    stepper, generator = optimizer(model.parameters(), lr=rate), torch.Generator().manual_seed(variant.seed)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(variant.seed)
        for step in range(1, variant.steps + 1):
            for group in stepper.param_groups:
                group["lr"] = rate * learning_share(step, variant.steps)
            loss = next(losses)
            if variant.weight is not None:
                f, x, z = found[-1]
                held = pytree.tree_map(Tensor.detach, z)
                loss = loss + variant.weight * jacobian_penalty(f, held, x, generator=generator)
            found.clear()
            stepper.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            stepper.step()
    model.deq.hooks.clear()
    return time.perf_counter() - began


@cache
def _before(family: Family, most: int) -> Judged:
    """The original on validation."""
    return judged(family, most, load(family), Broyden(BUDGET))


@torch.no_grad()
def judged(family: Family, most: int, model: Any, solver: Any, *, split: str = "validation") -> Judged:
    """What a model does on samples of a split, with a solver."""
    was = model.training
    held: Any = held_out(model.eval(), family.criterion, split, most, None)
    scores, outputs, spent, left = [], [], [], MOVED[family.texts]
    for index in torch.arange(len(held)).split(256):
        found = solve(*held.problem(index), solver=solver, rtol=RTOL, max_nfe=BUDGET, throw=False)
        scores.append(held.judge(found.z, index))
        spent.append(torch.where(found.converged, found.nfe, 2 * BUDGET).double())
        if left > 0:
            logits = model.classify(pytree.tree_map(lambda part: part[:left], found.z))  # noqa: B023 (called at once)
            outputs.append(logits.float().log_softmax(dim=-1))
            left -= len(logits)
    model.train(was)
    kept = torch.cat(scores)
    return Judged(-kept if family.texts else kept, float(torch.cat(spent).mean()), torch.cat(outputs))


def refitted(family: Family, model: Any, solver: Any, seed: int) -> Any:
    """The solver, trained further on the model as `fit_solver` does."""
    tasks = _tasks(family, model, seed)
    classical = measure_classical(tasks, rtol=RTOL, max_nfe=BUDGET)
    training = {"seed": seed, "validation_rtol": RTOL, "validation_nfe": BUDGET, "patience": 4}
    made = plan(tasks, classical, training=training, **as_it_is(solver)).shortened()
    if made.training.anchor:
        tasks.equilibria = classical.equilibria(tasks)
    learned = MetaTrainer(made.adopt(solver, tasks.problems("validation")[0]), tasks, made.training).run()
    calibrate(learned, tasks, rtol=RTOL, max_nfe=BUDGET, most=128)
    return learned


def _tasks(family: Family, model: Any, seed: int) -> TaskSet:
    tasks = family_tasks(model, family.criterion)
    return tasks.prepared(POOL, torch.Generator().manual_seed(seed), 128) if family.texts else tasks


def _losses(family: Family, model: Any, seed: int) -> Iterator[Tensor]:
    """Task losses without end, in the family's batches."""
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        yield from family.criterion.losses(model, get_family(family.name).training.batch, generator)


def _optimizer(family: Family) -> Any:
    training = get_family(family.name).training
    return partial(torch.optim.AdamW, betas=(0.9, training.beta2), weight_decay=training.weight_decay)
