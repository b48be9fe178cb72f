"""`fit_solver`: a trained DEQ in, a faster root finder for it out, or the best classical one where it is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metabroyden.compare import Comparison, by_sample, compare_solvers
from metabroyden.deprecated import old_options
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.inputs import check_contexts, gathered
from metabroyden.meta.plan import as_solved, measure_classical, plan, room
from metabroyden.meta.plan import make_learned as make_learned
from metabroyden.meta.progress import progress_bar
from metabroyden.meta.target import ModelMap, Target, check_start, resting, takes_several, target_of
from metabroyden.meta.tasks import TaskSet, count, rows, sampled
from metabroyden.meta.trainer import MetaTrainer
from metabroyden.solution import Cell, State
from metabroyden.solvers.registry import list_solvers
from metabroyden.state import Packing

MAX_NFE = 60  # evaluations allowed for each problem, on validation and in the comparison


@old_options
def fit_solver(
    f: Cell,
    x_train: Any,
    *,
    z0: Callable[[Any], State] | None = None,
    layout: str | None = None,
    conditioning: str = "auto",
    solver: str = "metabroyden",
    rtol: float = 1e-3,
    steps: int | None = None,
    seconds: float | None = None,
    patience: int | None = 4,
    fallback: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    score: Callable[[State, Any], Any] | None = None,
    return_report: bool = False,
) -> Any:
    """Meta-train a root finder for the fixed points of f(z, x), without labels, and see whether it pays.

    Three steps: `plan` chooses how the solver is made and trained, `MetaTrainer` trains it, `compare_solvers` measures it.
    Of x_train a fifth (at most 256 samples) chooses weights, when to stop, and the options of the classical solvers; another
    fifth (at most 128, fewer where states are large) is left alone until the end. On that one the fitted solver is held
    against Picard, Anderson and Broyden, tuned to rtol (and operator splitting where f offers its parts), at 60 evaluations
    a sample. It is returned where it solves no fewer samples than any of them, needs fewer evaluations in the mean and less
    time than each that solves most, and neither goes to another equilibrium more often nor scores lower (the exact rule is
    in `Comparison`). Else the fastest of those that solve most is returned, with a warning that gives the reasons. All
    figures are in the fitted solver's `summary["held_out"]`.

    Args:
        f: z⁺ = f(z, x), batch first, differentiable; a module's parameters are left as they are. Or a `DEQ`, which means its
            cell; or a model with one `DEQ` in it, ours or torchdeq's: x are then the model's inputs, see `Inside` and
            `ModelMap`. Layer and model are in evaluation mode while the fit lasts. Along a sequence the solver looks by
            steps of f's attribute `dilation`, the tokens that one evaluation carries news (1 where it has none).
        x_train: contexts of N ≥ 10 samples, on any device: a tensor (N, ...), or a pytree (dicts, tuples, lists) of
            such tensors, as `solve` takes them, with None and plain values in it if need be. Or batches of them: a
            `DataLoader`, a `Dataset` or any iterable that is no tuple, list or mapping (of a list of batches give
            `iter(batches)`), of which the first 2,048 samples are taken. Of a loader of (input, label) pairs give
            `(x for x, _ in loader)`. Of a model whose `forward` takes several arguments give a tuple, which means its
            positional arguments, or a dict, which means keywords; where `forward` takes one argument, or cannot be
            called so, a tuple or dict is that one argument.
        z0: x → start, a tensor or a tuple of several; default `f.initial_state` where f has one, else zeros like x. Of
            a model with a `DEQ` of ours, x is here what its DEQ is called with, and the default is where that starts.
        layout: which axes of the state are channels, space, time: "vector", "nct", "ntc", "image", or of several
            tensors "pyramid" (see `Layout`) or "vector", one vector of all. Default f's own attribute `layout`, else a
            guess where that is unambiguous.
        conditioning: what the solver sees of x. "initial_value": f(z0, x). "input": x itself (of a tuple its first
            tensor), which saves an evaluation but must then be given to every solve. "auto": "input" where that has the
            state's extents and f is no torchdeq model. For solves without a context, f(z), and those of torchdeq, say
            "initial_value".
        solver: "metabroyden", or another of `list_solvers(learned=True, adjoint=False)`. On a cell that offers its parts,
            with its native context, a MetaBroyden steps on Peaceman–Rachford's map instead of f: see `MetaSplitting`.
        rtol: tolerance at which solvers are judged.
        steps: outer steps at most; None: 11,200 solver steps' worth.
        seconds: of training at most, tuning and comparison not included.
        patience: looks at validation (one every eighth of the steps, or 1,400 solver steps) without gain after which it
            stops early; None: never.
        fallback: False to get the fitted solver whatever it is worth.
        seed: of weights, batches and the split.
        device: where to train; default that of x_train.
        progress: show a bar (needs rich), and print the comparison.
        checkpoint: file for the training's state, from which the same call goes on after an interruption.
        score: (z, x) → how good the states z are for the samples x of x_train, higher being better: a tensor (B,), or
            the mean, which is then asked for sample by sample. Labels may travel in x_train, beside what f reads. A
            column of the comparison, and a reason to refuse.
        return_report: whether to return the comparison too.

    Returns:
        A learned solver in evaluation mode, or a classical one; both for `solve`, `DEQ`, `register` and `save_solver`. With
        return_report a pair of it and the `Comparison`, also after a fallback; `fitted.solver` is the fitted one.

    Raises:
        ValueError, TypeError: bad input, saying what was given and what is wanted.
        RuntimeError: inference mode or autocast is on.
    """
    refuse_inference("fit_solver")
    target = target_of(f)
    if z0 is not None:
        target = target._replace(z0=z0)
    _check_arguments(target, seconds, score)
    x_train = contexts_of(x_train, target)
    check_contexts(x_train, zeros=target.z0 is None)
    if solver in list_solvers(adjoint=True):
        raise ValueError("the adjoint solver is for backward passes: fit_adjoint(cell, x_train) fits it")
    training: dict[str, Any] = {"seed": seed, "validation_rtol": rtol, "validation_nfe": MAX_NFE, "patience": patience}
    MetaConfig(**training, steps=1 if steps is None else steps)  # refuses what cannot be used before anything is solved
    if device is not None:
        x_train = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), x_train)
    with resting(target.whole):
        tasks = _split(target, x_train, seed)
        z0s, _ = tasks.problems("validation")
        _check_starts(z0s, count(tasks.split("validation")))
        if score is not None:  # a score that cannot be used is refused before the training, not after it
            by_sample(score, tasks.split("validation"))(z0s)
        classical = measure_classical(tasks, rtol=rtol, max_nfe=MAX_NFE, layout=layout)
        made = plan(
            tasks, classical, solver=solver, layout=layout, conditioning=conditioning, steps=steps, seconds=seconds,
            training=training,
        )  # fmt: skip
        learned = made.build(z0s)
        with progress_bar("meta-training", made.training.steps, show=progress) as report:
            trainer = MetaTrainer(learned, tasks, made.training, checkpoint=checkpoint)
            trainer.run(report)
        _warn_of_skipped(trainer)
        learned.fingerprint = fingerprint(target.f.model if isinstance(target.f, ModelMap) else target.f)
        raw = rows(tasks.split("test"), slice(room(made.layout)))
        comparison = compare_solvers(
            *as_solved(target.f, *tasks.prepare(raw)), solver, {**classical.solvers, solver: learned}, rtol=rtol,
            max_nfe=MAX_NFE, score=None if score is None else by_sample(score, raw),
        )  # fmt: skip
    learned.summary["held_out"] = comparison.summary()
    if progress:
        comparison.show()
    found = learned if not fallback or not comparison.failed_criteria else _refused(comparison)
    return (found, comparison) if return_report else found


def _warn_of_skipped(trainer: MetaTrainer) -> None:
    if trainer.skipped > trainer.step // 10:
        warnings.warn(
            f"fit_solver: {trainer.skipped} of {trainer.step} steps were skipped because their gradient was not finite: f "
            "blows up on some contexts, and the solver has learned little",
            stacklevel=4,
        )


def _refused(result: Comparison) -> Any:
    best = result.results[result.best].solver
    warnings.warn(
        f"fit_solver: the fitted solver does not beat the best classical ones on {len(result.fitted.nfe)} held-out problems "
        f"to {result.rtol:g}: {'; '.join(result.failed_criteria)}. "
        f"Returned is {best!r}; with fallback=False the fitted one is",
        stacklevel=4,
    )
    return best


def _check_starts(start: Any, size: int) -> None:
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
        raise ValueError("a state needs an axis besides the samples': give x_train (or z0) as (N, 1)")


def _check_arguments(target: Target, seconds: Any, score: Any) -> None:
    if target.z0 is not None and not callable(target.z0):
        raise TypeError(f"z0 must be a map x → start, got {type(target.z0).__name__}")
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if seconds is not None and not (number and 0 < seconds < float("inf")):
        raise ValueError(f"seconds must be a positive number, or None for no limit, got {seconds!r}")
    if score is not None and not callable(score):
        raise TypeError(f"score must be a map (z, x) → numbers, higher being better, got {type(score).__name__}")


def contexts_of(x_train: Any, target: Target) -> Any:
    """x_train as one pytree, see `gathered`."""
    name = "f" if target.model is None else type(target.model).__name__
    return gathered(x_train, name=name, several=takes_several(target.model))


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
