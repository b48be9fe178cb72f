"""Whether a fitted solver is worth having: the comparison that `fit_solver` makes, and its verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metabroyden.comparison.clock import clocked
from metabroyden.comparison.comparison import Comparison
from metabroyden.comparison.measure import Contestant, Rules, measure
from metabroyden.comparison.problems import HeldOut
from metabroyden.comparison.statistics import Outcome, able, standard_error
from metabroyden.gradients.base import parts_of
from metabroyden.shared import bare
from metabroyden.solution import State
from metabroyden.solver import as_solver
from metabroyden.solvers.registry import name_of
from metabroyden.state import gather

UNTUNED = "Broyden"  # name of the solver that a DEQ has by default
Score = Callable[[State], np.ndarray]  # states → (B,) task scores, higher being better


def contestant(name: str, solver: Any, kind: str | None = None) -> Contestant:
    """A solver of ours under a name; its kind follows from what it is, unless it is given."""
    options = type(solver).__name__ if isinstance(solver, nn.Module) else repr(solver)
    whole = as_solver(solver)
    return Contestant(name, kind or ("learned" if whole.is_learned else "classical"), whole, options)


class Verdict(Comparison):
    """A fitted solver against classical ones.

    The fitted solver wins if it solves as many problems as the classical solver that solves most and, against each rival,
    needs fewer evaluations in the mean and less time (median ratio of paired rounds). In this mean a failure counts twice
    the budget, or else a rival that fails more would look cheaper; in all figures it counts as the budget. It must also
    not be elsewhere more often than the rival that is so most often, nor score lower than the best rival. The share
    solved and the score have one standard error of tolerance, the share elsewhere two of the difference, since one or two
    samples of a hundred say nothing.

    Args:
        comparison: of the fitted solver and classical ones, to one tolerance.
        name: of the fitted solver.

    Attributes:
        name: of the fitted solver.
    """

    def __init__(self, comparison: Comparison, name: str) -> None:
        super().__init__(
            comparison.rows, solvers=comparison.solvers, methods=comparison.methods, title=comparison.title,
            about=comparison.about,
        )  # fmt: skip
        self.name = name

    @property
    def fitted(self) -> Any:
        """The fitted solver."""
        return self.solvers.get(self.name)

    @property
    def rivals(self) -> dict[str, Outcome]:
        """The classical solvers whose success is within one standard error of the highest."""
        return able({name: self.outcome(name) for name in self.names if name != self.name})

    @property
    def best(self) -> str:
        """The fastest rival."""
        return self.fastest_classical()

    @property
    def reference(self) -> str:
        """The classical solver whose equilibria the solutions are compared with."""
        return self._solves(self.name, self._at(None))[0]["reference"]

    @property
    def failed_criteria(self) -> list[str]:
        """The reasons why the fitted solver does not win; empty if it does."""
        fitted, rivals, best, failed = self.outcome(self.name), self.rivals, self.best, []
        surest = max(rivals, key=lambda name: rivals[name].success)
        if fitted.success < rivals[surest].success - rivals[surest].error:
            failed.append(f"it solves {fitted.success:.1%}, {surest} {rivals[surest].success:.1%}")
        fewest = min(rivals, key=lambda name: self._cost(rivals[name]))
        ours, theirs = self._cost(fitted), self._cost(rivals[fewest])
        if ours >= theirs:
            all_solved = fitted.solved.all() and rivals[fewest].solved.all()
            rule = "" if all_solved else ", a failure counting twice the budget"
            failed.append(f"it needs {ours:.1f} evaluations in the mean{rule}, {fewest} {theirs:.1f}")
        ratio = self.time_over(best)
        if ratio >= 1:
            failed.append(f"it takes {ratio:.2f} times as long as {best}")
        return failed + self._worse_solutions()

    def time_over(self, name: str) -> float:
        """Time of the fitted solver relative to another one's: the median ratio of paired rounds."""
        return float(np.median(self.outcome(self.name).seconds / self.outcome(name).seconds))

    def _cost(self, one: Outcome) -> float:
        """Mean evaluations, a failure counting twice the budget: what the verdict compares, so that solving more pays."""
        return float(np.where(one.solved, one.evaluations, 2 * self.budget).mean())

    def _apart(self, name: str) -> float:
        return self._mean(name, self._at(None), "elsewhere") or 0.0

    def _values(self, name: str, key: str) -> np.ndarray:
        """(N,) values that the solves have under a key; NaN for None."""
        rows = self._solves(name, self._at(None))
        return np.array([value for row in rows for value in row.get(key) or len(row["status"]) * [None]], dtype=float)

    def _worse_solutions(self) -> list[str]:
        rivals, failed = self.rivals, []
        most = max(rivals, key=self._apart)
        shared = int(np.isfinite(self._values(self.name, "elsewhere")).sum())
        ours, theirs = self._apart(self.name), self._apart(most)
        if shared and ours > theirs + 2 * math.hypot(*(standard_error(one, shared) for one in (ours, theirs))):
            failed.append(
                f"it is at another solution than {self.reference} on {ours:.1%} of the problems, {most} on {theirs:.1%}"
            )
        if self._mean(most, self._at(None), "score") is not None:
            scores = {name: self._values(name, "score") for name in (self.name, *rivals)}
            top = max(rivals, key=lambda name: float(np.nanmean(scores[name])))
            less = scores[self.name] - scores[top]
            if not less.mean() >= -less.std() / len(less) ** 0.5:  # NaN too
                failed.append(f"it scores {np.nanmean(scores[self.name]):.4g}, {top} {np.nanmean(scores[top]):.4g}")
        return failed

    def summary(self) -> dict[str, Any]:
        """All figures as JSON."""
        untuned = self.outcome(UNTUNED).mean if UNTUNED in self.names else None
        return {
            "rtol": self.tolerances[-1],
            "max_nfe": self.budget,
            "samples": self.samples,
            "mean_evaluations": self.outcome(self.name).mean,
            "mean_evaluations_broyden": untuned,
            "best_classical": self.best,
            "reference": self.reference,
            "failed_criteria": self.failed_criteria,
            "solvers": {row["solver"]: self._summary(row) for row in self.numbers(self.tolerances[-1])},
        }

    def _summary(self, row: dict[str, Any]) -> dict[str, Any]:
        return {
            "config": row["options"],
            "mean_evaluations": row["mean"],
            "median_evaluations": row["median"],
            "p90_evaluations": row["p90"],
            "success": row["solved"],
            "seconds": row["milliseconds"] / 1e3,
            "fitted_over_this": self.time_over(row["solver"]),
            "elsewhere": row["elsewhere"] or 0.0,
            **({} if row["metric"] is None else {"score": row["metric"]}),
        }


def compare_solvers(
    held: HeldOut, name: str, solvers: Mapping[str, Any], *, rtol: float, max_nfe: int, rounds: int | None = None
) -> Verdict:
    """Measure the solver called `name` against the other ones, which take turns on all problems as one batch.

    Args:
        held: the problems.
        name: a key of `solvers`.
        solvers: by name.
        rtol: as for `solve`; so is max_nfe.
        rounds: timed ones; None: as many as there is time for in about three seconds, from 3 to 15.
    """
    rules = Rules((rtol,), max_nfe, len(held), rounds, elsewhere=True)
    everyone = [contestant(key, one, "learned" if key == name else "classical") for key, one in solvers.items()]
    rows = measure(held, everyone, rules)
    methods = {key: name_of(solver) for key, solver in solvers.items()}
    about = f"{len(held)} held-out problems; {clocked(len(rows[0]['seconds']), held.device)}."
    return Verdict(Comparison(rows, solvers=solvers, methods=methods, about=about), name)


def by_sample(metric: Callable[[State, Any], Any], x: Any) -> Score:
    """Make (z, x) → (B,) or mean score into states → (B,) scores; a mean is computed for each sample alone.

    ValueError or TypeError, when called, if the metric gives anything else.
    """

    def scored(z: State, x: Any) -> Tensor:
        value = metric(z, bare(x))
        try:
            return torch.as_tensor(value)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"metric(z, x) must give numbers, or their mean, got {type(value).__name__}") from error

    def one(tree: Any, number: int) -> Any:
        device = next(leaf.device for leaf in pytree.tree_leaves(bare(tree)) if isinstance(leaf, Tensor))
        return gather(tree, torch.tensor([number], device=device))

    def scores(z: State) -> np.ndarray:
        size = len(parts_of(z)[0])
        value = scored(z, x)
        if value.dim() == 0:
            value = torch.stack([scored(one(z, number), one(x, number)) for number in range(size)])
        if value.shape != (size,):
            raise ValueError(f"metric(z, x) must give ({size},) numbers, or their mean, got shape {tuple(value.shape)}")
        return value.detach().double().cpu().numpy()

    return scores


def judge_of(metric: Callable[[State, Any], Any], x: Any) -> Callable[[State, Tensor], Tensor]:
    """Make (z, x) → (B,) or mean score into `HeldOut.judge` of the problems of raw contexts x."""
    return lambda z, index: torch.from_numpy(by_sample(metric, gather(x, index))(z))
