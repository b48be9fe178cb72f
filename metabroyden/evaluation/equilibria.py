"""What one trained family is: its quality beside its twins', its equilibria, how hard they are to find. Rows, no pictures.

A row is a JSON object with a key "row" that says what it tells, and "way", the variant of the family it is about:
  quality     score on the test split, parameters, seconds of training
  depth       score and residual after k iterations of a method, on a part of the test split
  difficulty  one solver: evaluations to each tolerance, by sample (the budget where it was not reached)
  guarantee   one solver on a whole split: the share of samples that it solves, and what the last of them cost
  spectrum    spectral radius of the Jacobian at each sample's equilibrium
  step        seconds and peak memory of one training step, interleaved with the other ways'
  leak        change of a language model's earlier predictions when later tokens are replaced, by tolerance
  ngram       an n-gram model's bits per token
  units       a few coordinates of one sample's state by depth, and where they come to rest
  parts       relative residual of each tensor of the state by depth
  tokens      evaluations until each token of a held-out passage has settled
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metabroyden.deq import DEQ
from metabroyden.evaluation.memory import LiveBytes
from metabroyden.evaluation.metrics import short
from metabroyden.evaluation.ngram import NGram
from metabroyden.gradients.base import parts_of
from metabroyden.meta.families import family_tasks, text_windows
from metabroyden.models.criteria import Criterion, Images, NextToken, device_of
from metabroyden.models.fit import Stage, Training
from metabroyden.solution import State, relative_residual
from metabroyden.solve import solve
from metabroyden.solvers import Anderson, Broyden, ForwardBackward, PeacemanRachford, Picard
from metabroyden.solvers.tuning import tune
from metabroyden.state import Packing, gather
from metabroyden.training.pin import pin
from metabroyden.training.spectral import spectral_radius

Row = dict[str, Any]
TOLERANCES = (1e-2, 1e-3, 1e-4)
EXACT = 1e-5  # what language models are scored at
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 50, 64, 80, 100)
_CHUNK = 64  # samples solved at once: Broyden keeps two states for each evaluation


@dataclass(frozen=True)
class HeldOut:
    """Fixed-point problems of a trained model on a part of a split: f pinned, starts, contexts; `judge` scores states.

    `judge(z, index)` gives (len(index),) scores of the states of these samples: 1 or 0 for a right or wrong class, or bits
    per token.
    """

    f: Callable[..., State]
    z0: State
    x: Any
    judge: Callable[[State, Tensor], Tensor]

    def __len__(self) -> int:
        return len(parts_of(self.z0)[0])

    def chunks(self) -> Iterable[tuple[State, Any, Tensor]]:
        """(z0, x, index) of consecutive samples."""
        for index in torch.arange(len(self)).split(_CHUNK):
            yield gather(self.z0, index), gather(self.x, index), index


@torch.no_grad()
def held_out(model: Any, criterion: Criterion, split: str, limit: int) -> HeldOut:
    """The first `limit` problems of a split (for texts: evenly spaced segments)."""
    tasks = family_tasks(model, criterion)
    raw = tasks.split(split)
    count = min(limit, len(raw))
    chosen = torch.arange(count) if isinstance(criterion, Images) else torch.linspace(0, len(raw) - 1, count).long()
    z0, x = tasks.prepare(raw[chosen])
    f, x = pin(model.cell, x, z0)
    if isinstance(criterion, Images):
        labels = getattr(criterion.data, split).labels[chosen]
        return HeldOut(f, z0, x, lambda z, index: (model.classify(z).argmax(dim=1) == labels[index]).float())
    assert isinstance(criterion, NextToken)
    targets = text_windows(criterion.data, split, criterion.length)[1][chosen]

    def bits(z: State, index: Tensor) -> Tensor:
        return _bits(model.classify(z), targets[index]).mean(dim=1)

    return HeldOut(f, z0, x, bits)


def _bits(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T) bits that logits (B, T, vocabulary) pay for targets (B, T)."""
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none") / np.log(2)


@torch.no_grad()
def depth_rows(way: str, held: HeldOut, *, solver: Any = None, depths: Sequence[int] = DEPTHS) -> list[Row]:
    """Mean score, its standard error, and quartiles of the residual after k evaluations, of a solver or of z ← f(z).

    The solver's state after k evaluations is the best it has seen; that of plain iteration is the last.
    """
    scores: dict[int, list[Tensor]] = {k: [] for k in depths}
    residuals: dict[int, list[Tensor]] = {k: [] for k in depths}
    for z0, x, index in held.chunks():
        for k, z in zip(depths, _states(held.f, z0, x, solver, depths), strict=True):
            scores[k].append(held.judge(z, index))
            residuals[k].append(_residual(held.f, z, x))
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
    grids: dict[str, list[Any]] = {
        "tuned Picard": [Picard(damping) for damping in (0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.6)],
        "tuned Anderson": [
            Anderson(memory, damping, ridge)
            for memory, damping, ridge in itertools.product((5, 10), (0.7, 1.0, 1.5), (1e-8, 1e-2))
        ],
        "tuned Broyden": [Broyden(budget, damping) for damping in (0.7, 0.85, 1.0, 1.15)],
    }
    z0, x, _ = next(iter(validation.chunks()))
    return {
        name: tune(grid, validation.f, z0, x, tolerances=(1e-2, 1e-3), max_nfe=budget)[0][0]
        for name, grid in grids.items()
    }


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
                began = time.perf_counter()
                _step(model, trainings[way], criterion)
                seconds[way].append(time.perf_counter() - began)
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


@torch.no_grad()
def unit_rows(way: str, held: HeldOut, *, solver: Any, depth: int = 60, units: int = 6, sample: int = 0) -> list[Row]:
    """A few coordinates of one sample by depth: those that move most between the middle of the way and its end.

    The fixed point is the solver's, to 1e-6 where it gets there; `residual` says how close it came.
    """
    index = torch.tensor([sample])
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


@torch.no_grad()
def token_rows(
    way: str, model: Any, criterion: NextToken, *, passages: int = 3, tolerance: float = 1e-2, budget: int = 100
) -> list[Row]:
    """For each token of some held-out passages, evenly spaced, how many plain iterations it takes to settle.

    Settled: its own residual ‖f(z)ₜ − zₜ‖ / ‖f(z)ₜ‖, over its channels, stays below the tolerance; the budget where it never
    does. `bits` is what the model pays there for the token that follows.
    """
    tokens, targets = text_windows(criterion.data, "test", criterion.length)
    held = held_out(model, criterion, "test", len(tokens))
    axis = 1 if model.cell.layout == "nct" else 2
    rows: list[Row] = []
    for window in torch.linspace(0, len(tokens) - 1, passages + 2).long()[1:-1].tolist():
        index = torch.tensor([window])
        z, x = gather(held.z0, index), gather(held.x, index)
        settled = torch.ones(criterion.length, dtype=torch.long)
        for k in range(1, budget + 1):
            image = held.f(z, x)
            assert isinstance(image, Tensor)
            assert isinstance(z, Tensor)
            residual = (image - z).norm(dim=axis) / image.norm(dim=axis)
            settled = torch.where(residual[0] > tolerance, k + 1, settled)
            z = image
        bits = _bits(model.classify(z), targets[index])[0]
        vocabulary = criterion.data.vocabulary
        rows.append(
            {
                "row": "tokens",
                "way": way,
                "tolerance": tolerance,
                "before": [vocabulary[t] for t in tokens[window, : criterion.length].tolist()],
                "tokens": [vocabulary[t] for t in tokens[window, criterion.length :].tolist()],
                "evaluations": settled.clamp_max(budget).tolist(),
                "bits": short(bits.tolist()),
            }
        )
    return rows


def quality_row(way: str, model: Any, criterion: Criterion, seconds: float) -> Row:
    """Score on the whole test split, parameters, seconds of training.

    A DEQ that reads texts is scored at equilibria found to `EXACT`: a looser solve of a whole segment may tell a token
    something of those after it (`leak_rows`).
    """
    with _solved_to(model, EXACT if isinstance(criterion, NextToken) else None):
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


@contextmanager
def _solved_to(model: Any, rtol: float | None) -> Iterator[None]:
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
    way: str, model: Any, criterion: NextToken, *, tolerances: Sequence[float], windows: int = 24, last: int = 8
) -> list[Row]:
    """By how many bits the predictions of a segment's tokens change when the last few are replaced, at each tolerance.

    Those before are asked alone: a causal model's equilibrium has no change there, a solve that stops before may.
    """
    tokens, targets = (part[:windows] for part in text_windows(criterion.data, "test", criterion.length))
    changed = tokens.clone()
    changed[:, -last:] = (changed[:, -last:] + 1) % len(criterion.data.vocabulary)
    rows: list[Row] = []
    for tolerance in tolerances:
        with _solved_to(model, tolerance):
            before, after = (_bits(model(read.chunk(2, dim=1)[1]), targets) for read in (tokens, changed))
        bits = (after - before)[:, :-last].abs()
        row = {"row": "leak", "way": way, "tolerance": tolerance, "mean": float(bits.mean()), "most": float(bits.max())}
        rows.append(row)
    return short(rows)


def ngram_rows(criterion: NextToken, orders: Sequence[int] = range(1, 10), batch: int = 64) -> list[Row]:
    """Bits per token of n-gram models of the training split: on validation, and on those test tokens that models predict.

    Orders whose n-grams do not fit into 63 bits are left out.
    """
    data, rows = criterion.data, []
    read = sum(targets.numel() for _, targets in data.test.streams(batch, criterion.length))
    for order in orders:
        if len(data.vocabulary) ** order >= 2**63:
            break
        model = NGram.fit(data.train.tokens, order, len(data.vocabulary))
        test = -np.log2(model.probabilities(data.test.tokens[: read + 1])[1:]).mean()
        validation = model.bits_per_token(data.validation.tokens)
        rows.append({"row": "ngram", "order": order, "score": float(test), "validation": float(validation)})
    return short(rows)


def splitting_solvers(validation: HeldOut, budget: int) -> dict[str, Any]:
    """Forward–backward (with a margin) and Peaceman–Rachford, tuned on validation problems, for a cell that offers parts."""
    z0, x, _ = next(iter(validation.chunks()))
    return {
        "forward-backward": ForwardBackward.tuned(validation.f, z0, x, margin=0.75, max_nfe=budget),
        "Peaceman-Rachford": PeacemanRachford.tuned(validation.f, z0, x, max_nfe=budget),
    }
