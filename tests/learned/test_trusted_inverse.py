"""What carries on a learned solve: Broyden's method on as much of the learned inverse as a sample's own pairs bear out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import metabroyden as mb
from metabroyden.learned.safeguard import Safeguard
from metabroyden.learned.trusted_inverse import TrustedInverse
from metabroyden.solver import Phase, SolverBase, Step, joined
from tests.helpers import DOUBLE, normal

N = 6
JACOBIAN = 0.4 * normal(N, N, seed=1, dtype=DOUBLE)
EXACT = torch.linalg.inv(torch.eye(N, dtype=DOUBLE) - JACOBIAN)  # −(J − I)⁻¹ = I + Q


class Known:
    """Q as a matrix, in the place of a learned one."""

    def __init__(self, q: Tensor) -> None:
        self.q = q

    def init(self, z, g, problem):
        return z.new_zeros(len(z), 1)

    def apply(self, r, frozen):
        return r @ self.q.T

    def rmatvec(self, w, frozen):
        return w @ self.q


def linear(z: Tensor, x: Tensor) -> Tensor:
    return z @ JACOBIAN.T + x


def trail(length: int) -> list[tuple[Tensor, Tensor]]:
    """Iterates anywhere, with their residuals."""
    x = normal(3, N, seed=2, dtype=DOUBLE)
    points = [normal(3, N, seed=10 + k, dtype=DOUBLE) for k in range(length)]
    return [(z, linear(z, x) - z) for z in points]


@pytest.mark.parametrize("length", [2, 4, 6])
def test_a_right_inverse_is_trusted_and_a_wrong_one_is_not(length):
    q = EXACT - torch.eye(N, dtype=DOUBLE)
    share = lambda q: TrustedInverse(Known(q)).resume(*trail(length)[-1], trail(length), None)[1]  # noqa: E731
    torch.testing.assert_close(share(q), torch.ones(3, 1, dtype=DOUBLE), rtol=1e-4, atol=0)
    torch.testing.assert_close(share(2 * q), torch.full((3, 1), 0.5, dtype=DOUBLE), rtol=1e-4, atol=0)
    assert (share(-q) == 0).all()
    assert (share(100 * normal(N, N, seed=3, dtype=DOUBLE)) < 0.1).all()


def test_the_share_does_not_depend_on_how_the_iterates_are_combined():
    """The pairs' span alone counts: other iterates with the same span of differences give the same share."""
    q = 0.5 * (EXACT - torch.eye(N, dtype=DOUBLE)) + 0.1 * normal(N, N, seed=4, dtype=DOUBLE)
    (z0, g0), *others = trail(4)
    mixed = [(z0, g0), others[2], others[0], others[1]]
    shares = [TrustedInverse(Known(q)).resume(z0, g0, way, None)[1] for way in ([(z0, g0), *others], mixed)]
    torch.testing.assert_close(*shares, rtol=1e-4, atol=0)


def test_it_knows_nothing_of_a_single_iterate_and_its_transpose_fits():
    q, v, w = normal(N, N, seed=5, dtype=DOUBLE), *normal(2, 3, N, seed=6, dtype=DOUBLE)
    inverse = TrustedInverse(Known(q))
    assert (inverse.resume(*trail(1)[0], trail(1), None)[1] == 1).all()
    assert (inverse.init(v, w, None)[1] == 1).all()
    frozen = (v[:, :1], torch.tensor([[0.0], [0.3], [1.0]], dtype=DOUBLE))
    torch.testing.assert_close((inverse.apply(v, frozen) * w).sum(1), (v * inverse.rmatvec(w, frozen)).sum(1))
    torch.testing.assert_close(inverse.apply(v, frozen), frozen[1] * (v @ q.T))


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_samples_that_left_at_different_steps_are_taken_over_together_as_each_would_be_alone(kind):
    """The shorter trail is filled up in front, which teaches neither Broyden's method nor the share anything."""
    broyden = mb.Broyden(kind=kind, initial=TrustedInverse(Known(EXACT - torch.eye(N, dtype=DOUBLE))))
    trails = [trail(2), trail(5)]
    states = [broyden.resume(*one[-1], one, Endless()) for one in (*trails, joined(trails))]
    steps = [
        broyden.step(*one[-1], state, Endless()).z for one, state in zip((*trails, joined(trails)), states, strict=True)
    ]
    torch.testing.assert_close(steps[2], torch.cat(steps[:2]))


class Endless:
    """A problem without a limit, for solvers by themselves."""

    steps_left = 40


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_broyden_resumed_takes_the_last_change_of_the_residual_to_the_last_move(kind):
    (z0, g0), (z1, g1) = trail(5)[-2:]
    broyden, w = mb.Broyden(kind=kind), normal(3, N, seed=7, dtype=DOUBLE)
    state = broyden.resume(z1, g1, trail(5), Endless())
    transposed = broyden.rmatvec(w, broyden.inverse(state, torch.arange(3)))
    torch.testing.assert_close((transposed * (g1 - g0)).sum(1), (w * (z1 - z0)).sum(1))


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_an_iterate_that_has_not_moved_teaches_nothing_and_loses_nothing(kind):
    known = trail(4)
    broyden, (z, g) = mb.Broyden(kind=kind), known[-1]
    once = broyden.step(z, g, broyden.resume(z, g, known[:-1], Endless()), Endless()).z
    again = broyden.step(z, g, broyden.resume(z, g, known, Endless()), Endless()).z
    if kind == "good":
        torch.testing.assert_close(once, again)
    assert torch.isfinite(again).all()


class Walk(SolverBase):
    """Steps of a Picard iteration that goes wrong after the third, with its trail."""

    def __init__(self, **safeguard: Any) -> None:
        self.safeguard = Safeguard(horizon=None, patience=None, **safeguard)

    def phases(self):
        return self.safeguard.phases(self)

    def init(self, z, g, problem):
        return (z, g, 0)

    def step(self, z, g, state, problem):
        steps = state[2]
        return Step(z + g if steps < 3 else z + 2 * g.norm() * torch.ones_like(z), (z, g, steps + 1))

    def gather(self, state, index):
        return state[0][index], state[1][index], state[2]

    def trail(self, state, index):
        return [(state[0][index], state[1][index])]


def phases(**safeguard: Any) -> tuple[list[int], mb.Solution]:
    f, z0 = lambda z, x: 0.5 * z + x, torch.zeros(1, N, dtype=DOUBLE)
    solution = mb.solve(f, z0, torch.ones_like(z0), solver=Walk(**safeguard), rtol=1e-6, throw=False)
    return solution.trace.phase[:, 0].tolist(), solution


def test_a_sample_above_the_envelope_is_handed_over_at_that_step():
    # relative residuals of this iteration are 1, 1/3, 1/7, 1/15 after 0, 1, 2, 3 steps
    path, solution = phases(envelope=(2.0, 1.0, 0.1))
    assert path[:4] == [0, 0, 0, 1]
    assert solution.converged.all()
    assert phases(envelope=(2.0, 1.0, 0.2, 0.01))[0][:5] == [0, 0, 0, 0, 1]
    assert phases(envelope=(0.9,))[0][:2] == [0, 2], "nothing to carry on from: it starts again from z0"
    assert phases(envelope=(2.0, 0.2), resume_below=0.3)[0][:3] == [0, 0, 2]
    assert 1 not in phases(envelope=(2.0, 1.0, 1.0, 1.0))[0]


def test_what_takes_over_is_told_of_the_last_iterates_and_of_the_one_just_evaluated():
    seen: list[Any] = []

    class Told(mb.Broyden):
        def resume(self, z, g, trail, problem):
            seen.append((z, trail))
            return super().resume(z, g, trail, problem)

    class Told2(Walk):
        def phases(self):
            first, second, third = super().phases()
            return [first, Phase(Told(), origin=second.origin, patience=second.patience), third]

    f, z0 = lambda z, x: 0.5 * z + x, torch.zeros(1, N, dtype=DOUBLE)
    mb.solve(f, z0, torch.ones_like(z0), solver=Told2(envelope=(2.0, 1.0, 0.1)), rtol=1e-6, throw=False)
    ((best, told),) = seen
    assert [float(z[0, 0]) for z, _ in told] == [1.0, 1.5]
    assert float(best[0, 0]) == 1.5
    for z, g in told:
        torch.testing.assert_close(g, f(z, 1.0) - z)


@pytest.mark.parametrize(
    "options",
    [{"envelope": [1.0]}, {"envelope": (0.0,)}, {"envelope": (1,)}, {"resume_below": 0}, {"resume_below": True}],
)
def test_a_safeguard_that_cannot_be_used_is_refused(options):
    with pytest.raises(ValueError, match=f"Safeguard: {next(iter(options))} must be .*, got"):
        Safeguard(**options)


def test_what_a_start_costs_is_not_held_against_the_envelope():
    """A look at z0, whose residual is one, comes before the first iterate; so do samples that are given no look."""
    solver = mb.MetaBroyden(layout=mb.Layout("vector", (N,)), safeguard=Safeguard(None, 15, envelope=(0.9,))).double()
    f = lambda z, x: 0.1 * z + x  # noqa: E731
    for z0 in (torch.zeros(2, N, dtype=DOUBLE), torch.tensor([[0.0], [9.0]], dtype=DOUBLE).expand(2, N)):
        solution = mb.solve(f, z0, torch.ones(2, N, dtype=DOUBLE), solver=solver, rtol=1e-6)
        assert (solution.trace.phase <= 0).all()
