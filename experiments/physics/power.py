"""AC power flow on pandapower's networks: the chord ("dishonest Newton") method as a fixed-point map."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.physics.parts import Own, library
from metabroyden.comparison.problems import HeldOut

LOADS = {"test": (0.8, 1.05), "validation": (0.81, 1.02)}
"""Lowest and highest load of a batch: all injections, loads and generation, as a share of the scheduled ones."""
STRESSED = {"test": (0.5, 0.95), "validation": (0.55, 0.85)}
"""Of a stressed batch, as a share of the way from the scheduled load to the highest that Newton's method solves."""
ANSWER = 1e-11
"""Relative residual of the equilibria."""


class Network(NamedTuple):
    """A network in per unit; n buses, m unknowns: angles of all buses but the slack ones, magnitudes of the load buses."""

    admittance: Any  # (n, n) sparse, complex
    power: np.ndarray  # (n,) complex, scheduled: generation minus load
    start: np.ndarray  # (n,) complex: angle 0, magnitudes as scheduled, 1 where none is
    angles: np.ndarray  # (k,) buses whose angles are unknown
    loads: np.ndarray  # (m − k,) buses whose magnitudes are unknown
    chord: Any  # LU factors of the Jacobian at the start

    def voltage(self, z: np.ndarray) -> np.ndarray:
        """(n, B) complex voltages of states (B, m)."""
        angle, size = (np.repeat(part[:, None], len(z), axis=1) for part in (np.angle(self.start), abs(self.start)))
        angle[self.angles], size[self.loads] = z[:, : len(self.angles)].T, z[:, len(self.angles) :].T
        return size * np.exp(1j * angle)

    def mismatch(self, z: np.ndarray, load: np.ndarray) -> np.ndarray:
        """(m, B) active and reactive power that states (B, m) lack at loads (B,)."""
        voltage = self.voltage(z)
        lacking = voltage * np.conj(self.admittance @ voltage) - self.power[:, None] * load
        return np.concatenate([lacking.real[self.angles], lacking.imag[self.loads]])

    def flat(self) -> np.ndarray:
        """(m,) the state of `start`."""
        return np.concatenate([np.angle(self.start)[self.angles], abs(self.start)[self.loads]])


def _factors(admittance: Any, voltage: np.ndarray, angles: np.ndarray, loads: np.ndarray) -> Any:
    """LU factors of the Jacobian of the mismatch at voltages (n,)."""
    from scipy import sparse

    by_size, by_angle = library("pandapower.pypower.dSbus_dV").dSbus_dV(admittance, voltage)
    rows = [(angles, "real"), (loads, "imag")]
    blocks = [
        [getattr(by_angle, part)[at][:, angles], getattr(by_size, part)[at][:, loads]] for at, part in rows
    ]  # fmt: skip
    return sparse.linalg.splu(sparse.bmat(blocks, format="csc"))


@cache
def network(case: str) -> Network:
    """A network of pandapower.networks, after a power flow of pandapower's has set up its matrices."""
    pandapower = library("pandapower")
    net = getattr(library("pandapower.networks"), case)()
    pandapower.runpp(net, calculate_voltage_angles=True, numba=False, max_iteration=30)
    inside = net._ppc["internal"]
    admittance, pv, pq = inside["Ybus"].tocsr(), inside["pv"], inside["pq"]
    start = abs(inside["V"]).astype(complex)
    start[pq] = 1.0
    angles = np.concatenate([pv, pq])
    return Network(admittance, inside["Sbus"], start, angles, pq, _factors(admittance, start, angles, pq))


def newton(net: Network, load: Tensor, tolerance: float, budget: int) -> tuple[Tensor, list[float]]:
    """Newton's method from the flat start at one load: a factorisation in each step; (state (m,), residuals of f)."""
    z, history = net.flat()[None], list[float]()
    while True:
        lacking = net.mismatch(z, load.numpy())
        move = net.chord.solve(lacking).T
        history.append(float(np.linalg.norm(move) / np.linalg.norm(z - move)))
        if history[-1] <= tolerance or len(history) == budget or not np.isfinite(history[-1]):
            return torch.from_numpy(z[0]), history
        exact = _factors(net.admittance, net.voltage(z)[:, 0], net.angles, net.loads)
        z = z - exact.solve(lacking).T


@cache
def highest_load(case: str) -> float:
    """The highest load, as a share of the scheduled one, that Newton's method solves from the flat start; to a hundredth."""
    net, low, high = network(case), 1.0, 8.0
    while high - low > 0.01:
        middle = (low + high) / 2
        solved = newton(net, torch.tensor(middle, dtype=torch.float64), ANSWER, 30)[1][-1] <= ANSWER
        low, high = (middle, high) if solved else (low, middle)
    return low


def problems(case: str, stressed: bool, samples: int, split: str) -> HeldOut:
    """f(z, load) = z − J₀⁻¹F(z): F the power mismatch, J₀ its Jacobian at the flat start, factored once. z is (B, m).

    Samples differ in load. Solves start at the flat start; the equilibria are Newton's, to `ANSWER`.
    """
    net = network(case)
    loads = torch.linspace(*(STRESSED if stressed else LOADS)[split], samples, dtype=torch.float64)
    if stressed:
        loads = 1 + (highest_load(case) - 1) * loads

    def f(z: Tensor, load: Tensor) -> Tensor:
        return z - torch.from_numpy(net.chord.solve(net.mismatch(z.numpy(), load.numpy())).T)

    found = [newton(net, load, ANSWER, 30) for load in loads]
    star, known = torch.stack([z for z, _ in found]), torch.tensor([history[-1] <= ANSWER for _, history in found])
    z0 = torch.from_numpy(net.flat()).repeat(samples, 1)
    return HeldOut(f, z0, loads, star=star, known=known)


def own(case: str, stressed: bool, samples: int) -> Own:
    """Newton's method, a factorisation in each step."""
    net = network(case)
    return Own("Newton", "peer", lambda load, *limits: newton(net, load, *limits))
