"""Robustness beside speed, as one table: share solved, slow tail, other equilibria, other inputs, wrong weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from experiments.bench.problems import BIBLE, CHANGES
from experiments.race.units import WRONG
from metabroyden.comparison.figures import FLAGSHIP
from metabroyden.comparison.measure import FAR
from metabroyden.comparison.statistics import BEST, Field, Outcome
from metabroyden.comparison.tables import Table, listed

WORDS = """\
MetaBroyden / the best classical solver: share solved within the budget; 90th percentile of evaluations; solutions at another
equilibrium; then mean evaluations (share solved) on other inputs, and with the weights of every tensor in another order
(beside Broyden's method, which takes over)."""


def table(field: Field, outside: Field | None, at: float) -> Table:
    """A row a family: MetaBroyden / the best classical solver there; with wrong weights Broyden's method."""

    def there(change: str) -> Callable[[str], str]:
        def cell(family: str) -> str:
            problem = f"{family}, {change}"
            if outside is None or problem not in outside.families:
                return ""
            return f"{_seen(outside.must(problem, FLAGSHIP, at))} / {_seen(outside.must(problem, BEST, at))}"

        return cell

    def both(cell: Callable[[str, str], str]) -> Callable[[str], str]:
        return lambda family: " / ".join(cell(family, solver) for solver in (FLAGSHIP, BEST))

    return listed(f"Robustness, to {at:g}", field.ran(FLAGSHIP), [
        ("family", str),
        ("solved", both(lambda family, solver: f"{field.must(family, solver, at).success:.1%}")),
        ("90%", both(lambda family, solver: f"{field.must(family, solver, at).p90:.0f}")),
        ("elsewhere", both(lambda family, solver: f"{elsewhere(field, at, family, solver):.1%}")),
        *((change, there(change)) for change in (*CHANGES, BIBLE, WRONG)),
    ])  # fmt: skip


def _seen(found: Outcome) -> str:
    return f"{found.mean:.1f} ({found.success:.1%})"


def elsewhere(field: Field, at: float, family: str, solver: str) -> float:
    """Share of the samples solved that are far from the float64 equilibrium, and stay so when solved to less.

    On an ill-conditioned problem the same solver comes nearer with a smaller tolerance, at another equilibrium it does not.
    NaN where nothing is known.
    """
    solver = field.named(family, solver, at)
    found = field.samples(family, solver, at, "distance")
    known = field.must(family, solver, at).solved & np.isfinite(found)
    for tighter in field.tolerances:
        if tighter < at and field.outcome(family, solver, tighter) is not None:
            found = np.fmin(found, field.samples(family, solver, tighter, "distance"))
    return float(np.mean((found > FAR * at)[known])) if known.any() else float("nan")
