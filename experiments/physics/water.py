"""Steady flow in the water networks that come with epyt: linear theory as a fixed-point map."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import metabroyden as mb
from experiments.physics.parts import library
from metabroyden.comparison.measure import Contestant
from metabroyden.comparison.problems import HeldOut

FOLDER = "networks/asce-tf-wdst"
"""Of the networks, inside epyt."""
DEMANDS = (0.5, 1.5)
"""Lowest and highest demand of a batch, as a share of the scheduled one."""
ANSWER = 1e-9
"""Relative residual of the equilibria, a hundred times what rounding leaves on the largest networks."""
POWER = 0.852
"""Head loss r·q|q|^0.852 of Hazen and Williams."""
SLOW = 1e-4
"""Cubic feet a second below which head loss is taken as linear in the flow."""
_CFS = {0: 1.0, 1: 1 / 448.831, 5: 1 / 28.317}
"""Cubic feet a second in EPANET's unit of flow, by its number: CFS, GPM, LPS."""
_PIPES = (0, 1)
"""EPANET's numbers of pipes with and without a check valve."""


class Network(NamedTuple):
    """The pipes of a network in feet and cubic feet a second; p pipes, n nodes, of which those with given heads count last.

    Tanks and reservoirs have the heads of EPANET's solution at the first hour, and so have the ends of pumps and valves,
    which are left out themselves. Pipes that are closed, and what is cut off from all given heads, are left out.
    """

    incidence: Any  # (p, n) sparse: 1 where a pipe begins, −1 where it ends
    resistance: np.ndarray  # (p,) r
    minor: np.ndarray  # (p,) of bends and fittings: m·q|q|
    start: np.ndarray  # (p,) flows at a foot a second, as EPANET begins
    heads: np.ndarray  # given ones
    demand: np.ndarray  # (free nodes,) scheduled
    flow: np.ndarray  # (p,) EPANET's solution

    def update(self, q: np.ndarray, demand: np.ndarray) -> np.ndarray:
        """(p,) flows of the linear network whose pipes conduct as they do at flows q (p,), for a demand (free nodes,)."""
        from scipy import sparse

        speed = np.maximum(abs(q), SLOW)
        conducts = 1 / (self.resistance * speed**POWER + self.minor * speed)
        free = len(demand)
        inner, given = self.incidence[:, :free], self.incidence[:, free:] @ self.heads
        laplacian = (inner.T @ sparse.diags(conducts) @ inner).tocsc()
        options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
        heads = sparse.linalg.splu(laplacian, **options).solve(-demand - inner.T @ (conducts * given))
        return conducts * (inner @ heads + given)


def _epanet(path: Path) -> dict[str, np.ndarray]:
    """What EPANET reads from a file and finds for the first hour, in its own units."""
    epanet = library("epyt.epanet")
    code, api = epanet.ToolkitConstants(), epanet.epanetapi(ph=True)
    with tempfile.TemporaryDirectory() as folder:
        api.ENcreateproject()
        api.ENopen(str(path), f"{folder}/report.txt", f"{folder}/binary")
        api.ENopenH()
        api.ENinitH(code.EN_NOSAVE)
        api.ENrunH()
        nodes = range(1, api.ENgetcount(code.EN_NODECOUNT) + 1)
        links = range(1, api.ENgetcount(code.EN_LINKCOUNT) + 1)
        names = ("DIAMETER", "LENGTH", "ROUGHNESS", "MINORLOSS", "STATUS", "FLOW")
        found = {name: np.array([api.ENgetlinkvalue(k, getattr(code, f"EN_{name}")) for k in links]) for name in names}
        for name in ("DEMAND", "HEAD"):
            found[name] = np.array([api.ENgetnodevalue(k, getattr(code, f"EN_{name}")) for k in nodes])
        found["ends"] = np.array([api.ENgetlinknodes(k) for k in links]) - 1
        found["link"] = np.array([api.ENgetlinktype(k) for k in links])
        found["node"] = np.array([api.ENgetnodetype(k) for k in nodes])
        found["unit"] = np.array(api.ENgetflowunits())
        assert api.ENgetoption(code.EN_HEADLOSSFORM) == 0, f"{path.stem}: not of Hazen and Williams"
        api.ENcloseH()
        api.ENclose()
        api.ENdeleteproject()
    return found


@cache
def network(name: str) -> Network:
    """A network of epyt's by the name of its file."""
    from scipy import sparse

    of = _epanet(Path(library("epyt").__file__).parent / FOLDER / f"{name}.inp")
    cfs, metric = _CFS[int(of["unit"])], int(of["unit"]) >= 5
    foot, inch = (0.3048, 25.4 * 12) if metric else (1.0, 12.0)
    pipe = np.isin(of["link"], _PIPES) & (of["STATUS"] > 0)
    given = of["node"] > 0
    given[of["ends"][~np.isin(of["link"], _PIPES)].ravel()] = True
    ends, count = of["ends"], len(given)
    graph = sparse.coo_matrix((np.ones(pipe.sum()), tuple(ends[pipe].T)), shape=(count, count))
    piece = sparse.csgraph.connected_components(graph, directed=False)[1]
    fed = np.isin(piece, piece[given])
    pipe &= fed[ends[:, 0]]
    order = np.concatenate([np.flatnonzero(fed & ~given), np.flatnonzero(given)])
    place = np.empty(count, dtype=int)
    place[order] = np.arange(len(order))
    begin, end = place[ends[pipe]].T
    p = np.arange(pipe.sum())
    signs = np.concatenate([np.ones(len(p)), -np.ones(len(p))])
    at = np.concatenate([p, p]), np.concatenate([begin, end])
    diameter, length = of["DIAMETER"][pipe] / inch, of["LENGTH"][pipe] / foot
    return Network(
        sparse.csr_matrix((signs, at), shape=(len(p), len(order))),
        4.727 * length / (of["ROUGHNESS"][pipe] ** (1 + POWER) * diameter**4.871),
        0.02517 * of["MINORLOSS"][pipe] / diameter**4,
        np.pi / 4 * diameter**2,
        of["HEAD"][given] / foot,
        of["DEMAND"][fed & ~given] * cfs,
        of["FLOW"][pipe] * cfs,
    )


def problems(name: str, samples: int, split: str) -> HeldOut:
    """f(q, demand): the flows of a linear network that conducts as at flows q (B, p): linear theory (Wood & Charles 1972).

    Samples differ in the demand: of all by a share between `DEMANDS`, of each node by a tenth of its own (standard
    deviation). Solves start at f of EPANET's first flows, which balances them; the equilibria are the global gradient
    method's, to `ANSWER`.
    """
    net = network(name)
    generator = torch.Generator().manual_seed(("test", "validation").index(split))
    share = torch.linspace(*DEMANDS, samples, dtype=torch.float64)[:, None]
    noise = 1 + 0.1 * torch.randn(samples, len(net.demand), generator=generator, dtype=torch.float64)
    demand = share * noise * torch.from_numpy(net.demand)

    def f(q: Tensor, demand: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([net.update(*pair) for pair in zip(q.numpy(), demand.numpy(), strict=True)]))

    q0 = f(torch.from_numpy(net.start).repeat(samples, 1), demand)
    found = mb.solve(f, q0, demand, solver=own().solver, rtol=ANSWER, max_nfe=200, throw=False, trace=False)
    assert isinstance(found.z, Tensor)
    return HeldOut(f, q0, demand, star=found.z, known=found.converged)


def own() -> Contestant:
    """EPANET's global gradient method (Todini & Pilati 1988), Newton's: on balanced flows it is f, damped.

    That holds where head loss is r·q|q|^0.852 alone, which it is but for bends and for flows below `SLOW`.
    """
    return Contestant("global gradient", "peer", mb.Picard(1 / (1 + POWER)))
