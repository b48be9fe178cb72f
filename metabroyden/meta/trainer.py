"""The outer loop: trains a learned solver on a task set by backpropagation through unrolled solves."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metabroyden import checkpoint
from metabroyden.learned.fingerprint import module_of
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.schedule import Clock, learning_rate, reason_to_stop, share
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.unroll import unroll
from metabroyden.solve import solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import Packing, gather

Progress = Callable[[int, str], None]
"""Called with the step reached and a few words."""


class MetaTrainer:
    """Trains `solver` on `tasks`; with a checkpoint path, an interrupted run goes on bit for bit where it stopped.

    Args:
        solver: a `LearnedSolver`; trained in place, left with the weights that did best on validation.
        tasks: the fixed-point problems; the test split is never touched.
        config: see `MetaConfig`.
        checkpoint: file for the training state (written every `save_every` steps), or None.

    Attributes:
        history: a dict for each look at validation: step, loss, score, and seconds and cpu_seconds until then (looks at
            validation and earlier sittings included).
        stopped: why it stopped, a key of `schedule.STOPS`; None while it has not.
    """

    def __init__(
        self,
        solver: Any,
        tasks: TaskSet,
        config: MetaConfig | None = None,
        *,
        checkpoint: str | Path | None = None,
        save_every: int = 50,
    ) -> None:
        self.solver, self.tasks, self.config = solver, tasks, MetaConfig() if config is None else config
        self.path = None if checkpoint is None else Path(checkpoint)
        self.save_every = save_every
        self.step, self.skipped = 0, 0
        self.clock = Clock()
        self.stopped: str | None = None
        self.history: list[dict[str, float]] = []
        self.best_score = math.inf
        self.best = copy.deepcopy(solver.state_dict())
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.optimizer = torch.optim.Adam(solver.parameters(), lr=self.config.learning_rate)
        if self.path is not None and self.path.exists():
            self._resume(self.path)

    def run(self, progress: Progress | None = None, until: int | None = None) -> Any:
        """Train to the end (or to step `until`) and return the solver, in evaluation mode once at the end."""
        last = self.config.steps if until is None else min(until, self.config.steps)
        self.solver.requires_grad_(True).train()
        self.clock.start()
        with frozen(self.tasks.f):
            if self.step == 0 and not self.history:
                self._validate(math.nan)
            while self.stopped is None and self.step < last:
                with torch.enable_grad():
                    loss = self._update()
                self.step += 1
                reason = reason_to_stop(self.config, self.step, self.clock, self.history)
                if self.step % self.config.validate_every == 0 or reason is not None:
                    self._validate(loss)
                    reason = reason or reason_to_stop(self.config, self.step, self.clock, self.history)
                self.stopped = reason
                if self.step % self.save_every == 0 or self.step == last or reason is not None:
                    self._save()
                if progress is not None:
                    progress(self.step, f"loss {loss:.3f}, validation {self.best_score:.1f} evaluations")
        self.clock.stop()
        if self.stopped is not None:
            self._finish()
        return self.solver

    def _update(self) -> float:
        """One outer step; a loss or gradient that is not finite is skipped and counted."""
        config = self.config
        z0, x = self.tasks.draw(config.batch, self.generator)
        done = share(config, self.step, self.clock)
        loss, finite = differentiate(self.solver, self.tasks.f, z0, x, config, config.backend, done)
        if not finite:
            self.skipped += 1
            return math.nan
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, done)
        self.optimizer.step()
        return float(loss)

    def _validate(self, loss: float) -> None:
        score = self._score()
        seconds, cpu_seconds = (round(value, 3) for value in self.clock.read())
        self.history.append(
            {"step": self.step, "loss": loss, "score": score, "seconds": seconds, "cpu_seconds": cpu_seconds}
        )
        if score < self.best_score:
            self.best_score = score
            self.best = copy.deepcopy(self.solver.state_dict())

    def _score(self) -> float:
        config = self.config
        return mean_evaluations(
            self.solver,
            self.tasks,
            limit=config.validation_size,
            rtol=config.validation_rtol,
            max_nfe=config.validation_nfe,
        )

    def _finish(self) -> None:
        self.solver.load_state_dict(self.best)
        self.solver.eval().requires_grad_(False)
        self.solver.summary = {
            "meta_training": _jsonable(asdict(self.config)),
            "steps": self.step,
            "stopped": self.stopped,
            "seconds": round(self.clock.read()[0], 1),
            "cpu_seconds": round(self.clock.read()[1], 1),
            "skipped_steps": self.skipped,
            "validation": [{key: _jsonable(value) for key, value in entry.items()} for entry in self.history],
        }

    def _save(self) -> None:
        if self.path is None:
            return
        tensors = checkpoint.training_tensors(self.solver, self.optimizer, self.generator)
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        header = {
            "config": _jsonable(asdict(self.config)),
            "solver": _jsonable(self.solver.describe()["config"]),
            "step": self.step,
            "seconds": self.clock.read(),
            "skipped": self.skipped,
            "stopped": self.stopped,
            "best_score": repr(self.best_score),
            "history": [{key: repr(value) for key, value in entry.items()} for entry in self.history],
        }
        checkpoint.write(self.path, "training/meta", tensors, header)

    def _resume(self, path: Path) -> None:
        tensors, header = checkpoint.read(path, "training")
        for name, wanted in (("config", asdict(self.config)), ("solver", self.solver.describe()["config"])):
            if header.get(name) != _jsonable(wanted):
                raise checkpoint.CheckpointError(
                    f"{path} was written by another meta-training: its {name} is {header.get(name)}, wanted "
                    f"{_jsonable(wanted)}; move it away to start anew"
                )
        checkpoint.restore_training(tensors, self.solver, self.optimizer, self.generator, path)
        self.best = checkpoint.under(tensors, "best.")
        self.step, self.skipped, self.stopped = header["step"], header["skipped"], header["stopped"]
        self.clock = Clock(*header["seconds"])
        self.best_score = float(header["best_score"])
        self.history = [{key: _number(value) for key, value in entry.items()} for entry in header["history"]]


def mean_evaluations(
    solver: Any, tasks: TaskSet, *, split: str = "validation", limit: int = 256, rtol: float = 1e-3, max_nfe: int = 60
) -> float:
    """Mean evaluations to rtol over (at most `limit`) problems of a split, a failure counting twice the budget."""
    raw = tasks.split(split)
    z0, x = tasks.problems(split)
    z0, x = gather((z0, x), torch.arange(min(limit, len(raw)), device=raw.device))
    solution = solve(tasks.f, z0, x, solver=solver, rtol=rtol, max_nfe=max_nfe, throw=False)
    cost = np.where(solution.converged.cpu().numpy(), solution.nfe.numpy(), 2 * max_nfe)
    return float(cost.mean())


def equilibria(f: Any, z0: Any, context: Any, *, rtol: float = 1e-4, max_nfe: int = 100) -> Tensor:
    """(B, n): where Broyden's method ends, for objectives that need z*; what did not converge is the best it saw."""
    found = solve(f, z0, context, solver=Broyden(memory=max_nfe), rtol=rtol, max_nfe=max_nfe, throw=False)
    return Packing.of(found.z).pack(found.z)


def differentiate(
    solver: Any, f: Any, z0: Any, context: Any, config: Any, backend: str, done: float = 0.0
) -> tuple[Tensor, bool]:
    """Unroll a solver and leave the clipped gradient of its objective in its parameters; (loss, whether that is finite).

    `config` has the objective, the steps (`unroll`) and the norm to clip at (`clip`); done in [0, 1) is how far the
    training has got.
    """
    objective = config.objective
    star = equilibria(f, z0, context) if objective.needs_star else None
    begin, losses = None, []
    parameters = list(solver.parameters())
    for parameter in parameters:
        parameter.grad = None
    for _ in range(getattr(config, "segments", 1)):
        rollout = unroll(solver, f, z0, context, steps=config.unroll, backend=backend, begin=begin)
        loss = objective.loss(rollout, star, done)
        # not loss.backward(): whatever else f closes over must not collect gradients
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        losses.append(loss.detach())
        begin = rollout.carry()
    return torch.stack(losses).mean(), bool(torch.isfinite(nn.utils.clip_grad_norm_(parameters, config.clip)))


class frozen:
    """While it lasts, the parameters of f (where it is a module) do not require gradients."""

    def __init__(self, f: Any) -> None:
        module = module_of(f)
        self.parameters = [] if module is None else [p for p in module.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)


def _jsonable(value: Any) -> Any:
    """What JSON gives back for this value; a NaN becomes None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return json.loads(json.dumps(value))


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() and "." not in text else value
