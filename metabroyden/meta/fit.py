"""`fit_solver`: a trained DEQ in, a faster root finder for it out, or the best classical one where it is none."""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metabroyden.comparison.problems import HeldOut
from metabroyden.comparison.verdict import UNTUNED, Verdict, by_sample, compare_solvers, judge_of
from metabroyden.deprecated import old_options
from metabroyden.learned.base import LearnedSolver
from metabroyden.learned.fingerprint import fingerprint, module_of
from metabroyden.meta import distributed
from metabroyden.meta.budget import Budget, call_seconds, within
from metabroyden.meta.calibrate import calibrate
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.defaults import RATES
from metabroyden.meta.inputs import check_contexts, gathered
from metabroyden.meta.plan import ALIASES, OURS, Classical, as_solved, measure_classical, plan, registered, room
from metabroyden.meta.plan import make_learned as make_learned
from metabroyden.meta.prospect import Prospect, prospect
from metabroyden.meta.target import ModelMap, Target, check_start, first_call, resting, takes_several, target_of
from metabroyden.meta.tasks import TaskSet, count, rows, sampled
from metabroyden.meta.trainer import Callback, MetaTrainer
from metabroyden.progress import Progress, phase, progress_bar, tensorboard
from metabroyden.solution import Cell, State
from metabroyden.solvers.registry import list_solvers, name_of
from metabroyden.state import Packing, gather

MAX_NFE = 60  # evaluations allowed for each problem, on validation and in the comparison


@old_options
def fit_solver(
    f: Cell,
    x_train: Any,
    *,
    z0: Callable[[Any], State] | None = None,
    layout: str | None = None,
    conditioning: str = "auto",
    solver: str | LearnedSolver = "metabroyden",
    rtol: float = 1e-3,
    steps: int | None = None,
    seconds: float | None = None,
    patience: int | None = 4,
    fallback: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    metric: Callable[[State, Any], Any] | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    log_dir: str | Path | None = None,
    callback: Callback | None = None,
    return_report: bool = False,
) -> Any:
    """Meta-train a root finder for the fixed points of f(z, x), without labels, and see whether it pays.

    Three steps: `plan` chooses how the solver is made and trained, `MetaTrainer` trains it, `compare_solvers` measures it.
    Before the second one the untrained solver is timed (see `prospect`): where it would be no faster than the fastest
    classical solver even if it needed a third of the evaluations of the best one, and three, there is nothing to gain. A
    warning then says so with the figures, nothing is trained, and the fastest classical solver is returned; so it is where
    no classical solver comes near a fixed point of any problem. With fallback=False, or where a checkpoint of a training
    is there, it is trained all the same.
    Of x_train a fifth (at most 256 samples) chooses weights, when to stop, and the options of the classical solvers; another
    fifth (at most 128, fewer where states are large) is left alone until the end. On that one the fitted solver is held
    against Picard, Anderson and Broyden, tuned to rtol (and operator splitting where f offers its parts), at 60 evaluations
    a sample. It is returned where it solves as many samples, needs fewer evaluations in the mean and less time than each
    that solves most, and neither goes to another equilibrium more often nor scores lower (the exact rule is in `Verdict`).
    Else the fastest of those that solve most is returned, with a warning that gives the reasons. All
    figures are in the fitted solver's `summary["held_out"]`.

    Args:
        f: z⁺ = f(z, x), batch first, differentiable; a module's parameters are left as they are. Or a `DEQ`, which means its
            cell; or a model with one `DEQ` in it, ours or torchdeq's: x are then the model's inputs, see `Inside` and
            `ModelMap`. Layer and model are in evaluation mode while the fit lasts. Along a sequence the solver looks by
            steps of f's attribute `dilation`, the tokens that one evaluation carries news (1 where it has none).
        x_train: contexts of N ≥ 10 samples, on any device: a tensor (N, ...), or a pytree (dicts, tuples, lists) of
            such tensors, as `solve` takes them, with None and plain values in it if need be. Or batches of them: a
            `DataLoader`, a `Dataset` or any iterable that is no tuple, list or mapping (of a list of batches give
            `iter(batches)`), of which the first 2,048 samples are taken, of a `Dataset` evenly spaced ones. Of a loader
            of (input, label) pairs give `(x for x, _ in loader)`. Of a model whose `forward` takes several arguments
            give a tuple, which means its positional arguments, or a dict, which means keywords; where `forward` takes
            one argument, a tuple or dict is that one (the exact rule is in `call_arguments`).
        z0: x → start, a tensor or a tuple of several; default `f.initial_state` where f has one, else zeros like x. Of
            a model with a `DEQ` of ours, x is here what its DEQ is called with, and the default is where that starts.
        layout: which axes of the state are channels, space, time: "vector", "nct", "ntc", "tokens", "set", "image", or
            of several tensors "pyramid" (see `Layout`) or "vector", one vector of all. Default f's own attribute
            `layout`, else a guess where that is unambiguous.
        conditioning: what the solver sees of x. "initial_value": f(z0, x). "input": x itself (of a tuple its first
            tensor), which saves an evaluation but must then be given to every solve. "auto": "input" where that has the
            state's extents and f is no torchdeq model. For solves without a context, f(z), and those of torchdeq, say
            "initial_value".
        solver: "metabroyden", or another of `list_solvers(learned=True, adjoint=False)`. Or a learned solver for states of
            this shape: a copy of it is trained further, and `conditioning` is its own. On a cell that offers its parts,
            with its native context, a MetaBroyden steps on Peaceman–Rachford's map instead of f: see `MetaSplitting`.
        rtol: tolerance at which solvers are judged.
        steps: outer steps at most; None: 11,200 solver steps' worth, half of them for a solver that is trained further.
        seconds: of the whole call, about: tuning of the classical solvers and comparison included. Where f is dear these
            are given fewer samples, and outer steps smaller batches, so that some hundred steps fit (see `Budget`; not with
            a checkpoint). Where they take more than half of it, training has half of what is left. None: no limit.
        patience: looks at validation (one every eighth of the steps, or 1,400 solver steps) without gain after which it
            stops early; None: never.
        fallback: False to train whatever the prospect, and to get the fitted solver whatever it is worth.
        seed: of weights, batches and the split.
        device: where to train; default where f's parameters are, or x_train if it has none. Under torchrun all
            processes must make the same call; each trains on its share of every batch and returns the same solver. The
            first one's x_train counts, and it alone measures, prints, calls the callback and writes.
        progress: show a bar (needs rich), and print the comparison.
        checkpoint: file for the training's state, from which the same call goes on after an interruption.
        metric: (z, x) → how good the states z are for the samples x of x_train, higher being better: a tensor (B,), or
            the mean, which is then asked for sample by sample. Labels may travel in x_train, beside what f reads. A
            column of the comparison, and a reason to refuse (as `metric` of `compare`).
        batch_size: problems of an outer step, over all processes; None: 32, or fewer where `seconds` are few.
        learning_rate: peak rate of Adam; None: that of the solver. The rate of a MetaBroyden's matrices is changed in
            proportion.
        log_dir: folder for TensorBoard files: loss, gradient norm, evaluations on validation, learning rates and skipped
            steps. Needs the tensorboard package.
        callback: called after each outer step with a `TrainingStep`: step, steps, loss, evaluations on validation, the
            best of these, seconds, skipped. Training ends where it returns True, with the best weights so far.
        return_report: whether to return the comparison too, with its tables and figures.

    Returns:
        A learned solver in evaluation mode, or a classical one; both for `solve`, `DEQ`, `register` and `save_solver`. With
        return_report a pair of it and the `Verdict`, a `Comparison`, after a fallback too; `fitted` of it is the fitted one.
        Where nothing was trained, that is a comparison of untuned Broyden with the tuned classical solvers.

    Raises:
        ValueError, TypeError: bad input, saying what was given and what is wanted.
        ImportError: log_dir without tensorboard.
        RuntimeError: inference mode or autocast is on; processes that differ in f.

    Examples:
        >>> import torch, metabroyden as mb
        >>> f = lambda z, x: torch.tanh(0.5 * z.roll(1, 1) + x)
        >>> solver = mb.fit_solver(f, torch.randn(30, 4), steps=2, fallback=False, progress=False)
        >>> bool(mb.solve(f, torch.zeros(3, 4), torch.randn(3, 4), solver=solver).converged.all())
        True
    """
    refuse_inference("fit_solver")
    began = time.perf_counter()
    target = target_of(f)
    if z0 is not None:
        target = target._replace(z0=z0)
    _check_arguments(target, seconds, metric)
    switches = {"fallback": fallback, "progress": progress, "return_report": return_report}
    _check_training(batch_size, learning_rate, callback, **switches)
    _check_places(checkpoint, log_dir)
    x_train = contexts_of(x_train, target)
    check_contexts(x_train, zeros=target.z0 is None)
    solver, known = _named(solver)
    if solver in list_solvers(adjoint=True):
        raise ValueError("the adjoint solver is for backward passes: fit_adjoint(cell, x_train) fits it")
    training: dict[str, Any] = {"seed": seed, "validation_rtol": rtol, "validation_nfe": MAX_NFE, "patience": patience}
    MetaConfig(**training, steps=1 if steps is None else steps)  # refuses what cannot be used before anything is solved
    where = device_of(target, x_train) if device is None else distributed.resolve(str(device))
    distributed.join(where)
    with resting(target.whole):
        training |= {"batch": _batch(batch_size), **_rates(solver, learning_rate)}
        shown = progress and distributed.rank() == 0
        limit = seconds if checkpoint is None else None  # what a checkpoint goes on with must not follow the clock
        job = FitJob.of(target, x_train, where, seed, rtol, layout, metric, seconds=limit)
        training["validation_size"] = job.budget.looked
        phase("fit_solver: classical solvers are tuned", show=shown)
        asked: dict[str, Any] = {"solver": solver, "layout": layout, "conditioning": conditioning}
        asked |= {} if known is None else as_it_is(known)
        made = distributed.by_first(
            lambda: plan(job.tasks, job.classical, **asked, steps=steps, seconds=seconds, training=training)
        )
        made = made.shortened() if known is not None and steps is None else made
        some, size = job.tasks.problems("validation")[0], min(room(made.layout), job.budget.compared)
        learned = made.build(some) if known is None else made.adopt(known, some)
        why = None if not fallback or _begun(checkpoint) else job.hopeless(learned, size)
        trained = why is None
        if trained:
            if made.training.anchor:
                job.tasks.equilibria = job.classical.equilibria(job.tasks, job.budget.anchored)
            reserve, config = _reserve(time.perf_counter() - began, seconds), made.training
            if limit is not None and batch_size is None and distributed.size() == 1:
                config = within(config, learned, job.tasks, limit - reserve)
            phase(f"fit_solver: training, {config.batch} problems a step", show=shown)
            trainer = MetaTrainer(learned, job.tasks, config, checkpoint=checkpoint)
            trainer.callback = callback
            trainer.reserve = reserve
            with _watched(trainer, progress, log_dir) as report:
                trainer.run(report)
            _say(_many_skipped(trainer))
            calibrate(learned, job.tasks, rtol=rtol, max_nfe=MAX_NFE, most=size)
            learned.fingerprint = fingerprint(target.f.model if isinstance(target.f, ModelMap) else target.f)
        else:
            _say(f"{why}, so nothing is trained (fallback=False trains all the same)")
        phase(f"fit_solver: comparing on {min(size, count(job.tasks.split('test')))} problems", show=shown)
        comparison = job.compared(solver if trained else UNTUNED, {solver: learned} if trained else {}, size)
        learned.summary["held_out"] = comparison.summary()
        if progress and distributed.rank() == 0:
            comparison.show()
        _say(_refused(comparison) if trained and fallback else None)
    kept = learned if trained else comparison.fitted
    found = comparison.solvers[comparison.best] if fallback and comparison.failed_criteria else kept
    return (found, comparison) if return_report else found


@dataclass(frozen=True)
class FitJob:
    """The problems of one fit, and what is asked of solvers on them; measured in the first process for all.

    Attributes:
        f: as `as_solved` takes it.
        tasks: its problems.
        classical: tuned on validation.
        rtol: tolerance.
        metric: of the user, or None.
        budget: samples of each phase.
    """

    f: Any
    tasks: TaskSet
    classical: Classical
    rtol: float
    metric: Callable[[State, Any], Any] | None
    budget: Budget

    @classmethod
    def of(
        cls, target: Target, x: Any, where: torch.device, seed: int, rtol: float, layout: str | None, metric: Any,
        *, seconds: float | None = None,
    ) -> FitJob:  # fmt: skip
        """The first process's contexts, on the device, split; ValueError or TypeError for a bad start or metric."""
        x = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(where), distributed.by_first(lambda: x))
        tasks = _split(target, x, seed)
        validation = tasks.split("validation")
        z0s, contexts = tasks.problems("validation")
        check_starts(z0s, count(validation))
        first = torch.arange(min(2, count(validation)), device=where)
        first_call(*as_solved(target.f, *gather((z0s, contexts), first)))
        if metric is not None:  # one that cannot be used is refused before the training, not after it
            by_sample(metric, validation)(z0s)
        known = fingerprint(target.f.model if isinstance(target.f, ModelMap) else target.f)
        distributed.agree("the weights of f", 0.0 if known is None else int(known.split("-")[1][:12], 16))
        budget = Budget()
        if seconds is not None:
            some = torch.arange(min(Budget.tuned, count(validation)), device=where)
            timed = as_solved(target.f, *gather((z0s, contexts), some))
            budget = Budget.of(seconds, distributed.from_first([call_seconds(*timed)])[0])
        classical = measure_classical(tasks, rtol=rtol, max_nfe=MAX_NFE, layout=layout, most=budget.tuned)
        return cls(target.f, tasks, classical, rtol, metric, budget)

    def hopeless(self, learned: Any, size: int) -> str | None:
        """Why there is nothing to gain, by `Classical.unsolvable` and `prospect`; None where there may be."""
        lost = distributed.by_first(self.classical.unsolvable)
        if lost is not None:
            return lost
        outlook = self.outlook(learned, size)
        return f"there is nothing to gain: {outlook}" if outlook.hopeless else None

    def outlook(self, learned: Any, size: int) -> Prospect:
        """The prospect of an untrained solver, on as many validation problems as will be compared (at most `size`)."""
        raw = rows(self.tasks.split("validation"), slice(min(size, count(self.tasks.split("test")))))
        limits: dict[str, Any] = {"rtol": self.rtol, "max_nfe": MAX_NFE}
        known = self.classical
        return distributed.by_first(
            lambda: prospect(
                *as_solved(self.f, *self.tasks.prepare(raw)), learned, known.solvers, fewest=known.fewest, **limits
            )
        )

    def compared(self, name: str, learned: dict[str, Any], size: int) -> Verdict:
        """The solver called `name` against the classical ones on at most `size` test problems."""
        raw = rows(self.tasks.split("test"), slice(size))
        judge = None if self.metric is None else judge_of(self.metric, raw)
        everyone = {**self.classical.solvers, **learned}

        def compared() -> Verdict:
            held = HeldOut(self.f, *self.tasks.prepare(raw), judge, closed=isinstance(self.f, ModelMap))
            return compare_solvers(held, name, everyone, rtol=self.rtol, max_nfe=MAX_NFE)

        return distributed.by_first(compared)


@contextmanager
def _watched(trainer: MetaTrainer, progress: bool, log_dir: Any) -> Iterator[Progress | None]:
    """What moves the progress bar; the trainer's curves are written meanwhile, where they are wanted."""
    first = distributed.rank() == 0
    log = tensorboard(Path(log_dir), trainer.step) if first and log_dir is not None else nullcontext()
    bar = progress_bar("meta-training", trainer.config.steps, show=progress and first)
    with log as trainer.curves, bar as report:
        yield report


def device_of(target: Target, x: Any) -> torch.device:
    """Where f is, by the first parameter of its module; where the contexts are if it has none."""
    module = target.whole or module_of(target.f)
    first = None if module is None else next(module.parameters(), None)
    return sampled(x)[0].device if first is None else first.device


def _named(solver: Any) -> tuple[str, LearnedSolver | None]:
    """(registered name, the solver itself where one was given)."""
    if isinstance(solver, str):
        registered(solver)  # refuses what is unknown before anything is solved
        return solver, None
    name = name_of(solver) if isinstance(solver, LearnedSolver) else None
    if name is None:
        raise TypeError(f"solver must be a name, or a learned solver to train further, got {type(solver).__name__}")
    return name, solver


def as_it_is(solver: LearnedSolver) -> dict[str, Any]:
    """What `plan` is told of a solver that is there: nothing of it is to be chosen."""
    config = solver.config
    kept = {name: getattr(config, name) for name in ("damping", "learned_steps", "alpha") if hasattr(config, name)}
    return {"conditioning": config.conditioning, "overrides": kept}


def _begun(checkpoint: Any) -> bool:
    """Whether a training has been decided on before."""
    return checkpoint is not None and Path(checkpoint).exists()


def _reserve(spent: float, seconds: float | None) -> float:
    """Seconds that are not for training: those that preparations took, and about as many, and four more, for what follows.

    Half of the time that is left is for training in any case.
    """
    return 0.0 if seconds is None else min(2 * spent + 4.0, (spent + seconds) / 2)


def _batch(size: int | None) -> int:
    """Problems of an outer step: as asked for, or the usual number rounded up to a multiple of the processes'."""
    each = distributed.size()
    size = -(-MetaConfig.batch // each) * each if size is None else size
    distributed.part(size)
    return size


def _rates(solver: str, learning_rate: float | None) -> dict[str, float]:
    """Options of `MetaConfig` for a learning rate: that of matrices is changed in proportion."""
    if learning_rate is None:
        return {}
    own = ALIASES.get(solver, solver) in OURS
    more = {"orthogonal_rate": learning_rate * RATES["orthogonal_rate"] / RATES["learning_rate"]} if own else {}
    return {"learning_rate": learning_rate, **more}


def _say(words: str | None) -> None:
    """Warn the caller of `fit_solver`, in the first process."""
    if words is not None and distributed.rank() == 0:
        warnings.warn(f"fit_solver: {words}", stacklevel=4)


def _many_skipped(trainer: MetaTrainer) -> str | None:
    if trainer.skipped <= trainer.step // 10:
        return None
    return (
        f"{trainer.skipped} of {trainer.step} steps were skipped because their gradient was not finite: f blows up on some "
        "contexts, and the solver has learned little"
    )


def _refused(result: Verdict) -> str | None:
    if not result.failed_criteria:
        return None
    return (
        f"the fitted solver does not beat the best classical ones on {result.samples} held-out problems "
        f"to {result.tolerances[-1]:g}: {reasons(result)}. "
        f"Returned is {result.solvers[result.best]!r}; fallback=False returns the fitted one whatever it is worth"
    )


def reasons(result: Verdict) -> str:
    """Why a fitted solver was refused, and what the metric says of it, where there is one."""
    why = "; ".join(result.failed_criteria)
    ours, theirs = (result.summary()["solvers"][name].get("score") for name in (result.name, result.best))
    told = ours is None or any(words.startswith("it scores") for words in result.failed_criteria)
    return why if told else f"{why} (by your metric it scores {ours:.4g}, {result.best} {theirs:.4g})"


def check_starts(start: Any, size: int, given: str = "x_train") -> None:
    """ValueError or TypeError for a start that has no row for each of `size` contexts."""
    check_start(start)
    packing = Packing.of(start, "z0(x)")
    there = len(start if isinstance(start, Tensor) else start[0])
    if there != size:
        raise ValueError(
            f"z0(x) must have a row for each of {size} contexts, got {there}. Of a model that makes several samples of one "
            "hand over the DEQ inside, with the contexts that it is called with"
        )
    if any(not shape for shape in packing.shapes):
        raise ValueError(f"a state needs an axis besides the samples': give {given} (or z0) as (N, 1)")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _check_arguments(target: Target, seconds: Any, metric: Any) -> None:
    if target.z0 is not None and not callable(target.z0):
        raise TypeError(f"z0 must be a map x → start, got {type(target.z0).__name__}")
    if seconds is not None and not _is_positive(seconds):
        raise ValueError(f"seconds must be a positive number, or None for no limit, got {seconds!r}")
    if metric is not None and not callable(metric):
        raise TypeError(f"metric must be a map (z, x) → numbers, higher being better, got {type(metric).__name__}")


def _check_training(batch_size: Any, learning_rate: Any, callback: Any, **switches: Any) -> None:
    whole = isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size > 0
    if batch_size is not None and not whole:
        raise ValueError(f"batch_size must be an integer of at least 1, or None for 32, got {batch_size!r}")
    if learning_rate is not None and not _is_positive(learning_rate):
        raise ValueError(f"learning_rate must be a positive number, or None for the usual one, got {learning_rate!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of a TrainingStep, got {type(callback).__name__}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r:.40}")


def _check_places(checkpoint: Any, log_dir: Any) -> None:
    for name, place in {"checkpoint": checkpoint, "log_dir": log_dir}.items():
        if place is not None and not isinstance(place, (str, os.PathLike)):
            raise TypeError(f"{name} must be a path, or None for none, got {type(place).__name__}")
    if checkpoint is not None and Path(checkpoint).is_dir():
        raise ValueError(f"checkpoint must be a file, such as fit.safetensors, got the folder {str(checkpoint)!r}")
    if log_dir is not None and importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "log_dir= writes TensorBoard files, and tensorboard is not installed: pip install tensorboard"
        )
    if log_dir is not None and Path(log_dir).exists() and not Path(log_dir).is_dir():
        raise ValueError(f"log_dir must be a folder, got the file {str(log_dir)!r}")


def contexts_of(x: Any, target: Target, given: str = "x_train") -> Any:
    """What was given under a name for contexts, as one pytree, see `gathered`."""
    name = "f" if target.model is None else type(target.model).__name__
    return gathered(x, name=name, several=takes_several(target.model), given=given)


def refuse_inference(name: str) -> None:
    """RuntimeError where nothing can be trained."""
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise RuntimeError(f"{name} trains: call it outside of torch.inference_mode and autocast")


def _split(target: Target, x: Any, seed: int) -> TaskSet:
    """A task set of x, a fifth (at most 256) for validation, one (at most 128) for the test; equal contexts together."""
    group = _groups(x)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(int(group.max()) + 1, generator=generator, device="cpu").to(group.device)
    if len(order) < 3:
        raise ValueError(f"x_train must hold at least three different samples, got {len(order)}")
    held, last = (max(1, min(most, len(order) // 5)) for most in (256, 128))
    place = order[group]
    validation, test = place < held, (place >= held) & (place < held + last)
    train, *others = (rows(x, mask.nonzero().squeeze(1)) for mask in (~validation & ~test, validation, test))
    return TaskSet(target.f, train, *others, encode=target.encode, z0=target.z0)


def _groups(x: Any) -> Tensor:
    """(N,) numbers from 0, the same for equal samples."""
    found = []
    for leaf in sampled(x):
        value = torch.view_as_real(leaf.detach()) if leaf.is_complex() else leaf.detach()
        found.append(torch.unique(value.reshape(len(leaf), -1), dim=0, return_inverse=True)[1])
    return found[0] if len(found) == 1 else torch.unique(torch.stack(found, dim=1), dim=0, return_inverse=True)[1]
