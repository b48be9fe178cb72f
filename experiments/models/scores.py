"""What a trained model is worth beside its twins, and what training it takes: rows "quality" and "step" (see equilibria)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from experiments.bench.clock import LiveBytes
from experiments.bench.tables import short
from experiments.legacy.equilibria import Row
from metabroyden.deq import DEQ
from metabroyden.zoo.models.criteria import Criterion, NextToken, device_of
from metabroyden.zoo.models.fit import Stage, Training

EXACT = 1e-5  # what language models are solved to where they are scored


def quality_row(way: str, model: Any, criterion: Criterion, seconds: float) -> Row:
    """Score on the whole test split, parameters, seconds of training.

    A DEQ that reads texts is scored at equilibria found to `EXACT`: a looser solve of a whole segment may tell a token
    something of those after it (`texts.leak_rows`).
    """
    with solved_to(model, EXACT if isinstance(criterion, NextToken) else None):
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
