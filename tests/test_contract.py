"""The contract of every registered solver with every type of problem: counted, of a fixed budget, and unrolled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.fixed import FixedProblem
from metabroyden.meta.unroll import UnrolledProblem, unroll
from metabroyden.problem import CountedProblem, Problem
from metabroyden.solver import SolverBase, as_solver
from metabroyden.zoo.models.monotone import MonotoneDense
from tests.conftest import linear, tanh
from tests.helpers import DOUBLE as D
from tests.helpers import fixed, moved, solved
from tests.zoo.test_monotone import Counted

N, BATCH, STEPS = 6, 4, 5
LEARNED = mb.list_solvers(learned=True)


def untrained(name: str) -> SolverBase:
    torch.manual_seed(1)
    return mb.get_solver(name, layout="vector", shape=(N,), safeguard=None).double().eval()


CASES = {
    **{name: mb.get_solver(name) for name in mb.list_solvers(learned=False)},
    "broyden-bad": mb.Broyden(kind="bad"),
    "broyden-2": mb.Broyden(memory=2),
    "bad-2": mb.Broyden(memory=2, kind="bad"),
    "anderson-2": mb.Anderson(memory=2),
    "broyden-search": mb.Broyden(line_search=True),
    **{f"{name}-untrained": untrained(name) for name in LEARNED},
    **{f"{name}-moved": moved(name, N, size=0.02, safeguard=None) for name in LEARNED},
}


def problem(family: str):
    """(f, z0, context) of a family."""
    if family == "monotone":
        torch.manual_seed(0)
        cell = MonotoneDense(N).double().requires_grad_(False)
        return cell, torch.zeros(BATCH, N, dtype=D), torch.randn(BATCH, N, dtype=D)
    known = {"linear": linear, "adjoint": linear, "tanh": tanh}[family](BATCH, N, 0.5)
    if family == "adjoint":
        context = {"z": torch.tanh(known.x), "v": known.x, "sample": torch.arange(BATCH)}
        return (lambda u, c: known.f(u, c["v"])), known.x, context
    return known.f, known.z0, known.x


def families(solver: SolverBase) -> list[str]:
    """The families that a solver is for."""
    if solver.required_methods:
        return ["monotone"]
    return ["adjoint"] if solver.homogeneous else ["linear", "tanh", "monotone"]


every_pair = pytest.mark.parametrize(
    ("solver", "family"),
    [
        pytest.param(solver, family, id=f"{name}-{family}")
        for name, solver in CASES.items()
        for family in families(solver)
    ],
)


@every_pair
def test_a_counted_solve_converges_and_can_be_recomputed(solver, family):
    f, z0, x = problem(family)
    solution = mb.solve(f, z0, x, solver=solver, rtol=1e-6, max_nfe=200)
    assert solution.converged.all()
    assert_close(mb.relative_residual(solution.z, f(solution.z, x)), solution.residual, rtol=1e-5, atol=1e-13)
    assert torch.equal(mb.solve(f, z0, x, solver=solver, rtol=1e-6, max_nfe=200).z, solution.z)
    if not isinstance(x, dict) and not (solver.is_learned and solver.required_methods):
        counted = Counted(f)
        solution = mb.solve(counted, z0, (torch.arange(BATCH), x), solver=solver, rtol=1e-6, max_nfe=200)
        seen = np.bincount(torch.cat(counted.seen).numpy(), minlength=BATCH)
        np.testing.assert_array_equal(solution.nfe.numpy(), seen)


@every_pair
def test_a_fixed_budget_and_an_unroll_make_the_steps_of_a_counted_solve(solver, family):
    f, z0, x = problem(family)
    if not solver.fixed_cost:
        with pytest.raises(ValueError, match="decides on the way"):
            mb.FixedBudget(f, solver, max_nfe=8)
        with pytest.raises(ValueError, match="decides on the way"):
            unroll(solver, f, z0, x, steps=STEPS)
        return
    counted = solved(f, z0, x, solver=solver, rtol=0.0, max_nfe=STEPS + 2).trace.residual
    if solver.required_methods:
        with pytest.raises(ValueError, match="evaluates f as a whole"):
            mb.FixedBudget(f, solver, max_nfe=8)
    else:
        found = fixed(f, z0, x, solver=solver, max_nfe=STEPS + 2, rtol=0.0)
        going = ~counted.isnan()  # a counted solve freezes what is exact
        assert_close(found.trace.residual[going], counted[going], rtol=1e-6, atol=1e-12)
        assert_close(mb.relative_residual(found.z, f(found.z, x)), found.residual, rtol=1e-5, atol=1e-13)
    with torch.set_grad_enabled(not isinstance(solver, mb.LearnedStart)):  # which takes Picard's steps with gradients
        found = unroll(solver, f, z0, x, steps=STEPS, backend="native").residuals.detach()
    if not isinstance(solver, mb.LearnedStart):
        assert_close(unroll(solver, f, z0, x, steps=STEPS).residuals, found, rtol=1e-9, atol=1e-13)
    first = 0 if torch.allclose(found[0], counted[0], rtol=1e-9) else 1  # a start may look at z0 first
    found, counted = found[: STEPS + 2 - first], counted[first : first + STEPS + 1]
    going = ~counted.isnan()
    assert_close(found[going], counted[going], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, solver in CASES.items() if solver.fixed_cost and not solver.is_learned])
def test_gradients_of_an_unrolled_classical_solver_agree_with_finite_differences(name):
    f, z0, x = problem(families(CASES[name])[-1])
    z0 = (z0 + 0.1 * torch.randn(z0.shape, generator=torch.Generator().manual_seed(3), dtype=z0.dtype)).requires_grad_()
    loss = lambda z: unroll(CASES[name], f, z, x, steps=4, backend="native").z.square().sum()  # noqa: E731
    (found,) = torch.autograd.grad(loss(z0), z0)
    direction = torch.randn_like(found)
    with torch.no_grad():
        ahead, behind = (loss(z0 + step * direction) for step in (1e-6, -1e-6))
    assert_close((found * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-7)


def test_all_types_of_problems_share_one_type():
    kinds = CountedProblem, FixedProblem, UnrolledProblem
    assert all(issubclass(kind, Problem) for kind in kinds)
    assert [kind.decides_on_host for kind in kinds] == [True, False, False]


class Own:
    """A user's own solver, without our base class."""

    def start(self, z0, problem):
        return z0

    def init(self, z, g, problem):
        return ()

    def step(self, z, g, state, problem):
        return mb.solvers.Step(z + g, state)


def test_a_solver_without_the_base_class_works_with_every_type_of_problem():
    f, z0, x = problem("tanh")
    own, picard = Own(), mb.Picard()
    for run in (
        lambda one: mb.solve(f, z0, x, solver=one).z,
        lambda one: fixed(f, z0, x, solver=one, max_nfe=5).z,
        lambda one: unroll(one, f, z0, x, steps=3).residuals,
        lambda one: mb.DEQ(f, solver=one)(x, z0),
    ):
        assert torch.equal(run(own), run(picard))
    assert repr(as_solver(own)) == repr(own)
    for wrong in (Own, mb.Broyden, object(), "broyden"):
        with pytest.raises(TypeError, match="solver must be an instance with start, init and step"):
            mb.solve(f, z0, x, solver=wrong)
