"""The outer loop: trains a learned solver by gradients of unrolled solves, on one DEQ or on many."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from metabroyden import checkpoint, resume
from metabroyden.described import check, damaged
from metabroyden.meta import distributed
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.estimators import ESTIMATORS, MixedDraws, TaskDraws
from metabroyden.meta.orthogonal import OrthogonalAdam, make_optimizer
from metabroyden.meta.schedule import STOPS, Clock, StepGuard, cosine, reason_to_stop, share
from metabroyden.meta.tasks import Source, TaskSet
from metabroyden.progress import Curves, Progress
from metabroyden.solve import solve
from metabroyden.state import gather


class TrainingStep(NamedTuple):
    """What a callback is told after an outer step."""

    step: int
    """Outer steps made."""
    steps: int
    """Outer steps at most."""
    loss: float
    """Training loss of this step; NaN or infinite where it was skipped."""
    evaluations: float
    """Mean evaluations on validation at the last look, a failure counting twice the budget."""
    best: float
    """The lowest of these so far: that of the weights that are kept."""
    seconds: float
    """Wall-clock time since the training began, looks at validation and earlier sittings included."""
    skipped: int
    """Outer steps that were not taken, as their loss or gradient was not finite."""


Callback = Callable[[TrainingStep], Any]
"""Called after each outer step; the training ends where it returns True."""


@dataclass(frozen=True)
class _Record:
    """What the header of a checkpoint says of the run so far."""

    step: int
    seconds: tuple[float, float]
    incidents: StepGuard
    stopped: str | None
    best_score: str
    history: list[dict[str, str]]


class Trainer:
    """The outer loop over an estimator of gradients, with looks at validation and a checkpoint.

    With a checkpoint path, an interrupted run goes on bit for bit where it stopped; not with a time budget, as the schedule
    then follows the clock. In several processes (see `metabroyden.meta.distributed`) each takes its share of the batch; the
    first alone looks at validation, at the clock and writes, and the checkpoint must be where all can read it.

    Args:
        solver: a `LearnedSolver`; trained in place, left with the weights that did best on validation.
        config: see `MetaConfig`.
        make_estimator: called when the training begins or goes back to its best weights; makes what leaves the clipped
            gradient of an outer step in the module's parameters, such as `BackpropEstimator`.
        validation: task sets whose validation split is looked at; the score is the geometric mean over them.
        problems: task sets, default those of validation; a checkpoint of others is refused.
        module: what is trained; default the solver.
        generator: what a checkpoint keeps of the draws.
        optimizer: of all of the module's parameters; default as the config says.
        checkpoint: file for the training state (written every `save_every` steps), or None.

    Attributes:
        history: a dict for each look at validation: step, loss, score, and seconds and cpu_seconds until then (looks at
            validation and earlier sittings included).
        best_score: the lowest score so far, mean evaluations on validation; a failure counts as twice the budget
            (`validation_nfe`), so that it may be larger than the budget.
        incidents: what went wrong.
        stopped: why it stopped, a key of `schedule.STOPS`; None while it has not.
        curves: called with loss, gradient norm, learning rates and skips of each step and the scores, if set.
        callback: called after each step, if set, in the first process; training ends where it returns True.
        reserve: seconds of the time budget, where there is one, that are for other work than training.
    """

    def __init__(
        self,
        solver: Any,
        config: MetaConfig,
        make_estimator: Callable[[], Any],
        *,
        validation: Sequence[TaskSet] = (),
        problems: Sequence[TaskSet] = (),
        module: nn.Module | None = None,
        generator: torch.Generator | None = None,
        optimizer: OrthogonalAdam | None = None,
        checkpoint: str | Path | None = None,
        save_every: int = 50,
    ) -> None:
        self.solver, self.config, self.validation = solver, config, list(validation)
        self.module: Any = solver if module is None else module
        self.path = None if checkpoint is None else Path(checkpoint)
        self.save_every, self._unsaved = save_every, False
        self._make_estimator, self._generator = make_estimator, generator
        of_these = () if checkpoint is None else problems or validation
        self._identity = " ".join(tasks.identity() for tasks in of_these)
        self.step = 0
        self.clock, self.incidents = Clock(), StepGuard()
        self.stopped: str | None = None
        self.history: list[dict[str, float]] = []
        self.best_score, self.best = math.inf, copy.deepcopy(self.module.state_dict())
        rates = config.learning_rate, config.orthogonal_rate
        self.optimizer = make_optimizer(self.module, *rates) if optimizer is None else optimizer
        self.curves: Curves | None = None
        self.callback: Callback | None = None
        self.reserve = 0.0
        self._estimator: Any = None
        if self.path is not None and self.path.exists():
            self._resume(self.path)
        distributed.agree("the outer step to begin with", self.step)

    @property
    def skipped(self) -> int:
        """Outer steps that were not taken."""
        return self.incidents.count

    @property
    def estimator(self) -> Any:
        """What makes the gradients."""
        if self._estimator is None:
            self._estimator = self._make_estimator()
        return self._estimator

    def run(self, progress: Progress | None = None, until: int | None = None) -> Any:
        """Train to the end (or to step `until`) and return the solver, in evaluation mode once at the end.

        It prints nothing. This shows a bar, where rich is installed::

            with metabroyden.progress.progress_bar("meta-training", trainer.config.steps) as bar:
                solver = trainer.run(bar)

        Args:
            progress: called after each step with the steps made (or their share of the time, in steps) and a few words on
                loss and validation; None: nobody is told.
            until: a step to stop at, from which a later call goes on; None: the end.
        """
        config = self.config
        last = config.steps if until is None else min(until, config.steps)
        self.module.requires_grad_(True).train()
        self.clock.start()
        if self.step == 0 and not self.history:
            self._validate(math.nan)
        while self.stopped is None and self.step < last:
            loss = self._update()
            self.step += 1
            self._look(loss)
            if self.stopped is not None:
                self.clock.stop()
            self._save(due=self.step % self.save_every == 0 or self.step == last)
            if progress is not None:
                progress(round(config.steps * share(config, self.step, self._spent())), self._words(loss))
        self.clock.stop()
        if self.stopped is not None:
            self._finish()
        return self.solver

    def _look(self, loss: float) -> None:
        """At validation where that is due, at what says that training is to stop, and at validation if it does."""
        self.stopped = self._reason()
        due = self.step % self.config.validate_every == 0 or self.stopped is not None
        if due:
            self._validate(loss)
            self.stopped = self.stopped or self._reason()
        if self._asked_to_stop(loss) and self.stopped is None:
            self.stopped = "callback"
            if not due:
                self._validate(loss)

    def _asked_to_stop(self, loss: float) -> bool:
        """What the callback returns in the first process."""
        if self.callback is None:
            return False
        told: Any = False
        if distributed.rank() == 0:
            evaluations = self.history[-1]["score"] if self.history else math.nan
            seconds = self.clock.read()[0]
            told = self.callback(
                TrainingStep(self.step, self.config.steps, loss, evaluations, self.best_score, seconds, self.skipped)
            )
        stop = isinstance(told, bool | np.bool_) and bool(told)  # what a logger happens to return does not count
        return bool(distributed.from_first([float(stop)])[0])

    def _update(self) -> float:
        """One outer step; a loss or gradient that is not finite is skipped and recorded."""
        config = self.config
        done = share(config, self.step, self._spent())
        with torch.enable_grad():
            loss, norm = (float(value) for value in self.estimator(self.step, done))
        rate = (cosine(done) if config.decay == "cosine" else 1 - done) * 0.5 ** len(self.incidents.returned)
        # an evolution strategy's gradients are long by nature: they grow with the number of weights
        clip = config.clip if config.estimator == "backprop" else math.inf
        if self.incidents.accept(self.step, loss, norm, clip):
            self.optimizer.set_rates(rate)
            self.optimizer.step()
        elif self.incidents.consecutive_skips >= config.rollback_after:
            self._roll_back()
        if self.curves is not None:
            rates = {"learning rate": config.learning_rate, "learning rate of matrices": config.orthogonal_rate}
            values = {"loss": loss, "gradient norm": norm, "skipped steps": float(self.skipped)}
            self.curves(self.step + 1, values | {name: rate * peak for name, peak in rates.items() if peak})
        return loss

    def _roll_back(self) -> None:
        if len(self.incidents.returned) < self.config.max_rollbacks:
            self.module.load_state_dict(self.best)
            self.optimizer.state.clear()
            self._estimator = None  # an unroll under way was of other weights
            self.incidents.returned.append(self.step)
            self.incidents.consecutive_skips = 0

    def _validate(self, loss: float) -> None:
        if not self.validation:
            return
        score = self._score()
        seconds, cpu_seconds = (round(value, 3) for value in self.clock.read())
        look = {"step": self.step, "loss": loss, "score": score, "seconds": seconds, "cpu_seconds": cpu_seconds}
        self.history.append(look)
        if self.curves is not None:
            self.curves(self.step, {"evaluations on validation": score})
        if score < self.best_score:
            self.best_score, self.best = score, copy.deepcopy(self.module.state_dict())
        elif score > self.config.rollback_above * self.best_score:
            self._roll_back()

    def _score(self) -> float:
        """Geometric mean over the validation sets of mean evaluations, as the first process finds it."""
        config, score = self.config, math.nan
        if distributed.rank() == 0:
            limit, rtol, max_nfe = config.validation_size, config.validation_rtol, config.validation_nfe
            limits: dict[str, Any] = {"limit": limit, "rtol": rtol, "max_nfe": max_nfe}
            counts = [mean_evaluations(self.solver, tasks, **limits) for tasks in self.validation]
            score = counts[0] if len(counts) == 1 else math.exp(sum(map(math.log, counts)) / len(counts))
        return distributed.from_first([score])[0]

    def _spent(self) -> list[float]:
        """What the first process's clock reads, and what is reserved."""
        spent = [value + self.reserve for value in self.clock.read()]
        return spent if self.config.seconds is None else distributed.from_first(spent)

    def _reason(self) -> str | None:
        return reason_to_stop(self.config, self.step, self._spent(), self.history, self.incidents)

    def _words(self, loss: float) -> str:
        if not self.history:
            return f"loss {loss:.3f}{self.incidents.words()}"
        look = self.history[-1]
        return (
            f"loss {loss:.3f}, validation {look['score']:.1f} evaluations at step {look['step']}, best "
            f"{self.best_score:.1f}{self.incidents.words()}"
        )

    def _finish(self) -> None:
        self.module.load_state_dict(self.best)
        self.solver.eval().requires_grad_(False)
        self.solver.summary = {
            "meta_training": _jsonable(asdict(self.config)),
            "processes": distributed.size(),
            "steps": self.step,
            "stopped": self.stopped,
            "seconds": round(self.clock.read()[0], 1),
            "cpu_seconds": round(self.clock.read()[1], 1),
            "skipped_steps": self.skipped,
            "incidents": self.incidents.describe(),
            "validation": [{key: _jsonable(value) for key, value in entry.items()} for entry in self.history],
        }

    def _save(self, due: bool) -> None:
        """Write the training state where that is due; where an unroll is under way, when it has ended (`settled`)."""
        self._unsaved = self._unsaved or due
        ready = self.stopped is not None or (self._unsaved and self.estimator.settled(self.step))
        if self.path is None or not ready or distributed.rank() > 0:
            return
        self._unsaved = False
        header = self._facts() | {
            "step": self.step,
            "seconds": self.clock.read(),
            "incidents": self.incidents.describe(),
            "stopped": self.stopped,
            "best_score": repr(self.best_score),
            "history": [{key: repr(value) for key, value in entry.items()} for entry in self.history],
        }
        kept = resume.pack(self.module, self.optimizer, header, generator=self._generator, best=self.best)
        checkpoint.write(self.path, "training/meta", *kept)

    def _facts(self) -> dict[str, Any]:
        """What must be the same for a training to go on."""
        return {
            "config": _jsonable(asdict(self.config)),
            "solver": _jsonable(self.solver.describe()["config"]),
            "tasks": self._identity,
        }

    def _resume(self, path: Path) -> None:
        tensors, header = checkpoint.read(path, "training")
        if isinstance(header.get("config"), dict):  # as files of earlier versions have it
            header["config"] = {"decay": "cosine"} | {_RENAMED.get(key, key): v for key, v in header["config"].items()}
        for name, wanted in self._facts().items():
            if header.get(name) != wanted:
                what = f"another meta-training: its {name} is {header.get(name)}, wanted {wanted}"
                if name == "tasks":
                    what = "a meta-training on other problems: other weights of f, or other contexts"
                raise checkpoint.CheckpointError(f"{path} was written by {what}; move it away to start anew")
        history, best_score = self._recorded(header, path)
        incidents = StepGuard(**header["incidents"])
        taken = 0 if incidents.returned else header["step"] - incidents.count
        self.best = resume.restore(
            tensors, header, path, self.module, self.optimizer, taken=taken, generator=self._generator, best=True
        )
        self.step, self.stopped = header["step"], header["stopped"]
        self.clock, self.incidents = Clock(*header["seconds"]), incidents
        self.history, self.best_score = history, best_score

    def _recorded(self, header: dict[str, Any], path: Path) -> tuple[list[dict[str, float]], float]:
        """(history, best score) of a header; `CheckpointError` for one that no such training has written."""
        check(header, _Record, path)
        try:
            history = [{key: _number(value) for key, value in entry.items()} for entry in header["history"]]
            best_score = float(header["best_score"])
        except ValueError as error:
            raise damaged(path, error) from error
        step, looks = header["step"], [entry.get("step", -1) for entry in history]
        wanted = {"step", "loss", "score", "seconds", "cpu_seconds"}
        scores = [entry.get("score", math.nan) for entry in history]
        sound = {
            f"step is {step}, wanted from 0 to {self.config.steps}": 0 <= step <= self.config.steps,
            f"stopped is {header['stopped']!r}": header["stopped"] is None or header["stopped"] in STOPS,
            "its seconds are negative": min(header["seconds"]) >= 0,
            f"its incidents are not of {step} steps": StepGuard(**header["incidents"]).before(step),
            f"its history is not one of {step} steps": looks == sorted(looks)
            and all(0 <= look <= step for look in looks),
            f"its history is not of {sorted(wanted)}": all(set(entry) == wanted for entry in history),
            "its history has scores that are not finite": all(map(math.isfinite, scores)),
            f"best_score is {best_score}, its history has another": best_score == min(scores, default=math.inf),
        }
        for complaint, holds in sound.items():
            if not holds:
                raise damaged(path, complaint)
        return history, best_score


class MetaTrainer(Trainer):
    """Trains `solver` on the problems of one DEQ, see `Trainer`.

    Args:
        solver: a `LearnedSolver`; trained in place.
        tasks: the fixed-point problems; the test split is never touched.
        config: see `MetaConfig`.
        checkpoint: see `Trainer`.
        save_every: see `Trainer`.
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
        config = MetaConfig() if config is None else config
        self.tasks = tasks
        super().__init__(
            solver,
            config,
            lambda: ESTIMATORS[config.estimator](solver, TaskDraws(tasks, config), config),
            validation=[tasks],
            checkpoint=checkpoint,
            save_every=save_every,
        )


class MultiTaskTrainer(Trainer):
    """Trains one solver on problems of many DEQs, a batch of one of them a step, see `Trainer`.

    Args:
        solver: runs on the states of all sources; trained in place.
        sources: with the weights they are drawn with; a `TaskSet` is one.
        validation: task sets whose validation split is looked at.
        config: as for one DEQ; unroll (one number) is the longest unroll, lengths are drawn from half of it on.
        checkpoint: file for the training's state, or None.
    """

    def __init__(
        self,
        solver: Any,
        sources: Sequence[tuple[float, Source]],
        validation: Sequence[TaskSet],
        config: MetaConfig,
        *,
        checkpoint: str | Path | None = None,
    ) -> None:
        if not sources or not validation:
            raise ValueError(
                f"wanted at least one source and one validation set, got {len(sources)}, {len(validation)}"
            )
        if not isinstance(config.unroll, int):
            raise ValueError(f"wanted one number for unroll, got {config.unroll!r}")
        for name in ("estimator", "start_noise"):
            if getattr(config, name) != getattr(MetaConfig, name):
                raise ValueError(f"training across DEQs knows no {name}, got {getattr(config, name)!r}")
        draws = MixedDraws(sources, config.batch, (max(1, config.unroll // 2), config.unroll), config.seed)
        super().__init__(
            solver,
            config,
            lambda: ESTIMATORS["backprop"](solver, draws, config),
            validation=validation,
            generator=draws.generator,
            checkpoint=checkpoint,
            save_every=config.validate_every,
        )


def mean_evaluations(
    solver: Any, tasks: TaskSet, *, split: str = "validation", limit: int = 256, rtol: float = 1e-3, max_nfe: int = 60
) -> float:
    """Mean evaluations to rtol over (at most `limit`) problems of a split, a failure counting twice the budget."""
    z0, x = tasks.problems(split)
    first = pytree.tree_leaves(z0)[0]
    z0, x = gather((z0, x), torch.arange(min(limit, len(first)), device=first.device))
    solution = solve(tasks.f, z0, x, solver=solver, rtol=rtol, max_nfe=max_nfe, throw=False)
    cost = np.where(solution.converged.cpu().numpy(), solution.nfe.numpy(), 2 * max_nfe)
    return float(cost.mean())


_RENAMED = {"budget_seconds": "seconds"}


def _jsonable(value: Any) -> Any:
    """What JSON gives back for this value; a NaN becomes None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return json.loads(json.dumps(value))


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() and "." not in text else value
