"""The problems by name: one line each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from experiments.physics import power, scf, water
from metabroyden.comparison.measure import Contestant
from metabroyden.comparison.problems import HeldOut


class Entry(NamedTuple):
    """A problem set of one kind of physics."""

    kind: str  # a key of `parts.PACKAGES`
    problems: Callable[[int, str], HeldOut]  # (samples, "test" or "validation") → problems with their equilibria
    own: Callable[[int], Contestant]  # the field's own method on so many test problems


def _power(case: str, *, stressed: bool = False) -> Entry:
    return Entry("power", partial(power.problems, case, stressed), partial(power.own, case, stressed))


def _water(name: str) -> Entry:
    return Entry("water", partial(water.problems, name), lambda samples: water.own())


def _scf(atoms: str, basis: str) -> Entry:
    return Entry("scf", partial(scf.problems, atoms, basis), partial(scf.own, atoms, basis))


_BENZENE = (
    "C 1.395 0 0; C 0.6975 1.2081 0; C -0.6975 1.2081 0; C -1.395 0 0; C -0.6975 -1.2081 0; C 0.6975 -1.2081 0; "
    "H 2.48 0 0; H 1.24 2.1477 0; H -1.24 2.1477 0; H -2.48 0 0; H -1.24 -2.1477 0; H 1.24 -2.1477 0"
)
SUITE: dict[str, Entry] = {
    "case118": _power("case118"),
    "case_illinois200": _power("case_illinois200"),
    "case300": _power("case300"),
    "case1354pegase": _power("case1354pegase"),
    "GBnetwork": _power("GBnetwork"),
    "case2848rte": _power("case2848rte"),
    "case2869pegase": _power("case2869pegase"),
    "case3120sp": _power("case3120sp"),
    "case118-stressed": _power("case118", stressed=True),
    "case300-stressed": _power("case300", stressed=True),
    "case1354pegase-stressed": _power("case1354pegase", stressed=True),
    "case3120sp-stressed": _power("case3120sp", stressed=True),
    "Hanoi": _water("Hanoi"),
    "Net3": _water("Net3"),
    "ky3": _water("ky3"),
    "ky10": _water("ky10"),
    "ky4": _water("ky4"),
    "KL": _water("KL"),
    "H2O": _scf("O 0 0 0; H 0 0.757 0.587; H 0 -0.757 0.587", "6-31g"),
    "N2": _scf("N 0 0 0; N 0 0 1.1", "6-31g"),
    "O3": _scf("O 0 0 0; O 0 1.0885 0.6697; O 0 -1.0885 0.6697", "6-31g"),
    "benzene": _scf(_BENZENE, "sto-3g"),
    "CuH": _scf("Cu 0 0 0; H 0 0 1.46", "sto-3g"),
    "FeO": _scf("Fe 0 0 0; O 0 0 1.62", "sto-3g"),
    "NiCO": _scf("Ni 0 0 0; C 0 0 1.69; O 0 0 2.84", "sto-3g"),
}
