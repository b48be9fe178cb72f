"""A fitted solver against tuned classical ones, on problems that neither was chosen on: the figures and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metabroyden.gradients.base import parts_of
from metabroyden.meta.progress import print_table
from metabroyden.meta.tasks import rows
from metabroyden.shared import bare
from metabroyden.solution import Solution, State
from metabroyden.solve import solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.solvers.clock import race
from metabroyden.state import Packing, gather

UNTUNED = "Broyden, untuned"
"""The solver that a DEQ has by default: one of the contestants."""
FAR = 10.0
"""A solution is elsewhere where its relative distance to the reference exceeds so many tolerances, and stays so."""
CLOSER = 100.0
"""Solutions are solved on to a tolerance so many times smaller."""
Score = Callable[[State], np.ndarray]
"""States → (B,) how good they are for the task, higher being better."""


def standard_error(success: float, count: int) -> float:
    """Of a share of `count` samples; all of them solved is no certainty."""
    smoothed = (success * count + 1) / (count + 2)
    return float((smoothed * (1 - smoothed) / count) ** 0.5)


@dataclass(frozen=True)
class SolverResult:
    """How one solver did. B problems.

    Attributes:
        solver: what was run. budget: evaluations allowed a problem.
        nfe: (B,) evaluations, the budget where it failed. solved: (B,) bool. seconds: of whole solves of all problems in one
            batch; the k-th is of the same round as every other solver's k-th.
        elsewhere: (B,) bool, where its solution is not the reference's; None where that was not looked at. both: (B,) bool,
            problems that it and the reference solve, of which `apart` tells. scores: (B,) of the task; None for none.
    """

    solver: Any
    budget: int
    nfe: np.ndarray
    solved: np.ndarray
    seconds: np.ndarray
    elsewhere: np.ndarray | None = None
    both: np.ndarray | None = None
    scores: np.ndarray | None = None

    @property
    def apart(self) -> float:
        """Share of the problems solved by both where its solution is not the reference's; 0 where there are none."""
        if self.elsewhere is None or self.both is None or not self.both.any():
            return 0.0
        return float(self.elsewhere[self.both].mean())

    @property
    def score(self) -> float | None:
        """Mean score."""
        return None if self.scores is None else float(self.scores.mean())

    @property
    def mean(self) -> float:
        """Mean evaluations, a failure counting twice the budget."""
        return float(np.where(self.solved, self.nfe, 2 * self.budget).mean())

    @property
    def success(self) -> float:
        """Share of the problems that were solved."""
        return float(self.solved.mean())

    def time_over(self, other: SolverResult) -> float:
        """Its time over another's: the median of the ratios of the rounds."""
        return float(np.median(self.seconds / other.seconds))

    def figures(self, fitted: SolverResult) -> dict[str, Any]:
        """All of it as JSON, with the time of the fitted solver over this one's."""
        median, most = np.quantile(np.where(self.solved, self.nfe, self.budget), [0.5, 0.9], method="nearest")
        more = {} if self.scores is None else {"score": self.score}
        return {
            "config": type(self.solver).__name__ if hasattr(self.solver, "parameters") else repr(self.solver),
            "mean_evaluations": self.mean,
            "median_evaluations": int(median),
            "p90_evaluations": int(most),
            "success": self.success,
            "seconds": float(np.median(self.seconds)),
            "fitted_over_this": fitted.time_over(self),
            "elsewhere": self.apart,
            **more,
        }


@dataclass(frozen=True)
class Comparison:
    """The results, and what follows from them.

    The fitted solver has won where it solves no fewer problems than any classical one, and against each rival needs fewer
    evaluations in the mean and less time, by the median ratio of paired rounds; is elsewhere no more often than the rival
    that is so most often, give or take a standard error, as classical solvers, too, choose among several equilibria; and
    scores no lower than the best rival, give or take a standard error of the
    paired difference.

    Attributes:
        name: of the fitted solver. results: of all by name. rtol: what was solved to.
        reference: the classical solver whose equilibria the solutions are held against.
    """

    name: str
    results: dict[str, SolverResult]
    rtol: float
    reference: str = UNTUNED

    @property
    def fitted(self) -> SolverResult:
        """The fitted solver's standing."""
        return self.results[self.name]

    @property
    def classical(self) -> dict[str, SolverResult]:
        """The results of the others."""
        return {name: one for name, one in self.results.items() if name != self.name}

    @property
    def rivals(self) -> dict[str, SolverResult]:
        """The classical solvers of the highest success, or no more than its standard error below it."""
        top, count = max(one.success for one in self.classical.values()), len(self.fitted.nfe)
        return {name: one for name, one in self.classical.items() if one.success >= top - standard_error(top, count)}

    @property
    def best(self) -> str:
        """The fastest of the rivals."""
        return max(self.rivals, key=lambda name: self.fitted.time_over(self.rivals[name]))

    @property
    def failed_criteria(self) -> list[str]:
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
        return said + self._other_solutions()

    def _other_solutions(self) -> list[str]:
        """In what its solutions are worse than the rivals', whatever they cost."""
        fitted, rivals, said = self.fitted, self.rivals, []
        most = max(rivals, key=lambda name: rivals[name].apart)
        shared = 0 if fitted.both is None else int(fitted.both.sum())
        if shared and fitted.apart > rivals[most].apart + standard_error(rivals[most].apart, shared):
            said.append(
                f"it is at another solution than {self.reference} on {fitted.apart:.1%} of the problems, {most} on "
                f"{rivals[most].apart:.1%}"
            )
        if fitted.scores is not None:
            top = max(rivals, key=lambda name: rivals[name].score or 0.0)
            less = fitted.scores - rivals[top].scores
            if not less.mean() >= -less.std() / len(less) ** 0.5:  # NaN too
                said.append(f"it scores {fitted.score:.4g}, {top} {rivals[top].score:.4g}")
        return said

    def summary(self) -> dict[str, Any]:
        """All figures as JSON."""
        return {
            "rtol": self.rtol,
            "max_nfe": self.fitted.budget,
            "samples": len(self.fitted.nfe),
            "mean_evaluations": self.fitted.mean,
            "mean_evaluations_broyden": self.results[UNTUNED].mean,
            "best_classical": self.best,
            "reference": self.reference,
            "failed_criteria": self.failed_criteria,
            "solvers": {name: one.figures(self.fitted) for name, one in self.results.items()},
        }

    def show(self) -> None:
        """Print the figures as a table, the classical solvers first."""
        scored = self.fitted.scores is not None
        head = (
            "solver",
            "median",
            "90%",
            "mean",
            "solved",
            "time",
            "ratio",
            "elsewhere",
            *(["score"] if scored else []),
        )
        rows = []
        for name, one in sorted(self.results.items(), key=lambda item: item[0] == self.name):
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
                    f"{figures['elsewhere']:.1%}",
                    *([f"{figures['score']:.4g}"] if scored else []),
                )
            )
        about = (
            f"{len(self.fitted.nfe)} held-out problems in one batch, to {self.rtol:g}, at most {self.fitted.budget} "
            f"evaluations.\nratio: time of {self.name} over time of the solver\nelsewhere: of the problems that "
            f"{self.reference} solves too, those whose solution is\nmore than {FAR:g} tolerances from its equilibrium, and "
            "stays so when solved on"
        )
        print_table(about, head, rows)


def compare_solvers(
    f: Callable[..., State],
    z0: State,
    context: Any,
    name: str,
    solvers: dict[str, Any],
    *,
    rtol: float,
    max_nfe: int,
    score: Score | None = None,
) -> Comparison:
    """Race the solver called `name` against the other ones; f, z0, context, rtol and max_nfe as for `solve`.

    Solutions are held against the equilibria of a reference, the classical solver that solves most (of several the first):
    its solutions, solved on by Broyden's method to a hundredth of the tolerance (or as near as that gets). A solution that
    is far from them is solved on as well: on an ill-conditioned problem it comes nearer, at another equilibrium it stays
    away.
    """
    found, taken = race(f, z0, context, solvers, rtol=rtol, max_nfe=max_nfe)
    solved = {key: found[key].converged.cpu().numpy() for key in solvers}
    reference = max((key for key in solvers if key != name), key=lambda key: solved[key].mean())
    star = _closer(f, found[reference], context, rtol, max_nfe)
    results = {}
    for key, solver in solvers.items():
        nfe = np.where(solved[key], found[key].nfe.numpy(), max_nfe)
        results[key] = SolverResult(
            solver,
            max_nfe,
            nfe,
            solved[key],
            np.array(taken[key]),
            elsewhere=_elsewhere(f, found[key], star, context, rtol, max_nfe),
            both=solved[key] & solved[reference],
            scores=None if score is None else score(found[key].z),
        )
    return Comparison(name, results, rtol, reference)


def by_sample(score: Callable[[State, Any], Any], x: Any) -> Score:
    """A score (z, x) → (B,) or a mean, as numbers by sample; one that gives a mean is asked for each sample alone.

    What samples share it sees as f does. It raises ValueError or TypeError where it gives anything else.
    """

    def scored(z: State, x: Any) -> Tensor:
        value = score(z, bare(x))
        try:
            return torch.as_tensor(value)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"score(z, x) must give numbers, or their mean, got {type(value).__name__}") from error

    def scores(z: State) -> np.ndarray:
        size = len(parts_of(z)[0])
        value = scored(z, x)
        if value.dim() == 0:
            value = torch.stack([scored(*_one(z, x, number)) for number in range(size)])
        if value.shape != (size,):
            raise ValueError(f"score(z, x) must give ({size},) numbers, or their mean, got shape {tuple(value.shape)}")
        return value.detach().double().cpu().numpy()

    return scores


def _one(z: State, x: Any, number: int) -> tuple[State, Any]:
    index = torch.tensor([number])
    return gather(z, index.to(parts_of(z)[0].device)), rows(x, index)


def _closer(f: Callable[..., State], found: Solution, context: Any, rtol: float, max_nfe: int) -> State:
    """The equilibria near solutions."""
    solver = Broyden(memory=max_nfe)
    return solve(f, found.z, context, solver=solver, rtol=rtol / CLOSER, max_nfe=max_nfe, throw=False).z


def _elsewhere(
    f: Callable[..., State], found: Solution, star: State, context: Any, rtol: float, max_nfe: int
) -> np.ndarray:
    """(B,) bool, whether a solution is far from the reference's equilibrium and, solved on, stays so."""
    far = _distance(found.z, star) > FAR * rtol
    return far & (_distance(_closer(f, found, context, rtol, max_nfe), star) > FAR * rtol) if far.any() else far


def _distance(z: State, star: State) -> np.ndarray:
    """(B,) ‖z − z*‖ / ‖z*‖, 0 where both are 0."""
    packing = Packing.of(z)
    flat, at = packing.pack(z).double(), packing.pack(star).double()
    apart: Tensor = (flat - at).norm(dim=1) / at.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return apart.cpu().numpy()
