"""What is measured of a model after a variant of training.

Rows say what they are under the key "row":
  model   score on test samples at equilibria, and its difference to the original's; seconds of training; looks at validation
  solver  one solver on test samples to one tolerance: evaluations and share solved
  depth   the task's mean score after so many evaluations of a solver
  start   solves of the same problems from zero, from the learned start and from random states: how many end elsewhere
  time    seconds of whole solves, the original's classical solvers and the co-trained model's in turns
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.bench import solvers
from experiments.bench.problems import Family, held_out, packed
from experiments.bench.runner import Row, threads
from experiments.cotrain.variants import (
    BUDGET,
    CO_TRAINED,
    ORIGINAL,
    RTOL,
    Trained,
    Variant,
    judged,
    load,
    trained,
)
from metabroyden import Broyden
from metabroyden.comparison.clock import laps
from metabroyden.comparison.figures import FLAGSHIP
from metabroyden.comparison.measure import FAR, Contestant, Rules, depth_rows, measure
from metabroyden.comparison.problems import HeldOut
from metabroyden.comparison.statistics import Outcome
from metabroyden.comparison.tables import chosen, grouped, short
from metabroyden.learned.learned_start import LearnedStart
from metabroyden.solve import solve

TOLERANCES = (1e-2, 1e-3, 1e-4)
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 45, 60)
SCORED = 2000
"""Test images of which a score is the mean; of texts all windows that are solved."""
ROUNDS, TEXTS = 5, 32
"""Timed rounds; windows of a text in them."""


def measured(config: Any, family: Family, variant: Variant) -> list[Row]:
    """All rows of a variant."""
    with threads(1):
        return short(list(_measured(config, family, variant)))


def _measured(config: Any, family: Family, variant: Variant) -> Iterator[Row]:
    samples = config.samples // 2 if family.texts else config.samples
    result = trained(family, variant)
    stamp: Row = {"family": family.name, "way": variant.way, "weight": variant.weight, "seed": variant.seed}
    looks = [look._asdict() for look in result.looks]
    yield {
        "row": "model", **stamp, **_scores(family, result, samples), "steps": variant.steps,
        "seconds": result.seconds, "fit_seconds": result.fit_seconds, "refused": result.refused, "looks": looks,
    }  # fmt: skip
    held = held_out(result.model, family.criterion, "test", samples, None)
    original = variant.way == ORIGINAL or result.refused
    known = _original_classical(family, config.budget) if original else None
    classical = known or _classical(family, result.model, config.budget)
    everyone = [*classical, *_learned(result, classical)]
    rows = measure(held, everyone, Rules(TOLERANCES, config.budget, len(held), 0))
    for found in grouped(chosen(rows, "solve"), "solver", "tolerance"):
        yield {"row": "solver", **stamp, **_figures(found)}
    if variant.way == ORIGINAL:
        best = min(classical, key=lambda one: _mean(rows, one.name))
        yield from ({**stamp, "solver": best.name, **row} for row in depth_rows(held, best.solver, DEPTHS))
    if variant.way == CO_TRAINED and variant.weight is None:
        ours = everyone[-1]
        yield from ({**stamp, "solver": ours.name, **row} for row in depth_rows(held, ours.solver, DEPTHS))
        yield from ({"row": "start", **stamp, **row} for row in start_rows(held, result.solver, variant.seed))
        yield from ({"row": "time", **stamp, **row} for row in _times(config, family, held, everyone))


def _classical(family: Family, model: Any, budget: int) -> list[Contestant]:
    """Picard, Anderson and Broyden, each the best of its grid on validation problems, and Broyden as it is."""
    held = held_out(model, family.criterion, "validation", 32 if family.texts else 64, None)
    return solvers.contestants(Broyden=Broyden(budget), **solvers.tuned(held, budget))


def _learned(result: Trained, classical: list[Contestant]) -> list[Contestant]:
    """The classical solvers from the learned start, and the learned solver, last; none where there is none."""
    if result.solver is None:
        return []
    ours = Contestant(FLAGSHIP, "learned", result.solver)
    return [*solvers.started(ours, classical), ours]


def _scores(family: Family, result: Trained, samples: int) -> Row:
    """Mean score at equilibria on test samples, its standard error, and the difference to the original's with its own."""
    scored = samples if family.texts else SCORED
    now, before = _test_scores(family, result.model, scored), _original_scores(family, scored)
    root = len(now) ** 0.5
    return {
        "score": float(now.mean()), "error": float(now.std()) / root, "difference": float((now - before).mean()),
        "difference_error": float((now - before).std()) / root, "scored": len(now),
        "original": float(before.mean()), "original_error": float(before.std()) / root,
    }  # fmt: skip


@cache
def _original_scores(family: Family, samples: int) -> Tensor:
    return _test_scores(family, load(family), samples)


@cache
def _original_classical(family: Family, budget: int) -> list[Contestant]:
    return _classical(family, load(family), budget)


def _test_scores(family: Family, model: Any, samples: int) -> Tensor:
    return judged(family, samples, model, Broyden(BUDGET), split="test").scores.double()


def _figures(found: list[Row]) -> Row:
    outcome = Outcome.of(found)
    first = found[0]
    return {
        "solver": first["solver"], "kind": first["kind"], "options": first["options"], "tolerance": first["tolerance"],
        "median": outcome.median, "mean": outcome.mean, "p90": outcome.p90, "solved": outcome.success,
        "error": outcome.error, "samples": outcome.solved.shape[1],
    }  # fmt: skip


def _mean(rows: list[Row], name: str) -> float:
    return float(np.mean([row["evaluations"] for row in chosen(rows, "solve", solver=name, tolerance=RTOL)]))


def start_rows(held: HeldOut, learned: Any, seed: int) -> Iterator[Row]:
    """Shares of problems whose solution from the learned start, or from noise, is another one than that from zero."""
    options: dict[str, Any] = {"rtol": RTOL / 10, "max_nfe": 4 * BUDGET, "throw": False}
    usual = solve(held.f, held.z0, held.x, solver=Broyden(BUDGET), **options)
    star = packed(usual.z)
    generator = torch.Generator().manual_seed(seed)
    scale = star.square().mean().sqrt()
    noise = held.states(scale * torch.randn(star.shape, generator=generator).to(star))
    begun = {
        "learned": (LearnedStart.of(learned, Broyden(BUDGET)), held.z0),
        "random": (Broyden(BUDGET), noise),
        "random, ten times as large": (Broyden(BUDGET), held.states(10 * packed(noise))),
    }
    for name, (solver, z0) in begun.items():
        found = solve(held.f, z0, held.x, solver=solver, **options)
        both = usual.converged & found.converged
        apart = (packed(found.z) - star).norm(dim=1) > FAR * RTOL * star.norm(dim=1)
        yield {
            "start": name, "samples": len(both), "solved": float(found.converged.double().mean()),
            "both": int(both.sum()), "elsewhere": int((apart & both).sum()),
            "farthest": float(((packed(found.z) - star).norm(dim=1) / star.norm(dim=1))[both].max()),
        }  # fmt: skip


def _times(config: Any, family: Family, held: HeldOut, everyone: list[Contestant]) -> Iterator[Row]:
    """Seconds of solves of all test images, or of some windows of a text, as one batch, in turns."""
    most, rounds = (TEXTS, 3) if family.texts else (len(held), ROUNDS)
    original, held = held_out(load(family), family.criterion, "test", len(held), None).head(most), held.head(most)
    theirs = _original_classical(family, config.budget)
    cases = [(ORIGINAL, original, one) for one in theirs] + [
        (CO_TRAINED, held, one) for one in everyone if one.kind != "classical"
    ]
    for tolerance in TOLERANCES[:2]:
        options: dict[str, Any] = {"rtol": tolerance, "max_nfe": config.budget, "throw": False}

        def job(of: HeldOut, one: Contestant) -> Any:
            return lambda: solve(of.f, of.z0, of.x, solver=one.solver, **options) and None  # noqa: B023 (used at once)

        seconds = laps({(way, one.name): job(of, one) for way, of, one in cases}, rounds)
        for (way, name), taken in seconds.items():
            yield {"model": way, "solver": name, "tolerance": tolerance, "seconds": taken.tolist()}
