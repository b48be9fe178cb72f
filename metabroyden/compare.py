"""`compare`: solvers on one's own DEQ, against tuned classical ones: a table, figures, files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from metabroyden.checkpoint import load_solver
from metabroyden.comparison.comparison import Comparison
from metabroyden.comparison.measure import Contestant, Rules, depth_rows, measure, stamp_of
from metabroyden.comparison.problems import HeldOut
from metabroyden.comparison.verdict import UNTUNED, contestant, judge_of
from metabroyden.meta.fit import contexts_of
from metabroyden.meta.plan import FEWEST, ROOM, TUNED_ON
from metabroyden.meta.target import ModelMap, Target, resting, target_of
from metabroyden.meta.tasks import count, rows
from metabroyden.nn.pin import pin
from metabroyden.shared import bare
from metabroyden.solution import Cell, State
from metabroyden.solve import check_options
from metabroyden.solver import as_solver
from metabroyden.solvers.broyden import Broyden
from metabroyden.solvers.classical import splitting_solvers, tuned_solvers
from metabroyden.solvers.registry import get_solver, list_solvers, name_of
from metabroyden.state import Packing

DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60, 80, 100)
"""Evaluations after which the metric is measured, up to the budget."""


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
            x_test are; as for `fit_solver`. Layer and model are in evaluation mode while it lasts.
        x_test: contexts of N samples that no solver was fitted to: a tensor (N, ...), a pytree of such tensors, or an
            iterable of batches, as `fit_solver` takes them.
        solvers: by name, solvers, names of registered ones ("broyden"), and files or names for `load_solver`; or several
            of these without names, or one.
        tune_on: contexts on which the options of the classical solvers are chosen. None: the last fifth of x_test, at most
            32 samples, which is then not measured; of fewer than ten samples nothing is tuned.
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
    tolerances = tuple(sorted({float(at) for at in ([rtol] if isinstance(rtol, (int, float)) else rtol)}, reverse=True))
    named, target = _named(solvers), target_of(f)
    target = target if z0 is None else target._replace(z0=z0)
    _check(target, named, tolerances, max_nfe, rounds, metric)
    x_test, tune_on = contexts_of(x_test, target), None if tune_on is None else contexts_of(tune_on, target)
    with resting(target.whole):
        tuning, x_test = _split(x_test, tune_on)
        held = _held(target, x_test, metric)
        classical = {UNTUNED: Broyden()} | _tuned(target, tuning, tolerances, max_nfe)
        everyone = [contestant(name, one) for name, one in {**named, **_others(classical, named)}.items()]
        size = sum(shape.numel() for shape in Packing.of(held.z0).shapes)
        rules = Rules(tolerances, max_nfe, max(FEWEST, ROOM // size), rounds, elsewhere=True)
        found = measure(held, everyone, rules, progress=progress)
        if metric is not None:
            found += _depths(held, everyone, max_nfe)
    by_name = {one.name: one.solver for one in everyone}
    methods = {name: name_of(solver) for name, solver in by_name.items()}
    about = _about(count(x_test), None if tuning is None else count(tuning), tune_on is None, rounds)
    return Comparison(found, solvers=by_name, methods=methods, title=title, about=about)


def _named(solvers: Any) -> dict[str, Any]:
    """Solvers by name."""
    if isinstance(solvers, Mapping):
        named = {str(name): _solver(one) for name, one in solvers.items()}
    else:
        several = solvers if isinstance(solvers, Sequence) and not isinstance(solvers, str) else [solvers]
        named = {}
        for one in map(_solver, several):
            usual = type(one).__name__
            same = sum(name.split(" #")[0] == usual for name in named)
            named[f"{usual} #{same + 1}" if same else usual] = one
    if not named:
        raise ValueError("solvers is empty: give at least one, such as mb.Broyden() or a fitted one")
    return named


def _solver(one: Any) -> Any:
    """A solver, from what people name it by."""
    if isinstance(one, str) and one in list_solvers(learned=False, splitting=False):
        return get_solver(one)
    if isinstance(one, str) or hasattr(one, "__fspath__"):
        return load_solver(one)
    as_solver(one)  # or it says what a solver is
    return one.eval() if isinstance(one, nn.Module) else one


def _others(classical: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """The classical solvers that the caller has not given, under this name or as the same solver."""
    given = [one for one in named.values() if not isinstance(one, nn.Module)]
    return {name: one for name, one in classical.items() if name not in named and one not in given}


def _check(
    target: Target, named: dict[str, Any], tolerances: tuple[float, ...], max_nfe: int, rounds: int, metric: Any
) -> None:
    for solver in named.values():
        for tolerance in tolerances or (0.0,):
            check_options(target.f, solver, tolerance, 0.0, max_nfe, 1, None)
    if not tolerances:
        raise ValueError("rtol is empty: give one relative residual or several, such as (1e-2, 1e-3)")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"rounds must be a whole number from 0, got {rounds!r}")
    for name, given in (("metric", metric), ("z0", target.z0)):
        if given is not None and not callable(given):
            raise TypeError(f"{name} must be a function, got {type(given).__name__}")


def _split(x_test: Any, tune_on: Any) -> tuple[Any, Any]:
    """(contexts to tune on or None, contexts to measure on)."""
    size = count(x_test)
    if tune_on is not None:
        return rows(tune_on, slice(TUNED_ON)), x_test
    if size < 10:
        return None, x_test
    last = size - min(TUNED_ON, size // 5)
    return rows(x_test, slice(last, size)), rows(x_test, slice(last))


def _held(target: Target, raw: Any, metric: Any = None) -> HeldOut:
    x = raw if target.encode is None else target.encode(raw)
    start = torch.zeros_like(x) if target.z0 is None else target.z0(bare(x))
    judge, closed = None if metric is None else judge_of(metric, raw), isinstance(target.f, ModelMap)
    f, x = (target.f, x) if closed else pin(target.f, x, start)
    return HeldOut(f, start, x, judge, closed=closed)


def _tuned(target: Target, raw: Any, tolerances: tuple[float, ...], max_nfe: int) -> dict[str, Any]:
    """The classical solvers, tuned where there are contexts to tune on."""
    if raw is None:
        return {"Picard": get_solver("picard"), "Anderson": get_solver("anderson")}
    held, options = _held(target, raw), {"budget": max_nfe, "tolerances": tolerances}
    problem = held.problem(torch.arange(len(held), device=held.device))
    return tuned_solvers(*problem, **options) | splitting_solvers(*problem, **options)  # type: ignore[arg-type]


def _depths(held: HeldOut, everyone: Sequence[Contestant], max_nfe: int) -> list[dict[str, Any]]:
    """Rows of the metric after so many evaluations, of solvers that have a state after each."""
    stamp, depths = stamp_of(held), [depth for depth in DEPTHS if depth <= max_nfe]
    shown = (one for one in everyone if as_solver(one.solver).min_nfe <= 1)
    return [{**stamp(one), **row} for one in shown for row in depth_rows(held, one.solver, depths)]


def _about(size: int, tuning: int | None, split: bool, rounds: int) -> str:
    tuned = (
        "the classical solvers have their default options" if tuning is None
        else f"the options of the classical solvers were chosen on {tuning} others" + (" of the same set" if split else "")
    )  # fmt: skip
    clock = f"times are medians of {rounds} rounds in which the solvers take turns" if rounds else "nothing was timed"
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return f"{size} problems; {tuned}; {clock}, on {threads}."
