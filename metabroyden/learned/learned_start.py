"""A learned start for any classical solver."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from metabroyden.learned.base import LearnedConfig, LearnedSolver
from metabroyden.learned.safeguard import Safeguard
from metabroyden.solver import Step
from metabroyden.solvers.picard import Picard
from metabroyden.solvers.registry import get_solver, name_of, register


@dataclass(frozen=True)
class LearnedStartConfig(LearnedConfig):
    """Adds to `LearnedConfig`, of whose fields `hidden` plays no part.

    Attributes:
        classical: what steps from the learned start: `Picard`, `Anderson`, `Broyden`, `Newton` or a splitting.
    """

    classical: Any = field(default_factory=Picard)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not can_start(self.classical):
            raise ValueError(f"classical must be a plain classical solver such as Broyden(), got {self.classical!r}")
        self._check_least(initializer_width=1)


def can_start(classical: Any) -> bool:
    """Whether a `LearnedStart` can step with it: a registered classical solver without an inverse of its own."""
    known = name_of(classical) is not None and not classical.is_learned
    return known and getattr(classical, "initial", None) is None


@register("started")
class LearnedStart(LearnedSolver):
    """A classical solver from h(c), see `Initializer`: nothing but the start is learned.

    Where gradients are recorded it takes Picard's steps instead (its own, where it is one), so that an unroll of K steps
    trains the start for small residuals in K Picard steps from it, by exact gradients: rank-one updates and mixing
    coefficients, backpropagated through, explode. Unroll ten steps or more: a start whose residual is small at once may have
    its error where residuals do not show it. Validation, and so the choice of the weights kept, runs the solver itself.
    A meta-training is cut between segments: only the first trains the start.

    Untrained it is the classical solver, from z0 where conditioning is "input" and from f(z0) else.
    """

    config_type = LearnedStartConfig
    config: LearnedStartConfig

    def __init__(self, config: LearnedStartConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        config = self.config
        self.unrolled = config.classical if isinstance(config.classical, Picard) else Picard()
        for name in ("min_nfe", "fixed_cost", "required_methods", "has_inverse", "gather", "inverse", "rmatvec"):
            setattr(self, name, getattr(config.classical, name))

    @classmethod
    def of(cls, learned: LearnedSolver, classical: Any, safeguard: Safeguard | None = None) -> LearnedStart:
        """A classical solver from the start of a trained one (a copy of its initializer); without a safeguard by default."""
        started = copy.deepcopy(cls.sharing(learned, classical, safeguard))
        started.fingerprint = learned.fingerprint
        return started.eval().requires_grad_(False)

    @classmethod
    def sharing(cls, learned: LearnedSolver, classical: Any, safeguard: Safeguard | None = None) -> LearnedStart:
        """The same with the initializer itself, for as long as that is trained."""
        shared = {item.name: getattr(learned.config, item.name) for item in fields(LearnedConfig)}
        started = cls(LearnedStartConfig(**{**shared, "safeguard": safeguard, "classical": classical}))
        started.initializer = learned.initializer
        return started

    def start(self, z0: Tensor, problem: Any) -> Tensor | Step:  # type: ignore[override]
        """The learned first iterate, (R, n), or the first step from there of a classical solver that begins with one."""
        z = super().start(z0, problem)
        begun = torch.is_grad_enabled() or self.config.conditioning == "initial_value"
        return z if begun else self.config.classical.start(z, problem)

    def init(self, z: Tensor, g: Tensor, problem: Any) -> Any:
        """The classical solver's state; none where gradients are recorded."""
        return () if torch.is_grad_enabled() else self.config.classical.init(z, g, problem)

    def step(self, z: Tensor, g: Tensor, state: Any, problem: Any) -> Step:
        """The classical solver's step, or Picard's where gradients are recorded, (R, n)."""
        if not torch.is_grad_enabled():
            return self.config.classical.step(z, g, state, problem)
        if not z.requires_grad:  # cut off from the start: a rollout needs some graph all the same
            z = z.detach().requires_grad_()
        return self.unrolled.step(z, g, (), problem)

    def describe(self) -> dict[str, Any]:
        """As every learned solver's, with the classical one's name and options."""
        described = super().describe()
        classical = {"name": name_of(self.config.classical), "options": asdict(self.config.classical)}
        return {**described, "config": {**described["config"], "classical": classical}}

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> LearnedSolver:
        """The untrained solver of a described config; ValueError for unknown fields."""
        classical = values.get("classical")
        if not isinstance(classical, dict) or set(classical) != {"name", "options"}:
            raise ValueError(f"classical must be described by name and options, got {classical!r}")
        return super().from_config({**values, "classical": get_solver(classical["name"], **classical["options"])})
