"""A learned solver of adjoint systems: the backward pass of a DEQ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from metabroyden.learned.grouped import GroupedConfig, GroupedLSTM
from metabroyden.learned.preconditioner import Frozen, Preconditioner
from metabroyden.solvers.registry import register


@dataclass(frozen=True)
class AdjointConfig(GroupedConfig):
    """As `GroupedConfig`, without an initializer but the preconditioner."""

    initializer_width: int = 0


@register("adjoint")
class AdjointLSTM(GroupedLSTM):
    """Solves u = Jᵀu + v for `Implicit`, at a step that is homogeneous in the cotangent: v → αv gives u → αu, any α ≠ 0.

    As `GroupedLSTM`, with weights that are even and of degree zero in v: no bias direction, no means among the features,
    the residual's scale relative to the first one. The preconditioner Q is gated by the equilibrium alone, the start is
    v + Q(v). For sequences time runs backwards. Untrained: Picard's iteration on the adjoint. What it does not solve goes
    to Broyden, which is homogeneous too, from B₀ = −(I + Q).
    """

    config_type = AdjointConfig
    homogeneous = True

    def __init__(self, config: AdjointConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        if self.layout.kind == "graph":
            raise ValueError("AdjointLSTM has no layout 'graph': solve the adjoint of graphs by a classical solver")
        self.layout = replace(self.layout, reverse=True)
        self.preconditioner = Preconditioner(self.layout, 0, self.config.rank)

    def start(self, z0: Tensor, problem: Any) -> Tensor:
        """v + Q(v), (R, n)."""
        frozen, shape = self.frozen(z0, problem), self.layout.resolve(problem.shape)
        v = problem.context["v"]
        return v + self.layout.flat(self.preconditioner(self.layout.canonical(v, shape), *frozen))

    def frozen(self, z: Tensor, problem: Any) -> Frozen:
        """Gates of the preconditioner at the equilibrium that the adjoint belongs to."""
        context = problem.context
        if not (isinstance(context, dict) and {"z", "v"} <= set(context)):
            raise ValueError(
                "AdjointLSTM solves the adjoint systems of Implicit, whose context holds the equilibrium under 'z' and the "
                f"cotangent under 'v'; got a context of type {type(context).__name__}"
            )
        shape = self.layout.resolve(problem.shape)
        star = self.layout.canonical(context["z"], shape)
        return self.preconditioner.gates(star, star[:, :0]), None
