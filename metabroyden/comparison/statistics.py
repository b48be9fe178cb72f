"""What rows of solves say, by one rule each: medians, success, ratios with intervals, means over problems, profiles.

A failure counts as the budget in every median, quantile and mean, and the share solved stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metabroyden.comparison.tables import Row, Table, chosen, grouped

RESAMPLES = 4000
HEADLINE = 12
"""Evaluations that the best classical solver needs, on validation, where a family counts towards the means."""


def standard_error(success: float, count: int) -> float:
    """Standard error of a success rate over `count` samples, with one success and one failure added."""
    smoothed = (success * count + 1) / (count + 2)
    return float((smoothed * (1 - smoothed) / count) ** 0.5)


def able(outcomes: Mapping[str, Any]) -> dict[str, Any]:
    """Those whose `success` is at most its standard error, `error`, below the highest."""
    top = max(outcomes.values(), key=lambda one: one.success)
    return {name: one for name, one in outcomes.items() if one.success >= top.success - top.error}


class Interval(NamedTuple):
    """A figure and its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """0.51 (0.49–0.53); nothing for NaN."""
        spec = spec or ".2f"
        return "" if np.isnan(self.value) else f"{self.value:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


BEST, FASTEST = "best classical", "fastest classical"
"""Names that a `Field` takes for the best and the fastest classical solver of a family, see `best` and `fastest`."""
NOTHING = Interval(*3 * (float("nan"),))


class Outcome(NamedTuple):
    """One solver on one problem set to one tolerance; S seeds, N samples."""

    evaluations: np.ndarray  # (S, N), the budget where it failed
    solved: np.ndarray  # (S, N) bool
    seconds: np.ndarray  # (S, blocks, rounds) of whole solves; empty where nothing was timed

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Outcome:
        """From rows of solves, of any seeds and blocks."""
        seeds = grouped(sorted(rows, key=lambda row: row.get("block", 0)), "seed")
        spent = [np.concatenate([row["evaluations"] for row in found]) for found in seeds]
        solved = [[letter == "C" for row in found for letter in row["status"]] for found in seeds]
        seconds = [[_laps(row) for row in found] for found in seeds]
        return cls(np.array(spent), np.array(solved), np.array(seconds))

    @property
    def median(self) -> float:
        """Of evaluations, over samples and seeds."""
        return float(np.median(self.evaluations))

    @property
    def mean(self) -> float:
        """Of evaluations."""
        return float(self.evaluations.mean())

    @property
    def p90(self) -> float:
        """90th percentile of evaluations."""
        return float(np.percentile(self.evaluations, 90))

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

    def __str__(self) -> str:
        """Median evaluations (share solved)."""
        return f"{self.median:g} ({self.success:.0%})"


def _laps(row: Row) -> list[float]:
    """Seconds of whole solves, by round, where the row has them."""
    laps = row.get("seconds")
    return [lap["total"] for lap in laps] if isinstance(laps, list) else []


def best(outcomes: Mapping[str, Outcome]) -> str:
    """Among those that solve most, the one with the smallest median of evaluations; the mean decides ties."""
    found = able(outcomes)
    return min(found, key=lambda name: (found[name].median, found[name].mean))


def fastest(outcomes: Mapping[str, Outcome]) -> str:
    """Among those that solve most, the one with the smallest median of seconds."""
    found = able(outcomes)
    return min(found, key=lambda name: float(np.median(found[name].seconds)))


class Field:
    """Rows of solves on several problems.

    Args:
        rows: of all kinds; those whose "row" is "solve" make outcomes.
        part: only rows with this "part"; None: all.

    Attributes:
        rows: of the part.
        families: names of problem sets, in the order of the rows.
        tolerances: the loosest first.
        budget: evaluations a sample.

    Raises:
        ValueError: If there are no solves.
    """

    def __init__(self, rows: Iterable[Row], part: str | None = None) -> None:
        self.rows = [row for row in rows if part is None or row.get("part") == part]
        self._solves = [row for row in self.rows if row["row"] == "solve"]
        if not self._solves:
            raise ValueError("no solves among the rows" + (f" of part {part!r}" if part else ""))
        self.families = list(dict.fromkeys(row["family"] for row in self.rows))
        self.tolerances = sorted({row["tolerance"] for row in self._solves}, reverse=True)
        self.budget = max(row["budget"] for row in self._solves)
        self._outcomes: dict[tuple[str, str, float], Outcome | None] = {}
        self._draws: dict[tuple[str, str, str, float, bool], np.ndarray] = {}
        self._names: dict[tuple[str, str, float], str] = {}

        self._places: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            self._places.setdefault((row["family"], row.get("solver", "")), []).append(row)

    def of(self, kind: str, family: str, solver: str, **wanted: Any) -> list[Row]:
        """Rows of one kind of a solver on a family."""
        return chosen(self._places.get((family, solver), ()), kind, **wanted)

    def solvers(self, family: str | None = None, *kinds: str) -> list[str]:
        """Those that ran on a family (None: on any), of these kinds (all where none is given)."""
        rows = (row for row in self._solves if family in (None, row["family"]))
        return list(dict.fromkeys(row["solver"] for row in rows if not kinds or row.get("kind") in kinds))

    def named(self, family: str, solver: str, tolerance: float) -> str:
        """The solver that `BEST` or `FASTEST` is; any other name as it is."""
        rule, key = {BEST: best, FASTEST: fastest}.get(solver), (family, solver, tolerance)
        if rule is None:
            return solver
        if key not in self._names:
            self._names[key] = rule(self.outcomes(family, tolerance, "classical"))
        return self._names[key]

    def outcome(self, family: str, solver: str, tolerance: float) -> Outcome | None:
        """How a solver did; None where it did not run."""
        key = family, self.named(family, solver, tolerance), tolerance
        if key not in self._outcomes:
            rows = self.of("solve", *key[:2], tolerance=tolerance)
            self._outcomes[key] = Outcome.of(rows) if rows else None
        return self._outcomes[key]

    def shown(self, family: str, solver: str, tolerance: float) -> str:
        """Median evaluations (share solved); nothing where it did not run."""
        return str(self.outcome(family, solver, tolerance) or "")

    def ran(self, solver: str) -> list[str]:
        """Families on which a solver ran."""
        return [family for family in self.families if solver in self.solvers(family)]

    def samples(self, family: str, solver: str, tolerance: float, key: str) -> np.ndarray:
        """(S, N) values that the solves have under a key, by sample; NaN for None."""
        name = self.named(family, solver, tolerance)
        rows = sorted(self.of("solve", family, name, tolerance=tolerance), key=lambda row: row["block"])
        return np.array([np.concatenate([row[key] for row in of]) for of in grouped(rows, "seed")], dtype=float)

    def must(self, family: str, solver: str, tolerance: float) -> Outcome:
        """The same; KeyError where it did not run."""
        found = self.outcome(family, solver, tolerance)
        if found is None:
            raise KeyError(f"{solver} did not run on {family} to {tolerance:g}")
        return found

    def outcomes(self, family: str, tolerance: float, *kinds: str) -> dict[str, Outcome]:
        """Of all solvers of these kinds that ran on a family."""
        return {name: self.must(family, name, tolerance) for name in self.solvers(family, *kinds)}

    def headline(self, tolerance: float) -> list[str]:
        """Families that count towards the means, by the validation problems that classical solvers were tuned on."""
        tuned = chosen(self.rows, "tuned", tolerance=tolerance)
        medians = {family: [row["median"] for row in tuned if row["family"] == family] for family in self.families}
        return [family for family, found in medians.items() if min(found, default=0) >= HEADLINE]

    def draws(self, family: str, solver: str, rival: str, tolerance: float, *, time: bool = False) -> np.ndarray:
        """Ratios of one solver over another, see `ratio_draws` and `time_draws`; kept, since they take time."""
        key = family, solver, self.named(family, rival, tolerance), tolerance, time
        if key not in self._draws:
            both = self.must(family, solver, tolerance), self.must(family, rival, tolerance)
            self._draws[key] = (time_draws if time else ratio_draws)(*both)
        return self._draws[key]

    def ratio(self, family: str, solver: str, rival: str, tolerance: float, *, time: bool = False) -> Interval:
        """Median evaluations of one over those of another, samples and seeds drawn again; or the median over blocks, rounds
        and seeds of the ratio of times of one round, these drawn again. NaN where either did not run."""
        if None in (self.outcome(family, solver, tolerance), self.outcome(family, rival, tolerance)):
            return NOTHING
        return interval(self.draws(family, solver, rival, tolerance, time=time))

    def over(self, family: str, solver: str, rival: str, tolerance: float) -> Interval:
        """The ratio of evaluations; NaN also where the rival does not solve half of the samples."""
        theirs = self.outcome(family, rival, tolerance)
        return NOTHING if theirs is None or theirs.success < 0.5 else self.ratio(family, solver, rival, tolerance)

    def mean_ratio(
        self, families: Iterable[str], solver: str, rival: str, tolerance: float, *, time: bool = False
    ) -> Interval:
        """Geometric mean of the ratios in each resample, of families on which both ran; families are not drawn."""
        both = [family for family in families if self.ratio(family, solver, rival, tolerance, time=time).value > 0]
        found = [np.log(self.draws(family, solver, rival, tolerance, time=time)) for family in both]
        return interval(np.exp(np.mean(found, axis=0))) if found else NOTHING


def against(field: Field, words: str, names: Sequence[str], rival: str, tolerance: float, head: str) -> Table:
    """Median evaluations (share solved) by family and solver, and their ratio to the rival's, see `Field.over`.

    The rival stands last, under `head`; the geometric means of the ratios stand below. Families on which no classical solver
    ran are left out.
    """
    families = [family for family in field.families if field.solvers(family, "classical")]

    def cell(name: str, family: str) -> str:
        found = field.shown(family, name, tolerance)
        return found and ", ".join(filter(None, (found, f"{field.over(family, name, rival, tolerance)}")))

    def mean(name: str) -> str:
        there = [family for family in families if field.over(family, name, rival, tolerance).value > 0]
        return f"{field.mean_ratio(there, name, rival, tolerance)}"

    def theirs(family: str) -> str:
        return f"{field.must(family, rival, tolerance)} {field.named(family, rival, tolerance)}"

    body = [[family, *(cell(name, family) for name in names), theirs(family)] for family in families]
    return Table(words, ["family", *names, head], [*body, ["geometric mean", *map(mean, names), ""]] if body else [])


def geometric(values: Iterable[float]) -> float:
    """Geometric mean of those that are finite; NaN where there are none."""
    found = [value for value in values if np.isfinite(value)]
    return float(np.exp(np.mean(np.log(found)))) if found else float("nan")


def ratio(ours: Outcome, theirs: Outcome) -> Interval:
    """Ratio of median evaluations of two solvers on the same samples, which are drawn again for both, and seeds."""
    return interval(ratio_draws(ours, theirs))


def ratio_draws(ours: Outcome, theirs: Outcome) -> np.ndarray:
    """(1 + RESAMPLES,) ratios of medians, the first of them the figure itself."""
    return np.divide(*_both(ours, theirs, np.median))


def time_draws(ours: Outcome, theirs: Outcome) -> np.ndarray:
    """(1 + RESAMPLES,) medians over seeds, blocks and rounds of ratios of times, the first of them the figure itself."""
    ratios = ours.seconds / np.median(theirs.seconds, axis=0, keepdims=True)
    generator, (seeds, blocks, rounds) = np.random.default_rng(0), ratios.shape
    # seeds, blocks of each, rounds of each
    seed = generator.integers(seeds, size=(RESAMPLES, seeds, 1, 1))
    block = generator.integers(blocks, size=(RESAMPLES, seeds, blocks, 1))
    lap = generator.integers(rounds, size=(RESAMPLES, seeds, blocks, rounds))
    return np.concatenate([[np.median(ratios)], np.median(ratios[seed, block, lap], axis=(1, 2, 3))])


def paired(ours: Outcome, theirs: Outcome) -> tuple[Interval, int, int]:
    """(mean difference of evaluations, samples that only the first solves, samples that only the second solves).

    A learned solver solves a sample where most of its seeds do.
    """
    return interval(np.subtract(*_both(ours, theirs, np.mean))), *alone(ours, theirs)


def alone(ours: Outcome, theirs: Outcome) -> tuple[int, int]:
    """Samples that only the first, that only the second solves."""
    return int((ours.mostly & ~theirs.mostly).sum()), int((theirs.mostly & ~ours.mostly).sum())


def _both(ours: Outcome, theirs: Outcome, of: Any) -> tuple[np.ndarray, np.ndarray]:
    """(1 + RESAMPLES,) means or medians of both over the same drawn samples, the first over all samples once."""
    generator, count = np.random.default_rng(0), ours.evaluations.shape[1]
    samples = np.concatenate([np.arange(count)[None], generator.integers(count, size=(RESAMPLES, count))])
    return _over(ours, samples, generator, of), _over(theirs, samples, generator, of)


def _over(outcome: Outcome, samples: np.ndarray, generator: np.random.Generator, of: Any) -> np.ndarray:
    """(draws,) means or medians over drawn samples, and drawn seeds where there are several; first of all seeds."""
    seeds = len(outcome.evaluations)
    if seeds == 1:
        return of(outcome.evaluations[0][samples], axis=1)
    chosen = generator.integers(seeds, size=(len(samples), seeds))
    chosen[0] = np.arange(seeds)
    return of(outcome.evaluations[chosen[:, :, None], samples[:, None, :]], axis=(1, 2))


def interval(draws: np.ndarray) -> Interval:
    """Of draws of which the first is the figure itself."""
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return Interval(float(draws[0]), float(low), float(high))


def profile(outcomes: Mapping[str, Outcome], factors: np.ndarray) -> dict[str, np.ndarray]:
    """(len(factors),) by solver: the share of samples solved within so many times the fewest evaluations of any of them.

    A performance profile (Dolan & Moré 2002); of a sample's seeds the middle one. Samples that none solves count.
    """
    spent = {
        name: np.sort(np.where(one.solved, one.evaluations, np.inf), axis=0)[len(one.solved) // 2]
        for name, one in outcomes.items()
    }
    fewest = np.min(list(spent.values()), axis=0)
    fewest[~np.isfinite(fewest)] = 1  # solved by none
    return {name: (values / fewest <= factors[:, None] + 1e-9).mean(axis=1) for name, values in spent.items()}
