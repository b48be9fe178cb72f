"""What rows of the race say: medians, successes, times, and ratios with their intervals. Solves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from experiments.legacy.race.contestants import FLAGSHIP
from experiments.legacy.race.schema import Row
from metabroyden.compare import standard_error

RESAMPLES = 4000
HEADLINE = 12
"""Evaluations that the best classical solver needs, on validation, where a family counts towards the means."""
TORCHDEQ = ("torchdeq Broyden", "tuned torchdeq Broyden", "torchdeq Anderson", "tuned torchdeq Anderson")


class Interval(NamedTuple):
    """A figure and its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """0.51 (0.49–0.53)."""
        spec = spec or ".2f"
        return f"{self.value:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


class SolverResult(NamedTuple):
    """One solver on one family to one tolerance; S seeds, N samples."""

    evaluations: np.ndarray  # (S, N), the budget where it failed
    solved: np.ndarray  # (S, N) bool
    seconds: np.ndarray  # (S, blocks, rounds)

    @property
    def median(self) -> float:
        """Of evaluations, over samples and seeds."""
        return float(np.median(self.evaluations))

    @property
    def success(self) -> float:
        """Share of samples solved, over seeds."""
        return float(self.solved.mean())

    @property
    def error(self) -> float:
        """Standard error of that share, over samples."""
        return standard_error(self.success, self.solved.shape[1])

    @property
    def mostly(self) -> np.ndarray:
        """(N,) samples that most seeds solve."""
        return self.solved.mean(axis=0) > 0.5

    def within(self, budget: int) -> float:
        """Share of samples solved in so many evaluations."""
        return float((self.solved & (self.evaluations <= budget)).mean())


class Field:
    """All rows of a race (or of one part of it).

    Attributes:
        rows: of the part. families: in the order of the rows. tolerances: the loosest first.
    """

    def __init__(self, rows: Sequence[Row], part: str = "families") -> None:
        self.rows = [row for row in rows if row["part"] == part]
        if not any(row["row"] == "solve" for row in self.rows):
            raise ValueError(f"no solves among the rows of part {part!r}")
        self.families = list(dict.fromkeys(row["family"] for row in self.rows))
        self.tolerances = sorted({row["tolerance"] for row in self.rows if row["row"] == "solve"}, reverse=True)
        self.budget = max(row["budget"] for row in self.rows if row["row"] == "solve")
        self._standings: dict[tuple[str, str, float], SolverResult | None] = {}

    @cached_property
    def _by_place(self) -> dict[tuple[str, str], list[Row]]:
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row["family"], row["solver"]), []).append(row)
        return found

    def of(self, kind: str, family: str, solver: str, **wanted: Any) -> list[Row]:
        """Rows of one kind of a solver on a family."""
        return [
            row
            for row in self._by_place.get((family, solver), ())
            if row["row"] == kind and all(row[key] == value for key, value in wanted.items())
        ]

    def solvers(self, family: str, *kinds: str) -> list[str]:
        """Those that ran on a family, of these kinds (all where none is given)."""
        return list(
            dict.fromkeys(
                row["solver"]
                for row in self.rows
                if row["row"] == "solve" and row["family"] == family and (not kinds or row["kind"] in kinds)
            )
        )

    def standing(self, family: str, solver: str, tolerance: float) -> SolverResult | None:
        """How a solver did; None where it did not run."""
        key = family, solver, tolerance
        if key not in self._standings:
            blocks = self.blocks(*key)
            spent, letters = (
                np.array([[value for row in rows for value in row[name]] for rows in blocks])
                for name in ("evaluations", "status")
            )
            seconds = np.array([[[lap["total"] for lap in row["seconds"]] for row in rows] for rows in blocks])
            self._standings[key] = SolverResult(spent, letters == "C", seconds) if blocks else None
        return self._standings[key]

    def blocks(self, family: str, solver: str, tolerance: float) -> list[list[Row]]:
        """Of each seed, the rows of a solver in the order of their blocks."""
        seeds: dict[Any, list[Row]] = {}
        for row in sorted(self.of("solve", family, solver, tolerance=tolerance), key=lambda row: row["block"]):
            seeds.setdefault(row["seed"], []).append(row)
        return list(seeds.values())

    def must(self, family: str, solver: str, tolerance: float) -> SolverResult:
        """The same; KeyError where it did not run."""
        found = self.standing(family, solver, tolerance)
        if found is None:
            raise KeyError(f"{solver} did not run on {family} to {tolerance:g}")
        return found

    def _able(self, family: str, tolerance: float, kinds: Sequence[str]) -> dict[str, SolverResult]:
        """Solvers whose success is at most a standard error below the best one's."""
        every = {name: self.must(family, name, tolerance) for name in self.solvers(family, *kinds)}
        best = max(every.values(), key=lambda one: one.success)
        return {name: one for name, one in every.items() if one.success >= best.success - best.error}

    def best(self, family: str, tolerance: float, kinds: Sequence[str] = ("classical",)) -> str:
        """The solver of these kinds that needs fewest evaluations, among those that solve most."""
        able = self._able(family, tolerance, kinds)
        return min(able, key=lambda name: (able[name].median, able[name].evaluations.mean()))

    def fastest(self, family: str, tolerance: float, kinds: Sequence[str] = ("classical",)) -> str:
        """The one that needs least time, among those that solve most."""
        able = self._able(family, tolerance, kinds)
        return min(able, key=lambda name: float(np.median(able[name].seconds)))

    def headline(self, tolerance: float) -> list[str]:
        """Families that count towards the means, by the validation problems that classical solvers were tuned on."""
        chosen = []
        for family in self.families:
            tuned = [row for row in self.rows if row["row"] == "tuned" and row["family"] == family]
            able = [row for row in tuned if row["tolerance"] == tolerance]
            if able and min(row["median"] for row in able) >= HEADLINE:
                chosen.append(family)
        return chosen

    def ratio(self, family: str, solver: str, rival: str, tolerance: float) -> Interval:
        """Median evaluations of one over those of another, samples and seeds drawn again."""
        return ratio_of(self.must(family, solver, tolerance), self.must(family, rival, tolerance))

    def mean_ratio(self, families: Sequence[str], solver: str, rival: Any, tolerance: float) -> Interval:
        """Geometric mean over families; `rival` a name, or a map from a family to one. NaN where there are none."""
        return self._mean(self._draws, families, solver, rival, tolerance)

    def _mean(self, draws: Any, families: Sequence[str], solver: str, rival: Any, tolerance: float) -> Interval:
        found = []
        for family in families:
            name = rival(family) if callable(rival) else rival
            if self.standing(family, solver, tolerance) and self.standing(family, name, tolerance):
                found.append(np.log(draws(family, solver, name, tolerance)))
        return _interval(np.exp(np.mean(found, axis=0))) if found else Interval(*3 * (float("nan"),))

    def _draws(self, family: str, solver: str, rival: str, tolerance: float) -> np.ndarray:
        """(1 + RESAMPLES,) ratios, the first of them the figure itself."""
        return _draws(self.must(family, solver, tolerance), self.must(family, rival, tolerance))

    def time_ratio(self, family: str, solver: str, rival: str, tolerance: float) -> Interval:
        """Median over blocks, rounds and seeds of the ratio of times of one round; these drawn again."""
        return _interval(self._time_draws(family, solver, rival, tolerance))

    def mean_time_ratio(self, families: Sequence[str], solver: str, rival: Any, tolerance: float) -> Interval:
        """Geometric mean over families, as `mean_ratio`."""
        return self._mean(self._time_draws, families, solver, rival, tolerance)

    def _time_draws(self, family: str, solver: str, rival: str, tolerance: float) -> np.ndarray:
        ours, theirs = self.must(family, solver, tolerance).seconds, self.must(family, rival, tolerance).seconds
        ratios = ours / np.median(theirs, axis=0, keepdims=True)
        generator, (seeds, blocks, rounds) = np.random.default_rng(0), ratios.shape
        # seeds, blocks of each, rounds of each
        seed = generator.integers(seeds, size=(RESAMPLES, seeds, 1, 1))
        block = generator.integers(blocks, size=(RESAMPLES, seeds, blocks, 1))
        lap = generator.integers(rounds, size=(RESAMPLES, seeds, blocks, rounds))
        return np.concatenate([[np.median(ratios)], np.median(ratios[seed, block, lap], axis=(1, 2, 3))])

    def paired(self, family: str, solver: str, rival: str, tolerance: float) -> tuple[Interval, int, int]:
        """(mean difference of evaluations, samples that only the first solves, samples that only the second solves).

        A learned solver solves a sample where most of its seeds do.
        """
        ours, theirs = self.must(family, solver, tolerance), self.must(family, rival, tolerance)
        generator = np.random.default_rng(0)
        samples = _drawn_samples(ours, generator)
        draws = _over(ours, samples, generator, np.mean) - _over(theirs, samples, generator, np.mean)
        return _interval(draws), *_alone(ours, theirs)

    @property
    def flagship(self) -> list[str]:
        """Families on which MetaBroyden ran."""
        return [family for family in self.families if FLAGSHIP in self.solvers(family)]


def compared(ours: Field, theirs: Field) -> list[tuple[str, str, float, Interval, int, int]]:
    """Two runs of the race, solver by solver: (family, solver, tolerance, ratio of median evaluations of the first over the
    second, samples drawn in pairs, samples that only the first, that only the second solves), where both have it.

    ValueError where the runs share nothing, or hold different samples or budgets.
    """
    if ours.budget != theirs.budget:
        raise ValueError(f"runs can be compared at the same budget, got {ours.budget} and {theirs.budget}")
    found = []
    for family in ours.families:
        for solver in ours.solvers(family):
            for tolerance in ours.tolerances:
                one, other = ours.must(family, solver, tolerance), theirs.standing(family, solver, tolerance)
                if other is None:
                    continue
                if one.evaluations.shape[1] != other.evaluations.shape[1]:
                    counts = f"{one.evaluations.shape[1]} and {other.evaluations.shape[1]}"
                    raise ValueError(f"runs can be compared on the same samples; {family} has {counts}")
                found.append((family, solver, tolerance, ratio_of(one, other), *_alone(one, other)))
    if not found:
        raise ValueError("the two runs have no family and solver in common")
    return found


def ratio_of(ours: SolverResult, theirs: SolverResult) -> Interval:
    """Ratio of median evaluations of two solvers on the same samples, which are drawn again for both, and seeds."""
    return _interval(_draws(ours, theirs))


def _alone(ours: SolverResult, theirs: SolverResult) -> tuple[int, int]:
    """Samples that only the first, that only the second solves."""
    return int((ours.mostly & ~theirs.mostly).sum()), int((theirs.mostly & ~ours.mostly).sum())


def _draws(ours: SolverResult, theirs: SolverResult) -> np.ndarray:
    """(1 + RESAMPLES,) ratios of medians; the same samples are drawn for both."""
    generator = np.random.default_rng(0)
    samples = _drawn_samples(ours, generator)
    return _over(ours, samples, generator, np.median) / _over(theirs, samples, generator, np.median)


def _drawn_samples(standing: SolverResult, generator: np.random.Generator) -> np.ndarray:
    """(1 + RESAMPLES, N) indices, the first row all samples once."""
    count = standing.evaluations.shape[1]
    return np.concatenate([np.arange(count)[None], generator.integers(count, size=(RESAMPLES, count))])


def _over(standing: SolverResult, samples: np.ndarray, generator: np.random.Generator, of: Any) -> np.ndarray:
    """(draws,) means or medians over drawn samples, and drawn seeds where there are several; first of all seeds."""
    seeds = len(standing.evaluations)
    if seeds == 1:
        return of(standing.evaluations[0][samples], axis=1)
    chosen = generator.integers(seeds, size=(len(samples), seeds))
    chosen[0] = np.arange(seeds)
    return of(standing.evaluations[chosen[:, :, None], samples[:, None, :]], axis=(1, 2))


def _interval(draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return Interval(float(draws[0]), float(low), float(high))
