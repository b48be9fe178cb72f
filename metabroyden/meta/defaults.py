"""What `fit_solver` chooses for a person who says nothing: layout, context and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from metabroyden.deprecated import WORDS, current
from metabroyden.learned.layout import KINDS, Layout, guess_layout, packed_layout
from metabroyden.meta.target import ModelMap
from metabroyden.meta.tasks import TaskSet, rows
from metabroyden.solution import Cell, State
from metabroyden.solve import solve
from metabroyden.solvers.splitting import PeacemanRachford
from metabroyden.solvers.tuning import tune

CONDITIONINGS = ("auto", "initial_value", "input")
SEGMENTS = range(6, 15)  # solver steps a segment may have
MOST_SEGMENTS, LATER = 3, 0.2  # segments of an unroll, at most; what one after the first costs, as a share of the first
SOLVER_STEPS = (3_000, 11_200)  # of a whole training, all unrolls together: the fewest and the most
ANCHOR = 0.5  # weight, see `Unrolling`
LOOK = 1_400  # solver steps from one look at validation to the next, at most
RATES: dict[str, Any] = {"learning_rate": 5e-3, "orthogonal_rate": 0.05}  # peak rates for a `MetaBroyden`
EVALUATIONS_A_DECADE = 8 / 3
"""What a `MetaSplitting`'s step length α leaves to the directions that it is too small for, see `splitting_alpha`."""
DAMPINGS = (1.0, 0.5, 0.25, 0.12)
"""Step lengths of the iteration that a `MetaBroyden` is before training; the best is taken."""


def state_layout(f: Cell, z: State, kind: str | None) -> Layout:
    """The layout of states like z: of the kind given, else of the cell's own attribute `layout`, else guessed.

    ValueError where the kind does not fit, or nothing can be guessed.
    """
    own = getattr(f, "layout", None)
    if kind is None and isinstance(own, str) and WORDS.get(own, own) in KINDS:
        kind = own
    kind = None if kind is None else current(kind)
    shape: Any = tuple(z.shape[1:]) if isinstance(z, Tensor) else tuple(tuple(part.shape[1:]) for part in z)
    if kind is None:
        return guess_layout(shape)
    if isinstance(z, Tensor):
        return Layout(kind, shape)
    if kind in KINDS and kind not in ("pyramid", "vector"):
        raise ValueError(
            f"the layout of a state of several tensors is 'pyramid', or 'vector' for one vector; got {kind!r}"
        )
    return packed_layout(shape) if kind == "vector" else Layout(kind, shape)


def tasks_layout(tasks: TaskSet) -> tuple[Layout, int]:
    """The layout of a task set's states, and how many channels its context has in canonical form (0: none to be had).

    The layout is the cell's own `layout` where it has one; else guessed: the states of a converted network, a
    tuple of vectors, are one vector. The context is the injection: the first tensor where there are several.
    """
    z0, x = tasks.prepare(rows(tasks.split("validation"), slice(1)))
    layout = state_layout(tasks.f, z0, None)
    return layout, layout.context_channels(x, layout.shape)


def context_options(f: Cell, layout: Layout, z: State, x: Any, conditioning: str) -> dict[str, Any]:
    """Options of a learned solver that say what it sees of x; ValueError where it cannot see what is asked for.

    A native context needs a tensor (of a tuple the first) of the state's dtype and device with its spatial or time extents,
    and an f that takes it: inside a torchdeq model f is a closure.
    """
    conditioning = current(conditioning)
    if conditioning not in CONDITIONINGS:
        raise ValueError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, got {conditioning!r}")
    if conditioning == "initial_value":
        return {"conditioning": "initial_value"}
    first = z if isinstance(z, Tensor) else z[0]
    seen = x[0] if isinstance(x, tuple) and x else x
    alike = isinstance(seen, Tensor) and (seen.dtype, seen.device) == (first.dtype, first.device)
    channels = layout.context_channels(x, layout.shape) if alike and not isinstance(f, ModelMap) else 0
    if channels:
        return {"conditioning": "input", "context_channels": channels}
    if conditioning == "auto":
        return {"conditioning": "initial_value"}
    why = (
        "a torchdeq model solves a closure, with no context to see"
        if isinstance(f, ModelMap)
        else f"x must be a tensor like the state, {first.dtype} of layout {layout.kind!r} and shape {layout.shape} but for "
        f"its channels, or a tuple that begins with one; got {_described(seen)}"
    )
    raise ValueError(f"conditioning='input' cannot be had: {why}; say conditioning='initial_value'")


def _described(seen: Any) -> str:
    return (
        f"{seen.dtype} of per-sample shape {tuple(seen.shape[1:])}" if isinstance(seen, Tensor) else type(seen).__name__
    )


def best_damping(make: Callable[..., Any], f: Cell, z0: State, x: Any, **options: Any) -> float:
    """The damping with which the untrained `make(damping=…)` needs fewest evaluations; the smallest if none solves any.

    An unroll has to begin as an iteration that does not diverge: where f has large negative eigenvalues, with small steps.
    f, z0 and x as for `solve`, options as for `tune`.
    """
    candidates = [make(damping=damping).eval() for damping in DAMPINGS[::-1]]
    return float(tune(candidates, f, z0, x, **options)[0][0].config.damping)


def splitting_alpha(best: float, f: Cell, z0: State, x: Any, *, tolerances: tuple[float], max_nfe: int) -> float:
    """α of Peaceman–Rachford's map for a learned solver, at least the one that is best for the method itself.

    The best one holds the balance between directions that it is too small for and stiff ones that it is too large for.
    Stiff ones are few, and a learned inverse knows them. At half of it the method's evaluations are those of the
    others, and inversely proportional to α; it is made so large that these would need `EVALUATIONS_A_DECADE`. Not for
    vectors: little is gained there, and a rare sample takes five times as long (results/RESEARCH.md, 72).
    f, z0, x, tolerances and max_nfe as for `tune`.
    """
    (rtol,), half = tolerances, best / 2
    found = solve(f, z0, x, solver=PeacemanRachford(half), rtol=rtol, max_nfe=max_nfe, throw=False)
    spent, _ = found.trace.evaluations_to(rtol, max_nfe)
    needed, decades = float(spent.mean()), max(1.0, -math.log10(rtol))
    return max(best, round(half * needed / (EVALUATIONS_A_DECADE * decades), 4))


def dilations(f: Cell, layout: str) -> tuple[int, int]:
    """Of a `MetaBroyden`'s two maps, so that no token within eight evaluations of f is left out, see `Preconditioner`.

    f's own attribute `dilation` is the distance in tokens that an evaluation carries news; 1 where it has none.
    """
    step = getattr(f, "dilation", 1)
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        step = 1
    return (step, 3 * step) if layout in ("nct", "ntc", "tokens", "graph") else (1, 1)


def gated_steps(trained: int, coefficients: str = "schedule", *, extra: bool = True) -> dict[str, int]:
    """Options of a `MetaBroyden` unrolled for so many steps: a table's last row goes on for half as many, eight at least.

    extra: False where secant steps follow at once. On Peaceman–Rachford's map for vectors these save evaluations; elsewhere
    they cost more time than they save (results/RESEARCH.md, 56).
    """
    more = max(8, trained // 2) if coefficients == "schedule" and extra else 0
    return {"schedule_length": trained, "learned_steps": trained + more}


def solver_steps(operations: float) -> int:
    """Solver steps of a whole training, where no number of outer steps is asked for, by f's operations for a sample.

    7,000 for an f of 1.25 million, which takes about a millisecond for 32 samples on a core; with the fourth root of what it
    costs less or more.
    """
    low, high = SOLVER_STEPS
    return round(min(high, max(low, 7_000 * (1.25e6 / max(operations, 1.0)) ** 0.25)))


def schedule(fewest: float) -> int:
    """Steps of a segment of an unroll, by the evaluations of the best classical solver: half of them, see `SEGMENTS`.

    A learned solver is to need half of them, and longer segments spend training on iterates that are there already
    (results/RESEARCH.md, 43); through more than 14 steps gradients are cut.
    """
    return min(max(math.ceil(fewest / 2), SEGMENTS[0]), SEGMENTS[-1])


def segments(unroll: int, most: float) -> int:
    """Segments of an unroll, by the evaluations that the best classical solver needs on the hard problems: half of these.

    Segments after the first are of the samples that are not solved yet, and cost little (results/RESEARCH.md, 52).
    """
    return min(max(round(most / (2 * unroll)), 1), MOST_SEGMENTS)


def expected_steps(config: Any) -> int:
    """Solver steps of an outer step on a whole batch, about, of a `MetaConfig`."""
    later = LATER if config.drop_below else 1.0
    return max(1, round(config.worth / config.segments * (1 + later * (config.segments - 1))))
