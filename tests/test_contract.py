"""The contract of every registered solver with every type of problem: counted, of a fixed budget, and unrolled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import metabroyden as mb
from metabroyden.fixed import FixedProblem
from metabroyden.meta.unroll import UnrolledProblem, unroll
from metabroyden.problem import CountedProblem, Problem
from metabroyden.solver import SolverBase, as_solver
from metabroyden.zoo.models.monotone import MonotoneDense
from tests.conftest import linear, tanh

N, BATCH, STEPS = 6, 4, 5
CLASSICAL = mb.list_solvers(learned=False)
LEARNED = mb.list_solvers(learned=True)


def made(name: str, *, moved: bool = False, **options) -> SolverBase:
    """The registered solver of this name, a learned one with weights at random if `moved`."""
    if name in CLASSICAL:
        return mb.get_solver(name, **options)
    torch.manual_seed(1)
    solver = mb.get_solver(name, layout="vector", shape=(N,), **options).double()
    for parameter in solver.parameters():
        parameter.data += 0.02 * moved * torch.randn_like(parameter)
    return solver.eval()


CASES = {
    **{name: made(name) for name in CLASSICAL},
    "broyden-bad": mb.Broyden(kind="bad"),
    "broyden-2": mb.Broyden(memory=2),
    "bad-2": mb.Broyden(memory=2, kind="bad"),
    "anderson-2": mb.Anderson(memory=2),
    "broyden-search": mb.Broyden(line_search=True),
    **{f"{name}-untrained": made(name, safeguard=None) for name in LEARNED},
    **{f"{name}-moved": made(name, moved=True, safeguard=None) for name in LEARNED},
}


def problem(family: str):
    """(f, z0, context) of a family."""
    if family == "monotone":
        torch.manual_seed(0)
        cell = MonotoneDense(N).double().requires_grad_(False)
        return cell, torch.zeros(BATCH, N, dtype=torch.float64), torch.randn(BATCH, N, dtype=torch.float64)
    if family == "adjoint":
        known = linear(BATCH, N, 0.5)
        context = {"z": torch.tanh(known.x), "v": known.x, "sample": torch.arange(BATCH)}
        return (lambda u, c: known.f(u, c["v"])), known.x, context
    known = {"linear": linear, "tanh": tanh}[family](BATCH, N, 0.5)
    return known.f, known.z0, known.x


def families(solver: SolverBase) -> list[str]:
    """The families that a solver is for."""
    if solver.required_methods:
        return ["monotone"]
    return ["adjoint"] if solver.homogeneous else ["linear", "tanh", "monotone"]


PAIRS = [
    pytest.param(solver, family, id=f"{name}-{family}") for name, solver in CASES.items() for family in families(solver)
]
every_pair = pytest.mark.parametrize(("solver", "family"), PAIRS)


@every_pair
def test_a_counted_solve_converges_and_can_be_recomputed(solver, family):
    f, z0, x = problem(family)
    seen: list[torch.Tensor] = []

    class Numbered(torch.nn.Module):
        """f, which notes the samples that it is called with, and the methods of the cell."""

        def forward(self, z, x):
            seen.append(x[0])
            return f(z, x[1])

        def linear(self, z, x):
            seen.append(x[0])
            return f.linear(z, x[1])

        def prox(self, v):
            return f.prox(v)

        def resolvent(self, alpha):
            made = f.resolvent(alpha)
            return lambda v, x: seen.append(x[0]) or made(v, x[1])

    solution = mb.solve(f, z0, x, solver=solver, rtol=1e-6, max_nfe=200)
    assert solution.converged.all()
    again = mb.relative_residual(solution.z, f(solution.z, x))
    torch.testing.assert_close(again, solution.residual, rtol=1e-5, atol=1e-13)
    assert torch.equal(mb.solve(f, z0, x, solver=solver, rtol=1e-6, max_nfe=200).z, solution.z)
    if not isinstance(x, dict) and not (solver.is_learned and solver.required_methods):
        counted = (torch.arange(BATCH), x)
        solution = mb.solve(Numbered(), z0, counted, solver=solver, rtol=1e-6, max_nfe=200)
        np.testing.assert_array_equal(solution.nfe.numpy(), np.bincount(torch.cat(seen).numpy(), minlength=BATCH))


@every_pair
def test_a_fixed_budget_and_an_unroll_make_the_steps_of_a_counted_solve(solver, family):
    f, z0, x = problem(family)
    if not solver.fixed_cost:
        with pytest.raises(ValueError, match="decides on the way"):
            mb.FixedBudget(f, solver, max_nfe=8)
        with pytest.raises(ValueError, match="decides on the way"):
            unroll(solver, f, z0, x, steps=STEPS)
        return
    counted = mb.solve(f, z0, x, solver=solver, rtol=0.0, max_nfe=STEPS + 2, throw=False).trace.residual
    if solver.required_methods:
        with pytest.raises(ValueError, match="evaluates f as a whole"):
            mb.FixedBudget(f, solver, max_nfe=8)
    else:
        fixed = mb.FixedBudget(f, solver, max_nfe=STEPS + 2, rtol=0.0, compiled=False)(z0, x)
        going = ~counted.isnan()  # a counted solve freezes what is exact
        torch.testing.assert_close(fixed.trace.residual[going], counted[going], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(mb.relative_residual(fixed.z, f(fixed.z, x)), fixed.residual, rtol=1e-5, atol=1e-13)
    steps = {"steps": STEPS, "backend": "native"}
    with torch.set_grad_enabled(not isinstance(solver, mb.LearnedStart)):  # which takes Picard's steps with gradients
        found = unroll(solver, f, z0, x, **steps).residuals.detach()
    if not isinstance(solver, mb.LearnedStart):
        torch.testing.assert_close(unroll(solver, f, z0, x, steps=STEPS).residuals, found, rtol=1e-9, atol=1e-13)
    first = 0 if torch.allclose(found[0], counted[0], rtol=1e-9) else 1  # a start may look at z0 first
    found, counted = found[: STEPS + 2 - first], counted[first : first + STEPS + 1]
    going = ~counted.isnan()
    torch.testing.assert_close(found[going], counted[going], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, solver in CASES.items() if solver.fixed_cost and not solver.is_learned])
def test_gradients_of_an_unrolled_classical_solver_agree_with_finite_differences(name):
    f, z0, x = problem(families(CASES[name])[-1])
    z0 = (z0 + 0.1 * torch.randn(z0.shape, generator=torch.Generator().manual_seed(3), dtype=z0.dtype)).requires_grad_()
    loss = lambda z: unroll(CASES[name], f, z, x, steps=4, backend="native").z.square().sum()  # noqa: E731
    (found,) = torch.autograd.grad(loss(z0), z0)
    direction = torch.randn_like(found)
    with torch.no_grad():
        ahead, behind = (loss(z0 + step * direction) for step in (1e-6, -1e-6))
    torch.testing.assert_close((found * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-7)


def test_all_types_of_problems_share_one_type():
    for kind in (CountedProblem, FixedProblem, UnrolledProblem):
        assert issubclass(kind, Problem)
    assert [kind.decides_on_host for kind in (CountedProblem, FixedProblem, UnrolledProblem)] == [True, False, False]


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
    assert torch.equal(mb.solve(f, z0, x, solver=own).z, mb.solve(f, z0, x, solver=picard).z)
    fixed = [mb.FixedBudget(f, one, max_nfe=5, compiled=False)(z0, x).z for one in (own, picard)]
    assert torch.equal(*fixed)
    assert torch.equal(*(unroll(one, f, z0, x, steps=3).residuals for one in (own, picard)))
    assert repr(as_solver(own)) == repr(own)
    assert torch.equal(mb.DEQ(f, solver=own)(x, z0), mb.DEQ(f, solver=picard)(x, z0))
    for wrong in (Own, mb.Broyden, object(), "broyden"):
        with pytest.raises(TypeError, match="solver must be an instance with start, init and step"):
            mb.solve(f, z0, x, solver=wrong)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_norms_neither_overflow_nor_underflow_in_single_precision(scale):
    known = tanh(dtype=torch.float32)
    f = lambda z, x: scale * known.f(z / scale, x)  # noqa: E731
    star = mb.solve(known.f, known.z0, known.x, solver=mb.Picard(), rtol=1e-6, max_nfe=200).z
    solution = mb.solve(f, known.z0, known.x, solver=mb.Picard(), rtol=1e-5, max_nfe=200)
    torch.testing.assert_close(solution.z / scale, star, rtol=1e-3, atol=1e-3)
    again = mb.relative_residual(solution.z, f(solution.z, known.x))
    torch.testing.assert_close(again, solution.residual, rtol=1e-2, atol=1e-7)
