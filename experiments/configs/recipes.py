"""How solvers are meta-trained: what takes the place of `metabroyden.meta.plan`'s own choices, and why.

Names are those of `plan(..., overrides=...)`: "solver", a field of `MetaConfig`, or an option of the solver. What is not
here, the plan chooses as it does for `fit_solver`. Numbers in brackets are entries of results/RESEARCH.md.
"""

from __future__ import annotations

from typing import Any

from metabroyden import Anderson, Broyden
from metabroyden.learned.safeguard import BY_PROGRESS

_LONG: dict[str, Any] = {"unroll": 14, "segments": 2}
_SAFE: dict[str, Any] = {"safeguard": BY_PROGRESS}
_START: dict[str, Any] = {"solver": "started", "steps": 600, "unroll": 14, **_SAFE}
RECIPES: dict[str, dict[str, Any]] = {
    "meta-broyden": {},
    "grouped": {"steps": 300, **_LONG, "learning_rate": 4e-3, **_SAFE},
    "coordinatewise": {"steps": 400, "unroll": 14, **_SAFE},
    "hyper-anderson": {"steps": 1100, "unroll": 10, "learning_rate": 1e-3, "memory": 8, "gram": True, **_SAFE},
    "neural-fixed-point": {"steps": 600, **_LONG, **_SAFE},
    "gated-secant": {"solver": "neural-fixed-point", "form": "secant", "steps": 600, **_LONG, **_SAFE},
    "meta-learner": {"steps": 400, "unroll": 14, **_SAFE},
    "started-broyden": {**_START, "classical": Broyden(60)},
    "started-anderson": {**_START, "classical": Anderson()},
}
"""By solver. The plan's rules are MetaBroyden's, so that only the others need something in general. All have the same
safeguard, that of MetaBroyden. HyperAnderson is in the best of the configurations tried
(results/meta/hyper-anderson-tuning.md), and has about as much CPU time or more."""
TEXT: dict[str, dict[str, Any]] = {
    "meta-broyden": {"batch": 16, "steps": 200, "unroll": 14, "segments": 1},
    "hyper-anderson": {"batch": 16},
    "": {"batch": 16, "steps": 250},
}
"""By solver, and of all others, where f is a language model's: it costs ten times as much."""
_DENSE: dict[str, Any] = {"steps": 1500, "segments": 1, "initializer_width": 128}
_LAYERS: dict[str, Any] = {"steps": 3000, "unroll": 6, "segments": 1, "initializer_width": 128, "rank": 48}
_SHORT: dict[str, Any] = {"steps": 150, "unroll": 4, "segments": 6, "learning_rate": 2e-3}
_SEEING: dict[str, Any] = {"orthogonal_rate": 0.0, "coefficients": "lstm", "learned_steps": 12, "dilations": (1, 1)}
OWN: dict[tuple[str, str], dict[str, Any]] = {
    # states are vectors, so that a wide start costs little; unrolls of as many steps as 1e-3 takes do best (43, 50)
    ("dense-fashion", "meta-broyden"): {**_DENSE, "unroll": 8},
    ("monotone-dense-digits", "meta-broyden"): {**_DENSE, "unroll": 7},
    ("monotone-dense-fashion", "meta-broyden"): {**_DENSE, "unroll": 7},
    # converted networks are solved exactly in six steps, and longer unrolls teach nothing (43)
    ("mlp-digits", "meta-broyden"): _LAYERS,
    # a table learns nothing there, an LSTM that sees the solve does (48)
    ("mlp-fashion", "meta-broyden"): {**_LAYERS, "steps": 6000, "coefficients": "lstm"},
    # 150 to 600 steps still gain (41)
    ("conv-digits", "meta-broyden"): {"steps": 600},
    ("conv-fashion", "meta-broyden"): {"steps": 600},
    # shorter unrolls cost more time a solve, and lose samples (43)
    ("multiscale-digits", "meta-broyden"): {"steps": 600, **_LONG},
    # one of twelve does better than two of fourteen (45), and GroupedLSTM's steps are dear
    ("multiscale-fashion", "meta-broyden"): {"steps": 1200, "unroll": 12, "segments": 1},
    ("multiscale-fashion", "grouped"): {"steps": 150},
    # on Peaceman–Rachford's map: more channels (41, 42)
    ("monotone-conv-digits", "meta-broyden"): {"steps": 450, "unroll": 14},
    ("monotone-conv-fashion", "meta-broyden"): {"steps": 450, "unroll": 14},
    ("monotone-multitier-digits", "meta-broyden"): {"steps": 600, "unroll": 14, "rank": 48},
    ("monotone-multitier-fashion", "meta-broyden"): {"steps": 450, "unroll": 14, "rank": 48},
    # gradients explode in longer unrolls: many short segments, small steps (41); an LSTM is better than a table (47)
    ("transformer-shakespeare", "meta-broyden"): {**_SHORT, **_SEEING},
    ("transformer-shakespeare", "grouped"): _SHORT,
    # one of twelve does better than one of fourteen (45)
    ("trellisnet-words", "meta-broyden"): {"steps": 300, "unroll": 12},
}
"""By family and solver."""
POOL, HELD = 1024, 128
"""Contexts of a text, each a solve of its own, that are made beforehand: to train on, and to choose the weights by."""


def recipe(family: str, solver: str, *, texts: bool) -> dict[str, Any]:
    """The overrides of a solver on a family."""
    on_texts = TEXT.get(solver, TEXT[""]) if texts else {}
    return {**RECIPES.get(solver, {}), **on_texts, **OWN.get((family, solver), {})}
