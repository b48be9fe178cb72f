"""The strangers: 28 DEQs that nothing in this package was tuned on, by name. Which half one belongs to its name decides."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """How one of them is made and trained.

    Attributes:
        name: of its file, and what `split_of` reads.
        cell: see `experiments.strangers.model.KINDS`.
        data: see `experiments.strangers.data.SOURCES`.
        width: channels of its state.
        norm: of the cell, where it has a choice: "group", "layer", "instance" or "none".
        rtol: to which its forward solves go in training.
        penalty: weight of the Jacobian penalty; 0 trains without one.
        solver: of these solves, "broyden" or "anderson".
        rate: of Adam at its peak.
        steps: of training, each on 64 samples.
        seed: of weights and batches.
        contexts: of training samples that a solver may be fitted to.
    """

    name: str
    cell: str
    data: str
    width: int
    norm: str = "group"
    rtol: float = 1e-3
    penalty: float = 0.0
    solver: str = "broyden"
    rate: float = 2e-3
    steps: int = 300
    seed: int = 0
    contexts: int = 1200


SUITE = (
    Spec("conv-digits-16-free", "conv", "digits", 16, steps=150),
    Spec("conv-digits-24-penalised", "conv", "digits", 24, penalty=0.5, rtol=1e-2, seed=1, steps=120),
    Spec("conv-fashion-12-layer", "conv", "fashion", 12, norm="layer", rtol=1e-2, seed=2, steps=100),
    Spec("conv-denoise-12-instance", "conv", "denoise", 12, norm="instance", penalty=0.3, rate=1e-3, seed=3, steps=100),
    Spec("conv-inpaint-12-penalised", "conv", "inpaint", 12, penalty=0.2, seed=4, steps=120),
    Spec("dense-digits-64-tanh", "dense", "digits", 64, norm="none", seed=5),
    Spec("dense-digits-128-layer", "dense", "digits", 128, norm="layer", rtol=1e-2, solver="anderson", seed=6),
    Spec("dense-fashion-96-free", "dense", "fashion", 96, norm="none", rate=4e-3, seed=7, steps=500),
    Spec("dense-fashion-48-penalised", "dense", "fashion", 48, norm="group", penalty=0.3, seed=8),
    Spec("multiscale-digits-8", "multiscale", "digits", 8, seed=9, steps=120),
    Spec("multiscale-fashion-8-penalised", "multiscale", "fashion", 8, penalty=0.3, rtol=1e-2, seed=10, steps=100),
    Spec("trellis-text-24", "trellis", "text", 24, rtol=1e-2, rate=5e-3, seed=11, steps=100, contexts=800),
    Spec("trellis-latch-16", "trellis", "latch", 16, rate=5e-3, seed=12, steps=80),
    Spec("gated-latch-24", "gated", "latch", 24, rate=5e-3, seed=13, steps=120),
    Spec("transformer-text-32", "causal", "text", 32, rtol=1e-2, rate=4e-3, seed=14, steps=200, contexts=800),
    Spec("transformer-latch-24", "causal", "latch", 24, penalty=0.1, seed=15, steps=150),
    Spec("transformer-lines-32-padded", "padded", "lines", 32, rtol=1e-2, seed=16, steps=100, contexts=800),
    Spec("transformer-counts-24-padded", "padded", "counts", 24, solver="anderson", rate=5e-3, seed=17, steps=300),
    Spec("monotone-digits-64", "monotone", "digits", 64, seed=18, steps=200),
    Spec("monotone-fashion-100", "monotone", "fashion", 100, rtol=1e-2, solver="anderson", seed=19, steps=200),
    Spec("graph-blocks-16", "graph", "blocks", 16, norm="none", seed=20, steps=200),
    Spec("graph-reach-24-layer", "graph", "reach", 24, norm="layer", rate=4e-3, seed=21, steps=200),
    Spec("mlp-digits-48", "mlp", "digits", 48, seed=22),
    Spec("mlp-fashion-32", "mlp", "fashion", 32, seed=23),
    Spec("deep-digits-12", "deep", "digits", 12, seed=24, steps=100),
    Spec("deep-denoise-12-layer", "deep", "denoise", 12, norm="layer", penalty=0.1, rtol=1e-2, seed=25, steps=100),
    Spec("spectral-digits-80", "spectral", "digits", 80, rate=4e-3, seed=26),
    Spec("spectral-fashion-10-conv", "spectral-conv", "fashion", 10, rtol=1e-2, seed=27, steps=120),
    Spec("mixer-digits-24", "mixer", "digits", 24, rtol=1e-2, seed=28, steps=150),
    Spec("mixer-fashion-32-penalised", "mixer", "fashion", 32, penalty=0.2, seed=29, steps=150),
)
"""All of them."""
DEV, HELD = "dev", "held"
"""The half that is developed on, and the half that is run once, at the end."""


def names(part: str = "") -> list[str]:
    """Of all, or of one half, in the order of the suite."""
    return [spec.name for spec in SUITE if part in ("", split_of(spec.name))]


def spec_of(name: str) -> Spec:
    """The stranger of that name; ValueError where there is none."""
    found = {spec.name: spec for spec in SUITE}
    if name not in found:
        raise ValueError(f"unknown stranger {name!r}: known are {', '.join(found)}")
    return found[name]


def split_of(name: str) -> str:
    """DEV for the first half of the names in the order of their sha256, HELD for the others."""
    order = sorted((spec.name for spec in SUITE), key=lambda one: hashlib.sha256(one.encode()).hexdigest())
    return DEV if order.index(spec_of(name).name) < (len(order) + 1) // 2 else HELD
