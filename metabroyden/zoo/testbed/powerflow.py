"""AC power flow on the IEEE test networks of pypower, 14 to 300 buses; the answer is pypower's Newton solution."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metabroyden.zoo.testbed.base import KnownProblem, generator, register

BUSES = (14, 30, 57, 118, 300)


class _Network(NamedTuple):
    """A network in per unit: admittance G + iB, what is scheduled, which buses are of which kind, the flat start."""

    g: Tensor  # (n, n)
    b: Tensor  # (n, n)
    power: np.ndarray  # (n,) complex
    ref: np.ndarray
    pv: np.ndarray
    pq: np.ndarray
    start: np.ndarray  # (n,) complex
    admittance: Any


@lru_cache(maxsize=8)
def _network(buses: int) -> _Network:
    from pypower import api
    from pypower.bustypes import bustypes
    from pypower.idx_gen import GEN_BUS, GEN_STATUS, VG
    from pypower.makeSbus import makeSbus
    from pypower.makeYbus import makeYbus

    case = api.ext2int(getattr(api, f"case{buses}")())
    admittance, _, _ = makeYbus(case["baseMVA"], case["bus"], case["branch"])
    ref, pv, pq = bustypes(case["bus"], case["gen"])
    start = np.ones(len(case["bus"]), dtype=complex)
    on = case["gen"][case["gen"][:, GEN_STATUS] > 0]
    held = on[:, GEN_BUS].astype(int)
    kept = ~np.isin(held, pq)
    start[held[kept]] = on[kept, VG]
    dense = torch.from_numpy(np.asarray(admittance.todense()))
    power = makeSbus(case["baseMVA"], case["bus"], case["gen"])
    return _Network(dense.real.clone(), dense.imag.clone(), power, ref, pv, pq, start, admittance)


def _answer(network: _Network, load: float) -> np.ndarray:
    """(n,) complex voltages by pypower's Newton method."""
    from pypower.api import ppoption
    from pypower.newtonpf import newtonpf

    options = ppoption(VERBOSE=0, OUT_ALL=0, PF_TOL=1e-12, PF_MAX_IT=30)
    start = network.start.copy()
    voltage, converged, _ = newtonpf(
        network.admittance, load * network.power, start, network.ref, network.pv, network.pq, options
    )
    if not converged:
        raise RuntimeError(f"pypower did not solve the network at load {load}")
    return voltage


def power_flow(buses: int, dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
    """f(z) = z − M·F(z): F the power mismatch at angles and magnitudes z, M the inverse Jacobian at the flat start.

    So Picard is the chord ("dishonest Newton") method. Samples differ in load, 80% to 105% of the scheduled one.
    """
    network = _network(buses)
    pvpq, pq = np.concatenate([network.pv, network.pq]), network.pq
    angles, n = len(pvpq), len(network.start)
    index, loads_at = torch.from_numpy(pvpq), torch.from_numpy(pq)
    magnitude = torch.from_numpy(np.abs(network.start))

    def mismatch(z: Tensor, p: Tensor, q: Tensor) -> Tensor:
        theta = z.new_zeros(len(z), n).index_copy(1, index, z[:, :angles])
        size = magnitude.to(z).expand(len(z), -1).index_copy(1, loads_at, z[:, angles:])
        e, f = size * torch.cos(theta), size * torch.sin(theta)
        g, b = network.g.to(z), network.b.to(z)
        re, im = e @ g.T - f @ b.T, f @ g.T + e @ b.T
        active, reactive = e * re + f * im - p, f * re - e * im - q
        return torch.cat([active[:, index], reactive[:, loads_at]], dim=1)

    load = 0.8 + 0.25 * torch.rand(batch, generator=generator(seed), dtype=torch.float64)
    power = torch.from_numpy(network.power)
    p, q = load[:, None] * power.real, load[:, None] * power.imag
    start = torch.cat([torch.zeros(angles, dtype=torch.float64), magnitude[loads_at]])
    jacobian = torch.func.jacrev(lambda z: mismatch(z[None], p[:1], q[:1])[0])(start)
    inverse = torch.linalg.inv(jacobian)
    voltages = [_answer(network, value) for value in load.tolist()]
    star = [np.concatenate([np.angle(voltage)[pvpq], np.abs(voltage)[pq]]) for voltage in voltages]
    return KnownProblem(
        lambda z, x: z - mismatch(z, *x) @ inverse.to(z).T,
        start.to(dtype).repeat(batch, 1),
        (p.to(dtype), q.to(dtype)),
        "Every solver converges to the operating point.",
        torch.from_numpy(np.stack(star)),
    )


def _registered(buses: int) -> None:
    @register(f"power_flow_{buses}")
    def maker(dtype: torch.dtype, batch: int, seed: int) -> KnownProblem:
        return power_flow(buses, dtype, batch, seed)

    maker.__doc__ = f"AC power flow, IEEE network of {buses} buses."


for _buses in BUSES:
    _registered(_buses)
