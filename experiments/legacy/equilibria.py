"""The equilibria of a trained family, and how hard they are to find. Rows, no pictures.

A row is a JSON object with a key "row" that says what it tells, and "way", the variant of the family it is about:
  depth       score and residual after k iterations of a method, on a part of the test split
  difficulty  one solver: evaluations to each tolerance, by sample (the budget where it was not reached)
  guarantee   one solver on a whole split: the share of samples that it solves, and what the last of them cost
  spectrum    spectral radius of the Jacobian at each sample's equilibrium
  units       a few coordinates of one sample's state by depth, and where they come to rest
  parts       relative residual of each tensor of the state by depth
and, in `model_scores`,
  quality     score on the test split, parameters, seconds of training
  step        seconds and peak memory of one training step, interleaved with the other ways'
and, in `texts`,
  tokens      evaluations until each token of a held-out passage has settled
  leak        change of a language model's earlier predictions when later tokens are replaced, by tolerance
  ngram       an n-gram model's bits per token
  recent      the same of the best one, when it bets on repeats
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.legacy.metrics import bits_of, short
from metabroyden.gradients.base import parts_of
from metabroyden.nn.pin import pin
from metabroyden.nn.spectral import spectral_radius
from metabroyden.solution import State, relative_residual
from metabroyden.solve import solve
from metabroyden.solvers import classical
from metabroyden.state import Packing, gather
from metabroyden.zoo.models.criteria import Criterion, Images, NextToken, device_of
from metabroyden.zoo.tasks import family_tasks, text_windows

Row = dict[str, Any]
TOLERANCES = (1e-2, 1e-3, 1e-4)
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 50, 64, 80, 100)
_CHUNK = 64  # samples solved at once: Broyden keeps two states for each evaluation


@dataclass(frozen=True)
class HeldOut:
    """Fixed-point problems of a trained model on a part of a split: f pinned, starts, contexts; `judge` scores states.

    `judge(z, index)` gives (len(index),) scores of the states of these samples: 1 or 0 for a right or wrong class, or bits
    per token; `predict(z)` the classes themselves, (B,) or (B, T).
    """

    f: Callable[..., State]
    z0: State
    x: Any
    judge: Callable[[State, Tensor], Tensor]
    predict: Callable[[State], Tensor] | None = None

    def __len__(self) -> int:
        return len(parts_of(self.z0)[0])

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return parts_of(self.z0)[0].device

    def chunks(self) -> Iterable[tuple[State, Any, Tensor]]:
        """(z0, x, index) of consecutive samples."""
        for index in torch.arange(len(self), device=self.device).split(_CHUNK):
            yield gather(self.z0, index), gather(self.x, index), index


@torch.no_grad()
def held_out(
    model: Any, criterion: Criterion, split: str, limit: int, change: Callable[[Tensor], Tensor] | None = None
) -> HeldOut:
    """The first `limit` problems of a split (for texts: evenly spaced segments), of inputs changed by `change`."""
    tasks = family_tasks(model, criterion)
    raw = tasks.split(split)
    count = min(limit, len(raw))
    chosen = torch.arange(count) if isinstance(criterion, Images) else torch.linspace(0, len(raw) - 1, count).long()
    z0, x = tasks.prepare(raw[chosen] if change is None else change(raw[chosen]))
    f, x = pin(model.cell, x, z0)

    def classes(z: State) -> Tensor:
        return model.classify(z).argmax(dim=1 if isinstance(criterion, Images) else 2)

    if isinstance(criterion, Images):
        labels = getattr(criterion.data, split).labels[chosen].to(device_of(model))
        return HeldOut(f, z0, x, lambda z, index: (model.classify(z).argmax(dim=1) == labels[index]).float(), classes)
    assert isinstance(criterion, NextToken)
    targets = text_windows(criterion.data, split, criterion.length)[1][chosen].to(device_of(model))

    def bits(z: State, index: Tensor) -> Tensor:
        return bits_of(model.classify(z), targets[index]).mean(dim=1)

    return HeldOut(f, z0, x, bits, classes)


@torch.no_grad()
def depth_rows(way: str, held: HeldOut, *, solver: Any = None, depths: Sequence[int] = DEPTHS) -> list[Row]:
    """Mean score, its standard error, and quartiles of the residual after k evaluations, of a solver or of z ← f(z).

    The solver's state after k evaluations is the best it has seen; that of plain iteration is the last.
    """
    scores: dict[int, list[Tensor]] = {k: [] for k in depths}
    residuals: dict[int, list[Tensor]] = {k: [] for k in depths}
    for z0, x, index in held.chunks():
        for k, z in zip(depths, _states(held.f, z0, x, solver, depths), strict=True):
            scores[k].append(held.judge(z, index).cpu())
            residuals[k].append(_residual(held.f, z, x).cpu())
    last = torch.cat(scores[depths[-1]])
    rows = []
    for k in depths:
        score, residual = torch.cat(scores[k]), torch.cat(residuals[k])
        against = score - last
        rows.append(
            {
                "row": "depth",
                "way": way,
                "method": "plain iteration" if solver is None else type(solver).__name__,
                "evaluations": k,
                "score": float(score.mean()),
                "over_last": float(against.mean()),
                "over_last_error": float(against.std() / len(against) ** 0.5),
                "residual": torch.quantile(residual, torch.tensor([0.25, 0.5, 0.75]), interpolation="nearest").tolist(),
            }
        )
    return short(rows)


def _states(f: Callable[..., State], z0: State, x: Any, solver: Any, depths: Sequence[int]) -> list[State]:
    if solver is not None:
        found = solve(f, z0, x, solver=solver, rtol=0.0, max_nfe=depths[-1] + 1, throw=False, snapshots=depths)
        return list(found.snapshots)
    states, z = [], z0
    for k in range(1, depths[-1] + 1):
        z = f(z, x)
        if k in depths:
            states.append(z)
    return states


def _residual(f: Callable[..., State], z: State, x: Any) -> Tensor:
    """(B,) ‖f(z) − z‖ / ‖f(z)‖."""
    fz = f(z, x)
    flat, image = (torch.cat([part.flatten(1) for part in parts_of(state)], dim=1) for state in (z, fz))
    return relative_residual(flat, image).nan_to_num(torch.inf, torch.inf)


def tuned_solvers(validation: HeldOut, budget: int) -> dict[str, Any]:
    """The best Picard, Anderson and Broyden of a grid on validation problems."""
    z0, x, _ = next(iter(validation.chunks()))
    return classical.tuned_solvers(validation.f, z0, x, budget=budget)


def splitting_solvers(validation: HeldOut, budget: int) -> dict[str, Any]:
    """Forward–backward (with a margin) and Peaceman–Rachford, tuned on validation problems, for a cell that offers parts."""
    z0, x, _ = next(iter(validation.chunks()))
    return classical.splitting_solvers(validation.f, z0, x, budget=budget)


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
    z, x = gather(held.z0, index), gather(held.x, index)
    packing = Packing.of(z)
    path = [packing.pack(z)[0]]
    for _ in range(depth):
        z = held.f(z, x)
        path.append(packing.pack(z)[0])
    found = solve(held.f, gather(held.z0, index), x, solver=solver, rtol=1e-6, max_nfe=400, throw=False)
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
    z0, x, _ = next(iter(held.chunks()))
    z, table = z0, []
    for _ in range(depths):
        image = held.f(z, x)
        pairs = zip(parts_of(image), parts_of(z), strict=True)
        table.append([float(relative_residual(b, a).median()) for a, b in pairs])
        z = image
    return [{"row": "parts", "way": way, "residual": short(table)}]
