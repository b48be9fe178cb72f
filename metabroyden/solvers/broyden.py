"""Broyden's good method in product form, with limited memory and an optional initial inverse Jacobian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metabroyden.problem import Problem
from metabroyden.solvers.base import ClassicalSolver, Step, check_number
from metabroyden.solvers.registry import register
from metabroyden.state import gather


class InverseJacobian(Protocol):
    """An operator P such that B₀ = −(I + P) approximates the inverse of the Jacobian of g = f(z) − z.

    It must be linear in r and frozen for the solve: whatever it knows of z, it takes once, in `init`.
    """

    def init(self, z: Tensor, g: Tensor, problem: Problem) -> Any:
        """What `apply` needs, a pytree of tensors with the rows first."""
        ...

    def apply(self, r: Tensor, frozen: Any) -> Tensor:
        """P r for r (R, n)."""
        ...


class BroydenState(NamedTuple):
    """Ring buffers of the last `memory` rank-one factors I + uᵢΔzᵢᵀ. R rows, m memory, n coordinates."""

    dz: Tensor  # (R, m, n) steps Δzᵢ
    u: Tensor  # (R, m, n)
    mix: Tensor  # (R, m, m) inverse of I − S, Sᵢⱼ = Δzᵢᵀuⱼ for j older than i, else 0; slots are rows and columns
    z: Tensor  # (R, n) previous iterate
    b: Tensor  # (R, n) B₀g there
    frozen: Any  # what the initial inverse Jacobian keeps
    steps: int


@register("broyden")
@dataclass(frozen=True)
class Broyden(ClassicalSolver):
    """z⁺ = z − damping·B g with the good update B⁺ = (I + uΔzᵀ)B, u = (Δz − BΔg) / (ΔzᵀBΔg), started at B₀ = −(I + P).

    Broyden (1965); the product form needs no transpose of B₀. With k factors, B r = b + Uᵀc where b = B₀r and
    (I − S)c = ΔZ b: a triangular system whose inverse is kept up to date, so a step is a handful of batched products.
    Once the memory is full the oldest factor is dropped BEFORE the newest is made: B⁺Δg = Δz holds exactly, always.

    Attributes:
        memory: factors kept, m ≥ 1.
        damping: step length in (0, 2].
        initial: P as an `InverseJacobian`; None for P = 0.
    """

    memory: int = 30
    damping: float = 1.0
    initial: InverseJacobian | None = None

    def __post_init__(self) -> None:
        check_number("Broyden", "memory", self.memory, 0, 10_000, whole=True)
        check_number("Broyden", "damping", self.damping, 0, 2)

    def init(self, z: Tensor, g: Tensor, problem: Problem) -> BroydenState:
        """Empty buffers; the initial inverse Jacobian looks at z and g once."""
        frozen = None if self.initial is None else self.initial.init(z, g, problem)
        buffers = z.new_empty(2, len(z), self.memory, z.shape[1])
        mix = z.new_zeros(len(z), self.memory, self.memory)
        return BroydenState(buffers[0], buffers[1], mix, z, g, frozen, 0)

    def step(self, z: Tensor, g: Tensor, state: BroydenState, problem: Problem) -> Step:
        """One quasi-Newton step; the first is z − damping·B₀g."""
        b = -g if self.initial is None else -(g + self.initial.apply(g, state.frozen))
        if state.steps == 0:
            return Step(z - self.damping * b, state._replace(z=z, b=b, steps=1))
        slot, used = (state.steps - 1) % self.memory, min(state.steps, self.memory)
        dz = z - state.z
        if state.steps > self.memory:  # drop the oldest factor
            state.mix[:, slot] = 0
            state.mix[:, :, slot] = 0
            # an infinite value in the dropped slot would survive a zero weight
            state.dz[:, slot] = 0
            state.u[:, slot] = 0
        known = used if state.steps > self.memory else used - 1
        right = torch.stack([b - state.b, b], dim=1)  # (R, 2, n): B₀Δg and B₀g
        if known:
            coefficients = torch.bmm(right, state.dz[:, :known].transpose(1, 2)) @ state.mix[
                :, :known, :known
            ].transpose(1, 2)
            right = torch.baddbmm(right, coefficients, state.u[:, :known])
        by, bg = right[:, 0], right[:, 1]
        products = torch.bmm(right, dz.unsqueeze(2)).squeeze(2)  # Δzᵀ(BΔg), Δzᵀ(Bg)
        sizes = torch.linalg.vector_norm(dz, dim=1) * torch.linalg.vector_norm(by, dim=1)
        safe = products[:, 0].abs() > 10 * torch.finfo(z.dtype).eps * sizes
        u = torch.where(safe[:, None], (dz - by) / torch.where(safe, products[:, 0], 1.0)[:, None], 0.0)
        if known:
            older = torch.bmm(state.u[:, :known], dz.unsqueeze(2)).transpose(1, 2)  # (R, 1, known): Δzᵀuⱼ
            state.mix[:, slot, :known] = torch.bmm(older, state.mix[:, :known, :known]).squeeze(1)
        state.mix[:, slot, slot] = 1
        state.dz[:, slot] = dz
        state.u[:, slot] = u
        direction = bg + u * products[:, 1:]
        return Step(z - self.damping * direction, state._replace(z=z, b=b, steps=state.steps + 1))

    def gather(self, state: BroydenState, index: Tensor) -> BroydenState:
        """The rows `index`, without copying the part of the buffers that nothing was written to."""
        used = min(max(state.steps - 1, 0), self.memory)
        buffers = state.dz.new_empty(2, len(index), *state.dz.shape[1:])
        buffers[0, :, :used] = state.dz[index, :used]
        buffers[1, :, :used] = state.u[index, :used]
        mix, z, b, frozen = gather((state.mix, state.z, state.b, state.frozen), index)
        return BroydenState(buffers[0], buffers[1], mix, z, b, frozen, state.steps)
