"""What a language model does token by token: rows "tokens", "ngram" and "recent"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.bench.problems import bits_of, held_out
from experiments.bench.runner import Row
from experiments.bench.tables import short
from experiments.models.ngram import NGram, Recent
from metabroyden.zoo.models.criteria import NextToken
from metabroyden.zoo.tasks import text_windows


@torch.no_grad()
def token_rows(
    way: str, model: Any, criterion: NextToken, *, passages: int = 3, tolerance: float = 1e-2, budget: int = 100
) -> list[Row]:
    """For each token of some held-out passages, evenly spaced, how many plain iterations it takes to settle.

    Settled: its own residual ‖f(z)ₜ − zₜ‖ / ‖f(z)ₜ‖, over its channels, stays below the tolerance; the budget where it never
    does. `bits` is what the model pays there for the token that follows.
    """
    length = criterion.length
    tokens, targets = text_windows(criterion.data, "test", length)
    held = held_out(model, criterion, "test", len(tokens))
    axis = 1 if model.cell.layout == "nct" else 2
    rows: list[Row] = []
    for window in torch.linspace(0, len(tokens) - 1, passages + 2).long()[1:-1].tolist():
        index = torch.tensor([window])
        z, x = held.take(index)
        settled = torch.ones(length, dtype=torch.long)
        for k in range(1, budget + 1):
            image = held.f(z, x)
            assert isinstance(image, Tensor)
            assert isinstance(z, Tensor)
            residual = (image - z).norm(dim=axis) / image.norm(dim=axis)
            settled = torch.where(residual[0] > tolerance, k + 1, settled)
            z = image
        bits = bits_of(model.classify(z), targets[index])[0]
        vocabulary = criterion.data.vocabulary
        rows.append(
            {
                "row": "tokens",
                "way": way,
                "tolerance": tolerance,
                "before": [vocabulary[t] for t in tokens[window, :length].tolist()],
                "tokens": [vocabulary[t] for t in tokens[window, length:].tolist()],
                "evaluations": settled.clamp_max(budget).tolist(),
                "bits": short(bits.tolist()),
            }
        )
    return rows


def ngram_rows(
    criterion: NextToken, orders: Sequence[int] = range(1, 10), batch: int = 64, recent: int = 512
) -> list[Row]:
    """Bits per token of n-gram models of the training split: on validation, and on those test tokens that models predict.

    Orders whose n-grams do not fit into 63 bits are left out. A last row, "recent", is that of the best of them when it may
    also bet on what it read a short while ago.
    """
    data = criterion.data
    rows: list[Row] = []
    best: tuple[float, NGram] | None = None
    read = sum(targets.numel() for _, targets in data.test.streams(batch, criterion.length))
    for order in orders:
        if len(data.vocabulary) ** order >= 2**63:
            break
        model = NGram.fit(data.train.tokens, order, len(data.vocabulary))
        test = -np.log2(model.probabilities(data.test.tokens[: read + 1])[1:]).mean()
        validation = model.bits_per_token(data.validation.tokens)
        rows.append({"row": "ngram", "order": order, "score": float(test), "validation": float(validation)})
        if best is None or validation < best[0]:
            best = float(validation), model
    assert best is not None, "an n-gram of order 1 always fits"
    told = Recent.fit(best[1], data.validation.tokens, recent)
    test = -np.log2(told.probabilities(data.test.tokens[: read + 1])[1:]).mean()
    order = best[1].order
    rows.append({"row": "recent", "order": order, "within": recent, "weights": told.weights, "score": float(test)})
    return short(rows)
