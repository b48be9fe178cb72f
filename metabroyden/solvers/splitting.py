"""Operator splitting for monotone cells f = prox ∘ linear: forward–backward and Peaceman–Rachford.

Both are those of Winston & Kolter, Monotone operator equilibrium networks (NeurIPS 2020), section 3.2. A cell offers its
parts as methods: `linear(z, x)` = Wz + x, `prox(v)`, elementwise, and for Peaceman–Rachford `resolvent(alpha)`, which gives
the map (v, x) ↦ V(v + αx), V = (I + α(I − W))⁻¹. A use of `linear` or of the resolvent counts as an evaluation of f; `prox`
costs next to nothing and is not counted. Forward–backward calls f at z0, Peaceman–Rachford nowhere: f(z) follows from what
a step, or the use of a part, has made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from metabroyden.problem import Problem
from metabroyden.solution import Cell, State
from metabroyden.solver import SolverBase, Step
from metabroyden.solvers.base import check_number
from metabroyden.solvers.registry import register
from metabroyden.solvers.tuning import tune

S = TypeVar("S", "ForwardBackward", "PeacemanRachford")


class ForwardBackwardState(NamedTuple):
    """What forward–backward carries."""

    linear: Tensor | None  # (R, n) Wz + x at the iterate; None before the first step


@register("forward-backward")
@dataclass(frozen=True)
class ForwardBackward(SolverBase):
    """z⁺ = prox(z − α(z − (Wz + x))).

    Where I − W is strongly monotone with constant m it converges for 0 < α < 2m / ‖I − W‖₂², linearly; larger α often do
    better. Each step is one use of `linear`, at z⁺, from which f(z⁺) = prox(Wz⁺ + x) follows. The first step is z + αg, as
    of Wz₀ + x only the positive part is known then: the same one where z₀ = 0, at no use of `linear`.

    Attributes:
        alpha: step length in (0, 10].
    """

    alpha: float = 0.5
    required_methods = ("linear", "prox")

    def __post_init__(self) -> None:
        check_number("ForwardBackward", "alpha", self.alpha, 0, 10)

    @classmethod
    def tuned(cls, f: Cell, z0: State, context: Any, *, margin: float = 1.0, **options: Any) -> ForwardBackward:
        """`margin` times the best α in [1/16, 2] on validation problems; f, z0, context and options as for `tune`.

        The best one lies at the edge of what converges, and other samples may lie beyond: of 10,000 held-out images 124
        did, with a margin of 0.75 none (results/RESEARCH.md, entry 30).
        """
        return cls(round(margin * _tuned(cls, -4, 1, f, z0, context, options).alpha, 4))

    def init(self, z: Tensor, g: Tensor, problem: Problem) -> ForwardBackwardState:
        """Nothing known of Wz + x."""
        return ForwardBackwardState(None)

    def step(self, z: Tensor, g: Tensor, state: ForwardBackwardState, problem: Problem) -> Step:
        """One step and its residual, for one use of `linear`."""
        if state.linear is None:
            z = torch.add(z, g, alpha=self.alpha)
        else:
            z = problem.elementwise("prox", torch.lerp(z, state.linear, self.alpha))
        linear = problem.evaluate_method(problem.method("linear"), z)
        g = problem.record_residual(z, problem.elementwise("prox", linear))
        return Step(z, ForwardBackwardState(linear), g)


class PeacemanRachfordState(NamedTuple):
    """What Peaceman–Rachford carries."""

    u: Tensor  # (R, n)
    resolvent: Cell  # (v, x) ↦ V(v + αx)


@register("peaceman-rachford")
@dataclass(frozen=True)
class PeacemanRachford(SolverBase):
    """u' = 2 prox(u) − u, z⁺ = V(u' + αx), u⁺ = 2z⁺ − u'; the iterate reported is z⁺.

    Converges for every α > 0 where I − W is strongly monotone. From z₀ = 0 it begins at u = 0, and nothing of f(0) is
    wanted. From any other z₀ it begins at u = z₀ + α(Wz₀ + x − z₀), which belongs to z₀ if that is the solution: one use of
    `linear`, which tells f(z₀). Each step is one use of the resolvent (see `resolved`). That is set up anew in each solve,
    before the first step: an inverse, or one for every frequency of a convolution; time, not counted as an evaluation.

    Attributes:
        alpha: in (0, 1000].
    """

    alpha: float = 1.0
    required_methods = ("linear", "prox", "resolvent")

    def __post_init__(self) -> None:
        check_number("PeacemanRachford", "alpha", self.alpha, 0, 1000)

    @classmethod
    def tuned(cls, f: Cell, z0: State, context: Any, **options: Any) -> PeacemanRachford:
        """The best α in [1/16, 16] on validation problems; f, z0, context and options as for `tune`."""
        return _tuned(cls, -4, 4, f, z0, context, options)

    def start(self, z0: Tensor, problem: Problem) -> Step:
        """The first step; z0 itself, with its residual, where it is not zero."""
        state = self.init(z0, z0, problem)
        if not z0.any():
            return self.step(z0, z0, state, problem)
        linear = problem.evaluate_method(problem.method("linear"), z0)
        g = problem.record_residual(z0, problem.elementwise("prox", linear))
        return Step(z0, state._replace(u=torch.lerp(z0, linear, self.alpha)), g)

    def init(self, z: Tensor, g: Tensor, problem: Problem) -> PeacemanRachfordState:
        """u = z, and the resolvent."""
        return PeacemanRachfordState(z, problem.method("resolvent", self.alpha))

    def step(self, z: Tensor, g: Tensor, state: PeacemanRachfordState, problem: Problem) -> Step:
        """One step and its residual, for one use of the resolvent."""
        z, g, u = resolved(state.u, state.resolvent, self.alpha, problem)
        return Step(z, PeacemanRachfordState(u, state.resolvent), g)


def resolved(u: Tensor, resolvent: Cell, alpha: float, problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(z, f(z) − z, u⁺), all (R, n), of a step of Peaceman–Rachford from u (R, n): one use of the resolvent.

    As that makes (1 + α)z − αWz = u' + αx, it gives Wz + x = ((1 + α)z − u') / α and with it f(z) at no further cost.
    """
    reflected = 2 * problem.elementwise("prox", u) - u
    z = problem.evaluate_method(resolvent, reflected)
    linear = z + (z - reflected) / alpha
    return z, problem.record_residual(z, problem.elementwise("prox", linear)), 2 * z - reflected


def _tuned(cls: type[S], low: int, high: int, f: Cell, z0: State, context: Any, options: dict[str, Any]) -> S:
    """The best of α = 2^low, …, 2^high, then two refinements around it."""
    best, spacing = cls(), 1.0
    grid = [2.0**k for k in range(low, high + 1)]
    for _ in range(3):
        best = tune([cls(round(alpha, 4)) for alpha in grid], f, z0, context, **options)[0][0]
        spacing /= 2.5
        grid = [best.alpha * 2**power for power in (-spacing, 0, spacing)]
    return best
