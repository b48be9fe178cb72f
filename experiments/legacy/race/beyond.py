"""Solvers where they were not trained: on the model of other data, and far past their horizon."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.legacy import equilibria
from experiments.legacy.race import measure
from experiments.legacy.race.contestants import FLAGSHIP, LEARNED, Contestant
from experiments.legacy.race.schema import Row
from experiments.legacy.race.units import OnFamily, Settings, digest
from metabroyden.solve import solve
from metabroyden.solvers import Broyden
from metabroyden.zoo.models import FAMILIES

FAR = 4
"""Times the steps that MetaBroyden is trained for, to which curves go."""
FEW = 64
"""Problems of a curve."""
FINEST = 1e-6


class BeyondUnit(OnFamily):
    """On one family: the solvers of other families that fit its states, and long curves of its own solvers."""

    def __init__(self, settings: Settings, family: str) -> None:
        super().__init__(settings, family)
        self.name = f"beyond-{family}"
        self.others = [other for other in FAMILIES if other != family]
        files = [path for name in (family, *self.others) for path in self.solvers_of(name)]
        self.key = f"{self.name}-{digest(self.path, *files)}"

    def rows(self, work: Path) -> list[Row]:
        """Transfer first, then curves."""
        held = equilibria.held_out(self.model(), self.criterion, "test", self.count)
        return [*self._transfer(held), *self._curves(held)]

    def _transfer(self, held: equilibria.HeldOut) -> list[Row]:
        """MetaBroyden as trained on other families, under the name of the family that it was trained on."""
        found = [
            replace(one, name=f"{FLAGSHIP} of {other}")
            for other in self.others
            for one in self.trained(other)
            if _fits(one.solver, held)
        ]
        return self.briefly("transfer", found, held) if found else []

    def _curves(self, held: equilibria.HeldOut) -> list[Row]:
        """Residuals by evaluations to `FAR`, of the first seeds and of Broyden's method."""
        own = [one for one in self.trained(self.family, LEARNED) if not one.seed]
        flagship = [one.solver for one in own if one.name == FLAGSHIP]
        if not flagship:
            return []
        steps = FAR * flagship[0].trained_for
        everyone = [*own, Contestant("Broyden", "classical", Broyden(steps), repr(Broyden(steps)))]
        far = replace(self.rules(held), budget=steps)
        return measure.curve_rows(everyone, held, FEW, FINEST, far, self.stamp("horizon", self.family))


def _fits(solver: Any, held: equilibria.HeldOut) -> bool:
    """Whether a solver takes these states: one that does not says so by a ValueError or TypeError."""
    z0, x, _ = next(iter(held.chunks()))
    try:
        solve(held.f, z0, x, solver=solver, max_nfe=2, throw=False)
    except (ValueError, TypeError):
        return False
    return True
