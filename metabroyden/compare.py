"""Solvers on the same problems: evaluations, success, time, whether they find the same equilibria, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metabroyden.gradients.base import parts_of
from metabroyden.shared import bare
from metabroyden.solution import Cell, Solution, State
from metabroyden.solve import solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.solvers.clock import race
from metabroyden.state import Packing, gather

UNTUNED = "Broyden, untuned"  # name of the solver that a DEQ has by default
FAR = 10.0
"""A solution is elsewhere if its relative distance to the reference exceeds this many tolerances, and still does when the
solve is continued."""
CLOSER = 100.0  # solves are continued to a tolerance smaller by this factor
Score = Callable[[State], np.ndarray]  # states → (B,) task scores, higher being better


def standard_error(success: float, count: int) -> float:
    """Standard error of a success rate over `count` samples, with one success and one failure added."""
    smoothed = (success * count + 1) / (count + 2)
    return float((smoothed * (1 - smoothed) / count) ** 0.5)


def able(results: Mapping[str, Any]) -> dict[str, Any]:
    """Those whose `success` is at most its standard error, `error`, below the highest."""
    top = max(results.values(), key=lambda one: one.success)
    return {name: one for name, one in results.items() if one.success >= top.success - top.error}


@dataclass(frozen=True)
class SolverResult:
    """The measurements of one solver on B problems."""

    solver: Any
    budget: int  # evaluations allowed for each problem
    nfe: np.ndarray  # (B,) evaluations, the budget for a failure
    solved: np.ndarray  # (B,) bool
    seconds: np.ndarray  # (rounds,) of whole solves of the batch; entries of one round are paired across solvers
    elsewhere: np.ndarray | None = None  # (B,) bool, whether the solution is not the reference's, if that was checked
    both: np.ndarray | None = None  # (B,) bool, problems that both this solver and the reference solve
    scores: np.ndarray | None = None  # (B,) task scores

    @property
    def apart(self) -> float:
        """Share of `both` where the solution is not the reference's; 0 if `both` is empty."""
        if self.elsewhere is None or self.both is None or not self.both.any():
            return 0.0
        return float(self.elsewhere[self.both].mean())

    @property
    def score(self) -> float | None:
        """Mean score."""
        return None if self.scores is None else float(self.scores.mean())

    @property
    def mean(self) -> float:
        """Mean evaluations, a failure counting as the budget."""
        return float(np.where(self.solved, self.nfe, self.budget).mean())

    @property
    def cost(self) -> float:
        """Mean evaluations, a failure counting twice the budget: what the verdict compares, so that solving more pays."""
        return float(np.where(self.solved, self.nfe, 2 * self.budget).mean())

    @property
    def success(self) -> float:
        """Share of the problems that were solved."""
        return float(self.solved.mean())

    @property
    def error(self) -> float:
        """Standard error of that share."""
        return standard_error(self.success, len(self.solved))

    def time_over(self, other: SolverResult) -> float:
        """Time relative to another solver: the median ratio of paired rounds."""
        return float(np.median(self.seconds / other.seconds))

    def figures(self, fitted: SolverResult) -> dict[str, Any]:
        """All figures as JSON, with the fitted solver's time relative to this one's."""
        median, most = np.quantile(np.where(self.solved, self.nfe, self.budget), [0.5, 0.9], method="nearest")
        return {
            "config": type(self.solver).__name__ if isinstance(self.solver, nn.Module) else repr(self.solver),
            "mean_evaluations": self.mean,
            "median_evaluations": int(median),
            "p90_evaluations": int(most),
            "success": self.success,
            "seconds": float(np.median(self.seconds)),
            "fitted_over_this": fitted.time_over(self),
            "elsewhere": self.apart,
            **({} if self.scores is None else {"score": self.score}),
        }


@dataclass(frozen=True)
class Comparison:
    """A fitted solver against classical ones.

    The fitted solver wins if it solves no fewer problems than any classical solver and, against each rival, needs fewer
    evaluations in the mean and less time (median ratio of paired rounds). In this mean a failure counts twice the budget,
    see `SolverResult.cost`, or else a rival that fails more would look cheaper; in all figures it counts as the budget. It
    must also not be elsewhere more often than the rival that is so most often, nor score lower than the best rival; both
    with one standard error of tolerance.
    """

    name: str  # of the fitted solver
    results: dict[str, SolverResult]  # of all solvers, by name
    rtol: float  # tolerance of the solves
    reference: str = UNTUNED  # the classical solver whose equilibria the solutions are compared with

    @property
    def fitted(self) -> SolverResult:
        """The fitted solver's result."""
        return self.results[self.name]

    @property
    def rivals(self) -> dict[str, SolverResult]:
        """The classical solvers whose success is within one standard error of the highest."""
        return able({name: one for name, one in self.results.items() if name != self.name})

    @property
    def best(self) -> str:
        """The fastest rival."""
        return max(self.rivals, key=lambda name: self.fitted.time_over(self.rivals[name]))

    @property
    def failed_criteria(self) -> list[str]:
        """The reasons why the fitted solver does not win; empty if it does."""
        fitted, rivals, best, failed = self.fitted, self.rivals, self.best, []
        surest = max(rivals, key=lambda name: rivals[name].success)
        if fitted.success < rivals[surest].success:
            failed.append(f"it solves {fitted.success:.1%}, {surest} {rivals[surest].success:.1%}")
        fewest = min(rivals, key=lambda name: rivals[name].cost)
        if fitted.cost >= rivals[fewest].cost:
            rule = (
                "" if fitted.solved.all() and rivals[fewest].solved.all() else ", a failure counting twice the budget"
            )
            failed.append(
                f"it needs {fitted.cost:.1f} evaluations in the mean{rule}, {fewest} {rivals[fewest].cost:.1f}"
            )
        ratio = fitted.time_over(rivals[best])
        if ratio >= 1:
            failed.append(f"it takes {ratio:.2f} times as long as {best}")
        return failed + self._worse_solutions()

    def _worse_solutions(self) -> list[str]:
        fitted, rivals, failed = self.fitted, self.rivals, []
        most = max(rivals, key=lambda name: rivals[name].apart)
        shared = 0 if fitted.both is None else int(fitted.both.sum())
        if shared and fitted.apart > rivals[most].apart + standard_error(rivals[most].apart, shared):
            failed.append(
                f"it is at another solution than {self.reference} on {fitted.apart:.1%} of the problems, {most} on "
                f"{rivals[most].apart:.1%}"
            )
        if fitted.scores is not None:
            top = max(rivals, key=lambda name: rivals[name].score or 0.0)
            less = fitted.scores - rivals[top].scores
            if not less.mean() >= -less.std() / len(less) ** 0.5:  # NaN too
                failed.append(f"it scores {fitted.score:.4g}, {top} {rivals[top].score:.4g}")
        return failed

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
        """Print the figures as a table, the fitted solver last."""
        columns: dict[str, Callable[[dict[str, Any]], str]] = {
            "median": lambda row: f"{row['median_evaluations']}",
            "90%": lambda row: f"{row['p90_evaluations']}",
            "mean": lambda row: f"{row['mean_evaluations']:.1f}",
            "solved": lambda row: f"{row['success']:.1%}",
            "time": lambda row: f"{1e3 * row['seconds']:.1f} ms",
            "ratio": lambda row: f"{row['fitted_over_this']:.2f}×",
            "elsewhere": lambda row: f"{row['elsewhere']:.1%}",
        }
        if self.fitted.scores is not None:
            columns["score"] = lambda row: f"{row['score']:.4g}"
        lines = []
        for name, one in sorted(self.results.items(), key=lambda item: item[0] == self.name):
            figures = one.figures(self.fitted)
            lines.append((name, *(cell(figures) for cell in columns.values())))
        about = (
            f"{len(self.fitted.nfe)} held-out problems in one batch, to {self.rtol:g}, at most {self.fitted.budget} "
            f"evaluations.\nratio: time of {self.name} over time of the solver\nelsewhere: of the problems that "
            f"{self.reference} solves too, those whose solution is\nmore than {FAR:g} tolerances from its equilibrium, and "
            "stays so when solved on"
        )
        print_table(about, ("solver", *columns), lines)


def compare_solvers(
    f: Cell,
    z0: State,
    context: Any,
    name: str,
    solvers: dict[str, Any],
    *,
    rtol: float,
    max_nfe: int,
    score: Score | None = None,
) -> Comparison:
    """Measure the solver called `name` against the other ones, which take turns on one batch.

    The reference is the classical solver that solves most (the first of several). Its solutions are continued by Broyden's
    method to a hundredth of the tolerance. A solution that is far from them is continued as well: on an ill-conditioned
    problem it then comes nearer, at another equilibrium it stays away.

    f, z0, context, rtol and max_nfe as for `solve`; `name` is a key of `solvers`; score: see `by_sample`.
    """
    found, taken = race(f, z0, context, solvers, rtol=rtol, max_nfe=max_nfe)
    solved = {key: found[key].converged.cpu().numpy() for key in solvers}
    reference = max((key for key in solvers if key != name), key=lambda key: solved[key].mean())
    closer = Broyden(memory=max_nfe)

    def refined(solution: Solution) -> State:
        return solve(f, solution.z, context, solver=closer, rtol=rtol / CLOSER, max_nfe=max_nfe, throw=False).z

    def elsewhere(solution: Solution) -> np.ndarray:
        far = _distance(solution.z, star) > FAR * rtol
        return far & (_distance(refined(solution), star) > FAR * rtol) if far.any() else far

    star = refined(found[reference])
    results = {
        key: SolverResult(
            solver,
            max_nfe,
            np.where(solved[key], found[key].nfe.numpy(), max_nfe),
            solved[key],
            np.array(taken[key]),
            elsewhere=elsewhere(found[key]),
            both=solved[key] & solved[reference],
            scores=None if score is None else score(found[key].z),
        )
        for key, solver in solvers.items()
    }
    return Comparison(name, results, rtol, reference)


def by_sample(score: Callable[[State, Any], Any], x: Any) -> Score:
    """Make (z, x) → (B,) or mean score into states → (B,) scores; a mean is computed for each sample alone.

    ValueError or TypeError, when called, if the score gives anything else.
    """

    def scored(z: State, x: Any) -> Tensor:
        value = score(z, bare(x))
        try:
            return torch.as_tensor(value)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"score(z, x) must give numbers, or their mean, got {type(value).__name__}") from error

    def one(tree: Any, number: int) -> Any:
        device = next(leaf.device for leaf in pytree.tree_leaves(bare(tree)) if isinstance(leaf, Tensor))
        return gather(tree, torch.tensor([number], device=device))

    def scores(z: State) -> np.ndarray:
        size = len(parts_of(z)[0])
        value = scored(z, x)
        if value.dim() == 0:
            value = torch.stack([scored(one(z, number), one(x, number)) for number in range(size)])
        if value.shape != (size,):
            raise ValueError(f"score(z, x) must give ({size},) numbers, or their mean, got shape {tuple(value.shape)}")
        return value.detach().double().cpu().numpy()

    return scores


def _distance(z: State, star: State) -> np.ndarray:
    """(B,) ‖z − z*‖ / ‖z*‖, 0 where both are 0."""
    packing = Packing.of(z)
    flat, at = packing.pack(z).double(), packing.pack(star).double()
    apart: Tensor = (flat - at).norm(dim=1) / at.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return apart.cpu().numpy()


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its first column left-aligned, the others right-aligned; plain text if rich is not installed."""
    print(title)
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for line in (head, *rows):
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for column, name in enumerate(head):
        table.add_column(name, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    terminal = Console()
    # a file or notebook has no width of its own
    (terminal if terminal.is_terminal else Console(width=200)).print(table)
