"""Questions that experiments ask of problems beside the comparison itself; rows as `metabroyden.comparison.measure` makes.

pace     seconds of solves that stop after so many evaluations
horizon  a learned solver against its own fallback, far beyond the steps that it was trained on
leak     how far a language model's earlier predictions move when later tokens are replaced
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from experiments.bench.problems import bits_of
from metabroyden.comparison.clock import laps
from metabroyden.comparison.measure import Contestant, Rules, Stamp, depth_rows, measure, stamp_of
from metabroyden.comparison.problems import HeldOut
from metabroyden.comparison.tables import Row, short
from metabroyden.deq import DEQ
from metabroyden.solve import solve
from metabroyden.zoo.models.criteria import NextToken, device_of
from metabroyden.zoo.tasks import second_half, text_windows

__all__ = ["Rules", "Stamp", "depth_rows", "horizon_rows", "leak_rows", "measure", "pace_rows", "solved_to", "stamp_of"]


def pace_rows(held: HeldOut, solves: Sequence[tuple[Contestant, int, bool]], rules: Rules, stamp: Stamp) -> list[Row]:
    """Time of solves of the first block that stop after so many evaluations, whatever the residual; in turns.

    solves: contestant, evaluations, and whether they are enough for the task.
    """
    z0, x = held.take(torch.arange(min(rules.block, len(held)), device=held.device))

    def lap(one: Contestant, count: int) -> float:
        return one.timed(held.f, z0, x, 0.0, count, keep=False)[1]["total"]

    seconds = laps({(one.key, count): partial(lap, one, count) for one, count, _ in solves}, rules.rounds or 0)
    return [
        {"row": "pace", **stamp(one), "evaluations": count, "enough": enough,
         "seconds": short(seconds[one.key, count].tolist())}
        for one, count, enough in solves
    ]  # fmt: skip


@torch.no_grad()
def horizon_rows(
    held: HeldOut, one: Contestant, stamp: Stamp, *, steps: int, tolerances: Iterable[float] = (1e-3, 1e-4)
) -> list[Row]:
    """A learned solver against its own fallback, `steps` evaluations each: the safeguard's promise, counted.

    The promise is that with max_nfe plus what was spent before the fallback began, it does not fail where that converges.
    """
    rows, (fallback, phase) = [], one.solver.fallback()
    for tolerance in tolerances:
        counts = dict.fromkeys(("fallback", "learned", "lost", "broken", "triggered"), 0)
        for z0, x, _ in held.chunks():
            ours = solve(held.f, z0, x, solver=one.solver, rtol=tolerance, max_nfe=4 * steps, throw=False)
            theirs = solve(held.f, z0, x, solver=fallback, rtol=tolerance, max_nfe=steps, throw=False)
            nfe, hit = ours.trace.evaluations_to(tolerance, 4 * steps)
            # all of them where it never entered the phase
            before = np.where((ours.trace.phase < phase).numpy(), ours.trace.nfe.numpy(), 0).max(axis=0)
            converged, learned = theirs.converged.cpu().numpy(), hit & (nfe <= steps)
            found = {
                "fallback": converged, "learned": learned, "lost": converged & ~learned,
                "broken": converged & ~(hit & (nfe <= steps + before)),
                "triggered": (ours.trace.phase > 0).any(dim=0).numpy(),
            }  # fmt: skip
            counts = {key: count + int(found[key].sum()) for key, count in counts.items()}
        about = {"tolerance": tolerance, "steps": steps, "samples": len(held)}
        rows.append({"row": "horizon", **stamp(one), **about, **counts})
    return rows


@contextmanager
def solved_to(model: Any, rtol: float | None) -> Iterator[None]:
    """The model's DEQ, where it has one and a tolerance is given, solving to that, with evaluations enough."""
    if rtol is None or not isinstance(model.deq, DEQ):
        yield
        return
    before = model.deq.rtol, model.deq.max_nfe
    model.deq.rtol, model.deq.max_nfe = rtol, 100
    try:
        yield
    finally:
        model.deq.rtol, model.deq.max_nfe = before


@torch.no_grad()
def leak_rows(
    model: Any, criterion: NextToken, stamp: Row, *, tolerances: Iterable[float], windows: int = 24, last: int = 8
) -> list[Row]:
    """By how many bits the predictions of a segment's tokens change when the last few are replaced, at each tolerance.

    Those before are asked alone: a causal model's equilibrium has no change there, a solve that stops before may.
    """
    length = criterion.length
    tokens, targets = (part[:windows] for part in text_windows(criterion.data, "test", length, model.stem.back))
    tokens, targets = tokens.to(device_of(model)), targets.to(device_of(model))
    changed = tokens.clone()
    changed[:, -last:] = (changed[:, -last:] + 1) % len(criterion.data.vocabulary)
    rows = []
    for tolerance in tolerances:
        with solved_to(model, tolerance):
            solved = (model.deq(second_half(model, read, length)) for read in (tokens, changed))
            before, after = (bits_of(model.classify(z), targets) for z in solved)
        bits = (after - before)[:, :-last].abs()
        rows.append(
            {"row": "leak", **stamp, "tolerance": tolerance, "mean": float(bits.mean()), "most": float(bits.max())}
        )
    return short(rows)
