"""Learned and classical solvers on the held-out problems of a trained family: rows. Nothing here draws or judges.

A row is a JSON object with a key "row" that says what it tells of one solver:
  solve  stopped at one tolerance: evaluations by sample (the budget where it was not reached), what it had by then: distance
         to the float64 equilibrium, score of the task
  curve  quartiles over samples of the smallest residual after k evaluations
  horizon  far past the steps it was trained on: how many samples a learned solver loses that its fallback (the last of its
         phases) solves, at the same budget and at the budget plus what it had spent when that took over
  clock  seconds of a whole solve to one tolerance by repeat, interleaved with the other solvers; the share of samples that
         got there; seconds in f and calls of it, but for solvers that use parts of f
and "score" after k evaluations by `equilibria.depth_rows`, and "leak" by `texts.leak_rows`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from experiments.legacy.equilibria import HeldOut, Row
from experiments.legacy.metrics import residual_after, short
from experiments.legacy.stopwatch import Stopwatch, now
from metabroyden import checkpoint
from metabroyden.nn.pin import pin
from metabroyden.solution import State
from metabroyden.solve import solve
from metabroyden.solvers import Anderson, Broyden
from metabroyden.solvers.clock import turns
from metabroyden.state import Packing, gather

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def packed(z: State) -> Tensor:
    """(B, n)."""
    return Packing.of(z).pack(z)


@torch.no_grad()
def double_equilibria(
    cell: Any, held: HeldOut, solvers: Sequence[Any] = (), *, rtol: float = 1e-8, max_nfe: int = 400
) -> tuple[Tensor, Tensor]:
    """(z*, known): float64 equilibria (N, n) of held-out problems, found from their own starts; known (N,) where found.

    solvers: what to try, each on what those before left; default Broyden's method, then Anderson's.
    """
    solvers = solvers or (Broyden(memory=200), Anderson(memory=10, ridge=1e-12))
    double = copy.deepcopy(cell).double()
    stars, known = [], []
    for z0, x, _ in held.chunks():
        z0, x = pytree.tree_map(_in_double, (z0, x))
        f, x = pin(double, getattr(x, "context", x), z0)
        star = packed(z0).clone()
        found = torch.zeros(len(star), dtype=torch.bool, device=star.device)
        for solver in solvers:
            todo = (~found).nonzero().squeeze(1)
            if len(todo) == 0:
                break
            start, context = gather((z0, x), todo)
            solution = solve(f, start, context, solver=solver, rtol=rtol, max_nfe=max_nfe, throw=False)
            star[todo], found[todo] = packed(solution.z), solution.converged
        stars.append(star)
        known.append(found)
    return torch.cat(stars), torch.cat(known)


def kept_equilibria(path: Path, cell: Any, held: HeldOut, solvers: Sequence[Any] = ()) -> tuple[Tensor, Tensor]:
    """`double_equilibria`, found once and kept in a file."""
    if not path.exists():
        star, known = double_equilibria(cell, held, solvers)
        checkpoint.write(path, "measured/equilibria", {"star": star, "known": known}, {})
    tensors, _ = checkpoint.read(path, "measured")
    return tensors["star"].to(held.device), tensors["known"].to(held.device)


def states_at(star: Tensor, held: HeldOut) -> State:
    """Equilibria (N, n) as states of the held-out problems, in their dtype."""
    packing = Packing.of(held.z0)
    return packing.unpack(star.to(packing.pack(held.z0).dtype))


def _in_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@torch.no_grad()
def solve_rows(
    name: str, solver: Any, held: HeldOut, star: Tensor, known: Tensor, *, budget: int,
    tolerances: Sequence[float] = TOLERANCES,
) -> list[Row]:  # fmt: skip
    """One solver to each tolerance, a solve of its own each, and its residual curve from the last."""
    rows: list[Row] = []
    best: list[np.ndarray] = []
    for tolerance in tolerances:
        spent, reached, distances, scores, handed = [], [], [], [], 0
        for z0, x, index in held.chunks():
            found = solve(held.f, z0, x, solver=solver, rtol=tolerance, max_nfe=budget, throw=False)
            nfe, hit = found.trace.evaluations_to(tolerance, budget)
            spent += nfe.tolist()
            reached += hit.tolist()
            apart = (packed(found.z).double() - star[index]).norm(dim=1) / star[index].norm(dim=1)
            distances += torch.where(known[index], apart, torch.nan).tolist()
            scores += held.judge(found.z, index).tolist()
            handed += int((found.trace.phase > 0).any(dim=0).sum())
            if tolerance == tolerances[-1]:
                best.append(residual_after(found.trace, budget))
        rows.append(
            {
                "row": "solve",
                "solver": name,
                "config": repr(solver) if not isinstance(solver, torch.nn.Module) else type(solver).__name__,
                "budget": budget,
                "tolerance": tolerance,
                "nfe": spent,
                "reached": reached,
                "distance": [None if np.isnan(value) else float(f"{value:.3g}") for value in distances],
                "score": float(np.mean(scores)),
                "handed_over": handed / len(held),
            }
        )
    quartiles = np.quantile(np.concatenate(best, axis=1), [0.25, 0.5, 0.75], axis=1, method="nearest")
    finite = int(np.isfinite(quartiles[2]).sum())
    first = budget - finite  # a learned start is measured after its first evaluation, or its second
    rows.append({"row": "curve", "solver": name, "first": first + 1, "residual": quartiles[:, first:].T.tolist()})
    return short(rows)


@torch.no_grad()
def horizon_rows(
    name: str, solver: Any, held: HeldOut, *, steps: int, tolerances: Sequence[float] = (1e-3, 1e-4)
) -> list[Row]:
    """A learned solver against its own fallback, `steps` evaluations each: the safeguard's promise, counted.

    The promise is that with max_nfe plus what was spent before the fallback began, it does not fail where that converges.
    """
    rows, (fallback, phase) = [], solver.fallback()
    for tolerance in tolerances:
        counts = {"fallback": 0, "learned": 0, "lost": 0, "broken": 0, "triggered": 0}
        for z0, x, _ in held.chunks():
            ours = solve(held.f, z0, x, solver=solver, rtol=tolerance, max_nfe=4 * steps, throw=False)
            theirs = solve(held.f, z0, x, solver=fallback, rtol=tolerance, max_nfe=steps, throw=False)
            nfe, hit = ours.trace.evaluations_to(tolerance, 4 * steps)
            before = _spent_before(ours, phase)
            converged = theirs.converged.cpu().numpy()
            counts["fallback"] += int(converged.sum())
            counts["learned"] += int((hit & (nfe <= steps)).sum())
            counts["lost"] += int((converged & ~(hit & (nfe <= steps))).sum())
            counts["broken"] += int((converged & ~(hit & (nfe <= steps + before))).sum())
            counts["triggered"] += int((ours.trace.phase > 0).any(dim=0).sum())
        rows.append(
            {"row": "horizon", "solver": name, "tolerance": tolerance, "steps": steps, "samples": len(held), **counts}
        )
    return rows


def _spent_before(solution: Any, phase: int) -> np.ndarray:
    """(B,) evaluations each sample had spent when it entered a phase; all of them where it never did."""
    trace = solution.trace
    counts = np.where((trace.phase < phase).numpy(), trace.nfe.numpy(), 0)
    return counts.max(axis=0)


@torch.no_grad()
def clock_rows(
    solvers: dict[str, Any], held: HeldOut, *, tolerances: Iterable[float], budget: int, batch: int, repeats: int
) -> list[Row]:
    """Whole solves of one batch of held-out problems by every solver in turn, `repeats` rounds after one to warm up.

    On a GPU the clock is read when it has done what it was told, before and after each evaluation of f too.
    """
    index = torch.arange(min(batch, len(held)), device=held.device)
    z0, x = gather(held.z0, index), gather(held.x, index)
    watch = Stopwatch(held.device)
    f = watch.of_f(held.f)
    rows: list[Row] = []
    for tolerance in tolerances:
        taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in solvers}
        reached: dict[str, float] = {}
        for name in turns(list(solvers), repeats + 1):
            solver = solvers[name]
            watch.clear()
            timed = held.f if getattr(solver, "parts", ()) else f
            began = now(held.device)
            found = solve(timed, z0, x, solver=solver, rtol=tolerance, max_nfe=budget, throw=False)
            taken[name].append((now(held.device) - began, watch.f, watch.calls))
            reached[name] = float(found.converged.float().mean())
        for name, readings in taken.items():
            total, in_f, calls = zip(*readings[1:], strict=True)
            whole = not getattr(solvers[name], "parts", ())
            rows.append(
                {
                    "row": "clock",
                    "solver": name,
                    "tolerance": tolerance,
                    "batch": len(index),
                    "reached": reached[name],
                    "total": list(total),
                    "in_f": list(in_f) if whole else None,
                    "calls": list(calls) if whole else None,
                }
            )
    return short(rows)
