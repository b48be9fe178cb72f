"""`fit_solver`: a trained DEQ in, a faster root finder for it out."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metabroyden.integrations.torchdeq import FixedPointMap, holds_deq
from metabroyden.learned import ADJOINT, LEARNED
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.learned.layout import Layout, guess_layout
from metabroyden.meta.progress import progress_bar
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.trainer import MetaConfig, MetaTrainer, mean_evaluations
from metabroyden.solution import State
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import check_state

ALIASES = {"metabroyden": "grouped"}
"""Names of presets: the default is the grouped LSTM whose safeguard starts Broyden at the learned inverse Jacobian."""


def make_learned(
    kind: str, layout: Layout, *, seed: int = 0, context: str = "f0", context_channels: int = 0, **options: Any
) -> Any:
    """An untrained solver of this kind (a name in `LEARNED`, `ADJOINT` or `ALIASES`); ValueError for an unknown one."""
    name = ALIASES.get(kind, kind)
    known = LEARNED | ADJOINT
    if name not in known:
        raise ValueError(f"unknown learned solver {kind!r}: known are {', '.join(sorted({*known, *ALIASES}))}")
    cls = known[name]
    unknown = set(options) - {item.name for item in fields(cls.config_type)}
    if unknown:
        raise TypeError(f"unknown options for {kind!r}: {', '.join(sorted(unknown))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(
            cls.config_type(
                layout=layout.kind,
                shape=tuple(layout.shape),
                context=context,
                context_channels=context_channels,
                **options,
            )
        )


def fit_solver(
    f: Callable[..., State],
    x_train: Tensor,
    *,
    z0: Callable[[Tensor], State] | None = None,
    layout: str | None = None,
    solver: str = "metabroyden",
    rtol: float = 1e-3,
    steps: int = 400,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Any:
    """Meta-train a root finder for the fixed points of f(z, x), without labels.

    A fifth of x_train (at most 256 samples) is held out to choose the weights. What the solver gained there over
    Broyden is in its `summary["held_out"]`; read it before using the solver. With `higher` installed the unroll runs
    through it, else by plain autograd, with the same gradients.

    Args:
        f: z⁺ = f(z, x), batch first, differentiable; a module's parameters are left as they are. Or a model with a
            torchdeq DEQ in it: x are then the model's inputs, see `FixedPointMap`.
        x_train: contexts, (N, ...) with N ≥ 10, on any device.
        z0: x → start; default `f.initial_state` where f has one, else zeros like x.
        layout: "nd", "nct", "ntc" or "nchw": which axes of the state are channels, space, time (see `Layout`); guessed
            where that is unambiguous.
        solver: "metabroyden" (the default: for now the grouped LSTM), or another name in `LEARNED`.
        rtol: tolerance at which the solver is judged while it trains.
        steps: outer steps. seed: of weights and batches. device: where to train; default that of x_train.
        progress: show a bar (needs rich).
        checkpoint: file for the training's state, from which the same call goes on after an interruption.

    Returns:
        A learned solver in evaluation mode, for `solve`, `DEQ` and `save_solver`.

    Raises:
        ValueError, TypeError: bad input, saying what was given and what is wanted.
    """
    config = MetaConfig(
        steps=steps,
        seed=seed,
        backend="higher" if importlib.util.find_spec("higher") else "native",
        validation_rtol=rtol,
    )
    if holds_deq(f):
        f = FixedPointMap(f)  # type: ignore[arg-type]
    if z0 is None:
        z0 = getattr(f, "initial_state", None)
    _check_arguments(f, x_train, z0)
    if solver in ADJOINT:
        raise ValueError("the adjoint solver is for backward passes: fit_adjoint(cell, x_train) fits it")
    if device is not None:
        x_train = x_train.to(device)
    tasks = _split(f, x_train, z0, seed)
    start, _ = tasks.problems("validation")
    check_state(start, "z0(x)")
    if not isinstance(start, Tensor):
        raise ValueError("fit_solver takes states of one tensor; this z0 returns a tuple")
    size = len(tasks.split("validation"))
    if len(start) != size:
        raise ValueError(f"z0(x) must have a row for each of {size} contexts, got {len(start)}")
    shape = tuple(start.shape[1:])
    if not shape:
        raise ValueError("a state needs an axis besides the samples': give x_train (or z0) as (N, 1)")
    where = guess_layout(shape) if layout is None else Layout(layout, shape)
    learned = make_learned(solver, where, seed=seed).to(device=start.device, dtype=start.dtype)
    with progress_bar("meta-training", steps, show=progress) as report:
        trainer = MetaTrainer(learned, tasks, config, checkpoint=checkpoint)
        trainer.run(report)
    if trainer.skipped > steps // 10:
        warnings.warn(
            f"fit_solver: {trainer.skipped} of {steps} steps were skipped because their gradient was not finite: f blows up "
            "on some contexts, and the solver has learned little",
            stacklevel=2,
        )
    learned.fingerprint = fingerprint(f.model if isinstance(f, FixedPointMap) else f)
    learned.summary["held_out"] = held_out(learned, tasks, config)
    return learned


def held_out(learned: Any, tasks: TaskSet, config: MetaConfig) -> dict[str, Any]:
    """What a fitted solver gained over Broyden on the validation problems."""
    rtol = config.validation_rtol
    return {
        "rtol": rtol,
        "max_nfe": config.validation_nfe,
        "mean_evaluations": mean_evaluations(learned, tasks, rtol=rtol),
        "mean_evaluations_broyden": mean_evaluations(Broyden(memory=60), tasks, rtol=rtol),
        "samples": len(tasks.split("validation")),
    }


def _check_arguments(f: Any, x_train: Any, z0: Any) -> None:
    """TypeError or ValueError for arguments of `fit_solver` that cannot work."""
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    if z0 is not None and not callable(z0):
        raise TypeError(f"z0 must be a map x → start, got {type(z0).__name__}")
    if not isinstance(x_train, Tensor) or x_train.dim() < 1 or len(x_train) < 10:
        shape = tuple(x_train.shape) if isinstance(x_train, Tensor) else type(x_train).__name__
        raise ValueError(f"x_train must be a tensor with at least 10 samples first, got {shape}")
    if x_train.dtype in (torch.float16, torch.bfloat16) or x_train.is_complex():
        raise ValueError(f"x_train must be float32, float64 or of an integer dtype, got {x_train.dtype}")
    if x_train.is_floating_point() and not bool(torch.isfinite(x_train).all()):
        raise ValueError("x_train must be finite, got NaN or infinity in it")
    if z0 is None and not x_train.is_floating_point():
        raise ValueError(f"x_train is {x_train.dtype}, so the state cannot be zeros like it: give z0=, a map x → start")


def _split(f: Callable[..., State], x: Tensor, z0: Callable[[Tensor], State] | None, seed: int) -> TaskSet:
    """A task set of x with a fifth (at most 256) held out for validation; equal contexts stay on one side."""
    _, group = torch.unique(x.detach().reshape(len(x), -1), dim=0, return_inverse=True)
    order = torch.randperm(int(group.max()) + 1, generator=torch.Generator().manual_seed(seed)).to(group.device)
    held = max(1, min(256, len(order) // 5))
    validation = order[group] < held
    if bool(validation.all()):
        raise ValueError("x_train must hold at least two different samples")
    return TaskSet(f, x[~validation], x[validation], z0=z0)
