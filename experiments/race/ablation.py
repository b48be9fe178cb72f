"""What each piece of MetaBroyden buys: the same solver trained, or run, without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from experiments import meta
from experiments.bench.problems import Family
from experiments.bench.runner import Row, digest
from experiments.bench.solvers import Contestant, contestant
from experiments.race.units import Setting, Unit
from metabroyden.learned import MetaBroyden
from metabroyden.solvers import Broyden

FAMILIES = ("dense-digits", "conv-digits", "trellisnet-words")
"""A vector, an image and a text, none of them solved by splitting."""
SEED = 0
"""Of what is trained without a piece."""


@dataclass(frozen=True)
class Variant:
    """MetaBroyden trained without a piece, by the recipe of the whole.

    Attributes:
        words: what is left out. options: of its config, other than the recipe's.
        masks: solver ↦ {parameter: mask (1 or 0) of its shape}, entries that are zero and stay zero.
    """

    words: str = "nothing"
    options: dict[str, Any] = field(default_factory=dict)
    masks: Callable[[MetaBroyden], dict[Tensor, Tensor]] = lambda solver: {}

    def differs(self, whole: MetaBroyden) -> bool:
        """Whether there is something to leave out."""
        return not self.options or any(getattr(whole.config, name) != value for name, value in self.options.items())

    def prepared(self, solver: MetaBroyden) -> MetaBroyden:
        """The untrained solver, its masked weights zero; their gradients will be zero, too."""
        for parameter, mask in self.masks(solver).items():
            with torch.no_grad():
                parameter.mul_(mask)
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
        return solver


def _no_preconditioner(solver: MetaBroyden) -> dict[Tensor, Tensor]:
    return {weight: torch.zeros_like(weight) for weight in solver.preconditioner.outward.parameters()}


TRAINED = {
    "no learned start": Variant("the initializer", options={"initializer_width": 0}),
    "no P": Variant("P: B₀ is a weight of the residual by step and channel", masks=_no_preconditioner),
    "LSTM for table": Variant(
        "the table: an LSTM that sees residuals and gates weighs the first steps", options={"coefficients": "lstm"}
    ),
    "no dilations": Variant("the distance of P's taps", options={"dilations": (1, 1)}),
}
"""Trained anew, where the whole has it. P's gates where a solve begins depend on its context in all of them."""


def without_secants(solver: MetaBroyden, budget: int) -> MetaBroyden:
    """The same weights; the table's last row goes on where secants would take over, and only a hand-over uses any."""
    return _changed(solver, learned_steps=budget, schedule_length=solver.trained_for)


def without_safeguard(solver: MetaBroyden, budget: int) -> MetaBroyden:
    """The same weights and steps, nothing handed over."""
    return _changed(solver, safeguard=None)


RUN = {"no secants": without_secants, "no safeguard": without_safeguard}
"""The whole solver's weights, run without."""


def _changed(solver: MetaBroyden, **options: Any) -> MetaBroyden:
    changed = MetaBroyden(replace(solver.config, **options)).to(next(solver.parameters()))
    changed.load_state_dict(solver.state_dict())
    return changed.eval()


def _train(setting: Setting, family: str, words: str) -> MetaBroyden:
    """The trained variant; training goes on where it was interrupted."""
    config = setting.config
    usual = meta.Meta(
        family=family, seed=SEED, models=config.models, device=config.device, progress=config.progress,
        runs=config.runs / "ablation" / digest(TRAINED[words].words), overwrite=config.overwrite,
    )  # fmt: skip
    variant = TRAINED[words]
    return meta.Job(usual, variant.options, variant.prepared).trained()


def unit(setting: Setting, name: str) -> Unit:
    """Ablations on one family."""
    one = setting.family(name)
    described = repr(([(name, one.words) for name, one in TRAINED.items()], sorted(RUN), SEED))
    files = [one.path, *setting.files(name)]
    return setting.unit(f"ablation-{name}", lambda work: _rows(setting, one), files, described)


def _rows(setting: Setting, family: Family, train: Any = _train) -> list[Row]:
    """The whole with all its seeds, without each piece, and Broyden's method."""
    budget = setting.config.budget
    held = family.problems("test", setting.count(family))
    everyone = whole = setting.learned(family.name)
    for words, change in RUN.items():
        everyone = [*everyone, *(replace(one, name=words, solver=change(one.solver, budget)) for one in whole)]
    for words in (name for name, variant in TRAINED.items() if variant.differs(whole[0].solver)):
        anew = train(setting, family.name, words).to(setting.device)
        everyone = [*everyone, Contestant(words, "learned", anew, f"trained anew, seed {SEED}", SEED)]
    return setting.briefly("ablation", family, [*everyone, contestant("Broyden", Broyden(budget))], held)
