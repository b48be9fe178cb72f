"""What a trained family is worth beside its twins, and how hard its equilibria are to find. Rows, no pictures.

Rows say what they are under the key "row", and under "way" the variant of the family that they are about:
  epoch      a training's history
  quality    score on the test split, parameters, seconds of training
  depth      score and residual after k iterations of a method, on a part of the test split (`bench.measure.depth_rows`)
  solve      evaluations of a classical solver by sample (`bench.measure.measure`)
  guarantee  one solver on a whole split: how many samples it solves, and what the last of them cost
  spectrum   spectral radius of the Jacobian at each sample's equilibrium
  units      a few coordinates of one sample's state by depth, and where they come to rest
  step       seconds and peak memory of one training step, in turns with the other variants
  ngram, recent  bits a token of n-gram models, and of the best of them when it may bet on what it read
  leak       how far predictions move when later tokens are replaced (`bench.measure.leak_rows`)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from experiments.bench import measure, problems, solvers
from experiments.bench.problems import HeldOut, packed
from experiments.bench.runner import Row
from experiments.models.ngram import NGram, Recent
from metabroyden import solve
from metabroyden.comparison.clock import LiveBytes, laps, now
from metabroyden.comparison.statistics import Field
from metabroyden.comparison.tables import chosen, short
from metabroyden.nn.spectral import spectral_radius
from metabroyden.progress import ticks
from metabroyden.solvers import Anderson, Broyden, Picard
from metabroyden.zoo.models.criteria import Criterion, NextToken, device_of
from metabroyden.zoo.models.fit import Stage, Training, history

DEQ, REGULARISED = "DEQ", "DEQ, Jacobian penalty"
TOLERANCES, DEPTHS = (1e-2, 1e-3, 1e-4), (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 50, 64, 80, 100)
EXACT = 1e-5
"""What language models are solved to where they are scored: a looser solve may tell a token something of those after it."""


def measured(job: Any, models: dict[str, Any]) -> Iterator[Row]:
    """All rows of a family, of its variants once they are trained; job: a `Job` of this package."""
    with ticks(f"{job.name}, measuring", len(models) + 2, show=job.config.progress) as tick:
        for way, model in models.items():
            past = history(job.at(way))
            yield from ({"row": "epoch", "way": way, **asdict(epoch)} for epoch in past)
            yield quality_row(way, model, job.criterion, past[-1].seconds)
            if way in (DEQ, REGULARISED, "unrolled"):
                yield from examined(job, way, model)
            tick(way)
        if isinstance(job.criterion, NextToken):
            yield from ngram_rows(job.criterion)
            tolerances = (job.family.rtol, EXACT)
            yield from measure.leak_rows(models[DEQ], job.criterion, {"way": DEQ}, tolerances=tolerances)
        tick("tokens")
        yield from step_rows(models, {way: job.training(way) for way in models}, job.criterion, job.config.repeats)
        tick("training steps")


def quality_row(way: str, model: Any, criterion: Criterion, seconds: float) -> Row:
    """Score on the whole test split, parameters, seconds of training."""
    with measure.solved_to(model, EXACT if isinstance(criterion, NextToken) else None):
        score = criterion.score(model, "test")
    about = {"row": "quality", "way": way, "metric": criterion.metric, "higher": criterion.higher}
    figures = {"score": score, "validation": criterion.score(model, "validation"), "seconds": seconds}
    return {**about, **short(figures), "parameters": sum(p.numel() for p in model.parameters())}


def examined(job: Any, way: str, model: Any) -> Iterator[Row]:
    """How hard the equilibria are to find, what the score is on the way there, and what pictures show."""
    held, budget = problems.held_out(model, job.criterion, "test", job.config.samples), job.config.budget
    if way != "unrolled":
        validation = problems.held_out(model, job.criterion, "validation", 64)
        known: dict[str, Any] = {"Picard": Picard(), "Anderson": Anderson(), "Broyden": Broyden(budget)}
        known |= solvers.tuned(validation, budget, splitting=job.family.splitting)
        yield from solve_rows(way, held, known, TOLERANCES, budget)
        sure = {name: one for name, one in known.items() if name in ("forward-backward", "Peaceman-Rachford")}
        if sure:
            yield from guarantee_rows(way, problems.held_out(model, job.criterion, "test", sys.maxsize), sure)
        yield spectrum_row(way, held, sure.get("Peaceman-Rachford", Broyden(memory=100)))
        yield from depth_rows(way, held, job.family.solver)
    yield from depth_rows(way, held)
    if job.family.pictures and way != REGULARISED:
        yield unit_row(way, held, Broyden(memory=200))


def depth_rows(way: str, held: HeldOut, solver: Any = None, depths: Sequence[int] = DEPTHS) -> list[Row]:
    """Score and residual after k evaluations of a solver, or of z ← f(z)."""
    method = "plain iteration" if solver is None else type(solver).__name__
    return [{**row, "way": way, "method": method} for row in measure.depth_rows(held, solver, depths)]


def solve_rows(way: str, held: HeldOut, known: dict[str, Any], tolerances: tuple[float, ...], budget: int) -> list[Row]:
    """The bench's solves; for its statistics a variant is a family."""
    rules, every = measure.Rules(tolerances, budget), solvers.contestants(**known)
    stamp = measure.stamp_of(replace(held, name=way), way=way)
    return chosen(measure.measure(held, every, rules, stamp), "solve")


def guarantee_rows(way: str, held: HeldOut, known: dict[str, Any]) -> Iterator[Row]:
    """Whether solvers find each equilibrium there is to 1e-4, and with how many evaluations at most."""
    field = Field(solve_rows(way, held, known, (1e-4,), 200))
    place = {"row": "guarantee", "way": way, "tolerance": 1e-4, "budget": 200, "samples": len(held)}
    for name, found in field.outcomes(way, 1e-4).items():
        counts = {"failures": int((~found.solved).sum()), "worst": int(found.evaluations.max())}
        yield {**place, "solver": name, **counts}


def spectrum_row(way: str, held: HeldOut, solver: Any) -> Row:
    """Spectral radii at equilibria found to 1e-5 (or as closely as the budget allows: `converged` says how many were)."""
    radii, converged = [], []
    for z0, x, _ in held.chunks():
        found = solve(held.f, z0, x, solver=solver, rtol=1e-5, max_nfe=200, throw=False)
        radii += spectral_radius(held.f, found.z, x, iterations=40).tolist()
        converged += found.converged.tolist()
    return {"row": "spectrum", "way": way, "radius": short(radii), "converged": float(np.mean(converged))}


@torch.no_grad()
def unit_row(way: str, held: HeldOut, solver: Any, *, depth: int = 60, units: int = 6) -> Row:
    """A few coordinates of the first sample by depth: those that move most between the middle of the way and its end.

    The fixed point is the solver's, to 1e-6 where it gets there; `residual` says how close it came.
    """
    z, x = z0, x = held.take(torch.zeros(1, dtype=torch.long, device=held.device))
    path = [packed(z)[0]]
    for _ in range(depth):
        z = held.f(z, x)
        path.append(packed(z)[0])
    found = solve(held.f, z0, x, solver=solver, rtol=1e-6, max_nfe=400, throw=False)
    star, states = packed(found.z)[0], torch.stack(path)
    moving = states[depth // 6 :].std(dim=0).argsort(descending=True)
    moving = moving[: 40 * units : 40] if len(moving) >= 40 * units else moving[:units]
    curves = {"activations": states[:, moving].T.tolist(), "fixed_point": star[moving].tolist()}
    distance = ((states - star).norm(dim=1) / star.norm()).tolist()
    return {"row": "units", "way": way, **short({**curves, "distance": distance, "residual": float(found.residual[0])})}


def step_rows(
    models: dict[str, Any], trainings: dict[str, Training], criterion: Criterion, repeats: int
) -> Iterator[Row]:
    """Seconds and peak bytes of one training step of each model as its last epochs took them: loss, penalty, backward.

    Interleaved; medians. `evaluations` are those of a DEQ's solve, where the step has one.
    """
    steps = {way: partial(_step, model, trainings[way], criterion) for way, model in models.items()}
    peaks, spent = {}, {}
    for way, model in models.items():
        with LiveBytes([*model.requires_grad_(True).parameters()]) as live:
            _, spent[way] = steps[way]()
        peaks[way] = live.peak
    for way, found in laps(steps, repeats).items():
        about = {"device": device_of(models[way]).type, "batch": trainings[way].batch, "peak_bytes": peaks[way]}
        figures = {"seconds": float(np.median(found[:, 0])), "evaluations": spent[way] or None}
        yield {"row": "step", "way": way, **about, **short(figures)}


def _step(model: Any, training: Training, criterion: Criterion) -> tuple[float, float]:
    """(seconds, mean evaluations of a solve) of one batch of the last epoch."""
    generator, device = torch.Generator().manual_seed(0), device_of(model)
    model.deq.last_solution = None
    began = now(device)
    model.train()
    with Stage(model, training, epoch=training.epochs) as stage:
        loss = next(stage.losses(criterion, generator))
        (loss + stage.penalty(generator)).backward()
    model.eval()
    seconds, solution = now(device) - began, model.deq.last_solution
    model.zero_grad()
    model.deq.last_solution = model.deq.last_backward_solution = None
    return seconds, 0.0 if solution is None else float(solution.nfe.float().mean())


def ngram_rows(criterion: NextToken, orders: Iterable[int] = range(1, 10), batch: int = 64) -> Iterator[Row]:
    """Bits per token of n-gram models of the training split: on validation, and on those test tokens that models predict."""
    data, size = criterion.data, len(criterion.data.vocabulary)
    read = sum(targets.numel() for _, targets in data.test.streams(batch, criterion.length))

    def bits(model: NGram | Recent) -> Row:
        test, validation = (model.probabilities(part.tokens) for part in (data.test, data.validation))
        return short({"score": -np.log2(test[1 : read + 1]).mean(), "validation": -np.log2(validation).mean()})

    found = {n: bits(NGram.fit(data.train.tokens, n, size)) for n in orders if size**n < 2**63}
    yield from ({"row": "ngram", "order": order, **scores} for order, scores in found.items())
    best = min(found, key=lambda order: found[order]["validation"])
    told = Recent.fit(NGram.fit(data.train.tokens, best, size), data.validation.tokens, recent=512)
    about = {"order": best, "within": told.recent, "weights": short(told.weights[1:].tolist())}
    yield {"row": "recent", **about, "score": bits(told)["score"]}
