"""What learned solvers share: layout, context feature, initializer, safeguard, description."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from metabroyden.deprecated import OldOptions, current
from metabroyden.evaluator import to_host
from metabroyden.learned.initializer import Initializer
from metabroyden.learned.layout import Layout
from metabroyden.learned.preconditioner import Frozen
from metabroyden.learned.safeguard import Safeguard
from metabroyden.learned.wiring import Wiring, wiring_of
from metabroyden.padded import length_mask
from metabroyden.solution import relative_residual
from metabroyden.solver import Phase, SolverBase

WARM = 0.3
"""Relative residual of a given z0 up to which no learned start is blended in, where it is not known what that reaches."""


def apart(a: Tensor, b: Tensor) -> Tensor:
    """(R,) ‖a − b‖ over the smaller of ‖a‖ and ‖b‖, for a and b (R, n)."""
    norm = torch.linalg.vector_norm
    return norm(a - b, dim=1) / torch.minimum(norm(a, dim=1), norm(b, dim=1))


@dataclass(frozen=True)
class LearnedConfig(metaclass=OldOptions):
    """Sizes and habits common to learned solvers.

    Attributes:
        layout: layout kind, see `Layout`.
        shape: per-sample shape of the states it is fitted to.
        conditioning: what the solver sees of a problem. "initial_value": the first evaluation f(z0, x), which every solve
            has. "input": the context tensor itself (of a tuple the first one, the injection).
        context_channels: channels of the context feature in canonical form (see `Layout.context`); 0: as the state's.
        hidden: LSTM width.
        initializer_width: inner channels of the initializer; 0 for none.
        initializer_kernels: widths of its maps' convolutions, odd, two maps or more (vectors have dense maps): (5, 1) is a
            good choice for texts.
        safeguard: hand-over to Broyden.
        reach: (low, high, far), by which a given start is judged where solves usually start at zero, see `warm_start`.
            Made by `fit_solver` of what its validation problems reach; None: not known.
    """

    layout: str
    shape: tuple[int, ...]
    conditioning: str = "initial_value"
    context_channels: int = 0
    hidden: int = 8
    initializer_width: int = 32
    initializer_kernels: tuple[int, ...] = (3, 3)
    safeguard: Safeguard = field(default_factory=Safeguard)
    reach: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("layout", "conditioning"):
            object.__setattr__(self, name, current(getattr(self, name)))
        Layout(self.layout, self.shape)
        known = self.reach is None or (isinstance(self.reach, tuple) and len(self.reach) == 3 and min(self.reach) > 0)
        if not known:
            raise ValueError(f"reach must be three positive numbers, or None, got {self.reach!r}")
        self._check_choice("conditioning", "initial_value", "input")
        self._check_least(hidden=1, initializer_width=0)
        kernels = self.initializer_kernels
        if not isinstance(kernels, tuple) or len(kernels) < 2 or any(k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(f"initializer_kernels must be at least two odd numbers, as (3, 3), got {kernels!r}")

    def _check_choice(self, name: str, *choices: Any) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")

    def _check_least(self, **least: int) -> None:
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")

    def _check_share(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)!r}")


class LearnedSolver(SolverBase, nn.Module):
    """A solver with weights; stateless between solves.

    Args:
        config: sizes and options. None: made of the keywords.
        options: fields of `config_type`, where `layout` may be a `Layout`.

    Attributes:
        config: as given.
        fingerprint: hash of the f it was fitted to, or None.
        summary: what meta-training reported.

    Examples:
        >>> import metabroyden as mb
        >>> mb.GroupedLSTM(layout=mb.Layout("image", (16, 8, 8)), rank=8).config.shape
        (16, 8, 8)
    """

    is_learned = True
    preconditioner: Any
    config_type: type[LearnedConfig] = LearnedConfig

    def __init__(self, config: LearnedConfig | None = None, **options: Any) -> None:
        super().__init__()
        if isinstance(options.get("layout"), Layout):
            options |= {"layout": options["layout"].kind, "shape": tuple(options["layout"].shape)}
        self.config = config = self.config_type(**options) if config is None else config
        self.layout = Layout(config.layout, tuple(config.shape))
        self.context_channels = config.context_channels or self.layout.channels
        self.fingerprint: str | None = None
        self.summary: dict[str, Any] = {}
        sizes = config.initializer_width, config.initializer_kernels
        self.initializer = Initializer(self.layout, self.context_channels, *sizes) if config.initializer_width else None

    @property
    def dimension_free(self) -> bool:
        """Whether it runs on states of any shape, no weight being that of a channel."""
        return False

    def phases(self) -> list[Phase]:
        """The phases of a solve: the learned steps alone where there is no safeguard."""
        return [Phase(self)] if self.config.safeguard is None else self.safeguarded()

    def safeguarded(self) -> list[Phase]:
        """The learned steps and what they are handed over to, see `Safeguard`."""
        return self.config.safeguard.phases(self)

    def fallback(self) -> tuple[Any, int]:
        """The classical solver that a sample ends with, from z0, and the number of its phase in the plan."""
        return self.config.safeguard.fallback(), 2

    def context_feature(self, problem: Any, shape: tuple[int, ...]) -> Tensor:
        """The context feature (R, C', *S): f(z0) (evaluated and counted at the start), or the context itself."""
        if self.config.conditioning == "initial_value":
            return self.layout.canonical(problem.origin(), shape)
        context = problem.context[0] if isinstance(problem.context, tuple) and problem.context else problem.context
        wanted = f"a context tensor with {self.context_channels} channels and the state's layout {self.layout.kind!r}"
        if not isinstance(context, Tensor):
            raise ValueError(
                f"this solver was fitted with conditioning='input': it needs {wanted}, got {type(context).__name__}; one "
                "fitted with conditioning='initial_value' needs none"
            )
        extents = self.layout.extents(shape)
        feature = self.layout.context(context, extents)
        wrong_extents = feature.shape[2:] != extents
        if feature.dim() < 2 or feature.shape[1] != self.context_channels or wrong_extents:
            raise ValueError(f"this solver needs {wanted}, got shape {tuple(context.shape)}")
        mask = length_mask(problem.context) if self.layout.by_token else None
        return feature if mask is None else feature * mask.unsqueeze(1)

    def frozen(self, z: Tensor, problem: Any) -> Frozen:
        """What the solver's preconditioner sees of a problem: its gates at z (R, n), (R, rank, *S), and the wiring."""
        shape, wiring = self.layout.resolve(problem.shape), self.wiring(problem, z)
        seen = self.layout.canonical(z, shape), self.context_feature(problem, shape)
        return self.preconditioner.gates(*seen, wiring), wiring

    def wiring(self, problem: Any, like: Tensor) -> Wiring | None:
        """Which places of these problems' states are real, and the edges of graphs; None where nothing is marked."""
        return wiring_of(problem.context, self.layout, like)

    def start(self, z0: Tensor, problem: Any) -> Tensor:
        """The first iterate, (R, n): f(z0), or z0 where that is given no look, with a share of the learned start.

        The start is learned for solves from zero, or from the starts of training. How much of it is blended in where z0 is
        another one tells `warm_start`. In an unroll that records gradients every start is learned.
        """
        self.check_dtype(z0)
        shape = self.layout.resolve(problem.shape)
        context = self.context_feature(problem, shape)
        seen = self.config.conditioning == "initial_value"
        base = problem.origin() if seen else z0
        if self.initializer is None:
            return base
        move = self.layout.flat(self.initializer(context, self.wiring(problem, z0)))
        learned = base + move if seen or self.config.reach is None else move
        warm = self.warm_start(z0, learned, problem)
        return learned if warm is None else torch.where(warm[0] == 1, learned, torch.lerp(warm[1], learned, warm[0]))

    def warm_start(self, z0: Tensor, learned: Tensor, problem: Any) -> tuple[Tensor, Tensor] | None:
        """((R, 1) share of the learned start, (R, n) what the rest is of); None where the share is one everywhere.

        The rest is of f(z0). Where conditioning is "initial_value" that is known; else a z0 of zeros needs no look, and
        another costs one evaluation, or is trusted where there are no decisions on the host (`FixedBudget`). With
        `reach` a z0 that is more than `far` `apart` from the learned start gets no look either: solutions are nearer.

        By the relative residual at z0 the share rises, in its logarithm, from zero at `low` to one at `high`. These are what
        usual solves have after a half and a quarter of their steps: the error of a given start is in slow directions, and
        its residual falls more slowly than theirs. Without `reach` the share jumps at `WARM`.
        """
        if self.config.conditioning == "initial_value":
            image = problem.origin()
            return self._share(relative_residual(z0, image).unsqueeze(1)), image
        if torch.is_grad_enabled():
            return None
        if problem.decides_on_host and not z0.any():
            return None
        given = (z0 != 0).any(dim=1, keepdim=True)
        if self.config.reach is not None:
            given &= apart(z0, learned).unsqueeze(1) <= self.config.reach[2]
        if not problem.decides_on_host:
            return 1 - given.to(z0), z0
        among = to_host([given.squeeze(1)])[0] > 0
        if not among.any():
            return None
        image = z0 + problem.residual(z0, among=among)
        return torch.where(given, self._share(relative_residual(z0, image).unsqueeze(1)), 1.0), image

    def _share(self, residual: Tensor) -> Tensor:
        """How much of the learned start to blend in where z0 has these relative residuals (R, 1)."""
        low, high, _ = self.config.reach or (WARM, WARM, 0.0)
        if high <= low:
            return (~(residual <= low)).to(residual)
        return torch.nan_to_num((residual / low).log() / math.log(high / low), 1.0, 1.0).clamp(0, 1)

    def check_dtype(self, z0: Tensor) -> None:
        """ValueError, with the remedy, where the state is of another dtype than the weights."""
        dtype = next(self.parameters()).dtype
        if z0.dtype != dtype:
            raise ValueError(f"this solver's weights are {dtype}, the state is {z0.dtype}: solver.to({z0.dtype}) first")

    def describe(self) -> dict[str, Any]:
        """Everything but the weights: what a checkpoint needs."""
        return {"config": asdict(self.config), "fingerprint": self.fingerprint, "summary": self.summary}

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> LearnedSolver:
        """The untrained solver of a described config; ValueError for unknown fields."""
        known = {item.name for item in fields(cls.config_type)}
        if set(values) - known:
            raise ValueError(f"unknown config fields for {cls.__name__}: {sorted(set(values) - known)}")
        values = {name: _tuples(value) for name, value in values.items()}
        if isinstance(values.get("safeguard"), dict):
            values["safeguard"] = Safeguard(**{name: _tuples(value) for name, value in values["safeguard"].items()})
        return cls(cls.config_type(**values))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the solver as a folder in Hugging Face's convention (`metabroyden.save_pretrained`); returns the folder."""
        from metabroyden.checkpoint import save_pretrained

        return save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder_or_name: str | Path) -> Self:
        """The solver of this class in a folder or file, or the shipped one of that name; see `metabroyden.load_solver`.

        `CheckpointError` where it is of another class; else as `load_solver`.
        """
        from metabroyden.checkpoint import CheckpointError, load_solver

        solver = load_solver(folder_or_name)
        if not isinstance(solver, cls):
            raise CheckpointError(f"{folder_or_name} holds a {type(solver).__name__}, wanted a {cls.__name__}")
        return solver


def _tuples(value: Any) -> Any:
    """Lists, as JSON has them, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
