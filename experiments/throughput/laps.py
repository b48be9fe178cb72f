"""Inference as users do it, raw inputs to predictions, with a learned solver and with classical ones: rows.

A row is a JSON object with a key "row" that says what it tells:
  throughput  one solver at one batch size: samples per second by round, interleaved with the others'; the score of the task,
              evaluations, share solved, share of predictions that are those at the reference; `best`: the classical solver
              that the learned one is held against
  fixed       the same of a compiled `FixedBudget`, with the rates of the same solver in an ordinary solve in these rounds;
              `refused`: why it cannot be had, with no figures
  reference   score at states found to 1e-5 by Broyden's method, else by a classical one of the others; share found
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.bench.measure import solved_to
from experiments.bench.problems import bits_of
from experiments.bench.runner import Row
from experiments.bench.tables import short
from metabroyden.compare import Comparison, SolverResult
from metabroyden.deq import initial_state
from metabroyden.fixed import FixedBudget
from metabroyden.nn.pin import pin
from metabroyden.solution import Solution, State
from metabroyden.solvers import Broyden
from metabroyden.solvers.clock import turns
from metabroyden.state import gather
from metabroyden.zoo.models.criteria import Criterion, Images, NextToken
from metabroyden.zoo.tasks import read_on, text_windows

EXACT = 1e-5
"""What the reference is solved to."""
MOST = 4
"""Times as many rounds as asked for, at most, where they are short."""
_SECONDS = 20.0  # of all solvers' rounds at one batch size, where more rounds than asked for are made
_CHUNK = 64  # samples of the reference solved at once


@dataclass(frozen=True)
class Inputs:
    """Held-out inputs with their answers.

    Attributes:
        given: what a model is called with, batch first: images alone, or tokens and the memory of the segment before.
        answers: classes (N,) or the tokens that follow (N, T).
    """

    given: tuple[Any, ...]
    answers: Tensor

    def __len__(self) -> int:
        return len(self.answers)

    def score(self, logits: Tensor, index: Tensor) -> Tensor:
        """(B,) 1 or 0 for a right or wrong class, or bits per token, of the samples `index`."""
        answers = self.answers[index]
        return (logits.argmax(1) == answers).float() if answers.ndim == 1 else bits_of(logits, answers).mean(1)


def raw_inputs(model: Any, criterion: Criterion, count: int) -> Inputs:
    """What `problems.held_out(model, criterion, "test", count)` is made of; the model itself solves a text's memory."""
    if isinstance(criterion, Images):
        test = criterion.data.test
        return Inputs((test.images[:count],), test.labels[:count])
    assert isinstance(criterion, NextToken)
    windows, answers = text_windows(criterion.data, "test", criterion.length, model.stem.back)
    chosen = torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()
    return Inputs(tuple(read_on(model, windows[chosen], criterion.length)), answers[chosen])


@dataclass(frozen=True)
class _Runs:
    """One model: samples per second by round; of each sample its evaluations (the budget where it failed) and so on."""

    rate: np.ndarray
    nfe: np.ndarray
    solved: np.ndarray
    score: np.ndarray
    agrees: np.ndarray

    def figures(self) -> Row:
        return {
            "samples": len(self.nfe),
            "rate": self.rate.tolist(),
            "score": float(self.score.mean()),
            "evaluations": float(self.nfe.mean()),
            "most": int(self.nfe.max()),
            "solved": float(self.solved.mean()),
            "agrees": None if np.isnan(self.agrees).all() else float(np.nanmean(self.agrees)),
        }


class Throughput:
    """Models of the same weights and other solvers, on the same inputs.

    Args:
        models: by the name of their solver, `learned` among them; all solve to one tolerance with one budget.
        rounds: at least; together they see every input that fills a batch.
        done: called after each batch size.
    """

    def __init__(
        self, models: dict[str, Any], learned: str, inputs: Inputs, rounds: int, done: Callable[[], None] = lambda: None
    ) -> None:
        self.models, self.learned, self.inputs, self.rounds, self.done = models, learned, inputs, rounds, done
        self._settled, self._known = inputs.answers, torch.zeros(len(inputs), dtype=torch.bool)

    def rows(self, batches: Sequence[int], *, compiled: bool = False) -> list[Row]:
        """All rows: the reference, then each batch size; compiled: with the fixed budget too."""
        rows = [self._reference()]
        for batch in batches:
            runs = self._race(self.models, batch)
            contest = self._contest(runs)
            for name, run in runs.items():
                solver = self.models[name].deq.solver
                config = type(solver).__name__ if isinstance(solver, nn.Module) else repr(solver)
                who = {"solver": name, "config": config, "learned": name == self.learned, "best": name == contest.best}
                rows.append({"row": "throughput", "batch": batch, **who, **run.figures()})
            if compiled:
                chosen = {name: contest.results[name] for name in (self.learned, contest.best)}
                rows += self._fixed(batch, {name: int(np.median(one.nfe)) for name, one in chosen.items()})
            self.done()
        return short(rows)

    def _contest(self, runs: dict[str, _Runs]) -> Comparison:
        budget, rtol = self.models[self.learned].deq.max_nfe, self.models[self.learned].deq.rtol
        results = {
            name: SolverResult(self.models[name].deq.solver, budget, run.nfe, run.solved, 1 / run.rate)
            for name, run in runs.items()
        }
        return Comparison(self.learned, results, rtol)

    @torch.no_grad()
    def _reference(self) -> Row:
        model = self.models[self.learned]
        ours = model.deq.solver
        others = [other.deq.solver for name, other in self.models.items() if name != self.learned]
        score, known = torch.zeros(len(self.inputs)), torch.zeros(len(self.inputs), dtype=torch.bool)
        settled = torch.zeros_like(self.inputs.answers)
        with solved_to(model, EXACT):
            for solver in (Broyden(100), *others):
                if known.all():
                    break
                model.deq.solver = solver
                for index in (~known).nonzero().squeeze(1).split(_CHUNK):
                    logits = model(*gather(self.inputs.given, index))
                    score[index], settled[index] = self.inputs.score(logits, index), logits.argmax(-1)
                    known[index] = model.deq.last_solution.converged
        model.deq.solver = ours
        self._settled, self._known = settled, known
        figures = {"score": float(score.mean()), "solved": float(known.float().mean())}
        return {"row": "reference", "samples": len(self.inputs), **figures}

    def _race(self, models: dict[str, Any], batch: int) -> dict[str, _Runs]:
        """Every model in turns; round by round other inputs, of which all models see the same ones."""
        pieces = list(torch.arange(len(self.inputs) // batch * batch).split(batch))
        groups = [pieces[k :: self.rounds] or [pieces[k % len(pieces)]] for k in range(self.rounds)]
        spent = 0.0
        for model in models.values():
            _lap(model, self.inputs, pieces[:1])  # warms up, compiles
            spent += _lap(model, self.inputs, groups[0])[0]
        # whole passes through the groups
        passes = int(min(MOST, max(1, _SECONDS / max(spent, 1e-9) / self.rounds)))
        rates: dict[str, list[float]] = {name: [] for name in models}
        seen: dict[str, dict[int, tuple[float, ...]]] = {name: {} for name in models}
        for number, name in enumerate(turns(list(models), passes * self.rounds)):
            group = groups[number // len(models) % self.rounds]
            seconds, found = _lap(models[name], self.inputs, group)
            rates[name].append(len(group) * batch / seconds)
            for index, (logits, solution) in zip(group, found, strict=True):
                same = (logits.argmax(-1) == self._settled[index]).float().reshape(batch, -1).mean(1)
                nfe = torch.where(solution.converged, solution.nfe, models[name].deq.max_nfe)
                same = same.where(self._known[index], torch.nan)
                columns = (nfe, solution.converged, self.inputs.score(logits, index), same)
                values = zip(*(column.tolist() for column in columns), strict=True)
                seen[name] |= dict(zip(index.tolist(), values, strict=True))
        return {
            name: _Runs(np.array(rates[name]), *np.array([of[key] for key in sorted(of)]).T)
            for name, of in seen.items()
        }

    def _fixed(self, batch: int, budgets: dict[str, int]) -> list[Row]:
        """Compiled solves of as many evaluations as the median sample needs, beside ordinary ones."""
        torch.compiler.reset()  # there is a limit on what may be compiled of one function
        models, rows, fixed = {name: self.models[name] for name in budgets}, [], {}
        for name, budget in budgets.items():
            try:
                model = _with_budget(self.models[name], budget)
            except ValueError as error:
                rows.append({"row": "fixed", "batch": batch, "solver": name, "refused": str(error)})
                continue
            fixed[name], models[f"{name}, fixed"] = model, model
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message="FixedBudget runs uncompiled")
            runs = self._race(models, batch) if fixed else {}
        said = [str(one.message) for one in caught if "runs uncompiled" in str(one.message)]
        for name, model in fixed.items():
            about = {"solver": name, "learned": name == self.learned, "budget": budgets[name]}
            took = {"compile_seconds": model.deq.seconds, "uncompiled": said[0] if said else None}
            beside = {"ordinary": runs[name].rate.tolist(), **took}
            rows.append({"row": "fixed", "batch": batch, **about, **runs[f"{name}, fixed"].figures(), **beside})
        return rows


@torch.no_grad()
def _lap(model: Any, inputs: Inputs, group: Sequence[Tensor]) -> tuple[float, list[tuple[Tensor, Solution]]]:
    """(seconds, (logits, solution) of each batch) of some batches one after another, raw inputs to logits."""
    given = [gather(inputs.given, index) for index in group]
    found = []
    began = time.perf_counter()
    for one in given:
        logits = model(*one)
        found.append((logits, model.deq.last_solution))
    return time.perf_counter() - began, found


class _FixedLayer(nn.Module):
    """A DEQ's equilibria by `FixedBudget`."""

    def __init__(self, deq: Any, budget: int) -> None:
        super().__init__()
        self.cell, self.max_nfe = deq.cell, budget
        self.last_solution: Solution | None = None
        self._runs: FixedBudget | None = None
        self._make = lambda f: FixedBudget(f, deq.solver, max_nfe=budget, rtol=deq.rtol)
        self._make(deq.cell)  # says so where it cannot be

    @property
    def seconds(self) -> float:
        """Taken by compiling."""
        return 0.0 if self._runs is None else self._runs.compile_seconds

    def forward(self, x: Any) -> State:
        """The best of the iterates."""
        z0 = initial_state(self.cell, x)
        if self._runs is None:  # computed weights stay what they are
            self._runs = self._make(pin(self.cell, x, z0)[0])
        self.last_solution = self._runs(z0, x)
        return self.last_solution.z


def _with_budget(model: Any, budget: int) -> Any:
    """A copy of a model whose DEQ has a fixed budget."""
    twin = copy.deepcopy(model)
    twin.deq = _FixedLayer(model.deq, budget)
    return twin
