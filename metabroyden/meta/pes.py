"""Gradients of long unrolls from evolution strategies that remember their perturbations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metabroyden.meta import distributed
from metabroyden.meta.backprop import equilibria
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.draws import generator, training_batch, unroll_length
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.unroll import unroll

Play = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(parameters (P,), state or None) → (the segment's loss, the state it ends in)."""


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
    """`Particles` on a task set: `segments` outer steps in a row are one unroll of segments·K steps on one batch.

    The perturbations are the same in all processes, each with its share of the batch: the losses are what is averaged.
    """

    def __init__(self, solver: Any, tasks: TaskSet, config: MetaConfig) -> None:
        self.solver, self.tasks, self.config = solver, tasks, config
        self._twin = copy.deepcopy(solver).requires_grad_(False)
        self._particles = Particles(config.particles, config.sigma)
        self._batch: tuple[Any, Any, Tensor | None] | None = None

    def settled(self, step: int) -> bool:
        """Whether an unroll ended with this many steps, so that nothing persists beside the weights."""
        return step % self.config.segments == 0

    def __call__(self, step: int, done: float) -> tuple[Tensor, Tensor]:
        """Leave the clipped estimate of an outer step in the solver's parameters; (loss, norm before clipping)."""
        config = self.config
        if self.settled(step) or self._batch is None:
            z0, x = training_batch(self.tasks, config, step, distributed.part(config.batch))
            star = equilibria(self.tasks.f, z0, x) if config.objective.needs_star else None
            self._particles, self._batch = Particles(config.particles, config.sigma), (z0, x, star)
        z0, x, star = self._batch
        length = unroll_length(config.unroll, config.seed, step)

        def play(theta: Tensor, begin: Any) -> tuple[Tensor, Any]:
            nn.utils.vector_to_parameters(theta, self._twin.parameters())
            rollout = unroll(
                self._twin, self.tasks.f, z0, x, steps=length, backend="native", begin=begin, half=config.half
            )
            return config.objective.loss(rollout, star, done), rollout.carry()

        parameters = list(self.solver.parameters())
        theta = nn.utils.parameters_to_vector(parameters).detach()
        shape = config.particles, len(theta)
        noise = torch.randn(
            shape, generator=generator(config.seed, step, "particles"), dtype=torch.float64, device="cpu"
        ).to(theta)
        loss, gradient = self._particles.segment(theta, noise, play, distributed.mean)
        for parameter, piece in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = piece.view_as(parameter).clone()
        return loss, nn.utils.clip_grad_norm_(parameters, config.clip)
