"""MetaBroyden on operator splitting: for monotone cells, which offer their parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metabroyden.learned.base import WARM
from metabroyden.learned.meta_broyden import MetaBroyden, MetaBroydenConfig, MetaBroydenState
from metabroyden.solution import Cell, relative_residual
from metabroyden.solver import Phase, Step, Trail
from metabroyden.solvers.base import check_number
from metabroyden.solvers.registry import register
from metabroyden.solvers.splitting import PeacemanRachford, resolved


@dataclass(frozen=True)
class MetaSplittingConfig(MetaBroydenConfig):
    """Adds to `MetaBroydenConfig`, of whose fields the safeguard's memory and resumed_patience play no part.

    Attributes:
        alpha: α of Peaceman–Rachford's map, in (0, 1000]. Choose it as for `PeacemanRachford`.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("MetaSplittingConfig", "alpha", self.alpha, 0, 1000)


class MetaSplittingState(NamedTuple):
    """R rows, n coordinates."""

    u: Tensor  # (R, n) where the resolvent was used last
    move: Tensor | None  # (R, n) T(u) − u; None before the first use
    learned: MetaBroydenState | None  # of the steps in u; None before the first use
    resolvent: Cell  # (v, x) ↦ V(v + αx)


@register("meta-splitting")
class MetaSplitting(MetaBroyden):
    """A `MetaBroyden` in u, for the fixed point of Peaceman–Rachford's map T instead of f's.

    T(u) = 2z − u' with u' = 2 prox(u) − u and z = V(u' + αx), see `PeacemanRachford`; T's fixed points are those u for
    which z = f(z, x). T does not expand, whatever the eigenvalues of f: what a preconditioner for f would have to learn of
    the linear part of a monotone cell, V is exactly. The initializer makes u, and every step is one use of the resolvent,
    which tells z, f(z) and T(u):

        z = V(2 prox(u) − u + αx),   u⁺ = a MetaBroyden step from u and its residual T(u) − u.

    The iterates reported are the z. Untrained, with a damping of 1, its gated steps are Peaceman–Rachford's from u = z0, and
    those after them Anderson's on the pairs of T. Samples are handed to Peaceman–Rachford, from z0. It keeps no inverse
    Jacobian of f. Needs a cell with the parts `linear`, `prox`, `resolvent`, and a context; `FixedBudget` and f_dtype are
    not for it.
    """

    config_type = MetaSplittingConfig
    config: MetaSplittingConfig
    required_methods = PeacemanRachford.required_methods
    has_inverse = False

    def safeguarded(self) -> list[Phase]:
        """Learned steps, then Peaceman–Rachford's, which converge on every monotone cell."""
        return [self.config.safeguard.learned_phase(self), Phase(self.fallback()[0])]

    def fallback(self) -> tuple[PeacemanRachford, int]:
        """Peaceman–Rachford's method with the same α, in the second phase."""
        return PeacemanRachford(self.config.alpha), 1

    def start(self, z0: Tensor, problem: Any) -> Tensor | Step:  # type: ignore[override]
        """The learned u, (R, n), and the first use of the resolvent; u alone where it took an evaluation, of f(z0)."""
        u = super().start(z0, problem)
        return u if self.config.conditioning == "initial_value" else self.step(u, u, self.init(u, u, problem), problem)

    def warm_start(self, z0: Tensor, learned: Tensor, problem: Any) -> tuple[Tensor, Tensor] | None:
        """As every learned solver's, with the u that belongs to z0: one use of `linear` where a sample of z0 is not zero."""
        if torch.is_grad_enabled() or not z0.any():
            return None
        linear = problem.evaluate_method(problem.method("linear"), z0)
        image = problem.elementwise("prox", linear)
        problem.record_residual(z0, image)
        cold = ~(relative_residual(z0, image).unsqueeze(1) <= WARM)
        return cold.to(z0), torch.lerp(z0, linear, self.config.alpha)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> MetaSplittingState:  # type: ignore[override]
        """u = z, and the resolvent."""
        return MetaSplittingState(z, None, None, problem.method("resolvent", self.config.alpha))

    def step(self, z: Tensor, g: Tensor, state: MetaSplittingState, problem: Any) -> Step:  # type: ignore[override]
        """One learned step in u, (R, n), and one use of the resolvent there."""
        u, learned = state.u, state.learned
        if state.move is not None:
            u, learned, _ = super().step(u, state.move, learned, problem)  # type: ignore[arg-type]
        z, g, after = resolved(u, state.resolvent, self.config.alpha, problem)
        move = after - u
        if learned is None:
            learned = super().init(u, move, problem)
        return Step(z, MetaSplittingState(u, move, learned, state.resolvent), g)

    def trail(self, state: MetaSplittingState, index: Tensor) -> Trail:  # type: ignore[override]
        """None: its pairs are of another map."""
        return []

    def gather(self, state: MetaSplittingState, index: Tensor) -> MetaSplittingState:  # type: ignore[override]
        """The rows `index` of a state."""
        u, move = (None if value is None else value.index_select(0, index) for value in (state.u, state.move))
        learned = None if state.learned is None else super().gather(state.learned, index)
        assert u is not None
        return MetaSplittingState(u, move, learned, state.resolvent)
