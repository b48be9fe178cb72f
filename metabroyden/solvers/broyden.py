"""Broyden's methods, good and bad, with limited memory and an optional initial inverse Jacobian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metabroyden.problem import Problem
from metabroyden.solver import SolverBase, Step, Trail
from metabroyden.solvers.base import check_number, combine, first_scale, gather_ring, into, own, ring_size
from metabroyden.solvers.line_search import backtrack
from metabroyden.solvers.registry import register
from metabroyden.state import gather

_TRIALS = 6  # backtracking steps at most
_USEFUL = 8  # updates worth keeping for each coordinate beyond the first; with one coordinate one is all there is
_GROWN = 8  # rows of `mix` to begin with, doubled as updates come: most solves end before the memory is full
_RECENT = 20  # a step is shortened where it takes the residual above the largest of so many before it
_Buffers = tuple[Tensor, Tensor, Tensor, Tensor]  # `v`, `u`, `mix` and `alive` of a state


class InverseJacobian(Protocol):
    """An operator P such that B₀ = −(I + P) approximates the inverse of the Jacobian of g = f(z) − z.

    It must be linear in r and frozen for the solve: whatever it knows of z, it takes once, in `init`.
    """

    def init(self, z: Tensor, g: Tensor, problem: Problem) -> Any:
        """What `apply` needs, a pytree of tensors with the rows first."""
        ...

    def resume(self, z: Tensor, g: Tensor, trail: Trail, problem: Problem) -> Any:
        """What `apply` needs where a solve goes on at z from these iterates, see `SolverBase.resume`."""
        ...

    def apply(self, r: Tensor, frozen: Any) -> Tensor:
        """P r for r (R, n)."""
        ...

    def rmatvec(self, w: Tensor, frozen: Any) -> Tensor:
        """Pᵀw for w (R, n); asked for only where B is transposed."""
        ...


class BroydenState(NamedTuple):
    """Ring buffers of the last `memory` rank-one updates. R rows, m memory, n coordinates.

    Good: factors I + uᵢvᵢᵀ with vᵢ = Δzᵢ. Bad: terms uᵢvᵢᵀ with vᵢ = Δgᵢ / ‖Δgᵢ‖.
    """

    v: Tensor  # (R, m, n)
    u: Tensor  # (R, m, n)
    mix: Tensor  # (R, k, k), k ≤ m, good: inverse of I − S, Sᵢⱼ = vᵢᵀuⱼ for j older than i, else 0; bad: empty
    alive: Tensor  # (R, m) one; zero for what a restart has forgotten
    z: Tensor  # (R, n) previous iterate
    g: Tensor  # (R, n) its residual
    b: Tensor  # (R, n) B₀g there
    bg: Tensor  # (R, n) Bg there
    recent: Tensor  # (R, 20) the last ‖g‖, for the line search; (R, 0) without
    frozen: Any  # what the initial inverse Jacobian keeps
    scale: Tensor | None  # (R, 1) B₀ = scale·I; None where that is −(I + P) for good
    steps: int


@register("broyden")
@dataclass(frozen=True)
class Broyden(SolverBase):
    """z⁺ = z − damping·B g, where B approximates the inverse Jacobian of g, from B₀ = −(I + P) on, by rank-one updates.

    Both of Broyden (1965), with s = Δz, y = Δg:

    - good: B⁺ = (I + u sᵀ)B, u = (s − By) / (sᵀBy). The product form needs no transpose of B₀. With k factors
      B r = b + Uᵀc where b = B₀r and (I − S)c = V b: a triangular system whose inverse is kept up to date, so a step is
      three products of a vector with a buffer.
    - bad: B⁺ = B + (s − By)yᵀ / ‖y‖²: two such products.

    Once the memory is full the oldest update is dropped BEFORE the newest is made: B⁺y = s holds after every update.
    B₀ = −I fits a Jacobian whose eigenvalues are small beside one. Where the first step makes ‖g‖ grow more than threefold
    and moves it along the step, B₀ becomes σI from then on, with σ = sᵀy / yᵀy of the first pair (see `first_scale`); the
    second step is then one from z₀ with that scale. Elsewhere nothing changes, to the last bit.
    A sample restarts from B₀ where its update breaks down: where |sᵀBy| is below `guard`·‖s‖² / step length (good), where
    y = 0 (bad), or where a line search fails.

    Attributes:
        memory: updates kept, m ≥ 1; of states of n coordinates no more than 8(n − 1) + 1 are.
        damping: step length in (0, 2].
        kind: "good" or "bad".
        line_search: backtrack, per sample, where a step takes the residual above the largest of the last twenty
            (non-monotone: Grippo, Lampariello & Lucidi 1986; see `backtrack`). For divergent problems; where plain steps
            converge it costs success, since Broyden's path to a root is not downhill.
        guard: in (0, 1]; the longest step an update can cause is 1/guard times the last one.
        initial: P as an `InverseJacobian`; None for P = 0.
        rescale: let the first pair change the scale of B₀; without `initial` only.
    """

    memory: int = 30
    damping: float = 1.0
    kind: str = "good"
    line_search: bool = False
    guard: float = 1e-2
    initial: InverseJacobian | None = None
    rescale: bool = True
    has_inverse = True

    def __post_init__(self) -> None:
        check_number("Broyden", "memory", self.memory, 0, 10_000, whole=True)
        check_number("Broyden", "damping", self.damping, 0, 2)
        check_number("Broyden", "guard", self.guard, 0, 1)
        if self.kind not in ("good", "bad"):
            raise ValueError(f"Broyden: kind must be 'good' or 'bad', got {self.kind!r}")
        if not isinstance(self.line_search, bool):
            raise ValueError(f"Broyden: line_search must be True or False, got {self.line_search!r}")
        if not isinstance(self.rescale, bool):
            raise ValueError(f"Broyden: rescale must be True or False, got {self.rescale!r}")

    @property
    def fixed_cost(self) -> bool:  # type: ignore[override]
        """Whether a step costs a number of evaluations known beforehand."""
        return not self.line_search

    def init(self, z: Tensor, g: Tensor, problem: Problem) -> BroydenState:
        """Empty buffers; the initial inverse Jacobian looks at z and g once."""
        frozen = None if self.initial is None else self.initial.init(z, g, problem)
        rows, m = z.shape[0], ring_size(min(self.memory, _USEFUL * (z.shape[1] - 1) + 1), problem)
        v, u = (z.new_empty(rows, m, z.shape[1]) for _ in range(2))
        mix = _identities(z, min(m, _GROWN)) if self.kind == "good" else z.new_empty(rows)
        scale = z.new_full((rows, 1), -1.0) if self.rescale and self.initial is None else None
        return BroydenState(
            v, u, mix, z.new_ones(rows, m), z, g, z, z, z.new_zeros(rows, _RECENT * self.line_search), frozen, scale, 0
        )

    def resume(self, z: Tensor, g: Tensor, trail: Trail, problem: Problem) -> BroydenState:
        """The updates of the pairs between the iterates of a trail."""
        state = self.init(*trail[0], problem)
        if self.initial is None:
            starts: Any = [None] * len(trail)
        else:
            state = state._replace(frozen=self.initial.resume(z, g, trail, problem))
            residuals = torch.stack([g for _, g in trail], dim=1)
            starts = (residuals + apply_to_all(self.initial, residuals, state.frozen)).neg_().unbind(1)
        for point, start in zip(trail, starts, strict=True):
            state = self._updated(*point, state, start)
        return state

    def step(self, z: Tensor, g: Tensor, state: BroydenState, problem: Problem) -> Step:
        """One quasi-Newton step; the first is z − damping·B₀g."""
        after = self._updated(z, g, state)
        b, bg = after.b, after.bg
        if not self.line_search:
            return Step(torch.add(z, bg, alpha=-self.damping), after)
        state.recent[:, state.steps % _RECENT] = torch.linalg.vector_norm(g, dim=1)
        ceiling = state.recent.amax(dim=1)
        z_next, g_next, failed = backtrack(z, g, -self.damping * bg, problem, ceiling=ceiling, trials=_TRIALS)
        written = min(state.steps, state.v.shape[1])
        after.alive[:, :written].masked_fill_(failed[:, None], 0.0)  # restart: B₀ is what the next pair is made with
        return Step(z_next, after._replace(bg=torch.where(failed[:, None], b, bg)), g_next)

    def _updated(self, z: Tensor, g: Tensor, state: BroydenState, b: Tensor | None = None) -> BroydenState:
        """The state with the update of the pair between its iterate and this one, (R, n); b is B₀g where that is known."""
        state = self._prepared(z, g, state)
        b = self._initial(g, state) if b is None else b
        update = self._good if self.kind == "good" else self._bad
        bg, buffers = update(z, g, b, state) if state.steps else (b, (state.v, state.u, state.mix, state.alive))
        return BroydenState(*buffers, z, g, b, bg, state.recent, state.frozen, state.scale, state.steps + 1)

    def _prepared(self, z: Tensor, g: Tensor, state: BroydenState) -> BroydenState:
        """The state with the scale that the first pair tells, and with room in `mix` for the pair to come."""
        if state.steps == 1 and state.scale is not None:
            scale = first_scale(z - state.z, g - state.g, state.g, self.damping)
            start = state.g * scale
            state = state._replace(b=start, bg=start, scale=scale)
        memory = state.v.shape[1]
        if self.kind == "good" and state.mix.shape[1] < min(state.steps, memory):
            mix = _identities(z, min(2 * state.mix.shape[1], memory))
            before = state.mix.shape[1]
            mix[:, :before, :before] = state.mix
            state = state._replace(mix=mix)
        return state

    def _initial(self, g: Tensor, state: BroydenState) -> Tensor:
        """B₀g."""
        if state.scale is not None:
            return g * state.scale
        return -g if self.initial is None else -(g + self.initial.apply(g, state.frozen))

    def _slot(self, state: BroydenState) -> tuple[int, int, bool, _Buffers]:
        """Where the newest update goes, how many older ones there are, whether the oldest is dropped, and the buffers."""
        memory = state.v.shape[1]
        full = state.steps > memory
        slot = (state.steps - 1) % memory
        v, u, mix, alive = map(own, state[:4]) if full else state[:4]
        if full:  # what is dropped may be infinite, and would survive a zero weight
            v[:, slot], u[:, slot], alive[:, slot] = 0, 0, 1
        return slot, memory if full else slot, full, (v, u, mix, alive)

    def _good(self, z: Tensor, g: Tensor, b: Tensor, state: BroydenState) -> tuple[Tensor, _Buffers]:
        """Make the newest factor: B⁺g and the buffers."""
        slot, known, full, buffers = self._slot(state)
        v, u, mix, alive = (part.narrow(1, 0, known) for part in buffers)
        mix = mix.narrow(2, 0, known)
        if full:
            mix[:, slot], mix[:, :, slot], mix[:, slot, slot] = 0, 0, 1
            both = torch.stack([b, state.b], dim=1)  # the old Bg was made with the factor that is gone
            weights = torch.bmm(both, v.transpose(1, 2)).mul_(alive.unsqueeze(1))
            h, bg = torch.baddbmm(both, torch.bmm(weights, mix.transpose(1, 2)), u).unbind(1)
        else:
            h, bg = b, state.bg
            if known:
                weights = torch.bmm(b.unsqueeze(1), v.transpose(1, 2)).mul_(alive.unsqueeze(1))
                h = combine(b, torch.bmm(weights, mix.transpose(1, 2)), u)
        all_v, all_u, all_mix, all_alive = map(own, buffers)
        s = into(all_v.select(1, slot), torch.sub, z, state.z)
        ahead, behind = torch.linalg.vecdot(s, h), torch.linalg.vecdot(s, bg)  # behind = −‖s‖² / step length
        slope = ahead - behind  # sᵀBy
        sound = (slope.abs() > self.guard * behind.abs()).unsqueeze(1)
        intact = sound | ((slope == 0) & (behind == 0)).unsqueeze(1)  # where z has not moved there is nothing to learn
        inverse = torch.where(sound, slope.reciprocal().unsqueeze(1), 0.0)
        new = into(all_u.select(1, slot), torch.mul, (s - h).add_(bg), inverse)
        if known:
            older = torch.bmm(s.unsqueeze(1), u.transpose(1, 2)).mul_(alive.unsqueeze(1))
            all_mix.select(1, slot).narrow(1, 0, known).copy_(torch.bmm(older, mix).squeeze(1))
            if full:
                all_mix[:, slot, slot] = 1
            all_alive.narrow(1, 0, known).mul_(intact)  # a breakdown forgets everything
        return torch.where(intact, torch.addcmul(h, new, ahead.unsqueeze(1)), b), (all_v, all_u, all_mix, all_alive)

    def _bad(self, z: Tensor, g: Tensor, b: Tensor, state: BroydenState) -> tuple[Tensor, _Buffers]:
        """Make the newest term: B⁺g and the buffers."""
        slot, known, full, buffers = self._slot(state)
        v, u, _, alive = (part.narrow(1, 0, known) if part.dim() > 1 else part for part in buffers)
        h, bg = b, state.bg
        if known:
            across = v.transpose(1, 2)
            weights = torch.bmm(g.unsqueeze(1), across).mul_(alive.unsqueeze(1))
            h = combine(b, weights, u)
            if full:  # the old Bg was made with the term that is gone
                weights = torch.bmm(state.g.unsqueeze(1), across).mul_(alive.unsqueeze(1))
                bg = combine(state.b, weights, u)
        y = g - state.g
        size = torch.linalg.vector_norm(y, dim=1, keepdim=True)
        sound = size > 0
        inverse = torch.where(sound, size.reciprocal(), 0.0)
        all_v, all_u, mix, all_alive = map(own, buffers)
        unit = into(all_v.select(1, slot), torch.mul, y, inverse)
        new = into(all_u.select(1, slot), torch.mul, (z - state.z).sub_(h).add_(bg), inverse)
        if known:
            all_alive.narrow(1, 0, known).mul_(sound)  # a breakdown forgets everything
        ahead = torch.linalg.vecdot(unit, g).unsqueeze(1)
        return torch.where(sound, torch.addcmul(h, new, ahead), b), (all_v, all_u, mix, all_alive)

    def inverse(self, state: BroydenState, index: Tensor) -> tuple[Any, ...]:
        """What `rmatvec` needs of the rows `index`."""
        used = self._used(state)
        v, u, alive = (part[:, :used].index_select(0, index) for part in (state.v, state.u, state.alive))
        mix = state.mix[:, :used, :used].index_select(0, index) if self.kind == "good" else None
        scale = None if state.scale is None else state.scale.index_select(0, index)
        return v, u, mix, alive, scale, None if state.frozen is None else gather(state.frozen, index)

    def rmatvec(self, w: Tensor, inverse: tuple[Any, ...]) -> Tensor:
        """Bᵀw for w (R, n), with what `inverse` gave; AttributeError where B₀ has no `rmatvec`."""
        v, u, mix, alive, scale, frozen = inverse
        outer = torch.zeros_like(w)
        if v.shape[1]:
            weights = torch.bmm(w.unsqueeze(1), u.transpose(1, 2))
            weights = (weights if mix is None else torch.bmm(weights, mix)) * alive.unsqueeze(1)
            outer = torch.bmm(weights, v).squeeze(1)
        inner = w if mix is None else w + outer
        if scale is not None:
            initial = inner * scale
        else:
            initial = -inner if self.initial is None else -(inner + self.initial.rmatvec(inner, frozen))
        return initial + outer if mix is None else initial

    @staticmethod
    def _used(state: BroydenState) -> int:
        """Slots of the buffers that were ever written to."""
        return min(max(state.steps - 1, 0), state.v.shape[1])

    def gather(self, state: BroydenState, index: Tensor) -> BroydenState:
        """The rows `index`, without copying the part of the buffers that nothing was written to."""
        used = self._used(state)
        frozen = None if state.frozen is None else gather(state.frozen, index)
        v, u = gather_ring(state.v, index, used), gather_ring(state.u, index, used)
        mix, alive, z, g, b, bg, recent = (part.index_select(0, index) for part in state[2:9])
        scale = None if state.scale is None else state.scale.index_select(0, index)
        return BroydenState(v, u, mix, alive, z, g, b, bg, recent, frozen, scale, state.steps)


def apply_to_all(inverse: InverseJacobian, r: Tensor, frozen: Any) -> Tensor:
    """P r for several r a row, (R, k, n)."""
    rows, count, _ = r.shape
    index = torch.arange(rows, device=r.device).repeat_interleave(count)
    return inverse.apply(r.flatten(0, 1), gather(frozen, index)).unflatten(0, (rows, count))


def _identities(like: Tensor, size: int) -> Tensor:
    """(R, size, size) identities for like (R, n)."""
    return torch.eye(size, dtype=like.dtype, device=like.device).repeat(like.shape[0], 1, 1)
