"""Numbers read off traces and logits: time to a tolerance, residual after so many evaluations, bits per token."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional

from metabroyden.solution import Trace


def seconds_to(trace: Trace, tolerance: float) -> np.ndarray:
    """(B,) seconds until each sample's residual first reached the tolerance; infinite where it never did."""
    hit = (trace.residual <= tolerance).cpu().numpy()
    return np.where(hit, trace.seconds.numpy()[:, None], np.inf).min(axis=0, initial=np.inf)


def residual_after(trace: Trace, budget: int) -> np.ndarray:
    """(budget, B): the smallest residual each sample had seen after 1, 2, … evaluations; infinite before its first."""
    residual, nfe = np.nan_to_num(trace.residual.cpu().numpy(), nan=np.inf), trace.nfe.numpy()
    best = np.full((budget + 1, residual.shape[1]), np.inf)
    columns = np.arange(residual.shape[1])
    for value, spent in zip(residual, np.minimum(nfe, budget), strict=True):
        best[spent, columns] = np.minimum(best[spent, columns], value)
    best[0] = np.inf  # rows of the trace in which the sample took no part carry nfe 0
    return np.minimum.accumulate(best[1:], axis=0)


def residual_by_time(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """(seconds (K,), median over samples of the smallest residual seen by then (K,))."""
    residual = np.nan_to_num(trace.residual.cpu().numpy(), nan=np.inf)
    return trace.seconds.numpy(), np.median(np.minimum.accumulate(residual, axis=0), axis=1)


def summarise(evaluations: np.ndarray, reached: np.ndarray) -> dict[str, float]:
    """Median and 90th percentile of evaluations, and the success rate that belongs beside them."""
    return {
        "median": float(np.median(evaluations)),
        "p90": float(np.percentile(evaluations, 90)),
        "success": float(reached.mean()),
    }


def short(value: Any) -> Any:
    """Numbers to five significant digits, in lists, tuples (made lists) and values of dicts too."""
    if isinstance(value, list | tuple):
        return [short(item) for item in value]
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def bits_of(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T) bits that logits (B, T, vocabulary) pay for targets (B, T)."""
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none") / np.log(2)
