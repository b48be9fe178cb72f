"""A fitted solver against tuned classical ones, on problems that neither was chosen on: the figures and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metabroyden.meta.progress import print_table
from metabroyden.solution import State
from metabroyden.solvers.clock import race

UNTUNED = "Broyden, untuned"
"""The solver that a DEQ has by default: one of the contestants."""


def standard_error(success: float, count: int) -> float:
    """Of a share of `count` samples; all of them solved is no certainty."""
    smoothed = (success * count + 1) / (count + 2)
    return float((smoothed * (1 - smoothed) / count) ** 0.5)


@dataclass(frozen=True)
class Standing:
    """How one solver did. B problems.

    Attributes:
        solver: what was run. budget: evaluations allowed a problem.
        nfe: (B,) evaluations, the budget where it failed. solved: (B,) bool. seconds: of whole solves of all problems in one
            batch; the k-th is of the same round as every other solver's k-th.
    """

    solver: Any
    budget: int
    nfe: np.ndarray
    solved: np.ndarray
    seconds: np.ndarray

    @property
    def mean(self) -> float:
        """Mean evaluations, a failure counting twice the budget."""
        return float(np.where(self.solved, self.nfe, 2 * self.budget).mean())

    @property
    def success(self) -> float:
        """Share of the problems that were solved."""
        return float(self.solved.mean())

    def time_over(self, other: Standing) -> float:
        """Its time over another's: the median of the ratios of the rounds."""
        return float(np.median(self.seconds / other.seconds))

    def figures(self, fitted: Standing) -> dict[str, Any]:
        """All of it as JSON, with the time of the fitted solver over this one's."""
        median, most = np.quantile(np.where(self.solved, self.nfe, self.budget), [0.5, 0.9], method="nearest")
        return {
            "config": type(self.solver).__name__ if hasattr(self.solver, "parameters") else repr(self.solver),
            "mean_evaluations": self.mean,
            "median_evaluations": int(median),
            "p90_evaluations": int(most),
            "success": self.success,
            "seconds": float(np.median(self.seconds)),
            "fitted_over_this": fitted.time_over(self),
        }


@dataclass(frozen=True)
class Contest:
    """The standings, and what follows from them.

    The fitted solver has won where it solves no fewer problems than any classical one, and against each rival needs fewer
    evaluations in the mean and less time, by the median ratio of paired rounds.

    Attributes:
        name: of the fitted solver. standings: of all by name. rtol: what was solved to.
    """

    name: str
    standings: dict[str, Standing]
    rtol: float

    @property
    def fitted(self) -> Standing:
        """The fitted solver's standing."""
        return self.standings[self.name]

    @property
    def classical(self) -> dict[str, Standing]:
        """The standings of the others."""
        return {name: one for name, one in self.standings.items() if name != self.name}

    @property
    def rivals(self) -> dict[str, Standing]:
        """The classical solvers of the highest success, or no more than its standard error below it."""
        top, count = max(one.success for one in self.classical.values()), len(self.fitted.nfe)
        return {name: one for name, one in self.classical.items() if one.success >= top - standard_error(top, count)}

    @property
    def best(self) -> str:
        """The fastest of the rivals."""
        return max(self.rivals, key=lambda name: self.fitted.time_over(self.rivals[name]))

    @property
    def shortfalls(self) -> list[str]:
        """In what the fitted solver does not win; empty where it does."""
        fitted, rivals, best = self.fitted, self.rivals, self.best
        said = []
        surest = max(rivals, key=lambda name: rivals[name].success)
        if fitted.success < rivals[surest].success:
            said.append(f"it solves {fitted.success:.1%}, {surest} {rivals[surest].success:.1%}")
        fewest = min(rivals, key=lambda name: rivals[name].mean)
        if fitted.mean >= rivals[fewest].mean:
            said.append(f"it needs {fitted.mean:.1f} evaluations in the mean, {fewest} {rivals[fewest].mean:.1f}")
        ratio = fitted.time_over(rivals[best])
        if ratio >= 1:
            said.append(f"it takes {ratio:.2f} times as long as {best}")
        return said

    def summary(self) -> dict[str, Any]:
        """All figures as JSON."""
        return {
            "rtol": self.rtol,
            "max_nfe": self.fitted.budget,
            "samples": len(self.fitted.nfe),
            "mean_evaluations": self.fitted.mean,
            "mean_evaluations_broyden": self.standings[UNTUNED].mean,
            "best_classical": self.best,
            "shortfalls": self.shortfalls,
            "solvers": {name: one.figures(self.fitted) for name, one in self.standings.items()},
        }

    def show(self) -> None:
        """Print the figures as a table, the classical solvers first."""
        head = ("solver", "median", "90%", "mean", "solved", "time", "ratio")
        rows = []
        for name, one in sorted(self.standings.items(), key=lambda item: item[0] == self.name):
            figures = one.figures(self.fitted)
            rows.append(
                (
                    name,
                    f"{figures['median_evaluations']}",
                    f"{figures['p90_evaluations']}",
                    f"{figures['mean_evaluations']:.1f}",
                    f"{figures['success']:.1%}",
                    f"{1e3 * figures['seconds']:.1f} ms",
                    f"{figures['fitted_over_this']:.2f}×",
                )
            )
        about = (
            f"Evaluations and time of a solve, {len(self.fitted.nfe)} held-out problems in one batch, to {self.rtol:g}, at "
            f"most {self.fitted.budget} evaluations; ratio: time of {self.name} over time of the solver"
        )
        print_table(about, head, rows)


def contest(
    f: Callable[..., State],
    z0: State,
    context: Any,
    name: str,
    solvers: dict[str, Any],
    *,
    rtol: float,
    max_nfe: int,
) -> Contest:
    """Race the solver called `name` against the other ones; f, z0, context, rtol and max_nfe as for `solve`."""
    found, taken = race(f, z0, context, solvers, rtol=rtol, max_nfe=max_nfe)
    standings = {}
    for key, solver in solvers.items():
        solved = found[key].converged.cpu().numpy()
        nfe = np.where(solved, found[key].nfe.numpy(), max_nfe)
        standings[key] = Standing(solver, max_nfe, nfe, solved, np.array(taken[key]))
    return Contest(name, standings, rtol)
