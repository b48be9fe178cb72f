"""The adjoint system u = Jᵀu + v of one backward pass: its products, its solve, and the fallback where that fails."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metabroyden.gradients.base import Report, parts_of
from metabroyden.gradients.frozen import Graph, Parts
from metabroyden.inverse import FinalInverse, TransposedInverse
from metabroyden.solution import Solution, Status, scaled_norm
from metabroyden.solve import solve
from metabroyden.solver import as_solver
from metabroyden.solvers.broyden import Broyden
from metabroyden.state import Packing

if TYPE_CHECKING:
    from metabroyden.gradients.implicit import Implicit


_ROUNDINGS = 8  # of u and Jᵀu, by which their difference may be wrong


@dataclass(frozen=True)
class AdjointSolve:
    """Solves u = Jᵀu + v, given the graph of the cell at the equilibrium.

    A sample that fails gets α·u or α·v, u the best iterate, whichever leaves the smaller residual, with α from least
    squares; α = 0 unless another α is better by more than rounding. So ‖Jᵀu + v − u‖ is never larger than with u = 0 (‖v‖)
    or with u = v (‖Jᵀv‖). `floor`: the smallest tolerance asked for.
    """

    mode: Implicit
    packing: Packing
    final: FinalInverse | None
    report: Report | None
    floor: float

    def __call__(self, graph: Graph, cotangent: Parts) -> Parts:
        """u for the cotangent v. Coordinates of v that are not finite bypass the solve."""
        mode, packing = self.mode, self.packing
        given, star = (_pack(packing, parts) for parts in (cotangent, graph.point))
        finite = torch.isfinite(given)
        v = torch.where(finite, given, 0.0)
        # by a power of two, so that nothing under- or overflows and not a bit changes otherwise
        _, exponent = torch.frexp(v.abs().amax(dim=1, keepdim=True))
        scale = torch.exp2(exponent.clamp(-100, 100).to(v.dtype))
        v = v / scale
        system = _System(graph, packing, v)
        solver, start = mode.solver, v
        if self.final is not None:
            solver, start = replace(solver, initial=TransposedInverse(self.final)), -self.final.rmatvec(v)
            start = torch.where(torch.isfinite(start).all(dim=1, keepdim=True), start, v)
        context = {"sample": system.sample, "z": star.detach(), "v": v}
        rtol = max(mode.rtol, self.floor)
        found = solve(system, start, context, solver=solver, rtol=rtol, max_nfe=mode.max_nfe, throw=False)
        found = _with_fallback(found, system, rtol)
        if self.report is not None:
            self.report(found)
        assert isinstance(found.z, Tensor)
        return parts_of(packing.unpack(torch.where(finite, found.z * scale, given)))

    def plain(self) -> AdjointSolve:
        """The solver of the adjoint of an adjoint: its matrix is J again, so no trained solver and no forward inverse."""
        solver = Broyden(memory=30) if as_solver(self.mode.solver).is_learned else self.mode.solver
        return replace(self, mode=replace(self.mode, precondition=False, solver=solver), final=None)


class _System:
    """u ↦ Jᵀu + v, on matrices (R, n); v (B, n). The graph is made anew for the samples that are left once they are few."""

    def __init__(self, graph: Graph, packing: Packing, v: Tensor) -> None:
        self._whole = self._graph = graph
        self._packing = packing
        self.v, self.sample = v, torch.arange(len(v), device=v.device)
        self._at_v: Tensor | None = None  # Jᵀv + v, where the solve began at v

    def __call__(self, u: Tensor, rows: dict[str, Tensor]) -> Tensor:
        image = self.rmatvec(u, rows["sample"]) + rows["v"]
        if self._at_v is None and rows["sample"] is self.sample:
            self._at_v = image if u.data_ptr() == self.v.data_ptr() else image[:0]
        return image

    def at_v(self, sample: Tensor) -> Tensor | None:
        """Jᵀv of these samples, where it is known."""
        if self._at_v is None or len(self._at_v) != len(self.v):
            return None
        return (self._at_v - self.v)[sample]

    def rmatvec(self, u: Tensor, sample: Tensor) -> Tensor:
        """Jᵀu for u (R, n) of these samples (R,)."""
        if sample is self.sample and self._graph is self._whole:
            return self._whole_rmatvec(u)
        self._graph = (self._graph if self._graph.holds(sample) else self._whole).for_rows(sample)
        place = sample if self._graph.place is None else self._graph.place[sample]
        spread = u.new_zeros(len(self._graph.point[0]), u.shape[1]).index_copy(0, place, u)
        return self._whole_rmatvec(spread).index_select(0, place)

    def _whole_rmatvec(self, u: Tensor) -> Tensor:
        return _pack(self._packing, self._graph.rmatvec(parts_of(self._packing.unpack(u))))


def _pack(packing: Packing, parts: Parts) -> Tensor:
    return packing.pack(parts[0] if packing.single else parts)


def _with_fallback(found: Solution, system: _System, rtol: float) -> Solution:
    """The solution with the best multiple of u or v wherever the solve failed, or met its tolerance by growing alone.

    Costs a failed sample one product, two where the solve did not begin at v.
    """
    u, v = found.z, system.v
    assert isinstance(u, Tensor)
    # ‖g‖ = ρ‖f(u)‖ ≤ ρ(‖u‖ + ‖g‖): small where it is below ‖v‖ for certain
    rounding = _ROUNDINGS * torch.finfo(v.dtype).eps
    small = (found.residual + rounding) * scaled_norm(u) <= (1 - found.residual) * scaled_norm(v)
    sample = (~(found.converged & small)).nonzero().squeeze(1)
    if not len(sample):
        return found
    v, at_v, iterate = v[sample], system.at_v(sample), u[sample]
    first = _best_multiple(iterate, system.rmatvec(iterate, sample), v)
    second = _best_multiple(v, system.rmatvec(v, sample) if at_v is None else at_v, v)
    better = (second.size < first.size).unsqueeze(1)
    chosen, g = torch.where(better, second.u, first.u), torch.where(better, second.g, first.g)
    size, image = scaled_norm(g), scaled_norm(chosen + g)
    # as it is: a sample without a finite residual, or one that has converged by a residual below ‖v‖
    kept = ~torch.isfinite(size + image) | (found.converged[sample] & (first.given <= scaled_norm(v)))
    residual = torch.where(size == 0, 0.0, size / image).to(v.dtype)
    converged = ~kept & (size <= rtol * image)
    status = found.status.to(v.device)[sample]
    failed = torch.where(status == Status.CONVERGED, int(Status.ILL_CONDITIONED), status)
    status = torch.where(kept, status, torch.where(converged, int(Status.CONVERGED), failed))
    nfe = found.nfe.to(v.device)[sample] + (1 if at_v is not None else 2)

    def put(values: Tensor, new: Tensor) -> Tensor:
        return values.index_copy(0, sample.to(values.device), new.to(values))

    return replace(
        found,
        z=put(u, torch.where(kept.unsqueeze(1), iterate, chosen)),
        residual=put(found.residual, torch.where(kept, found.residual[sample], residual)),
        converged=put(found.converged, torch.where(kept, found.converged[sample], converged)),
        status=put(found.status, status),
        nfe=put(found.nfe, nfe),
    )


@dataclass(frozen=True)
class _Multiple:
    """α·u with its residual g (R, n) and ‖g‖ (R,) at most, infinite where it is not finite; `given`: that at u itself."""

    u: Tensor
    g: Tensor
    size: Tensor
    given: Tensor


def _best_multiple(u: Tensor, product: Tensor, v: Tensor) -> _Multiple:
    """The α·u whose residual v − α(u − Jᵀu) is the smallest, for certain: with what rounding may add to it."""
    a = u - product
    length = scaled_norm(a).to(v.dtype).unsqueeze(1)
    length = torch.where(length > 0, length, 1.0)
    direction = a / length
    along = (direction * v).sum(dim=1, keepdim=True)
    g = v - along * direction
    blur = _ROUNDINGS * torch.finfo(v.dtype).eps * (scaled_norm(u) + scaled_norm(product))
    size = scaled_norm(g) + blur * (along / length).abs().squeeze(1)
    size = torch.where(torch.isfinite(size), size, torch.inf)
    none = torch.isfinite(size) & (size > scaled_norm(v))
    multiple = torch.where(none.unsqueeze(1), 0.0, u / length * along)
    g = torch.where(none.unsqueeze(1), v, g)
    return _Multiple(multiple, g, torch.where(none, scaled_norm(v), size), scaled_norm(v - a) + blur)
