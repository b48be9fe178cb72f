"""How a solver is made and meta-trained: one plan, for `fit_solver` and for experiments, which override parts of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from metabroyden.comparison.verdict import UNTUNED
from metabroyden.learned.layout import Layout
from metabroyden.meta import distributed
from metabroyden.meta.budget import Budget
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.defaults import (
    ANCHOR,
    LOOK,
    RATES,
    best_damping,
    context_options,
    dilations,
    expected_steps,
    gated_steps,
    schedule,
    segments,
    solver_steps,
    splitting_alpha,
    state_layout,
)
from metabroyden.meta.target import ModelMap
from metabroyden.meta.tasks import KNOWN, TaskSet, rows
from metabroyden.nn.spectral import spectral_radius
from metabroyden.shared import bare
from metabroyden.solution import Solution, State
from metabroyden.solve import check_methods, solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.solvers.classical import offers, splitting_solvers, tuned_solvers
from metabroyden.solvers.registry import get_solver, list_solvers
from metabroyden.solvers.splitting import PeacemanRachford
from metabroyden.solvers.tuning import tune
from metabroyden.state import gather

ALIASES = {"metabroyden": "meta-broyden"}
"""Names of presets."""
OURS = ("meta-broyden", "meta-splitting")
"""Solvers whose rates, dilations, learned steps and first step length are planned."""
TUNED_ON = Budget.tuned
"""Validation problems on which the classical solvers are tuned, at most."""
NEAR = 10
"""Times the tolerance that some classical solve must come to."""
ROOM, FEWEST = 2**20, 16
"""Coordinates solved at once: Broyden keeps two states for each evaluation; and samples, at least."""


@dataclass
class Classical:
    """Classical solvers on validation problems, tuned when they are first asked for.

    Attributes:
        problems: (f, z0, x) of validation, as solvers meet them.
        judged: tolerances and budget, as for `tune`.
        tuned: makes the solvers; default: tuned on `problems`.
    """

    problems: tuple[Any, State, Any]
    judged: dict[str, Any]
    tuned: Callable[[], dict[str, Any]] | None = None

    @cached_property
    def solvers(self) -> dict[str, Any]:
        """By name, and the untuned Broyden."""
        if self.tuned is not None:
            return self.tuned()
        options = {"budget": self.judged["max_nfe"], "tolerances": self.judged["tolerances"]}
        tuned = tuned_solvers(*self.problems, **options) | splitting_solvers(*self.problems, **options)
        return {UNTUNED: Broyden(), **tuned}

    @cached_property
    def _best(self) -> tuple[Any, float]:
        return tune(self.solvers.values(), *self.problems, **self.judged)[0]

    @property
    def best(self) -> Any:
        """The solver that needs fewest evaluations."""
        return self._best[0]

    @property
    def fewest(self) -> float:
        """Evaluations of the best one, in the geometric mean."""
        return math.exp(self._best[1])

    @cached_property
    def found(self) -> Solution:
        """What the best one makes of the problems."""
        budget, (rtol,) = self.judged["max_nfe"], self.judged["tolerances"]
        return solve(*self.problems, solver=self._best[0], rtol=rtol, max_nfe=budget, throw=False)

    @property
    def most(self) -> float:
        """Evaluations of the best one on the hard problems: their 95th percentile, a failure counting as the budget."""
        budget, (rtol,) = self.judged["max_nfe"], self.judged["tolerances"]
        spent, _ = self.found.trace.evaluations_to(rtol, budget)
        return float(np.quantile(spent, 0.95))

    def unsolvable(self) -> str | None:
        """Words where the best one gets nowhere near a fixed point of any problem; None else."""
        budget, (rtol,) = self.judged["max_nfe"], self.judged["tolerances"]
        _, near = self.found.trace.evaluations_to(NEAR * rtol, budget)
        if near.any():
            return None
        f, z0, x = self.problems
        some = torch.arange(min(len(near), 8), device=pytree.tree_leaves(z0)[0].device)
        z, seen = gather((self.found.z, x), some)
        radius = float(spectral_radius(f, z, seen).nanmedian())
        return (
            f"f has no usable fixed point: within {budget} evaluations none of {len(near)} problems comes to a relative "
            f"residual of {NEAR * rtol:g}; where the solves end, the spectral radius of its Jacobian is {radius:.3g}"
        )

    def equilibria(self, tasks: TaskSet, most: int = KNOWN) -> Tensor:
        """Where the best one ends on training problems, in all processes, see `TaskSet.find_equilibria`."""
        (rtol,) = self.judged["tolerances"]
        limits = {"rtol": rtol, "max_nfe": self.judged["max_nfe"], "most": most}
        return distributed.by_first(lambda: tasks.find_equilibria(self.best, **limits))


@dataclass(frozen=True)
class Plan:
    """One solver and its meta-training.

    Attributes:
        solver: registered name.
        layout: of the states.
        options: of the solver's config, its conditioning and context_channels included.
        training: unroll, segments, steps, rates and all else, see `MetaConfig`.
    """

    solver: str
    layout: Layout
    options: dict[str, Any]
    training: MetaConfig

    def build(self, z: State) -> Any:
        """The untrained solver, with dtype and device of states like z."""
        first = pytree.tree_leaves(z)[0]
        learned = make_learned(self.solver, self.layout, seed=self.training.seed, **self.options)
        return learned.to(device=first.device, dtype=first.dtype)

    def adopt(self, solver: Any, z: State) -> Any:
        """A copy of a solver that is there, in the place of the untrained one; ValueError where it is of other states."""
        first = pytree.tree_leaves(z)[0]
        if (solver.layout.kind, tuple(solver.layout.shape)) != (self.layout.kind, tuple(self.layout.shape)):
            raise ValueError(
                f"the solver is for layout {solver.layout.kind!r} and shape {solver.layout.shape}, f has "
                f"{self.layout.kind!r} and {self.layout.shape}"
            )
        return copy.deepcopy(solver).to(device=first.device, dtype=first.dtype)

    def shortened(self) -> Plan:
        """The same with half of the outer steps, for a solver that was trained before."""
        steps, look = (max(1, count // 2) for count in (self.training.steps, self.training.validate_every))
        return replace(self, training=replace(self.training, steps=steps, validate_every=look))


def make_learned(kind: str, layout: Layout, *, seed: int = 0, **options: Any) -> Any:
    """`get_solver` of a learned one, or of a name in `ALIASES`, with weights drawn from a seed; ValueError for others."""
    name = registered(kind)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return get_solver(name, layout=layout, **options)


def registered(kind: str) -> str:
    """The registered name of a learned solver or of a name in `ALIASES`; ValueError for others."""
    name, known = ALIASES.get(kind, kind), list_solvers(learned=True)
    if name not in known:
        raise ValueError(f"unknown learned solver {kind!r}: known are {', '.join(sorted({*known, *ALIASES}))}")
    return name


def measure_classical(
    tasks: TaskSet, *, rtol: float, max_nfe: int, layout: str | None = None, most: int = TUNED_ON
) -> Classical:
    """The classical solvers on at most so many validation problems."""
    raw = tasks.split("validation")
    z0, _ = tasks.prepare(rows(raw, slice(FEWEST)))
    most = room(state_layout(tasks.f, z0, layout), most)
    problems = as_solved(tasks.f, *tasks.prepare(rows(raw, slice(most))))
    return Classical(problems, {"tolerances": (rtol,), "max_nfe": max_nfe})


def plan(
    tasks: TaskSet,
    classical: Classical,
    *,
    solver: str = "meta-broyden",
    layout: str | None = None,
    conditioning: str = "auto",
    steps: int | None = None,
    seconds: float | None = None,
    training: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Plan:
    """Choose what nobody has chosen, by the problems and by what was measured of the classical solvers.

    - layout: f's attribute `layout`, else guessed from the shape of a state.
    - conditioning: "input" where x has the state's extents, which saves an evaluation, else "initial_value".
    - solver: a MetaBroyden becomes a MetaSplitting where f offers its parts, whose map converges for monotone f.
    - unroll: half the evaluations of the best classical solver, from 6 to 14: later iterates are there already.
    - segments, drop_below: of a MetaBroyden, see `segments`; the later ones are of the samples that are above rtol.
    - steps: of so many solver steps in all as f is worth, see `solver_steps`; validate_every: an eighth of them, or `LOOK`
      solver steps.
    - learning_rate, orthogonal_rate: `RATES` for `OURS`, else those of `MetaConfig`.
    - anchor: `ANCHOR` for a MetaBroyden (to the equilibria that the best classical solver finds); a monotone f has no
      second equilibrium.
    - backend: "native", which is faster than "higher"; the gradients are the same.
    - learned_steps, schedule_length, dilations: those of the unroll and of f, see `gated_steps` and `dilations`.
    - damping: the best of the untrained solver on validation, so that an unroll does not diverge.
    - alpha, on splitting: of vectors the one that is best for Peaceman–Rachford, else see `splitting_alpha`.

    Args:
        tasks: the problems.
        classical: from `measure_classical`.
        solver: as for `fit_solver`.
        layout: as for `fit_solver`.
        conditioning: as for `fit_solver`.
        steps: as for `fit_solver`.
        seconds: as for `fit_solver`.
        training: other fields of `MetaConfig`.
        overrides: by flat name, what takes the place of a choice: "solver", "layout", "conditioning", a field of
            `MetaConfig`, or an option of the solver. What depends on it is chosen accordingly.

    Raises:
        ValueError: a choice that does not fit the problems.
        TypeError: a choice that does not fit the problems.
    """
    given = dict(overrides or {})
    solver, layout, conditioning = (
        given.pop(name, value)
        for name, value in (("solver", solver), ("layout", layout), ("conditioning", conditioning))
    )
    known = {item.name for item in fields(MetaConfig)}
    told = {name: value for name, value in given.items() if name in known}
    options = {name: value for name, value in given.items() if name not in known}
    _, z0, x = classical.problems
    where = state_layout(tasks.f, z0, layout)
    name, seen = _conditioned(ALIASES.get(solver, solver), tasks.f, where, z0, x, conditioning)
    config = _training(name, classical, {**(training or {}), "steps": steps, "seconds": seconds} | told)
    made = Plan(name, where, {**seen, **options}, config)
    return _with_options(made, tasks.f, classical, z0) if name in OURS else made


def _conditioned(name: str, f: Any, layout: Layout, z0: State, x: Any, conditioning: str) -> tuple[str, dict[str, Any]]:
    """(the solver's name, its options that say what it sees of x)."""
    seen = context_options(f, layout, z0, x, conditioning)
    if name == "coordinatewise" and seen.get("context_channels", layout.channels) != layout.channels:
        seen = context_options(f, layout, z0, x, "initial_value" if conditioning == "auto" else conditioning)
    if name == "meta-broyden" and seen["conditioning"] == "input" and offers(f, PeacemanRachford):
        name = "meta-splitting"
    if name == "meta-splitting":
        check_methods(f, PeacemanRachford())
    return name, seen


def _training(name: str, classical: Classical, told: dict[str, Any]) -> MetaConfig:
    unroll = told.setdefault("unroll", schedule(classical.fewest))
    if "segments" not in told and name == "meta-broyden":
        told |= {"segments": segments(unroll, classical.most), "drop_below": classical.judged["tolerances"][0]} | told
    config = MetaConfig(**{key: told[key] for key in ("unroll", "segments", "drop_below") if key in told})
    steps = told.pop("steps") or max(1, solver_steps(operations(*classical.problems)) // expected_steps(config))
    worth = config.worth
    usual = {
        "backend": "native",
        "validate_every": max(1, min(steps // 8, LOOK // worth)),
        **(RATES if name in OURS else {}),
        **({"anchor": ANCHOR} if name == "meta-broyden" else {}),
    }
    return MetaConfig(steps=steps, **{**usual, **told})


def _with_options(made: Plan, f: Any, classical: Classical, z0: State) -> Plan:
    """A plan with the options that are chosen for one of `OURS`."""
    config, options, kind = made.training, made.options, made.layout.kind
    chosen: dict[str, Any] = {"dilations": dilations(f, kind)}
    if "learned_steps" not in options:
        secants = kind == "vector" and made.solver == "meta-splitting"
        chosen |= gated_steps(config.worth, options.get("coefficients", "schedule"), extra=not secants)
    made = replace(made, options={**chosen, **options})
    if {"damping", "alpha"} & set(options):
        return made
    if made.solver == "meta-splitting":
        best = classical.solvers["Peaceman-Rachford"].alpha
        first = {"alpha": best if kind == "vector" else splitting_alpha(best, *classical.problems, **classical.judged)}
    else:

        def untrained(**step: float) -> Any:
            return replace(made, options={**made.options, **step}).build(z0)

        first = {"damping": best_damping(untrained, *classical.problems, **classical.judged)}
    return replace(made, options={**made.options, **first})


@torch.no_grad()
def operations(f: Callable[..., State], z0: State, x: Any) -> float:
    """Floating-point operations of f for a sample, without elementwise ones, which torch does not count."""
    given = () if x is None else (bare(x),)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused transformer layer is not counted either
    try:
        with FlopCounterMode(display=False) as counter:
            f(z0, *given)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() / len(pytree.tree_leaves(z0)[0])


def room(layout: Layout, most: int = ROOM) -> int:
    """How many problems may be solved at once, at most."""
    return min(most, max(FEWEST, ROOM // (layout.channels * math.prod(layout.extents(layout.shape)))))


def as_solved(f: Callable[..., State], z0: State, x: Any) -> tuple[Callable[..., State], State, Any]:
    """(f, z0, context) as solvers will meet them: inside a `ModelMap`'s model f is a closure, without a context."""
    if not isinstance(f, ModelMap):
        return f, z0, x
    given = bare(x)
    return lambda z: f(z, given), z0, None
