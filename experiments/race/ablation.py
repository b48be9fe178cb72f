"""What each piece of MetaBroyden buys: the same solver trained, or run, without it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments import meta
from experiments.bench.runner import Row, digest
from experiments.bench.solvers import Contestant, contestant
from experiments.race.units import Setting, Unit
from metabroyden.learned import MetaBroyden
from metabroyden.solvers import Broyden

FAMILIES = ("dense-digits", "conv-digits", "trellisnet-words")
"""A vector, an image and a text, none of them solved by splitting."""
SEED = 0
"""Of what is trained without a piece."""
NO_P = "no P"
TRAINED: dict[str, dict[str, Any]] = {
    "no learned start": {"initializer_width": 0},
    NO_P: {},
    "LSTM for table": {"coefficients": "lstm"},
    "no dilations": {"dilations": (1, 1)},
}
"""Options with which it is trained anew, by the recipe of the whole, where the whole has others. P's gates where a solve
begins depend on its context in all of them; without P, B₀ is a weight of the residual by step and channel."""


def missing(words: str, whole: MetaBroyden) -> bool:
    """Whether the whole has what is left out."""
    return words == NO_P or any(getattr(whole.config, name) != value for name, value in TRAINED[words].items())


def prepared(words: str, solver: MetaBroyden) -> MetaBroyden:
    """The untrained solver; without P, P's last layer is zero and stays so."""
    for weight in solver.preconditioner.outward.parameters() if words == NO_P else ():
        nn.init.zeros_(weight)
        weight.register_hook(torch.zeros_like)
    return solver


def trained(setting: Setting, family: str, words: str) -> MetaBroyden:
    """The trained variant; training goes on where it was interrupted."""
    config = setting.config
    usual = meta.Meta(
        family=family, seed=SEED, models=config.models, device=config.device, progress=config.progress,
        runs=config.runs / "ablation" / digest(words), overwrite=config.overwrite,
    )  # fmt: skip
    return meta.Job(usual, TRAINED[words], partial(prepared, words)).trained()


def lighter(whole: MetaBroyden, budget: int) -> dict[str, MetaBroyden]:
    """The same weights run without secants, and without the safeguard.

    Without secants the table's last row goes on where they would take over, and only a hand-over uses any.
    """
    options: dict[str, dict[str, Any]] = {
        "no secants": {"learned_steps": budget, "schedule_length": whole.trained_for},
        "no safeguard": {"safeguard": None},
    }
    made = {words: MetaBroyden(replace(whole.config, **changed)) for words, changed in options.items()}
    for solver in made.values():
        solver.to(next(whole.parameters())).load_state_dict(whole.state_dict())
    return {words: solver.eval() for words, solver in made.items()}


def unit(setting: Setting, name: str) -> Unit:
    """The whole with all its seeds, without each piece, and Broyden's method, on one family."""

    def rows(_: Path) -> list[Row]:
        family, budget = setting.family(name), setting.config.budget
        whole = setting.learned(name)
        everyone = list(whole)
        for one in whole:
            everyone += [
                replace(one, name=words, solver=solver) for words, solver in lighter(one.solver, budget).items()
            ]
        for words in (words for words in TRAINED if missing(words, whole[0].solver)):
            solver = trained(setting, name, words).to(setting.device)
            everyone.append(Contestant(words, "learned", solver, f"trained anew, seed {SEED}", SEED))
        everyone.append(contestant("Broyden", Broyden(budget)))
        return setting.briefly("ablation", family, setting.held(family), everyone)

    return setting.unit(f"ablation-{name}", rows, setting.files(name), repr((TRAINED, SEED)))
