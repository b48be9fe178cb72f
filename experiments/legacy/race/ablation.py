"""What each piece of MetaBroyden buys: the same solver trained, or run, without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.legacy import equilibria
from experiments.legacy.race.contestants import Contestant
from experiments.legacy.race.schema import Row
from experiments.legacy.race.units import OnFamily, Settings, digest
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
    "no P": Variant(
        "P: B₀ is a weight of the residual by step and channel",
        masks=_no_preconditioner,
    ),
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


class AblationUnit(OnFamily):
    """Ablations on one family.

    train: (family, variant, seed) ↦ a trained solver; it keeps what it has done, and goes on with it.
    """

    def __init__(self, settings: Settings, family: str, train: Callable[[str, str, int], MetaBroyden]) -> None:
        super().__init__(settings, family)
        self.train = train
        self.name = f"ablation-{family}"
        described = [(name, one.words) for name, one in TRAINED.items()], sorted(RUN), SEED
        self.key = f"{self.name}-{digest(self.path, *self.solvers_of(family), also=repr(described))}"

    def rows(self, work: Path) -> list[Row]:
        """The whole with all its seeds, without each piece, and Broyden's method."""
        settings = self.settings
        held = equilibria.held_out(self.model(), self.criterion, "test", self.count)
        everyone = whole = self.trained(self.family)
        for words, change in RUN.items():
            without = [replace(one, name=words, solver=change(one.solver, settings.budget)) for one in whole]
            everyone = [*everyone, *without]
        for words in (name for name, variant in TRAINED.items() if variant.differs(whole[0].solver)):
            anew = self.train(self.family, words, SEED).to(settings.device)
            everyone = [*everyone, Contestant(words, "learned", anew, f"trained anew, seed {SEED}", SEED)]
        broyden = Broyden(settings.budget)
        everyone = [*everyone, Contestant("Broyden", "classical", broyden, repr(broyden))]
        return self.briefly("ablation", everyone, held)
