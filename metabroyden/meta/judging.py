"""What a model does on validation, and what of it may be lost in a fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from metabroyden.meta.cotrainer import AIM, layer_of
from metabroyden.meta.fit import MAX_NFE
from metabroyden.meta.supervised import Task, are_classes, beside, run_on
from metabroyden.meta.target import resting
from metabroyden.meta.tasks import count

DIVERGENCE = 0.03
"""How far outputs may move from those of the model as it was, in nats a prediction, before λ₂ is lowered for it."""
OUTPUTS = 2**23
"""Numbers of outputs that are compared, at most."""


class Judged(NamedTuple):
    """What a model does on validation samples."""

    scores: Tensor
    """(N,), or () their mean; higher is better."""
    evaluations: float
    """Mean evaluations of a sample, a failure counting twice the budget."""
    outputs: Tensor | None = None
    """Of the first samples: log-probabilities of classes, or numbers; None where they are neither."""
    error: float | None = None
    """Mean squared error of these numbers; None for classes."""


class Standard(NamedTuple):
    """What a model may lose beside what it was, on the same samples."""

    reference: Judged
    """The model as it was."""
    tolerance: float | None
    """What the mean score may lose; None: a standard error of the difference, sample by sample (0 for means)."""

    def used(self, now: Judged) -> float:
        """What the mean score has lost, as a share of what it may lose."""
        lost, error, rounding = self._lost(now)
        allowed = error if self.tolerance is None else self.tolerance
        return 0.0 if lost <= rounding else (lost - rounding) / max(allowed, rounding, 1e-300)

    def divergence(self, now: Judged) -> float | None:
        """Mean Kullback–Leibler divergence of outputs from those before, in nats; None where outputs have none.

        Of numbers that of normal distributions as wide as the mean squared error was: ‖Δ‖²/2σ².
        """
        before, after = self.reference.outputs, now.outputs
        if before is None or after is None:
            return None
        if self.reference.error is None:
            likely = before.exp()  # a class that a model rules out, at a logit of −inf, counts for nothing
            return float((likely * (before - after)).where(likely > 0, 0.0).sum(dim=-1).mean())
        return float((after - before).square().mean()) / max(2 * self.reference.error, 1e-300)

    def pressure(self, now: Judged) -> float:
        """For `CoTrainer.judge`: how far outputs have moved, and what has surely been lost, as a share of what may be.

        Outputs say more than a score of few samples: their divergence has hardly any noise. It is no reason to lower λ₂
        where the score has lost nothing: a DEQ that had not learned all it could moves as it learns on.
        """
        moved = self.divergence(now)
        if moved is None or not math.isfinite(moved):
            return self.used(now) if moved is None else math.inf
        lost, error, rounding = self._lost(now)
        allowed = max(error if self.tolerance is None else self.tolerance, rounding, 1e-300)
        moved /= DIVERGENCE
        return max(moved if lost > rounding else min(moved, AIM), (lost - rounding - error) / allowed)

    def _lost(self, now: Judged) -> tuple[float, float, float]:
        """(mean that was lost, its standard error, what is rounding)."""
        reference = self.reference.scores.double().cpu()
        less = reference - now.scores.double().cpu()
        if not bool(torch.isfinite(less).all()):
            return math.inf, 0.0, 0.0
        size = len(less) if less.dim() else 1
        error = float(less.std()) / math.sqrt(size) if size > 1 else 0.0
        return float(less.mean()), error, 1e-9 * float(reference.abs().mean())


def judge(model: nn.Module, solver: Any, held: Iterable[tuple[Any, Any]], task: Task, rtol: float) -> Judged:
    """What a model does on validation batches, at equilibria that a solver finds."""
    deq, scores, sizes, spent = layer_of(model), [], [], []
    kept_outputs = _Outputs()
    kept = {name: getattr(deq, name) for name in ("solver", "rtol", "atol", "max_nfe", "last_solution")}
    warned, deq._forward_failures._warn = deq._forward_failures._warn, False
    try:
        deq.solver, deq.rtol, deq.atol, deq.max_nfe = solver, rtol, 0.0, MAX_NFE
        with torch.no_grad(), resting(model):
            for batch in held:
                inputs, targets = beside(model, batch)
                outputs = run_on(model, inputs)
                kept_outputs.add(outputs, targets)
                scores.append(task.score(outputs, targets))
                sizes.append(count(targets))
                found = deq.last_solution
                assert found is not None
                spent.append(np.where(found.converged.cpu().numpy(), found.nfe.numpy(), 2 * MAX_NFE))
    finally:
        for name, value in kept.items():
            setattr(deq, name, value)
        deq._forward_failures._warn = warned
    mean = float(np.concatenate(spent).mean())
    if scores[0].dim():
        return Judged(torch.cat(scores), mean, *kept_outputs.all())
    weights = torch.tensor(sizes, dtype=torch.float64)
    return Judged(torch.stack(scores) @ weights / weights.sum(), mean, *kept_outputs.all())


class _Outputs:
    """The first outputs of a model on validation, as `Judged` has them."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.errors: list[Tensor] = []
        self.room, self.known = OUTPUTS, True

    def add(self, outputs: Any, targets: Any) -> None:
        """Those of a batch, as far as there is room."""
        if not self.known or self.room <= 0:
            return
        try:
            classes = are_classes(outputs, targets)
        except (TypeError, ValueError):
            self.known = False
            return
        many = max(1, min(len(outputs), self.room // max(1, outputs[0].numel())))
        self.room = self.room - many * outputs[0].numel() if many == len(outputs) else 0
        outputs, targets = outputs[:many].float(), targets[:many]
        self.kept.append((outputs.log_softmax(dim=-1) if classes else outputs).cpu())
        if not classes:
            self.errors.append((outputs - targets).square().flatten().cpu())

    def all(self) -> tuple[Tensor | None, float | None]:
        """(outputs, their mean squared error)."""
        if not self.known or not self.kept:
            return None, None
        return torch.cat(self.kept), float(torch.cat(self.errors).mean()) if self.errors else None
