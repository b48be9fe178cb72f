"""Gradients of an unrolled solve on drawn problems: by backpropagation, full or truncated, or by evolution strategies."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metabroyden.meta import distributed
from metabroyden.meta.config import MetaConfig, Unrolling
from metabroyden.meta.objectives import anchored
from metabroyden.meta.target import frozen
from metabroyden.meta.tasks import Source, TaskSet
from metabroyden.meta.unroll import unroll
from metabroyden.shared import bare
from metabroyden.solution import Cell, State
from metabroyden.solve import solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import Packing, gather

HARDEST = 0.25
"""Largest share of a batch that takes part in the segments after the first, where these are of hard samples."""
Play = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(parameters (P,), state or None) → (the segment's loss, the state it ends in)."""


class TaskDraws:
    """Problems of one DEQ; each process takes its share of a batch.

    A draw is a function of the seed, the outer step and the place in the batch alone: an interrupted run need not remember a
    generator's state, and processes that share a batch agree on it.
    """

    def __init__(self, tasks: TaskSet, config: MetaConfig) -> None:
        self.tasks, self.config = tasks, config

    def batch(self, step: int) -> tuple[Any, State, Any]:
        """(f, z0, x) of an outer step."""
        return self.tasks.f, *training_batch(self.tasks, self.config, step, distributed.part(self.config.batch))

    def star(self, step: int) -> Tensor | None:
        """The equilibria (B, n) of an outer step's problems, NaN where none is known; None where none is."""
        known, config = self.tasks.equilibria, self.config
        if known is None:
            return None
        numbers = self.tasks.drawn(config.batch, seeded(config.seed, step, "batch"))[distributed.part(config.batch)]
        found = known.new_full((len(numbers), known.shape[1]), torch.nan)
        there = numbers < len(known)
        found[there.to(known.device)] = known[numbers[there].to(known.device)]
        return found

    def length(self, step: int) -> int:
        """K of an outer step, see `unroll_length`."""
        return unroll_length(self.config.unroll, self.config.seed, step)


class MixedDraws:
    """A batch of one of several sources, drawn by one generator, and a uniform length between two.

    Sources come with the weights they are drawn with, `lengths` are the shortest and the longest K.
    """

    def __init__(
        self, sources: Sequence[tuple[float, Source]], batch: int, lengths: tuple[int, int], seed: int
    ) -> None:
        self.sources, self.size, self.lengths = [source for _, source in sources], batch, lengths
        self.shares = torch.tensor([share for share, _ in sources], dtype=torch.float64, device="cpu")
        self.generator = torch.Generator().manual_seed(seed)

    def star(self, step: int) -> Tensor | None:
        """None: equilibria are not known beforehand."""
        return None

    def batch(self, step: int) -> tuple[Any, State, Any]:
        """(f, z0, x) of an outer step."""
        several = len(self.sources) > 1
        number = int(torch.multinomial(self.shares, 1, generator=self.generator)) if several else 0
        return self.sources[number].problem(self.size, self.generator)

    def length(self, step: int) -> int:
        """K of an outer step."""
        low, high = self.lengths
        return low if low == high else int(torch.randint(low, high + 1, (), generator=self.generator, device="cpu"))


Draws = TaskDraws | MixedDraws


def seeded(seed: int, step: int, what: str) -> torch.Generator:
    """A generator of its own for each seed, step and purpose."""
    digest = hashlib.sha256(repr((seed, step, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def unroll_length(unroll: int | tuple[int, int], seed: int, step: int) -> int:
    """K as configured, or log-uniform from low to high, both included."""
    if isinstance(unroll, int):
        return unroll
    low, high = unroll
    at = float(torch.rand((), generator=seeded(seed, step, "length"), dtype=torch.float64, device="cpu"))
    return min(high, math.floor(low * ((high + 1) / low) ** at))


def training_batch(tasks: TaskSet, config: MetaConfig, step: int, part: slice = slice(None)) -> tuple[State, Any]:
    """(z0, x) of the rows `part` of an outer step's batch; z0 + start_noise·rms(f(z0))·noise, by sample."""
    z0, x = tasks.draw(config.batch, seeded(config.seed, step, "batch"), part)
    if config.start_noise == 0:
        return z0, x
    packing = Packing.of(z0)
    flat = packing.pack(z0)
    generator = seeded(config.seed, step, "start")
    noise = torch.randn(config.batch, flat.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        scale = packing.take(tasks.f(z0, bare(x)), flat).square().mean(dim=1, keepdim=True).sqrt()
    return packing.unpack(flat + scale * (config.start_noise * noise[part]).to(flat)), x


class UnrolledLoss(nn.Module):
    """A learned solver with one segment of its unroll and the loss as `forward`: what is distributed over processes."""

    def __init__(self, solver: Any) -> None:
        super().__init__()
        self.solver = solver

    def forward(
        self, f: Cell, z0: State, context: Any, star: Tensor | None, begin: Any, steps: int, done: float,
        config: Unrolling, backend: str,
    ) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
        """(the loss, relative residuals (B,) at the end, where the next segment begins)."""
        modes: dict[str, Any] = {key: getattr(config, key) for key in ("detach_features", "checkpoint_steps", "half")}
        rollout = unroll(self.solver, f, z0, context, steps=steps, backend=backend, begin=begin, **modes)
        loss = config.objective.loss(rollout, star, done)
        if config.anchor and star is not None:
            loss = loss + config.anchor * anchored(rollout, star)
        if distributed.size() > 1:  # the reduction wants every parameter's gradient, of segments that use none, too
            loss = loss + 0 * torch.stack([parameter.sum() for parameter in self.solver.parameters()]).sum()
        return loss, rollout.residuals[-1].detach(), rollout.carry()


def backpropagate(
    module: nn.Module, f: Any, z0: State, context: Any, config: Unrolling, backend: str, *, steps: int, done: float = 0.0,
    star: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Leave the clipped gradient of the objective in a module's parameters; (mean loss, norm before clipping).

    Where f or the steps blow up, the norm is not finite, and neither is the gradient.

    `module` is an `UnrolledLoss`, or that in a DistributedDataParallel, which then reduces once, after the last segment;
    each segment has K = `steps`, and `done` in [0, 1] is how far the training has got.
    """
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.grad = None
    begin, losses = None, []
    with frozen(f):
        if star is None and config.objective.needs_star:
            star = equilibria(f, z0, context)
        for number in range(config.segments):
            wait: AbstractContextManager[None] = nullcontext()
            if isinstance(module, DistributedDataParallel) and number < config.segments - 1:
                wait = module.no_sync()
            with wait, torch.enable_grad():
                loss, residual, begin = module(f, z0, context, star, begin, steps, done, config, backend)
                loss.backward(inputs=parameters)  # whatever else f closes over must not collect gradients
            losses.append(loss.detach())
            if config.drop_below and number < config.segments - 1:
                if not isinstance(module, DistributedDataParallel) and bool((residual < config.drop_below).all()):
                    break
                solver = getattr(module, "module", module).solver
                z0, context, star, begin = _hard(solver, residual, config.drop_below, z0, context, star, begin)
    return torch.stack(losses).mean(), nn.utils.clip_grad_norm_(parameters, config.clip)


def _hard(solver: Any, residual: Tensor, limit: float, z0: State, context: Any, star: Tensor | None, begin: Any) -> Any:
    """(z0, context, star, begin) of the samples with a relative residual (B,) of at least `limit`, at least one.

    Where that is a larger share than `HARDEST`, of those with the largest.
    """
    most = max(1, round(HARDEST * len(residual)))
    hard = min(max(int((~(residual < limit)).sum()), 1), most)
    chosen = residual.nan_to_num(math.inf).topk(hard).indices.sort().values
    z, state = begin
    return *gather((z0, context, star), chosen), (z.index_select(0, chosen), solver.gather(state, chosen))


def differentiate(
    solver: Any, f: Any, z0: State, context: Any, config: Unrolling, backend: str, *, steps: int, done: float = 0.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`backpropagate` for a solver by itself."""
    return backpropagate(UnrolledLoss(solver), f, z0, context, config, backend, steps=steps, done=done)


class BackpropEstimator:
    """`backpropagate` on drawn problems, a new batch each outer step."""

    def __init__(self, solver: Any, draws: Draws, config: MetaConfig) -> None:
        self.draws, self.config = draws, config
        self.module = distributed.spread(UnrolledLoss(solver))

    def settled(self, step: int) -> bool:
        """Nothing persists from one outer step to the next."""
        return True

    def __call__(self, step: int, done: float) -> tuple[Tensor, Tensor]:
        """Leave the clipped gradient of an outer step in the solver's parameters; (loss, norm before clipping)."""
        problem, length, config = self.draws.batch(step), self.draws.length(step), self.config
        star = self.draws.star(step) if config.anchor else None
        loss, norm = backpropagate(self.module, *problem, config, config.backend, steps=length, done=done, star=star)
        return distributed.mean(loss), norm


class Particles:
    """N antithetic pairs of unrolls with parameters θ ± ε, each with the sum ξ of all perturbations it has had.

    Persistent evolution strategies (Vicol, Metz & Sohl-Dickstein, ICML 2021, algorithm 2): the gradient of a segment's
    loss L is estimated as mean of ξ(L(θ + ε) − L(θ − ε))/2σ² over the pairs, ε ~ N(0, σ²). As ξ holds the perturbations of
    the earlier segments too, what these did to the state a segment begins in is accounted for: over a whole unroll the
    estimates add up, in expectation, to the gradient of its Gaussian-smoothed loss, where truncated backpropagation is
    biased. Nothing is backpropagated, so an unroll of any length costs one segment's memory and cannot explode; the
    variance grows with the number of parameters and of segments.
    """

    def __init__(self, count: int, sigma: float) -> None:
        self.sigma = sigma
        self.states: list[tuple[Any, Any]] = [(None, None)] * count
        self.sums: Tensor | None = None  # (N, P)

    def segment(
        self, theta: Tensor, noise: Tensor, play: Play, reduce: Callable[[Tensor], Tensor] = lambda losses: losses
    ) -> tuple[Tensor, Tensor]:
        """(mean loss, gradient (P,)) of the next segment, at θ (P,), with standard normal noise (N, P).

        reduce: of the losses (N, 2), such as their mean over processes.
        """
        steps = self.sigma * noise
        self.sums = steps if self.sums is None else self.sums + steps
        losses = torch.empty(len(noise), 2, dtype=theta.dtype, device=theta.device)
        for number, step in enumerate(steps):
            losses[number, 0], plus = play(theta + step, self.states[number][0])
            losses[number, 1], minus = play(theta - step, self.states[number][1])
            self.states[number] = plus, minus
        losses = reduce(losses)
        slopes = (losses[:, 0] - losses[:, 1]) / (2 * self.sigma**2)
        return losses.mean(), slopes @ self.sums / len(noise)


class EvolutionEstimator:
    """`Particles` on drawn problems: `segments` outer steps in a row are one unroll of segments·K steps on one batch.

    The perturbations are the same in all processes, each with its share of the batch: the losses are what is averaged.
    """

    def __init__(self, solver: Any, draws: Draws, config: MetaConfig) -> None:
        self.solver, self.draws, self.config = solver, draws, config
        self._twin = copy.deepcopy(solver).requires_grad_(False)
        self._particles = Particles(config.particles, config.sigma)
        self._batch: tuple[Any, State, Any, Tensor | None] | None = None

    def settled(self, step: int) -> bool:
        """Whether an unroll ended with this many steps, so that nothing persists beside the weights."""
        return step % self.config.segments == 0

    def __call__(self, step: int, done: float) -> tuple[Tensor, Tensor]:
        """Leave the clipped estimate of an outer step in the solver's parameters; (loss, norm before clipping)."""
        config = self.config
        if self.settled(step) or self._batch is None:
            problem = self.draws.batch(step)
            star = equilibria(*problem) if config.objective.needs_star else None
            self._particles, self._batch = Particles(config.particles, config.sigma), (*problem, star)
        f, z0, x, star = self._batch
        length = self.draws.length(step)

        @torch.no_grad()
        def play(theta: Tensor, begin: Any) -> tuple[Tensor, Any]:
            nn.utils.vector_to_parameters(theta, self._twin.parameters())
            rollout = unroll(self._twin, f, z0, x, steps=length, backend="native", begin=begin, half=config.half)
            return config.objective.loss(rollout, star, done), rollout.carry()

        parameters = list(self.solver.parameters())
        theta = nn.utils.parameters_to_vector(parameters).detach()
        drawn, size = seeded(config.seed, step, "particles"), (config.particles, len(theta))
        noise = torch.randn(size, generator=drawn, dtype=torch.float64, device="cpu").to(theta)
        loss, gradient = self._particles.segment(theta, noise, play, distributed.mean)
        for parameter, piece in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = piece.view_as(parameter).clone()
        return loss, nn.utils.clip_grad_norm_(parameters, config.clip)


ESTIMATORS: dict[str, Any] = {"backprop": BackpropEstimator, "pes": EvolutionEstimator}  # by `MetaConfig.estimator`


def equilibria(f: Any, z0: Any, context: Any, *, rtol: float = 1e-4, max_nfe: int = 100) -> Tensor:
    """(B, n): where Broyden's method ends, for objectives that need z*; what did not converge is the best it saw."""
    found = solve(f, z0, context, solver=Broyden(memory=max_nfe), rtol=rtol, max_nfe=max_nfe, throw=False)
    return Packing.of(found.z).pack(found.z)
