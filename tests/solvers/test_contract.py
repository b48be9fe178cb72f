"""The contract of `solve` over the registry of problems with known answers, for every classical solver."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import metabroyden as mb
from metabroyden.evaluator import Evaluator
from metabroyden.solution import relative_residual
from metabroyden.zoo.testbed import PROBLEMS, KnownProblem, make_problem
from metabroyden.zoo.testbed.base import distance
from tests.helpers import CLASSICAL as SOLVERS
from tests.helpers import same, solved

NAMES = mb.list_solvers(learned=False, splitting=False)
LIMITED = {
    "substitution": mb.get_solver("substitution"),
    "anderson-1": mb.Anderson(memory=1),
    "broyden-2": mb.Broyden(memory=2),
    "bad-2": mb.Broyden(memory=2, kind="bad"),
}
CONTRACTIVE = [name for name in PROBLEMS if make_problem(name, batch=2).contractive]
every_solver = pytest.mark.parametrize("solver", [*SOLVERS.values(), *LIMITED.values()], ids=[*SOLVERS, *LIMITED])
every_problem = pytest.mark.parametrize("name", PROBLEMS)


def run(problem: KnownProblem, solver, **options) -> mb.Solution:
    settings = {"rtol": problem.rtol, "max_nfe": problem.max_nfe} | options
    return solved(problem.f, problem.z0, problem.context, solver=solver, **settings)


def parts(z) -> tuple[Tensor, ...]:
    return (z,) if isinstance(z, Tensor) else z


def flat(z) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts(z)], dim=1)


def rows(problem: KnownProblem, index: list[int]) -> KnownProblem:
    """The problem of some of its samples, in this order."""
    take = lambda tree: pytree.tree_map(lambda leaf: leaf[index], tree)  # noqa: E731
    return replace(problem, z0=take(problem.z0), context=take(problem.context), star=None)


def recomputed(problem: KnownProblem, z) -> Tensor:
    return relative_residual(flat(z), flat(problem.f(z, problem.context)))


@every_problem
@pytest.mark.parametrize("name_of_solver", SOLVERS)
def test_every_solver_does_what_the_problem_says_a_correct_one_does(name, name_of_solver):
    problem, seen = make_problem(name), []
    counted = replace(
        problem,
        f=lambda z, context: seen.append(context[0]) or problem.f(z, context[1]),
        context=(torch.arange(8), problem.context),
    )
    solution = run(counted, SOLVERS[name_of_solver])
    expected = problem.expected(name_of_solver.split("-")[0]) if name_of_solver in NAMES else "open"
    assert expected in ("solves", "fails", "open")
    if expected == "solves":
        assert solution.converged.all(), solution.failures()
    if expected == "fails":
        assert not solution.converged.any()
    # an independent count, per sample
    np.testing.assert_array_equal(solution.nfe.numpy(), np.bincount(torch.cat(seen).numpy(), minlength=8))
    assert solution.nfe.max() <= problem.max_nfe
    # honest numbers
    assert all(torch.isfinite(part).all() for part in parts(solution.z))
    assert_close(recomputed(problem, solution.z), solution.residual, rtol=1e-6, atol=1e-12, equal_nan=True)
    assert ((solution.status == mb.Status.CONVERGED) == solution.converged).all()
    assert ((solution.residual <= problem.rtol) == solution.converged).all()
    if problem.star is not None:
        found = distance(flat(solution.z), flat(problem.star))[solution.converged]
        assert (found <= problem.distance).all(), found


@every_problem
def test_the_answer_of_a_problem_is_a_fixed_point_and_says_what_is_correct(name):
    problem = make_problem(name, batch=3, seed=5)
    assert problem.correct.endswith(".")
    assert set(problem.expects) <= set(NAMES)
    if problem.star is not None:
        assert (recomputed(problem, problem.star) < 1e-9).all()
    for part in parts(make_problem(name, dtype=torch.float32, batch=3).z0):
        assert (part.dtype, len(part)) == (torch.float32, 3)
    with pytest.raises(ValueError, match=r"unknown problem 'linaer': known are .*linear_normal"):
        make_problem("linaer")


@every_solver
@pytest.mark.parametrize("name", CONTRACTIVE)
def test_a_sample_takes_the_same_iterates_alone_and_among_others_in_any_order(name, solver):
    problem, order = make_problem(name, batch=6), [4, 0, 5, 2, 1, 3]
    together = run(problem, solver)
    for i in (0, 2, 5):
        alone = run(rows(problem, [i]), solver)
        assert abs(int(alone.nfe[0]) - int(together.nfe[i])) <= 1
        ours = together.trace.residual[:, i]
        ours = ours[~ours.isnan()][:10]
        assert_close(ours, alone.trace.residual[: len(ours), 0], rtol=1e-7, atol=1e-10)
    mixed = run(rows(problem, order), solver)
    assert (together.nfe[order] - mixed.nfe).abs().max() <= 1
    assert_close(flat(together.z)[order], flat(mixed.z), rtol=1e-6, atol=1e-8)


@every_solver
@every_problem
def test_the_same_solve_twice_is_the_same_bit_for_bit(name, solver):
    problem = make_problem(name, batch=4)
    one, two = (run(problem, solver, max_nfe=40) for _ in range(2))
    assert torch.equal(flat(one.z), flat(two.z))
    assert torch.equal(one.nfe, two.nfe)
    assert same(one.trace.residual, two.trace.residual)


@every_solver
@pytest.mark.parametrize("name", ["two_tensors", "tanh_symmetric_3", "riccati", "nan_throwing"])
def test_shapes_and_dtypes_are_kept_in_single_precision(name, solver):
    problem = make_problem(name, dtype=torch.float32)
    solution = run(problem, solver, rtol=1e-4)
    for got, start in zip(parts(solution.z), parts(problem.z0), strict=True):
        assert (got.shape, got.dtype, got.device) == (start.shape, start.dtype, start.device)
        assert torch.isfinite(got).all()
    assert_close(recomputed(problem, solution.z), solution.residual, rtol=1e-3, atol=1e-6, equal_nan=True)


@every_solver
@pytest.mark.parametrize("name", ["tanh_gaussian_0.95", "tanh_symmetric_1.5", "nan_throwing", "logistic"])
def test_gathering_a_solvers_memory_never_or_at_once_changes_nothing(name, solver, monkeypatch):
    problem, found = make_problem(name), []
    for share in (None, 0.0, 2.0):
        if share is not None:
            monkeypatch.setattr(importlib.import_module("metabroyden.solve"), "_COMPACT_AT", share)
        found.append(run(problem, solver, rtol=1e-6, max_nfe=60))
    for other in found[1:]:
        assert (found[0].nfe - other.nfe).abs().max() <= 1
        assert torch.equal(found[0].status, other.status)
        assert_close(flat(found[0].z), flat(other.z), rtol=1e-5, atol=1e-7)


@every_solver
def test_looking_less_often_gives_the_same_answer_for_fewer_waits(solver, monkeypatch):
    problem, looks = make_problem("tanh_gaussian_0.95"), 0
    synchronize = Evaluator.synchronize

    def counted(self):
        nonlocal looks
        looks += bool(self._pending)
        synchronize(self)

    monkeypatch.setattr(Evaluator, "synchronize", counted)
    often = run(problem, solver)
    waits, plain = looks, not isinstance(solver, mb.Newton) and not getattr(solver, "line_search", False)
    assert not plain or waits == int(often.nfe.max())  # one a step
    for every in (2, 3, 5):
        looks = 0
        seldom = run(problem, solver, check_every=every)
        assert looks <= waits // every + 2
        assert torch.equal(often.z, seldom.z)
        assert torch.equal(often.residual, seldom.residual)
        assert torch.equal(often.status, seldom.status)
        assert (seldom.nfe >= often.nfe).all()
        if not plain:
            continue
        assert (seldom.nfe - often.nfe).max() < every
        assert (seldom.nfe == seldom.trace.residual.isfinite().sum(0)).all()
        for budget in (1, 2, 3, 5):
            spent = run(problem, solver, rtol=0.0, max_nfe=budget, check_every=every)
            assert (spent.nfe == budget).all()
            assert (spent.steps == budget - 1).all()


def test_looking_less_often_keeps_to_the_budget_and_sees_what_was_not_finite_for_a_while():
    problem = make_problem("overflowing")
    for budget in (1, 3, 7):
        solution = run(problem, mb.Broyden(), max_nfe=budget, check_every=4)
        assert (solution.nfe == budget).all() or (solution.status == mb.Status.NON_FINITE).any()
        assert solution.nfe.max() <= budget
    calls = iter(torch.tensor([torch.inf, 1.0, 2.0, 3.0, 4.0, 5.0]))
    solution = solved(lambda z: 0 * z + next(calls), torch.ones(1, 2), solver=mb.Picard(0.5), check_every=3)
    assert solution.status.tolist() == [mb.Status.NON_FINITE]


@pytest.mark.parametrize("solver", [mb.Picard(), mb.Anderson(), mb.Broyden(), mb.Broyden(kind="bad")], ids=str)
def test_f_may_run_in_bfloat16_with_iterates_in_single_precision(solver):
    problem, dtypes = make_problem("tanh_gaussian_0.95", dtype=torch.float32), set()

    def half(z, x):
        dtypes.update((z.dtype, x.dtype))
        return problem.f(z.float(), x.float()).bfloat16()

    context = problem.context.bfloat16()
    options = {"solver": solver, "f_dtype": torch.bfloat16}
    found = mb.solve(half, problem.z0, context, rtol=1e-2, **options)
    assert dtypes == {torch.bfloat16}
    assert found.z.dtype == found.residual.dtype == torch.float32
    again = relative_residual(found.z, half(found.z.bfloat16(), context).float())
    assert_close(again, found.residual, rtol=1e-5, atol=1e-6)
    assert (distance(found.z, problem.star) < 0.1).all()
    tight = solved(half, problem.z0, context, rtol=1e-7, **options)
    assert torch.isfinite(tight.z).all()  # below what rounding allows: nothing raises, the residual is true
    assert (tight.residual < 1e-2).all()


def test_a_solver_that_writes_into_its_iterate_is_refused():
    class Careless(mb.Picard):
        def step(self, z, g, state, problem):
            return super().step(z.add_(g), g, state, problem)

    with pytest.raises(ValueError, match=r"Careless\(damping=1.0\).step changed the iterate z in place"):
        mb.solve(torch.cos, torch.zeros(2, 3), solver=Careless())
