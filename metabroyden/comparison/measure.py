"""Solves → rows: solvers on the same problems in turns, each row what one of them did on one batch to one tolerance.

Rows say what they are under the key "row":
  solve    one solver on one block of samples to one tolerance: by sample evaluations (the budget where it failed), smallest
           residual, status, distance to the float64 equilibrium, score, agreement of predictions, whether the solution is
           another one than the reference's; seconds of whole solves
  curve    quartiles over samples of the smallest residual so far, by evaluations; its median by time
  depth    the task's mean score after so many evaluations
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metabroyden.comparison.clock import LiveBytes, Stopwatch, now, turns
from metabroyden.comparison.problems import CHUNK, HeldOut
from metabroyden.comparison.tables import Row, short
from metabroyden.gradients.base import parts_of
from metabroyden.progress import ticks
from metabroyden.solution import Solution, State, Status, Trace, relative_residual
from metabroyden.solve import solve
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import gather

LETTERS = {Status.CONVERGED: "C", Status.MAX_NFE: "B", Status.NON_FINITE: "N", Status.STALLED: "S"}
"""Of a sample's status, in a row: converged, budget, not finite, stalled."""
FAR = 10.0
"""A solution is elsewhere if its relative distance to the reference exceeds this many tolerances, and still does when the
solve is continued."""
CLOSER, LONGER = 100.0, 4
"""Solves are continued to a tolerance smaller by this factor, for as many times the budget at most."""
SECONDS, LEAST, MOST = 3.0, 3, 15
"""Where the rounds are not given: how long all of them shall take, and how many there are at least and at most."""


@dataclass(frozen=True)
class Found:
    """What a solve of a batch found."""

    z: State
    evaluations: np.ndarray  # (B,), the budget where it failed
    residual: list[float]
    status: str  # a letter a sample
    handed_over: int  # samples that a learned solver's safeguard handed to its fallback
    trace: Trace | None


@dataclass(frozen=True)
class Contestant:
    """One solver in a comparison."""

    name: str  # in tables and figures
    kind: str  # "classical" (ours), "started" (the same from a learned start), "learned", "peer" (another library's)
    solver: Any  # for `solve`
    options: str = ""  # in words
    seed: int | None = None  # of a learned solver

    @property
    def parts(self) -> bool:
        """Whether it uses parts of a cell instead of f."""
        return bool(self.solver.required_methods)

    @property
    def key(self) -> str:
        """Its name with its seed."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"

    def timed(
        self, f: Callable[..., State], z0: State, x: Any, tolerance: float, budget: int, *, keep: bool = True
    ) -> tuple[Found, Row]:
        """A solve, and where its time went. keep: False where only the time is wanted."""
        watch = Stopwatch(parts_of(z0)[0].device)
        watched = watch.device.type == "cpu"  # on a GPU a look at the clock waits for the device
        f, solver = (watch.of_f(f), watch.of_solver(self.solver)) if watched else (f, self.solver)
        began = now(watch.device)
        solution = solve(f, z0, x, solver=solver, rtol=tolerance, max_nfe=budget, throw=False)
        total = now(watch.device) - began
        taken = {
            "total": total,
            "f": watch.f if watched and not self.parts else None,
            "solver": watch.solver if watched else total,
            "bookkeeping": total - watch.f - watch.solver if watched else 0.0,
        }
        return _found(solution, budget), taken


def _found(solution: Solution, budget: int) -> Found:
    status = "".join(LETTERS[Status(value)] for value in solution.status.tolist())
    evaluations = np.where(solution.converged.cpu().numpy(), solution.nfe.numpy(), budget)
    handed = int((solution.trace.phase > 0).any(dim=0).sum())
    return Found(solution.z, evaluations, solution.residual.tolist(), status, handed, solution.trace)


Stamp = Callable[[Contestant], Row]
"""What every row of a contestant begins with."""


@dataclass(frozen=True)
class Rules:
    """What is the same for all contestants."""

    tolerances: tuple[float, ...]  # each with a solve of its own
    budget: int = 60  # evaluations a sample
    block: int = 64  # samples solved as one batch
    rounds: int | None = (
        0  # timed ones of a block to the clocked tolerances, to the others one or none; None: by `SECONDS`
    )
    clocked: tuple[float, ...] | None = None  # all, where None
    weighed: bool = False  # whether memory is measured, in the first block to the last clocked tolerance
    elsewhere: bool = False  # whether solutions are compared with a classical solver's

    def rounds_to(self, tolerance: float, spent: float) -> int:
        """Timed rounds to a tolerance, where the round before them took so many seconds."""
        if self.rounds is None:
            return int(min(MOST, max(LEAST, SECONDS / max(spent, 1e-9))))
        return self.rounds if self.clocked is None or tolerance in self.clocked else min(self.rounds, 1)


def stamp_of(held: HeldOut, **more: Any) -> Stamp:
    """The usual stamp: problem set, solver, kind, seed, and what is the same for all."""
    return lambda one: {**more, "family": held.name, "solver": one.name, "kind": one.kind, "seed": one.seed}


def measure(
    held: HeldOut, contestants: Sequence[Contestant], rules: Rules, stamp: Stamp | None = None, *, progress: bool = False,
) -> list[Row]:  # fmt: skip
    """Every contestant on every block of problems to every tolerance, in turns; a residual curve of each at the end.

    Args:
        held: the problems; distances and agreement are measured where their equilibria are known.
        contestants: who runs.
        rules: tolerances, budget, rounds.
        stamp: what every row of a contestant begins with; default `stamp_of(held)`.
        progress: show a bar.

    Returns:
        Rows "solve", and a row "curve" of each contestant to the last tolerance.
    """
    stamp, rows = stamp or stamp_of(held), []
    traces: dict[str, list[Trace]] = {one.key: [] for one in contestants}
    predicted = None if held.star is None or held.predict is None else held.predict(held.states(held.star))
    blocks = list(torch.arange(len(held), device=held.device).split(rules.block))
    with ticks(held.name or "comparing", len(blocks) * len(rules.tolerances), show=progress) as done:
        for number, index in enumerate(blocks):
            for tolerance in rules.tolerances:
                block = _Block(held, index, number, tolerance, rules)
                # what is found warms up what is timed
                every = {one.key: block.run(one) for one in contestants}
                found = {key: result for key, (result, _) in every.items()}
                seconds = block.timed(contestants, sum(taken["total"] for _, taken in every.values()))
                apart = _elsewhere(block, contestants, found) if rules.elsewhere else {}
                for one in contestants:
                    result = found[one.key]
                    if tolerance == rules.tolerances[-1] and result.trace is not None:
                        traces[one.key].append(result.trace)
                    row = block.row(one, result, predicted, seconds[one.key])
                    rows.append({"row": "solve", **stamp(one), **row, **apart.get(one.key, {})})
                done()
    return rows + [{"row": "curve", **stamp(one), **_curve(traces[one.key], rules.budget)} for one in contestants]


@dataclass(frozen=True)
class _Block:
    """Samples that are solved as one batch to one tolerance."""

    held: HeldOut
    index: Tensor
    number: int
    tolerance: float
    rules: Rules

    @cached_property
    def problem(self) -> tuple[Callable[..., State], State, Any]:
        return self.held.problem(self.index)

    def run(self, one: Contestant, *, keep: bool = True) -> tuple[Found, Row]:
        return one.timed(*self.problem, self.tolerance, self.rules.budget, keep=keep)

    def timed(self, contestants: Sequence[Contestant], spent: float) -> dict[str, list[Row]]:
        """Seconds of the rounds of each; in every block another one goes first."""
        rounds = self.rules.rounds_to(self.tolerance, spent)
        seconds = {one.key: list[Row]() for one in contestants}
        first = self.number * (self.rules.rounds or 0) % len(contestants)
        for one in turns([*contestants[first:], *contestants[:first]], rounds):
            seconds[one.key].append(self.run(one, keep=False)[1])
        return seconds

    def row(self, one: Contestant, found: Found, predicted: Any, seconds: list[Row]) -> Row:
        held, index, whole = self.held, self.index, _flat(found.z).isfinite().all(dim=1)
        known = whole & (torch.zeros_like(whole) if held.known is None else held.known[index])
        score = agrees = distance = torch.full((len(index),), torch.nan)
        if held.judge is not None:
            score = held.judge(found.z, index)
        if held.star is not None:
            distance = (_flat(found.z).double() - held.star[index]).norm(dim=1) / held.star[index].norm(dim=1)
        if held.predict is not None and predicted is not None:
            agrees = (held.predict(found.z) == predicted[index]).float().reshape(len(index), -1).mean(dim=1)
        clocked = self.rules.clocked or self.rules.tolerances
        weighed = self.rules.weighed and self.number == 0 and self.tolerance == clocked[-1]
        return {
            "options": one.options, "tolerance": self.tolerance, "budget": self.rules.budget, "block": self.number,
            "evaluations": found.evaluations.tolist(), "residual": _numbers(found.residual), "status": found.status,
            "distance": _numbers(_where(distance, known), 3), "score": _numbers(_where(score, whole)),
            "agrees": _numbers(_where(agrees, known)), "handed_over": found.handed_over, "seconds": short(seconds),
            "peak_bytes": self._peak(one) if weighed else None,
        }  # fmt: skip

    def _peak(self, one: Contestant) -> int:
        """Bytes of tensors alive at once in a solve beyond those that were there before it (on a GPU: the allocator's)."""
        device = self.held.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self.run(one, keep=False)
            return torch.cuda.max_memory_allocated(device) - before
        with LiveBytes() as live:
            self.run(one, keep=False)  # weights and contexts are seen, and stay
            before = live.now
            live.mark()
            self.run(one, keep=False)
            return live.peak - before


def _elsewhere(block: _Block, contestants: Sequence[Contestant], found: dict[str, Found]) -> dict[str, Row]:
    """By contestant, the reference's name and (B,) whether the solution is another one than its; None where either failed.

    The reference is the classical solver that solves most (the first of several). Its solutions are continued by Broyden's
    method to a hundredth of the tolerance. A solution that is far from them is continued as well: on an ill-conditioned
    problem it then comes nearer, at another equilibrium it stays away. Where one of the two does not get that far, it is
    not known which it is: None.
    """
    solved = {key: np.array([letter == "C" for letter in one.status]) for key, one in found.items()}
    classical = [one.key for one in contestants if one.kind == "classical"] or [contestants[0].key]
    reference = max(classical, key=lambda key: solved[key].mean())
    (f, _, x), budget = block.problem, block.rules.budget

    def refined(z: State, among: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """(states, whether they got so far), where the others stay as they are."""
        whole, got = _flat(z), np.zeros(len(among), dtype=bool)
        some = np.arange(len(among)) if x is None else np.flatnonzero(among)  # without a context f sees the whole batch
        if not among.any():
            return whole, got
        options: dict[str, Any] = {"rtol": block.tolerance / CLOSER, "max_nfe": LONGER * budget, "throw": False}
        index = torch.as_tensor(some, device=whole.device)
        solution = solve(f, *gather((z, x), index), solver=Broyden(memory=budget), **options)
        got[some] = solution.converged.cpu().numpy()
        return whole.index_copy(0, index, _flat(solution.z)), got

    def far(z: Tensor) -> np.ndarray:
        apart = (z.double() - star.double()).norm(dim=1)
        return (apart > FAR * block.tolerance * star.double().norm(dim=1)).cpu().numpy()

    star, certain = refined(found[reference].z, solved[reference])
    rows = {}
    for key, one in found.items():
        known = solved[key] & solved[reference]
        there = far(_flat(one.z)) & known
        again, sure = refined(one.z, there & certain)
        known &= ~there | (certain & sure)
        there &= far(again)
        seen = [int(other) if told else None for other, told in zip(there, known, strict=True)]
        rows[key] = {"reference": reference, "elsewhere": seen}
    return rows


def _flat(z: State) -> Tensor:
    """(B, n) of a state that a peer may have broken: `packed` wants finite ones."""
    return torch.cat([part.flatten(1) for part in parts_of(z)], dim=1)


def _where(values: Tensor, there: Tensor) -> list[float]:
    return values.where(there.to(values.device), torch.nan).tolist()


def _numbers(values: list[float], digits: int = 4) -> list[float | None]:
    """To so many digits; None for what is no number."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]


def residual_after(trace: Trace, budget: int) -> np.ndarray:
    """(budget, B): the smallest residual each sample had seen after 1, 2, … evaluations; infinite before its first."""
    residual, nfe = np.nan_to_num(trace.residual.cpu().numpy(), nan=np.inf), trace.nfe.numpy()
    best = np.full((budget + 1, residual.shape[1]), np.inf)
    columns = np.arange(residual.shape[1])
    for value, spent in zip(residual, np.minimum(nfe, budget), strict=True):
        best[spent, columns] = np.minimum(best[spent, columns], value)
    best[0] = np.inf  # rows of the trace in which the sample took no part carry nfe 0
    return np.minimum.accumulate(best[1:], axis=0)


def residual_by_time(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """(seconds (K,), median over samples of the smallest residual seen by then (K,))."""
    residual = np.nan_to_num(trace.residual.cpu().numpy(), nan=np.inf)
    return trace.seconds.numpy(), np.median(np.minimum.accumulate(residual, axis=0), axis=1)


def _curve(traces: Sequence[Trace], budget: int) -> Row:
    """Quartiles of the residual by evaluations over all blocks; by time, of the first block."""
    best = np.concatenate([residual_after(trace, budget) for trace in traces], axis=1)
    low, median, high = np.quantile(best, [0.25, 0.5, 0.75], axis=1, method="nearest")
    seen = np.flatnonzero(np.isfinite(high))
    seconds, by_time = residual_by_time(traces[0])
    there = np.isfinite(by_time)
    bands = {"low": low[seen].tolist(), "median": median[seen].tolist(), "high": high[seen].tolist()}
    times = {"seconds": seconds[there].tolist(), "by_time": by_time[there].tolist()}
    return {"evaluations": (seen + 1).tolist(), **short({**bands, **times})}


@torch.no_grad()
def depth_rows(held: HeldOut, solver: Any, depths: Sequence[int]) -> list[Row]:
    """Mean score, its error against the last, and quartiles of the residual after k evaluations; no stamp.

    A solver's state after k evaluations is the best that it has seen; without a solver it is the k-th of z ← f(z).
    """
    if held.judge is None:
        raise ValueError("there is no score after so many evaluations: these problems have no task")
    found: dict[int, list[tuple[Tensor, Tensor]]] = {k: [] for k in depths}
    for index in torch.arange(len(held), device=held.device).split(CHUNK):
        f, z0, x = held.problem(index)
        for k, z in zip(depths, _states(f, z0, x, solver, depths), strict=True):
            found[k].append((held.judge(z, index).cpu(), _residual(f, z, x).cpu()))
    by_depth = {k: [torch.cat(parts) for parts in zip(*found[k], strict=True)] for k in depths}
    rows = []
    for k, (score, residual) in by_depth.items():
        over = score - by_depth[depths[-1]][0]
        quartiles = torch.quantile(residual, torch.tensor([0.25, 0.5, 0.75]), interpolation="nearest")
        rows.append({
            "row": "depth", "evaluations": k, "score": float(score.mean()), "over_last": float(over.mean()),
            "over_last_error": float(over.std() / len(over) ** 0.5), "residual": quartiles.tolist(),
        })  # fmt: skip
    return short(rows)


def _states(f: Callable[..., State], z0: State, x: Any, solver: Any, depths: Sequence[int]) -> list[State]:
    if solver is not None:
        found = solve(f, z0, x, solver=solver, rtol=0.0, max_nfe=depths[-1] + 1, throw=False, snapshots=depths)
        return list(found.snapshots)
    states, z = [], z0
    for k in range(1, depths[-1] + 1):
        z = _called(f, z, x)
        states += [z] if k in depths else []
    return states


def _residual(f: Callable[..., State], z: State, x: Any) -> Tensor:
    """(B,) ‖f(z) − z‖ / ‖f(z)‖."""
    return relative_residual(_flat(z), _flat(_called(f, z, x))).nan_to_num(torch.inf, torch.inf)


def _called(f: Callable[..., State], z: State, x: Any) -> State:
    return f(z) if x is None else f(z, x)
