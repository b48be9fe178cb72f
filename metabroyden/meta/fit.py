"""`fit_solver`: a trained DEQ in, a faster root finder for it out, or the best classical one where it is none."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metabroyden.compare import UNTUNED, Comparison, by_sample, compare_solvers
from metabroyden.deprecated import old_options
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.learned.layout import Layout
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.defaults import (
    LOOK,
    RATES,
    SHORT,
    SOLVER_STEPS,
    best_damping,
    context_options,
    dilations,
    gated_steps,
    schedule,
    state_layout,
)
from metabroyden.meta.progress import progress_bar
from metabroyden.meta.target import ModelMap, Target, check_start, target_of
from metabroyden.meta.tasks import TaskSet, count, rows, sampled
from metabroyden.meta.trainer import MetaTrainer
from metabroyden.shared import bare
from metabroyden.solution import State
from metabroyden.solve import check_methods
from metabroyden.solvers.broyden import Broyden
from metabroyden.solvers.classical import offers, splitting_solvers, tuned_solvers
from metabroyden.solvers.registry import list_solvers, solver_types
from metabroyden.solvers.splitting import PeacemanRachford
from metabroyden.solvers.tuning import tune
from metabroyden.state import Packing, check_context

ALIASES = {"metabroyden": "meta-broyden"}
"""Names of presets."""
TUNED_ON = 32
"""Validation problems on which the classical solvers are tuned, at most."""
ROOM = 2**20
"""Coordinates solved at once in the comparison: Broyden keeps two states for each evaluation."""


def make_learned(
    kind: str,
    layout: Layout,
    *,
    seed: int = 0,
    conditioning: str = "initial_value",
    context_channels: int = 0,
    **options: Any,
) -> Any:
    """An untrained solver: the registered learned one of this name, or a name in `ALIASES`; ValueError for others."""
    name = ALIASES.get(kind, kind)
    known = solver_types(learned=True)
    if name not in known:
        raise ValueError(f"unknown learned solver {kind!r}: known are {', '.join(sorted({*known, *ALIASES}))}")
    cls = known[name]
    unknown = set(options) - {item.name for item in fields(cls.config_type)}
    if unknown:
        raise TypeError(f"unknown options for {kind!r}: {', '.join(sorted(unknown))}")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return cls(
            cls.config_type(
                layout=layout.kind,
                shape=tuple(layout.shape),
                conditioning=conditioning,
                context_channels=context_channels,
                **options,
            )
        )


@old_options
def fit_solver(
    f: Callable[..., State],
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
) -> Any:
    """Meta-train a root finder for the fixed points of f(z, x), without labels, and see whether it pays.

    Of x_train a fifth (at most 256 samples) chooses weights, when to stop, and the options of the classical solvers; another
    fifth (at most 128, fewer where states are large) is left alone until the end. On that one the fitted solver is held
    against Picard, Anderson and Broyden, tuned to rtol (and operator splitting where f offers its parts), at 60 evaluations
    a sample: evaluations, success, whole solves of one batch, in turns on the clock, and whether it finds the same
    equilibria. It is returned where it solves no fewer samples than any of them, against each that solves most, give or take
    a standard error, needs fewer evaluations in the mean (a failure counts twice the budget) and less time (by the median
    ratio of paired solves), and neither goes to another equilibrium more often nor scores lower than they do. Else the
    fastest of those is returned, with a warning that gives the reasons.

    All figures are in the fitted solver's `summary["held_out"]`. With `higher` installed the unroll runs through it, else by
    plain autograd, with the same gradients.

    Args:
        f: z⁺ = f(z, x), batch first, differentiable; a module's parameters are left as they are. Or a `DEQ`, which stands
            for its cell; or a model with one `DEQ` in it, ours or torchdeq's: x are then the model's inputs, see `Inside`
            and `ModelMap`. Layer and model are in evaluation mode while the fit lasts. Along a sequence the solver
            looks by steps of f's attribute `dilation`, the tokens that one evaluation carries news (1 where it has none).
        x_train: contexts of N ≥ 10 samples, on any device: a tensor (N, ...), or a pytree (dicts, tuples, lists) of such
            tensors, as `solve` takes them.
        z0: x → start, a tensor or a tuple of several; default `f.initial_state` where f has one, else zeros like x. Of a
            model with a `DEQ` of ours, x is here what its DEQ is called with, and the default is where that starts.
        layout: which axes of the state are channels, space, time: "vector", "nct", "ntc", "image", or of several tensors
            "pyramid" (see `Layout`) or "vector", one vector of all. Default f's own attribute `layout`, else a guess where
            that is unambiguous.
        conditioning: what the solver sees of x. "initial_value": f(z0, x). "input": x itself (of a tuple its first tensor),
            which saves an evaluation but must then be given to every solve. "auto": "input" where that has the state's
            extents and f is no torchdeq model. For solves without a context, f(z), and those of torchdeq, say
            "initial_value".
        solver: "metabroyden", or another of `list_solvers(learned=True, adjoint=False)`. On a cell that offers its parts,
            with its native context, a MetaBroyden steps on Peaceman–Rachford's map instead of f: see `MetaSplitting`.
        rtol: tolerance at which solvers are judged.
        steps: outer steps at most; None: 11,200 solver steps' worth. An unroll has half the steps that the best classical
            solver has evaluations on validation problems, see `schedule`.
        seconds: of training at most, tuning and comparison not included. patience: looks at validation (one every eighth of
            the steps, or 1,400 solver steps) without gain after which it stops early; None: never.
        fallback: False to get the fitted solver whatever it is worth.
        seed: of weights, batches and the split. device: where to train; default that of x_train.
        progress: show a bar (needs rich), and print the comparison.
        checkpoint: file for the training's state, from which the same call goes on after an interruption.
        score: (z, x) → how good the states z are for the samples x of x_train, higher being better: a tensor (B,), or the
            mean, which is then asked for sample by sample. Labels may travel in x_train, beside what f reads. A column of
            the comparison, and a reason to refuse.

    Returns:
        A learned solver in evaluation mode, or a classical one; both for `solve`, `DEQ`, `register` and `save_solver`.

    Raises:
        ValueError, TypeError: bad input, saying what was given and what is wanted.
        RuntimeError: inference mode or autocast is on.
    """
    refuse_inference("fit_solver")
    target = target_of(f)
    if z0 is not None:
        target = target._replace(z0=z0)
    _check_arguments(target, seconds, score)
    check_contexts(x_train, zeros=target.z0 is None)
    if solver in list_solvers(adjoint=True):
        raise ValueError("the adjoint solver is for backward passes: fit_adjoint(cell, x_train) fits it")
    kind = ALIASES.get(solver, solver)
    ours = kind in ("meta-broyden", "meta-splitting")
    config = MetaConfig(
        steps=1 if steps is None else steps,
        seed=seed,
        backend="higher" if importlib.util.find_spec("higher") else "native",
        validation_rtol=rtol,
        patience=patience,
        seconds=seconds,
        **(RATES if ours else {}),
    )
    if device is not None:
        x_train = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), x_train)
    with target.at_rest():
        return _fit(
            target, _split(target, x_train, seed), config, solver, kind, steps=steps, layout=layout,
            conditioning=conditioning, fallback=fallback, progress=progress, checkpoint=checkpoint, score=score,
        )  # fmt: skip


def _fit(
    target: Target,
    tasks: TaskSet,
    config: MetaConfig,
    solver: str,
    kind: str,
    *,
    steps: int | None,
    layout: str | None,
    conditioning: str,
    fallback: bool,
    progress: bool,
    checkpoint: str | Path | None,
    score: Callable[[State, Any], Any] | None,
) -> Any:
    f, seed, rtol, seconds = target.f, config.seed, config.validation_rtol, config.seconds
    ours = kind in ("meta-broyden", "meta-splitting")
    start, x = tasks.problems("validation")
    where = _checked_layout(f, start, count(tasks.split("validation")), layout)
    first = start if isinstance(start, Tensor) else start[0]
    options = context_options(f, where, start, x, conditioning)
    if solver == "coordinatewise" and options.get("context_channels", where.channels) != where.channels:
        options = context_options(f, where, start, x, "initial_value" if conditioning == "auto" else conditioning)
    if kind == "meta-broyden" and options["conditioning"] == "input" and offers(f, PeacemanRachford):
        kind = "meta-splitting"
    if kind == "meta-splitting":
        check_methods(f, PeacemanRachford())
    known = _as_solved(f, *tasks.prepare(rows(tasks.split("validation"), slice(_room(where, TUNED_ON)))))
    budget = config.validation_nfe
    if score is not None:  # a score that cannot be used is refused before the training, not after it
        by_sample(score, tasks.split("validation"))(start)
    classical: dict[str, Any] = {UNTUNED: Broyden()}
    classical |= tuned_solvers(*known, budget=budget, tolerances=(rtol,))
    classical |= splitting_solvers(*known, budget=budget, tolerances=(rtol,))
    judged: dict[str, Any] = {"tolerances": (rtol,), "max_nfe": budget}
    fewest = math.exp(tune(classical.values(), *known, **judged)[0][1])
    long = kind == "meta-broyden" and (seconds is None or seconds >= SHORT)
    unroll, segments = schedule(fewest, 2 if long else 1)
    whole = steps or max(1, SOLVER_STEPS // (unroll * segments))
    every = max(1, min(whole // 8, LOOK // (unroll * segments)))
    config = replace(config, unroll=unroll, segments=segments, steps=whole, validate_every=every)
    if ours:
        options |= {**gated_steps(segments * unroll, where.kind), "dilations": dilations(f, where.kind)}

    def make(**more: Any) -> Any:
        return make_learned(kind, where, seed=seed, **options, **more).to(device=first.device, dtype=first.dtype)

    if kind == "meta-splitting":
        learned = make(alpha=classical["Peaceman-Rachford"].alpha)
    else:
        learned = make(**({"damping": best_damping(make, *known, **judged)} if ours else {}))
    with progress_bar("meta-training", whole, show=progress) as report:
        trainer = MetaTrainer(learned, tasks, config, checkpoint=checkpoint)
        trainer.run(report)
    _warn_of_skipped(trainer)
    learned.fingerprint = fingerprint(f.model if isinstance(f, ModelMap) else f)
    raw = rows(tasks.split("test"), slice(_room(where)))
    held = _as_solved(f, *tasks.prepare(raw))
    scored = None if score is None else by_sample(score, raw)
    result = compare_solvers(*held, solver, {**classical, solver: learned}, rtol=rtol, max_nfe=budget, score=scored)
    learned.summary["held_out"] = result.summary()
    if progress:
        result.show()
    return learned if not fallback or not result.failed_criteria else _refused(result)


def _warn_of_skipped(trainer: MetaTrainer) -> None:
    if trainer.skipped > trainer.step // 10:
        warnings.warn(
            f"fit_solver: {trainer.skipped} of {trainer.step} steps were skipped because their gradient was not finite: f "
            "blows up on some contexts, and the solver has learned little",
            stacklevel=4,
        )


def _refused(result: Comparison) -> Any:
    """The best classical solver, with a warning that says why."""
    best = result.results[result.best].solver
    warnings.warn(
        f"fit_solver: the fitted solver does not beat the best classical ones on {len(result.fitted.nfe)} held-out problems "
        f"to {result.rtol:g}: {'; '.join(result.failed_criteria)}. "
        f"Returned is {best!r}; with fallback=False the fitted one is",
        stacklevel=4,
    )
    return best


def _room(layout: Layout, most: int = ROOM) -> int:
    """How many problems may be solved at once, at most."""
    return min(most, max(16, ROOM // (layout.channels * math.prod(layout.extents(layout.shape)))))


def _as_solved(f: Callable[..., State], z0: State, x: Any) -> tuple[Callable[..., State], State, Any]:
    """(f, z0, context) as solvers will meet them: inside a torchdeq model f is a closure, without a context."""
    return (lambda z: f(z, x), z0, None) if isinstance(f, ModelMap) else (f, z0, x)


def _checked_layout(f: Callable[..., State], start: Any, size: int, layout: str | None) -> Layout:
    """The layout of a start that has a row for each of `size` contexts; ValueError or TypeError for what is none."""
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
    return state_layout(f, start, layout)


def _check_arguments(target: Target, seconds: Any, score: Any) -> None:
    """TypeError or ValueError for arguments of `fit_solver` that cannot work."""
    if target.z0 is not None and not callable(target.z0):
        raise TypeError(f"z0 must be a map x → start, got {type(target.z0).__name__}")
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if seconds is not None and not (number and 0 < seconds < float("inf")):
        raise ValueError(f"seconds must be a positive number, or None for no limit, got {seconds!r}")
    if score is not None and not callable(score):
        raise TypeError(f"score must be a map (z, x) → numbers, higher being better, got {type(score).__name__}")


def refuse_inference(name: str) -> None:
    """RuntimeError where nothing can be trained."""
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise RuntimeError(f"{name} trains: call it outside of torch.inference_mode and autocast")


def check_contexts(x_train: Any, *, zeros: bool = False) -> None:
    """TypeError or ValueError for what are no contexts to fit a solver to. zeros: whether the start is zeros like them."""
    leaves = sampled(x_train)
    for leaf in leaves:
        if leaf.is_nested or leaf.layout != torch.strided:
            raise ValueError(
                f"x_train must be dense, got {'a nested tensor' if leaf.is_nested else leaf.layout}: give it padded, or as "
                "mb.Shared(tensor) if all samples share it"
            )
    if not leaves or leaves[0].dim() < 1 or len(leaves[0]) < 10:
        shape = tuple(x_train.shape) if isinstance(x_train, Tensor) else type(x_train).__name__
        raise ValueError(f"x_train must be a tensor, or a pytree of them, with at least 10 samples first, got {shape}")
    check_context(x_train, len(leaves[0]))
    for leaf in pytree.tree_leaves(bare(x_train)):
        dense = isinstance(leaf, Tensor) and leaf.layout == torch.strided
        if dense and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise ValueError("x_train must be finite, got NaN or infinity in it")
    if zeros:
        _check_zeros_like(x_train)


def _check_zeros_like(x_train: Any) -> None:
    """ValueError unless a state can be zeros like these contexts."""
    dtype = x_train.dtype if isinstance(x_train, Tensor) else None
    if dtype in (torch.float16, torch.bfloat16) or (dtype is not None and dtype.is_complex):
        raise ValueError(
            f"x_train must be float32, float64 or of an integer dtype, got {dtype}; or give z0=, a map x → start"
        )
    if dtype is None or not dtype.is_floating_point:
        raise ValueError(
            f"x_train is {dtype or type(x_train).__name__}, so the state cannot be zeros like it: give z0=, a map x → start"
        )


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
