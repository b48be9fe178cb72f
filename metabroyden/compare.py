"""`compare`: solvers on one's own DEQ, against tuned classical ones: a table, figures, files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metabroyden.checkpoint import load_solver
from metabroyden.comparison.clock import clocked
from metabroyden.comparison.comparison import Comparison
from metabroyden.comparison.measure import Contestant, Rules, depth_rows, measure, stamp_of
from metabroyden.comparison.problems import CHUNK, HeldOut
from metabroyden.comparison.statistics import BEST, FASTEST
from metabroyden.comparison.verdict import UNTUNED, contestant, judge_of
from metabroyden.deprecated import old_options
from metabroyden.learned.fingerprint import module_of
from metabroyden.meta.fit import check_starts, contexts_of, device_of
from metabroyden.meta.inputs import check_contexts
from metabroyden.meta.plan import ROOM, TUNED_ON
from metabroyden.meta.target import ModelMap, Target, first_call, resting, target_of
from metabroyden.meta.tasks import count, rows
from metabroyden.nn.pin import pin
from metabroyden.solution import Cell, State
from metabroyden.solve import check_options, solve
from metabroyden.solver import as_solver
from metabroyden.solvers.broyden import Broyden
from metabroyden.solvers.classical import splitting_solvers, tuned_solvers
from metabroyden.solvers.registry import get_solver, list_solvers, name_of
from metabroyden.state import Packing

DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60, 80, 100)
"""Evaluations after which the metric is measured, up to the budget."""
FEW = 4
"""Problems that the classical solvers are tuned on at least, where there are as many, however large a state is."""
TAKEN = (UNTUNED, "Picard", "Anderson", "tuned Picard", "tuned Anderson", "tuned Broyden", "forward-backward",
         "Peaceman-Rachford")  # fmt: skip
"""Names that classical solvers have, and no learned one may."""


@old_options
@torch.no_grad()
def compare(
    f: Cell,
    x_test: Any,
    *,
    solvers: Any,
    tune_on: Any = None,
    z0: Callable[[Any], State] | None = None,
    rtol: float | Sequence[float] = (1e-2, 1e-3),
    max_nfe: int = 60,
    metric: Callable[[State, Any], Any] | None = None,
    rounds: int = 5,
    title: str = "",
    progress: bool = True,
) -> Comparison:
    """Compare solvers with each other and with classical ones on the fixed points of f(z, x). No labels are needed.

    Picard's iteration, Anderson acceleration and Broyden's method (and operator splitting where f offers its parts), each
    with the best options of a grid on `tune_on`, and Broyden's method as a `DEQ` has it by default, run beside the given
    solvers. All solve the same problems, a tolerance at a time, and take turns on the clock.

    Args:
        f: z⁺ = f(z, x), batch first; or a `DEQ`; or a model with one `DEQ` in it, ours or torchdeq's, whose raw inputs
            x_test are; as for `fit_solver`. Modules (f, the model, solvers) are in evaluation mode while it lasts.
        x_test: contexts of N samples that no solver was fitted to: a tensor (N, ...), a pytree of such tensors, or an
            iterable of batches, as `fit_solver` takes them (of which 2,048 samples are taken).
        solvers: by name, solvers, names of registered ones ("broyden"), and files or names for `load_solver`; or several
            of these without names, or one. A classical solver takes the place of ours of the same name; a learned one
            may not have such a name.
        tune_on: contexts on which the options of the classical solvers are chosen, at most 32 samples (fewer, but four,
            where states are large). None: the last fifth of x_test, at most 32 samples, which is then not measured; of
            fewer than ten samples nothing is tuned.
        z0: x → start; default as for `fit_solver`.
        rtol: relative residuals to solve to, each in a solve of its own.
        max_nfe: evaluations of f for each sample.
        metric: (z, x) → how good the states z are for the samples x: a tensor (B,), or the mean. Labels may travel in x.
        rounds: timed ones, in which the solvers take turns; 0: nothing is timed.
        title: of figures and reports.
        progress: show a bar (needs rich).

    Returns:
        The comparison: `print` it, `plot_reduction()`, `plot_residual()`, `plot_time()`, `plot_metric()`, `save(folder)`.

    Raises:
        TypeError, ValueError: bad input, saying what was given and what is wanted.

    Examples:
        >>> import torch, metabroyden as mb
        >>> f = lambda z, x: torch.tanh(0.9 * z.roll(1, 1) - 0.5 * z + x)
        >>> found = mb.compare(f, torch.randn(60, 8), solvers=mb.Newton(), rtol=1e-3, rounds=0, progress=False)
        >>> found.names, found.samples
        (['Newton', 'Broyden', 'tuned Picard', 'tuned Anderson', 'tuned Broyden'], 48)
    """
    tolerances = _tolerances(rtol)
    named, target = _named(solvers), target_of(f)
    target = target if z0 is None else target._replace(z0=z0)
    _check(target, named, tolerances, max_nfe)
    _check_words(target, rounds, metric, title)
    max_nfe, rounds = int(max_nfe), int(rounds)
    x_test = _contexts(x_test, target, "x_test")
    tune_on = None if tune_on is None else _contexts(tune_on, target, "tune_on")
    with ExitStack() as stack:
        for module in (target.whole or module_of(target.f), *named.values()):
            stack.enter_context(resting(module if isinstance(module, nn.Module) else None))
        tuning, x_test = _split(x_test, tune_on)
        held = _held(target, x_test, "x_test", metric)
        _try(held, named, max_nfe)
        room = max(1, ROOM // sum(shape.numel() for shape in Packing.of(held.z0).shapes))
        tuning = None if tuning is None else rows(tuning, slice(max(FEW, room)))
        classical = {UNTUNED: Broyden()} | _tuned(target, tuning, tolerances, max_nfe)
        by_name = {**named, **_others(classical, named)}
        everyone = [contestant(name, one) for name, one in by_name.items()]
        found = measure(held, everyone, Rules(tolerances, max_nfe, room, rounds, elsewhere=True), progress=progress)
        if metric is not None:
            found += _depths(held, everyone, max_nfe)
    methods = {name: name_of(solver) for name, solver in by_name.items()}
    about = _about(held, None if tuning is None else count(tuning), tune_on is None, rounds)
    return Comparison(found, solvers=by_name, methods=methods, title=title or "", about=about)


def _tolerances(rtol: Any) -> tuple[float, ...]:
    """Each once, the loosest first; a number in single precision is taken for the decimal that it stands for."""
    given = rtol.tolist() if isinstance(rtol, (Tensor, np.ndarray, np.generic)) else rtol
    several = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not several:
        raise ValueError("rtol is empty: give one relative residual or several, such as (1e-2, 1e-3)")
    for one in several:
        if isinstance(one, bool) or not isinstance(one, Real):
            raise TypeError(f"rtol must be a number or several, such as (1e-2, 1e-3), got {one!r:.40}")
    return tuple(sorted({float(f"{float(one):.6g}") for one in several}, reverse=True))


def _named(solvers: Any) -> dict[str, Any]:
    """Solvers by name."""
    if isinstance(solvers, Mapping):
        named = {name: _solver(one) for name, one in solvers.items()}
    else:
        whole = isinstance(solvers, (str, nn.Module)) or not isinstance(solvers, Iterable)
        named = {}
        for given in [solvers] if whole else solvers:
            one = _solver(given)
            file = isinstance(given, (str, os.PathLike)) and given not in list_solvers(learned=False, splitting=False)
            usual = Path(given).stem if file else type(one).__name__
            same = sum(name.split(" #")[0] == usual for name in named)
            named[f"{usual} #{same + 1}" if same else usual] = one
    if not named:
        raise ValueError("solvers is empty: give at least one, such as mb.Broyden() or a fitted one")
    for name, one in named.items():
        _check_name(name, as_solver(one).is_learned)
    return named


def _check_name(name: Any, learned: bool) -> None:
    if not isinstance(name, str) or not name or name != " ".join(name.split()):
        raise ValueError(f"the name of a solver must be one line of text, without spaces around it, got {name!r}")
    if name in (BEST, FASTEST) or (learned and name in TAKEN):
        raise ValueError(f"{name!r} is the name of a classical solver that runs too: give the solver another one")


def _solver(one: Any) -> Any:
    """A solver, from what people name it by."""
    if isinstance(one, str) and one in list_solvers(learned=False, splitting=False):
        return get_solver(one)
    if isinstance(one, (str, os.PathLike)):
        try:
            return load_solver(one if isinstance(one, str) else Path(one))
        except FileNotFoundError as error:
            if one in list_solvers(learned=True):
                more = f"; {one} is a learned solver, which has to be fitted first: give what fit_solver returns"
            else:
                more = f", nor that of a registered one ({', '.join(list_solvers(learned=False, splitting=False))})"
            raise FileNotFoundError(f"{error}{more}") from error
    as_solver(one)  # or it says what a solver is
    return one


def _others(classical: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """The classical solvers that the caller has not given, under this name or as the same solver."""
    given = [one for one in named.values() if not isinstance(one, nn.Module)]
    return {name: one for name, one in classical.items() if name not in named and one not in given}


def _check(target: Target, named: dict[str, Any], tolerances: tuple[float, ...], max_nfe: Any) -> None:
    for solver in named.values():
        for tolerance in tolerances:
            check_options(target.f, solver, tolerance, 0.0, max_nfe, 1, None)


def _check_words(target: Target, rounds: Any, metric: Any, title: Any) -> None:
    if isinstance(rounds, bool) or not isinstance(rounds, Integral) or rounds < 0:
        raise ValueError(f"rounds must be a whole number from 0, got {rounds!r}")
    for name, given in (("metric", metric), ("z0", target.z0)):
        if given is not None and not callable(given):
            raise TypeError(f"{name} must be a function, got {type(given).__name__}")
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be text, got {type(title).__name__}")


def _contexts(x: Any, target: Target, given: str) -> Any:
    """What was given for contexts under a name, as one pytree where f is."""
    x = contexts_of(x, target, given)
    check_contexts(x, zeros=target.z0 is None, given=given, least=1)
    device = device_of(target, x)
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), x)


def _split(x_test: Any, tune_on: Any) -> tuple[Any, Any]:
    """(contexts to tune on or None, contexts to measure on)."""
    size = count(x_test)
    if tune_on is not None:
        return rows(tune_on, slice(TUNED_ON)), x_test
    if size < 10:
        return None, x_test
    last = size - min(TUNED_ON, size // 5)
    return rows(x_test, slice(last, size)), rows(x_test, slice(last))


def _held(target: Target, raw: Any, given: str, metric: Any = None) -> HeldOut:
    start, x = target.prepare(raw)
    check_starts(start, count(raw), given)
    judge = None if metric is None else judge_of(metric, raw)
    closed = isinstance(target.f, ModelMap)
    f, x = (target.f, x) if closed else pin(target.f, x, start)
    return HeldOut(f, start, x, judge, closed=closed)


def _try(held: HeldOut, named: dict[str, Any], max_nfe: int) -> None:
    """ValueError for a solver that cannot run on these problems, or for a metric, before much time is spent.

    What f itself raises is raised as it is, but for the cases of `first_call`.
    """
    first = torch.arange(min(2, len(held)), device=held.device)
    f, z0, x = held.problem(first)
    first_call(f, z0, x)
    if held.judge is not None:
        several = torch.arange(min(CHUNK, len(held)), device=held.device)
        held.judge(held.take(several)[0], several)
    for name, one in named.items():
        try:
            solve(f, z0, x, solver=one, rtol=0.0, max_nfe=min(max_nfe, 2 * as_solver(one).min_nfe), throw=False)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the solver {name!r} cannot run on these problems: {error}") from error


def _tuned(target: Target, raw: Any, tolerances: tuple[float, ...], max_nfe: int) -> dict[str, Any]:
    """The classical solvers, tuned where there are contexts to tune on."""
    if raw is None:
        return {"Picard": get_solver("picard"), "Anderson": get_solver("anderson")}
    held, options = _held(target, raw, "tune_on"), {"budget": max_nfe, "tolerances": tolerances}
    problem = held.problem(torch.arange(len(held), device=held.device))
    return tuned_solvers(*problem, **options) | splitting_solvers(*problem, **options)  # type: ignore[arg-type]


def _depths(held: HeldOut, everyone: Sequence[Contestant], max_nfe: int) -> list[dict[str, Any]]:
    """Rows of the metric after so many evaluations, of solvers that have a state after each."""
    stamp, depths = stamp_of(held), [depth for depth in DEPTHS if depth <= max_nfe]
    shown = (one for one in everyone if as_solver(one.solver).min_nfe <= 1)
    return [{**stamp(one), **row} for one in shown for row in depth_rows(held, one.solver, depths)]


def _about(held: HeldOut, tuning: int | None, split: bool, rounds: int) -> str:
    tuned = (
        "the classical solvers have their default options" if tuning is None
        else f"the options of the classical solvers were chosen on {tuning} other{'s' if tuning > 1 else ''}"
        + (" of the same set" if split else "")
    )  # fmt: skip
    problems = f"{len(held)} problem{'s' if len(held) > 1 else ''}"
    return f"{problems}; {tuned}; {clocked(rounds, held.device)}."
