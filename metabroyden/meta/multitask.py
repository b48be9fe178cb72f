"""Meta-training across DEQs: one solver, many f."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from metabroyden import checkpoint, resume
from metabroyden.described import check, require
from metabroyden.meta.backprop import differentiate, frozen
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.orthogonal import make_optimizer
from metabroyden.meta.schedule import cosine
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.trainer import Progress, mean_evaluations


class Source(Protocol):
    """Where training problems come from."""

    def problem(self, batch: int, generator: torch.Generator) -> tuple[Any, Any, Any]:
        """(f, z0, x) of a random batch."""
        ...


class Known:
    """The training contexts of one DEQ."""

    def __init__(self, tasks: TaskSet) -> None:
        self.tasks = tasks

    def problem(self, batch: int, generator: torch.Generator) -> tuple[Any, Any, Any]:
        """(f, z0, x) of a random batch."""
        return self.tasks.f, *self.tasks.draw(batch, generator)


@dataclass(frozen=True)
class _Look:
    """One look at validation."""

    step: int
    loss: float | None
    score: float


@dataclass(frozen=True)
class _Record:
    """What the header of a checkpoint says of the run so far."""

    step: int
    seconds: float
    skipped: int
    best_score: float
    history: list[dict[str, Any]]


class MultiTaskTrainer:
    """Trains one solver on problems of many DEQs, a batch of one of them a step; resumes bit for bit from a checkpoint.

    What is kept are the weights with the smallest geometric mean, over the validation sets, of mean evaluations (a failure
    counting twice the budget).

    Args:
        solver: runs on the states of all sources; trained in place.
        sources: with the weights they are drawn with.
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
        for name in ("estimator", "start_noise", "patience", "budget_seconds"):
            if getattr(config, name) != getattr(MetaConfig, name):
                raise ValueError(f"training across DEQs knows no {name}, got {getattr(config, name)!r}")
        self.solver, self.config, self.validation = solver, config, list(validation)
        self.longest = config.unroll
        self.sources = [source for _, source in sources]
        self.shares = torch.tensor([share for share, _ in sources], dtype=torch.float64, device="cpu")
        self.path = None if checkpoint is None else Path(checkpoint)
        self.step, self.seconds, self.skipped = 0, 0.0, 0
        self.history: list[dict[str, float]] = []
        self.best_score, self.best = math.inf, copy.deepcopy(solver.state_dict())
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimizer = make_optimizer(solver, config.learning_rate, config.orthogonal_rate)
        if self.path is not None and self.path.exists():
            self._resume(self.path)

    def run(self, progress: Progress | None = None) -> Any:
        """Train to the end; the solver with the best weights, in evaluation mode."""
        config = self.config
        self.solver.requires_grad_(True).train()
        if self.step == 0 and not self.history:
            self._validate(math.nan)
        while self.step < config.steps:
            began = time.perf_counter()
            with torch.enable_grad():
                loss = self._update()
            self.step += 1
            self.seconds += time.perf_counter() - began
            if self.step % config.validate_every == 0 or self.step == config.steps:
                self._validate(loss)
                self._save()
            if progress is not None:
                progress(self.step, f"loss {loss:.3f}, validation {self.best_score:.2f} evaluations")
        self.solver.load_state_dict(self.best)
        self.solver.eval().requires_grad_(False)
        self.solver.summary = {
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "skipped_steps": self.skipped,
            "validation": self.history,
        }
        return self.solver

    def _update(self) -> float:
        config, generator = self.config, self.generator
        source = self.sources[int(torch.multinomial(self.shares, 1, generator=generator))]
        f, z0, x = source.problem(config.batch, generator)
        length = int(torch.randint(max(1, self.longest // 2), self.longest + 1, (), generator=generator, device="cpu"))
        done = self.step / config.steps
        with frozen(f):
            loss, norm = differentiate(self.solver, f, z0, x, config, config.backend, steps=length, done=done)
        if not torch.isfinite(norm):
            self.skipped += 1
            return math.nan
        self.optimizer.set_rates(cosine(done))
        self.optimizer.step()
        return float(loss)

    def _validate(self, loss: float) -> None:
        config = self.config
        counts = [
            mean_evaluations(
                self.solver,
                tasks,
                limit=config.validation_size,
                rtol=config.validation_rtol,
                max_nfe=config.validation_nfe,
            )
            for tasks in self.validation
        ]
        score = math.exp(sum(map(math.log, counts)) / len(counts))
        self.history.append({"step": self.step, "loss": None if math.isnan(loss) else loss, "score": score})  # type: ignore[dict-item]
        if score < self.best_score:
            self.best_score, self.best = score, copy.deepcopy(self.solver.state_dict())

    def _save(self) -> None:
        if self.path is None:
            return
        header = {
            "config": repr(asdict(self.config)),
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "best_score": self.best_score,
            "history": self.history,
        }
        resume.save(self.path, "across", self.solver, self.optimizer, header, generator=self.generator, best=self.best)

    def _resume(self, path: Path) -> None:
        tensors, header = checkpoint.read(path, "training")
        if header.get("config") != repr(asdict(self.config)):
            raise checkpoint.CheckpointError(
                f"{path} was written by another meta-training: its config is {header.get('config')}, wanted "
                f"{asdict(self.config)!r}; move it away to start anew"
            )
        self._check(header, path)
        self.best = resume.restore(
            tensors,
            header,
            path,
            self.solver,
            self.optimizer,
            taken=header["step"] - header["skipped"],
            generator=self.generator,
            best=True,
        )
        self.step, self.seconds, self.skipped = header["step"], header["seconds"], header["skipped"]
        self.best_score, self.history = header["best_score"], header["history"]

    def _check(self, header: dict[str, Any], path: Path) -> None:
        """`CheckpointError` for a header that no such training has written."""
        check(header, _Record, path)
        step, history = header["step"], header["history"]
        for entry in history:
            check(entry, _Look, path)
        looks = [entry["step"] for entry in history]
        sound = {
            f"step is {step}, wanted from 0 to {self.config.steps}": 0 <= step <= self.config.steps,
            f"skipped is {header['skipped']}, wanted from 0 to {step}": 0 <= header["skipped"] <= step,
            f"seconds is {header['seconds']}": header["seconds"] >= 0,
            f"its history is not one of {step} steps": looks == sorted(looks)
            and all(0 <= look <= step for look in looks),
            f"best_score is {header['best_score']}, its history has another": header["best_score"]
            == min((entry["score"] for entry in history), default=math.inf),
        }
        require(sound, path)
