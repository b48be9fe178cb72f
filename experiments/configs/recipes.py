"""How solvers are meta-trained: one recipe a solver, and what is different on some families."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from metabroyden import Anderson, Broyden
from metabroyden.learned.safeguard import BY_PROGRESS
from metabroyden.meta.defaults import RATES


@dataclass(frozen=True)
class Recipe:
    """How a solver is meta-trained, see `MetaConfig` and the solver's own config; `kind` where it is not named by that."""

    kind: str = ""
    steps: int = 600
    unroll: int | tuple[int, int] = 14
    segments: int = 2
    batch: int = 32
    objective: str = "residual"
    training: dict[str, Any] = field(default_factory=dict)  # more of MetaConfig
    learning_rate: float = 2e-3
    orthogonal_rate: float = 0.0
    pool: int = 1024  # training contexts of a text, made beforehand
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Solver steps of a segment, at most."""
        return self.unroll if isinstance(self.unroll, int) else self.unroll[1]


_SAME: dict[str, Any] = {"initializer_width": 32, "safeguard": BY_PROGRESS}
RECIPES: dict[str, Recipe] = {
    "meta-broyden": Recipe(**RATES, options=_SAME),
    "grouped": Recipe(steps=300, learning_rate=4e-3, options={**_SAME, "rank": 32}),
    "coordinatewise": Recipe(steps=400, segments=1, options=_SAME),
    "hyper-anderson": Recipe(
        steps=1100, unroll=10, segments=1, learning_rate=1e-3, options={**_SAME, "memory": 8, "gram": True}
    ),
    "neural-fixed-point": Recipe(options=_SAME),
    "gated-secant": Recipe(kind="neural-fixed-point", options={**_SAME, "form": "secant"}),
    "meta-learner": Recipe(steps=400, segments=1, options=_SAME),
    "started-broyden": Recipe(kind="started", segments=1, options={**_SAME, "classical": Broyden(60)}),
    "started-anderson": Recipe(kind="started", segments=1, options={**_SAME, "classical": Anderson()}),
}
"""All with the same safeguard and, but for `OWN`, the same width of the start. HyperAnderson is in the best of the
configurations tried (results/meta/hyper-anderson-tuning.md), and has about as much CPU time or more."""
TEXT: dict[str, dict[str, Any]] = {
    "meta-broyden": {"batch": 16, "steps": 200, "segments": 1},
    "hyper-anderson": {"batch": 16},
    "": {"batch": 16, "steps": 250},
}
"""What is different where f is a language model's, ten times as costly: by solver, and of all others."""
_DATA = ("digits", "fashion")
_WIDE: dict[str, Any] = {**_SAME, "initializer_width": 128}
_QUICK: dict[str, Any] = {"steps": 1500, "unroll": 7, "segments": 1, "options": _WIDE}
_LAYERS: dict[str, Any] = {"steps": 3000, "unroll": 6, "segments": 1, "options": {**_WIDE, "rank": 48}}
_SPLIT: dict[str, Any] = {"kind": "meta-splitting", "segments": 1}
_SHORT: dict[str, Any] = {"steps": 150, "unroll": 4, "segments": 6, "learning_rate": 2e-3}
_SEEING: dict[str, Any] = {**_SAME, "learned_steps": 12, "coefficients": "lstm", "dilations": (1, 1)}
OWN: dict[tuple[str, str], dict[str, Any]] = {
    **{(f"dense-{data}", "meta-broyden"): {**_QUICK, "unroll": 8} for data in _DATA},
    **{(f"monotone-dense-{data}", "meta-broyden"): {**_SPLIT, **_QUICK} for data in _DATA},
    ("mlp-digits", "meta-broyden"): _LAYERS,
    ("mlp-fashion", "meta-broyden"): {
        **_LAYERS,
        "steps": 6000,
        "options": {**_LAYERS["options"], "coefficients": "lstm"},
    },
    ("monotone-conv-digits", "meta-broyden"): {**_SPLIT, "steps": 450},
    ("monotone-conv-fashion", "meta-broyden"): {**_SPLIT, "steps": 450, "options": {**_SAME, "alpha": 0.4}},
    ("monotone-multitier-digits", "meta-broyden"): {**_SPLIT, "options": {**_SAME, "rank": 48}},
    ("monotone-multitier-fashion", "meta-broyden"): {**_SPLIT, "steps": 450, "options": {**_SAME, "rank": 48}},
    ("transformer-shakespeare", "meta-broyden"): {**_SHORT, "orthogonal_rate": 0.0, "options": _SEEING},
    ("transformer-shakespeare", "grouped"): _SHORT,
    ("multiscale-fashion", "meta-broyden"): {"steps": 1200, "unroll": 12, "segments": 1},
    ("multiscale-fashion", "grouped"): {"steps": 150},
    ("trellisnet-words", "meta-broyden"): {"steps": 300, "unroll": 12},
}
"""What is different for a solver on one family. Where states are vectors starts cost little, and unrolls of as many steps as
1e-3 takes do best; converted networks are solved exactly in six, and longer unrolls teach nothing (43). On monotone
networks MetaBroyden steps on Peaceman–Rachford's map, see `MetaSplitting`: one segment is enough, and on monotone-conv-
fashion twice the rival's α does better (results/RESEARCH.md, 42). On multiscale-fashion and words MetaBroyden does
better in shorter unrolls (45), and GroupedLSTM's steps are dear on the former. Gradients through the Transformer explode
in longer ones: many short segments, and small steps (41). An LSTM that sees the solve is better than a table there (47) and
on mlp-fashion, where a table learns nothing (48)."""
HELD = 128
"""Validation problems of a text on which weights are chosen."""
