"""The gradient of an unrolled solve, full or truncated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metabroyden.learned.fingerprint import module_of
from metabroyden.meta import distributed
from metabroyden.meta.config import MetaConfig, Unrolling
from metabroyden.meta.draws import training_batch, unroll_length
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.unroll import unroll
from metabroyden.solution import State
from metabroyden.solve import solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import Packing


class UnrolledLoss(nn.Module):
    """A learned solver with one segment of its unroll and the loss as `forward`: what is distributed over processes."""

    def __init__(self, solver: Any) -> None:
        super().__init__()
        self.solver = solver

    def forward(
        self, f: Callable[..., State], z0: State, context: Any, star: Tensor | None, begin: Any, steps: int, done: float,
        config: Unrolling, backend: str,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """(the loss, where the next segment begins)."""
        rollout = unroll(
            self.solver,
            f,
            z0,
            context,
            steps=steps,
            backend=backend,
            begin=begin,
            detach_features=config.detach_features,
            checkpoint_steps=config.checkpoint_steps,
            half=config.half,
        )
        loss = config.objective.loss(rollout, star, done)
        if distributed.size() > 1:  # the reduction wants every parameter's gradient, of segments that use none, too
            loss = loss + 0 * torch.stack([parameter.sum() for parameter in self.solver.parameters()]).sum()
        return loss, rollout.carry()


def backpropagate(
    module: nn.Module, f: Any, z0: State, context: Any, config: Unrolling, backend: str, *, steps: int, done: float = 0.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Leave the clipped gradient of the objective in a module's parameters; (mean loss, norm before clipping).

    module: an `UnrolledLoss`, or that one in a DistributedDataParallel, which then reduces once, after the last segment.
    steps: K of each segment. done: how far the training has got, in [0, 1]. Where f or the steps blow up, the norm is not
    finite, and neither is the gradient.
    """
    star = equilibria(f, z0, context) if config.objective.needs_star else None
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.grad = None
    begin, losses = None, []
    for number in range(config.segments):
        wait: AbstractContextManager[None] = nullcontext()
        if isinstance(module, DistributedDataParallel) and number < config.segments - 1:
            wait = module.no_sync()
        with wait:
            loss, begin = module(f, z0, context, star, begin, steps, done, config, backend)
            loss.backward(inputs=parameters)  # whatever else f closes over must not collect gradients
        losses.append(loss.detach())
    return torch.stack(losses).mean(), nn.utils.clip_grad_norm_(parameters, config.clip)


def differentiate(
    solver: Any, f: Any, z0: State, context: Any, config: Unrolling, backend: str, *, steps: int, done: float = 0.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`backpropagate` for a solver by itself."""
    return backpropagate(UnrolledLoss(solver), f, z0, context, config, backend, steps=steps, done=done)


class BackpropEstimator:
    """`backpropagate` on a task set, a new batch each outer step; each process takes its share of it."""

    def __init__(self, solver: Any, tasks: TaskSet, config: MetaConfig) -> None:
        self.tasks, self.config = tasks, config
        self.module = distributed.spread(UnrolledLoss(solver))

    def settled(self, step: int) -> bool:
        """Nothing persists from one outer step to the next."""
        return True

    def __call__(self, step: int, done: float) -> tuple[Tensor, Tensor]:
        """Leave the clipped gradient of an outer step in the solver's parameters; (loss, norm before clipping)."""
        config = self.config
        z0, x = training_batch(self.tasks, config, step, distributed.part(config.batch))
        length = unroll_length(config.unroll, config.seed, step)
        loss, norm = backpropagate(self.module, self.tasks.f, z0, x, config, config.backend, steps=length, done=done)
        return distributed.mean(loss), norm


def equilibria(f: Any, z0: Any, context: Any, *, rtol: float = 1e-4, max_nfe: int = 100) -> Tensor:
    """(B, n): where Broyden's method ends, for objectives that need z*; what did not converge is the best it saw."""
    found = solve(f, z0, context, solver=Broyden(memory=max_nfe), rtol=rtol, max_nfe=max_nfe, throw=False)
    return Packing.of(found.z).pack(found.z)


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
