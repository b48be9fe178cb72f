"""What a trained family is worth beside its twins, and how hard its equilibria are to find. Rows, no pictures.

Rows say what they are under the key "row", and under "way" the variant of the family that they are about:
  quality     score on the test split, parameters, seconds of training
  depth       score and residual after k iterations of a method, on a part of the test split (`bench.measure.depth_rows`)
  difficulty  one solver: evaluations to each tolerance, by sample (the budget where it was not reached)
  guarantee   one solver on a whole split: how many samples it solves, and what the last of them cost
  spectrum    spectral radius of the Jacobian at each sample's equilibrium
  units       a few coordinates of one sample's state by depth, and where they come to rest
  parts       relative residual of each tensor of the state by depth
  step        seconds and peak memory of one training step, in turns with the other variants
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from experiments.bench import measure
from experiments.bench.clock import LiveBytes, now
from experiments.bench.problems import HeldOut
from experiments.bench.runner import Row
from experiments.bench.tables import short
from metabroyden.deq import DEQ
from metabroyden.gradients.base import parts_of
from metabroyden.nn.spectral import spectral_radius
from metabroyden.solution import relative_residual
from metabroyden.solve import solve
from metabroyden.state import Packing
from metabroyden.zoo.models.criteria import Criterion, NextToken, device_of
from metabroyden.zoo.models.fit import Stage, Training

TOLERANCES = (1e-2, 1e-3, 1e-4)
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 50, 64, 80, 100)
EXACT = 1e-5
"""What language models are solved to where they are scored."""


def depth_rows(way: str, held: HeldOut, solver: Any = None, depths: Sequence[int] = DEPTHS) -> list[Row]:
    """Score and residual after k evaluations of a solver, or of z ← f(z)."""
    method = "plain iteration" if solver is None else type(solver).__name__
    return [{**row, "way": way, "method": method} for row in measure.depth_rows(held, solver, depths)]


def difficulty_rows(way: str, held: HeldOut, solvers: dict[str, Any], *, budget: int) -> list[Row]:
    """Evaluations of each solver to each of `TOLERANCES`, by sample."""
    rows = []
    for name, solver in solvers.items():
        spent: dict[str, list[int]] = {f"{tolerance:g}": [] for tolerance in TOLERANCES}
        reached: dict[str, list[bool]] = {f"{tolerance:g}": [] for tolerance in TOLERANCES}
        for z0, x, _ in held.chunks():
            found = solve(held.f, z0, x, solver=solver, rtol=TOLERANCES[-1], max_nfe=budget, throw=False)
            for tolerance in TOLERANCES:
                nfe, hit = found.trace.evaluations_to(tolerance, budget)
                spent[f"{tolerance:g}"] += nfe.tolist()
                reached[f"{tolerance:g}"] += hit.tolist()
        rows.append(
            {
                "row": "difficulty",
                "way": way,
                "solver": name,
                "config": repr(solver),
                "budget": budget,
                "nfe": spent,
                "reached": reached,
            }
        )
    return rows


def guarantee_rows(
    way: str, held: HeldOut, solvers: dict[str, Any], *, tolerance: float = 1e-4, budget: int = 200
) -> list[Row]:
    """Whether solvers find each equilibrium there is, and with how many evaluations at most."""
    rows = []
    for name, solver in solvers.items():
        found = [
            solve(held.f, z0, x, solver=solver, rtol=tolerance, max_nfe=budget, throw=False)
            for z0, x, _ in held.chunks()
        ]
        reached = torch.cat([solution.converged for solution in found])
        rows.append(
            {
                "row": "guarantee",
                "way": way,
                "solver": name,
                "tolerance": tolerance,
                "budget": budget,
                "samples": len(reached),
                "failures": int((~reached).sum()),
                "worst": max(int(solution.nfe.max()) for solution in found),
            }
        )
    return rows


def spectrum_rows(way: str, held: HeldOut, *, solver: Any, max_nfe: int = 200, iterations: int = 40) -> list[Row]:
    """Spectral radii at equilibria found to 1e-5 (or as closely as the budget allows: `converged` says how many were)."""
    radii: list[float] = []
    converged: list[bool] = []
    for z0, x, _ in held.chunks():
        found = solve(held.f, z0, x, solver=solver, rtol=1e-5, max_nfe=max_nfe, throw=False)
        radii += spectral_radius(held.f, found.z, x, iterations=iterations).tolist()
        converged += found.converged.tolist()
    return [{"row": "spectrum", "way": way, "radius": short(radii), "converged": float(np.mean(converged))}]


@torch.no_grad()
def unit_rows(way: str, held: HeldOut, *, solver: Any, depth: int = 60, units: int = 6, sample: int = 0) -> list[Row]:
    """A few coordinates of one sample by depth: those that move most between the middle of the way and its end.

    The fixed point is the solver's, to 1e-6 where it gets there; `residual` says how close it came.
    """
    index = torch.tensor([sample], device=held.device)
    z, x = z0, x = held.take(index)
    packing = Packing.of(z)
    path = [packing.pack(z)[0]]
    for _ in range(depth):
        z = held.f(z, x)
        path.append(packing.pack(z)[0])
    found = solve(held.f, z0, x, solver=solver, rtol=1e-6, max_nfe=400, throw=False)
    star, states = packing.pack(found.z)[0], torch.stack(path)
    chosen = states[depth // 6 :].std(dim=0).argsort(descending=True)
    chosen = chosen[: 40 * units : 40] if len(chosen) >= 40 * units else chosen[:units]
    distance = (states - star).norm(dim=1) / star.norm()
    return [
        {
            "row": "units",
            "way": way,
            "activations": short(states[:, chosen].T.tolist()),
            "fixed_point": short(star[chosen].tolist()),
            "distance": short(distance.tolist()),
            "residual": short(float(found.residual[0])),
        }
    ]


@torch.no_grad()
def part_rows(way: str, held: HeldOut, *, depths: int = 30) -> list[Row]:
    """Median relative residual of each tensor of a state of several, after k plain iterations."""
    (z, x), table = held.first(), []
    for _ in range(depths):
        image = held.f(z, x)
        pairs = zip(parts_of(image), parts_of(z), strict=True)
        table.append([float(relative_residual(b, a).median()) for a, b in pairs])
        z = image
    return [{"row": "parts", "way": way, "residual": short(table)}]


def quality_row(way: str, model: Any, criterion: Criterion, seconds: float) -> Row:
    """Score on the whole test split, parameters, seconds of training.

    A DEQ that reads texts is scored at equilibria found to `EXACT`: a looser solve of a whole segment may tell a token
    something of those after it (`bench.measure.leak_rows`).
    """
    with measure.solved_to(model, EXACT if isinstance(criterion, NextToken) else None):
        score = criterion.score(model, "test")
    return {
        "row": "quality",
        "way": way,
        "metric": criterion.metric,
        "higher": criterion.higher,
        "score": short(score),
        "validation": short(criterion.score(model, "validation")),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": short(seconds),
    }


def step_rows(
    models: dict[str, Any], trainings: dict[str, Training], criterion: Criterion, *, repeats: int
) -> list[Row]:
    """Seconds and peak bytes of one training step of each model as its last epochs took them: loss, penalty, backward.

    Interleaved; medians. `evaluations` are those of a DEQ's solve, where the step has one.
    """
    seconds: dict[str, list[float]] = {way: [] for way in models}
    peaks: dict[str, int] = {}
    nfe: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for way, model in models.items():
            if isinstance(model.deq, DEQ):
                model.deq.last_solution = None
            if repeat == 0:
                with LiveBytes([*model.parameters()]) as live:
                    _step(model, trainings[way], criterion)
                peaks[way] = live.peak
                solution = getattr(model.deq, "last_solution", None)
                nfe[way] = float("nan") if solution is None else float(solution.nfe.float().mean())
            else:
                began = now(device_of(model))
                _step(model, trainings[way], criterion)
                seconds[way].append(now(device_of(model)) - began)
            model.zero_grad()
            if isinstance(model.deq, DEQ):
                model.deq.last_solution = model.deq.last_backward_solution = None
    return [
        {
            "row": "step",
            "way": way,
            "device": device_of(models[way]).type,
            "batch": trainings[way].batch,
            "seconds": short(float(np.median(seconds[way]))),
            "peak_bytes": peaks[way],
            "evaluations": None if np.isnan(nfe[way]) else short(nfe[way]),
        }
        for way in models
    ]


def _step(model: Any, training: Training, criterion: Criterion) -> None:
    """Loss, penalty and backward of one batch of the last epoch."""
    generator = torch.Generator().manual_seed(0)
    model.train()
    with Stage(model, training, epoch=training.epochs) as stage:
        loss = next(stage.losses(criterion, generator))
        (loss + stage.penalty(generator)).backward()
    model.eval()
