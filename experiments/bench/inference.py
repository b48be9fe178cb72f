"""Whole models as users run them: raw inputs to predictions, in turns, and what is predicted."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import metabroyden as mb
from experiments.bench.measure import solved_to
from experiments.bench.problems import bits_of
from experiments.bench.runner import Row
from metabroyden.comparison.clock import turns
from metabroyden.comparison.tables import short
from metabroyden.deq import initial_state
from metabroyden.nn.pin import pin
from metabroyden.state import gather
from metabroyden.zoo.models.criteria import Images
from metabroyden.zoo.tasks import read_on, text_windows

EXACT, MOST, SECONDS = 1e-5, 4, 20.0
"""What the reference is solved to; more rounds than asked for, up to so many times, while they take less than so long."""


class Inputs(NamedTuple):
    """Held-out inputs, batch first: images alone, or tokens and the memory of the segment before."""

    given: tuple[Any, ...]
    answers: Tensor
    reference: Tensor  # what is predicted at the reference; -1 where that was not found

    def score(self, logits: Tensor, index: Tensor) -> Tensor:
        """(B,) 1 or 0 for a right or wrong class, or bits per token, of the samples `index`."""
        answers = self.answers[index]
        return (logits.argmax(1) == answers).float() if answers.ndim == 1 else bits_of(logits, answers).mean(1)


def raw_inputs(model: Any, criterion: Any, count: int) -> Inputs:
    """What `problems.held_out(model, criterion, "test", count)` is made of; the model itself solves a text's memory."""
    if isinstance(criterion, Images):
        images, labels = criterion.data.test.images[:count], criterion.data.test.labels[:count]
        return Inputs((images,), labels, torch.full_like(labels, -1))
    windows, answers = text_windows(criterion.data, "test", criterion.length, model.stem.back)
    chosen = torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()
    answers, given = answers[chosen], read_on(model, windows[chosen], criterion.length)
    return Inputs(tuple(given), answers, torch.full_like(answers, -1))


@torch.no_grad()
def find_reference(model: Any, inputs: Inputs, solvers: Iterable[Any]) -> Row:
    """Note what is predicted at states found to 1e-5 by one of the solvers; the row of these."""
    usual, score, known = model.deq.solver, torch.zeros(len(inputs.answers)), torch.zeros(len(inputs.answers)) > 0
    with solved_to(model, EXACT):
        for model.deq.solver in solvers:
            todo = (~known).nonzero().squeeze(1)
            for index in todo.split(64) if len(todo) else ():
                logits, converged = model(*gather(inputs.given, index)), model.deq.last_solution.converged
                score[index], known[index] = inputs.score(logits, index), converged
                inputs.reference[index[converged]] = logits.argmax(-1)[converged]
    model.deq.solver = usual
    shares = {"score": float(score.mean()), "solved": float(known.float().mean())}
    return {"row": "reference", "samples": len(score), **short(shares)}


Laps = tuple[np.ndarray, np.ndarray]
"""Of one model, samples per second by round; (4, N) evaluations (the budget where it failed), success, score, and share of
predictions that are the reference's (NaN where that is not known)."""


def race(models: dict[str, Any], inputs: Inputs, batch: int, rounds: int) -> dict[str, Laps]:
    """Every model in turns; round by round other inputs, of which all see the same, and together all that fill a batch."""
    count = len(inputs.answers) // batch * batch
    pieces = list(torch.arange(count).split(batch))
    groups = [pieces[k::rounds] or [pieces[k % len(pieces)]] for k in range(rounds)]
    for model in models.values():
        lap(model, inputs, pieces[:1])  # warms up
    spent = sum(lap(model, inputs, groups[0])[0] for model in models.values())
    passes = int(min(MOST, max(1, SECONDS / max(spent, 1e-9) / rounds)))  # whole ones through the groups
    rates: dict[str, list[float]] = {name: [] for name in models}
    seen = {name: torch.zeros(4, count, dtype=torch.double) for name in models}
    for number, name in enumerate(turns(list(models), passes * rounds)):
        group = groups[number // len(models) % rounds]
        seconds, found = lap(models[name], inputs, group)
        rates[name].append(len(group) * batch / seconds)
        for index, (logits, solution) in zip(group, found, strict=True):
            nfe = torch.where(solution.converged, solution.nfe, models[name].deq.max_nfe)
            wanted = inputs.reference[index].reshape(batch, -1)
            same = (logits.argmax(-1).reshape(batch, -1) == wanted).float().mean(1).where(wanted[:, 0] >= 0, torch.nan)
            columns = (nfe, solution.converged, inputs.score(logits, index), same)
            seen[name][:, index] = torch.stack([column.double() for column in columns])
    return {name: (np.array(rates[name]), seen[name].numpy()) for name in models}


@torch.no_grad()
def lap(model: Any, inputs: Inputs, group: Sequence[Tensor]) -> tuple[float, list[tuple[Tensor, Any]]]:
    """(seconds, (logits, solution) of each batch) of some batches one after another, raw inputs to logits."""
    given = [gather(inputs.given, index) for index in group]
    began = time.perf_counter()
    found = [(model(*one), model.deq.last_solution) for one in given]
    return time.perf_counter() - began, found


def summary(laps: Laps) -> Row:
    """Samples per second by round, and the means over samples of all else, for a row."""
    rate, (evaluations, solved, score, agrees) = laps
    means = {"score": float(score.mean()), "evaluations": float(evaluations.mean()), "most": int(evaluations.max())}
    same = None if np.isnan(agrees).all() else float(np.nanmean(agrees))
    found = {"rate": rate.tolist(), **means, "solved": float(solved.mean()), "agrees": same}
    return {"samples": len(score), **short(found)}


def compiled_to(model: Any, budget: int, inputs: Inputs, batch: int) -> Any:
    """The model with solves of a fixed budget, compiled for a batch; ValueError or UserWarning where it cannot be had."""
    twin = copy.deepcopy(model)
    twin.deq = _FixedLayer(model.deq, budget)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FixedBudget runs uncompiled")
        lap(twin, inputs, [torch.arange(batch)])
    return twin


class _FixedLayer(nn.Module):
    """A DEQ's equilibria by `FixedBudget`; ValueError where it cannot be had."""

    def __init__(self, deq: Any, budget: int) -> None:
        super().__init__()
        self.cell, self.max_nfe, self.pinned, self.last_solution = deq.cell, budget, False, deq.last_solution
        self.made = lambda f: mb.FixedBudget(f, deq.solver, max_nfe=budget, rtol=deq.rtol)
        self.runs = self.made(deq.cell)

    def forward(self, x: Any) -> Any:
        """The best of the iterates."""
        z0 = initial_state(self.cell, x)
        if not self.pinned:  # computed weights stay what they are
            self.runs, self.pinned = self.made(pin(self.cell, x, z0)[0]), True
        self.last_solution = self.runs(z0, x)
        return self.last_solution.z
