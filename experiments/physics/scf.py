"""Self-consistent fields of small molecules with pyscf: the density's Roothaan map, and DIIS as its rival."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.bench.peers import Enough
from experiments.physics.parts import Own, library
from metabroyden.comparison.problems import HeldOut

STRETCH = (0.95, 1.3)
"""Smallest and largest factor of all distances in a batch of geometries."""
ANSWER, ENOUGH = 1e-10, 1e-7
"""Relative residuals of the equilibria."""
MOVED = 0.03
"""Ångström, the standard deviation of each coordinate's noise."""


def hartree_fock(molecule: Any) -> Any:
    """pyscf's method, without the file of intermediates that it would leave open."""
    field = library("pyscf.scf").RHF(molecule)
    field._chkfile.close()
    field.chkfile = None
    return field


class Geometry:
    """A molecule at one geometry, restricted Hartree–Fock; N basis functions, S their overlap.

    Densities are P = S^½DS^½ (N, N), of which norms do not depend on the basis.

    Args:
        symbols: of the atoms.
        places: (atoms, 3) Ångström.
        basis: a name of pyscf's.
    """

    def __init__(self, symbols: list[str], places: np.ndarray, basis: str) -> None:
        molecule = library("pyscf.gto").M(atom=list(zip(symbols, places, strict=True)), basis=basis, verbose=0)
        self.field = hartree_fock(molecule)
        self.overlap, self.core = self.field.get_ovlp(), self.field.get_hcore()
        values, vectors = np.linalg.eigh(self.overlap)
        self._root, self._inverse = (
            (vectors * values**power) @ vectors.T for power in (0.5, -0.5)
        )  # fmt: skip
        self.guess = self.field.get_init_guess()

    def density(self, d: np.ndarray) -> np.ndarray:
        """(N, N) P of D."""
        return self._root @ d @ self._root

    def update(self, p: np.ndarray) -> np.ndarray:
        """(N, N) the density that fills the lowest orbitals in the field of P: one Fock build, one diagonalisation."""
        return self._filled(self.core + self.field.get_veff(self.field.mol, self._inverse @ p @ self._inverse))

    def energy(self, p: np.ndarray) -> float:
        """Of P, in hartree."""
        return float(self.field.energy_tot(self._inverse @ p @ self._inverse))

    def _filled(self, fock: np.ndarray) -> np.ndarray:
        energies, orbitals = self.field.eig(fock, self.overlap)
        return self.density(np.asarray(self.field.make_rdm1(orbitals, self.field.get_occ(energies, orbitals))))

    def diis(self, tolerance: float, budget: int) -> tuple[Tensor, list[float]]:
        """pyscf's own SCF with DIIS (Pulay 1982): (its best density (N, N), relative residual of f at each Fock build)."""
        field, history, best = hartree_fock(self.field.mol), list[float](), self.guess
        build = field.get_veff
        field.conv_tol, field.conv_tol_grad, field.max_cycle = 1e-300, 1e-300, budget

        def recorded(mol: Any = None, dm: Any = None, *more: Any, **options: Any) -> Any:
            nonlocal best
            found, before = build(mol, dm, *more, **options), np.asarray(dm)
            after = self._filled(self.core + np.asarray(found))
            history.append(float(np.linalg.norm(after - self.density(before)) / np.linalg.norm(after)))
            best = before if history[-1] == min(history) else best
            if history[-1] <= tolerance or len(history) == budget:
                raise Enough
            return found

        field.get_veff = recorded
        try:
            field.kernel(self.guess)
        except Enough:
            return torch.from_numpy(self.density(best)), history
        raise AssertionError("pyscf stops by our rule alone")


@cache
def geometries(atoms: str, basis: str, samples: int, split: str) -> list[Geometry]:
    """A molecule, stretched and with noise on its coordinates. atoms: as pyscf reads them, in Ångström."""
    parts = [one.split() for one in atoms.split(";")]
    places = np.array([[float(value) for value in part[1:]] for part in parts])
    generator = np.random.default_rng(("test", "validation").index(split))
    noise = MOVED * generator.standard_normal((samples, *places.shape))
    return [
        Geometry([part[0] for part in parts], share * places + move, basis)
        for share, move in zip(np.linspace(*STRETCH, samples), noise, strict=True)
    ]


def problems(atoms: str, basis: str, samples: int, split: str) -> HeldOut:
    """f(P, index): the next density of the geometry of that number, (B, N, N): Roothaan's iteration (1951).

    Equilibria are those of DIIS: to `ANSWER`, or as near as it comes in 200 Fock builds, if that is within `ENOUGH`. There
    may be others, so that the score is the energy in hartree by which a density is below them.
    """
    every = geometries(atoms, basis, samples, split)

    def f(p: Tensor, index: Tensor) -> Tensor:
        pairs = zip(p.numpy(), index.tolist(), strict=True)
        return torch.from_numpy(np.stack([every[k].update(one) for one, k in pairs]))

    def below(p: Any, index: Tensor) -> Tensor:
        pairs = zip(p.numpy(), index.tolist(), strict=True)
        return torch.tensor([energies[k] - every[k].energy(one) for one, k in pairs])

    found = [one.diis(ANSWER, 200) for one in every]
    energies = [one.energy(p.numpy()) for one, (p, _) in zip(every, found, strict=True)]
    star = torch.stack([p.flatten() for p, _ in found])
    known = torch.tensor([min(history) <= ENOUGH for _, history in found])
    z0 = torch.from_numpy(np.stack([one.density(one.guess) for one in every]))
    return HeldOut(f, z0, torch.arange(samples), below, star=star, known=known)


def own(atoms: str, basis: str, samples: int) -> Own:
    """DIIS on the test geometries."""
    every = geometries(atoms, basis, samples, "test")
    return Own("DIIS", "peer", lambda index, *limits: every[int(index)].diis(*limits))
