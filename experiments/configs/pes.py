"""How the ways of `experiments pes` train: alike on short unrolls, then each in its own on long ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from metabroyden.meta import MetaConfig

SMALL: dict[str, Any] = {"hidden": 8, "initializer_width": 0, "safeguard": None}
"""Options of the solver: small and without a safeguard, so that what it does late is its own."""
WAYS = ("backpropagation", "truncated", "PES")
"""On long unrolls."""


def settings(config: Any, way: str) -> MetaConfig:
    """How a way trains, by the options of the experiment."""
    segments, total = config.segments, config.unroll * config.segments
    short = MetaConfig(
        steps=1_000_000, unroll=config.unroll, batch=config.batch, learning_rate=config.learning_rate, seed=config.seed,
        backend="native", validation_size=64, validation_rtol=1e-4, validation_nfe=total, validate_every=50,
        seconds=config.begin_seconds, budget_clock="cpu",
    )  # fmt: skip
    evolved = {"estimator": "pes", "sigma": config.sigma, "particles": config.particles}
    own: dict[str, dict[str, Any]] = {
        "backpropagation": {"unroll": total, "validate_every": 10},
        "truncated": {"segments": segments, "validate_every": 10},
        "PES": {"segments": segments, "validate_every": 5 * segments, **evolved},
    }
    return short if way == "short" else replace(short, seconds=config.seconds, **own[way])
