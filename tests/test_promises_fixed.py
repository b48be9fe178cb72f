"""A fixed budget promises what `solve` promises, with nobody looking."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import metabroyden as mb
from metabroyden.solvers import Step
from tests.test_promises_evaluator import Reuses, contraction, inputs
from tests.test_promises_solve import Steps, shifted

SOLVERS = [mb.Picard(0.9), mb.Anderson(memory=2), mb.Broyden(memory=3), mb.Broyden(memory=3, kind="bad")]


def fixed(f, solver, z0, x=None, **options):
    return mb.FixedBudget(f, solver, compiled=False, **options)(z0, x)


@pytest.mark.parametrize("scale", [1.0, 2.0**-90, 2.0**90])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_f_may_use_its_memory_again(solver, scale):
    z0, x = inputs(dtype=torch.float32)
    plain = fixed(contraction, solver, z0, scale * x, max_nfe=12, rtol=1e-5)
    again = fixed(Reuses(contraction), solver, z0, scale * x, max_nfe=12, rtol=1e-5)
    assert torch.equal(again.z, plain.z)
    torch.testing.assert_close(again.trace.residual, plain.trace.residual, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, -90), (torch.float32, 90), (torch.float64, 700)])
def test_a_problem_of_any_size_takes_the_same_way(dtype, power):
    z0, x = inputs(dtype=dtype)
    plain = fixed(contraction, mb.Picard(), z0, x, max_nfe=9, rtol=1e-3)
    scaled = fixed(contraction, mb.Picard(), z0, 2.0**power * x, max_nfe=9, rtol=1e-3)
    assert torch.equal(scaled.z, 2.0**power * plain.z)
    torch.testing.assert_close(scaled.residual, plain.residual, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.trace.residual, plain.trace.residual, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.trace.absolute, 2.0**power * plain.trace.absolute, rtol=1e-6, atol=0)
    assert torch.equal(scaled.converged, plain.converged)


def test_the_iterate_returned_is_the_best_of_all_that_were_evaluated():
    points = 2.1 + 7 * np.random.default_rng(0).random((14, 5))
    z0, x = torch.tensor(points[0])[:, None], torch.zeros(5, 1, dtype=torch.float64)
    solution = fixed(shifted, Steps(*points[1:].tolist()), z0, x, max_nfe=14, rtol=1e-9)
    assert solution.z.flatten().tolist() == points.min(0).tolist()
    assert torch.equal(solution.residual, solution.trace.residual.amin(0))
    assert torch.equal(solution.trace.nfe, torch.arange(1, 15)[:, None].expand(14, 5))
    assert solution.trace.phase.tolist() == [[0] * 5] * 14
    assert solution.trace.seconds[:-1].isnan().all()
    assert 0 < solution.trace.seconds[-1] < 60
    assert solution.steps.tolist() == [13] * 5
    assert solution.status.tolist() == [mb.Status.MAX_NFE] * 5
    assert (z0.flatten() == torch.tensor(points[0])).all()


@pytest.mark.parametrize(("rtol", "atol"), [(1e-2, 0.0), (0.0, 1e-2), (1e-3, 1e-2)])
def test_the_first_iterate_within_the_tolerances_is_returned_though_later_ones_are_better(rtol, atol):
    z0, x = inputs()
    solution = fixed(contraction, mb.Picard(), z0, x, max_nfe=14, rtol=rtol, atol=atol)
    usual = mb.solve(contraction, z0, x, solver=mb.Picard(), max_nfe=14, rtol=rtol, atol=atol)
    assert torch.equal(solution.z, usual.z)
    torch.testing.assert_close(solution.residual, usual.residual, rtol=1e-12, atol=0)
    assert solution.status.tolist() == [mb.Status.CONVERGED] * 5
    assert (solution.trace.residual[-1] < solution.residual)[2:].all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_named_unless_the_sample_had_converged(value):
    z0, x = inputs()
    calls = []

    def f(z, x):
        calls.append(1)
        image = contraction(z, x)
        image[3] = torch.where(torch.tensor(len(calls) == 3), value, image[3])
        image[4] = torch.where(torch.tensor(len(calls) == 9), value, image[4])
        image[1] = torch.where(torch.tensor(len(calls) == 9), value, image[1])
        return image

    solution = fixed(f, mb.Picard(), z0, x, max_nfe=9, rtol=2e-2)
    healthy = fixed(contraction, mb.Picard(), z0, x, max_nfe=9, rtol=2e-2)
    assert solution.status.tolist() == [0, 0, 0, mb.Status.NON_FINITE, 0]
    assert torch.isfinite(solution.z).all()
    assert torch.equal(solution.z[[0, 1, 2, 4]], healthy.z[[0, 1, 2, 4]])
    torch.testing.assert_close(solution.residual[3], solution.trace.residual[1, 3])
    assert solution.trace.absolute[2:, 3].isnan().all()


def test_nothing_finite_gives_back_z0_and_shares_no_memory_with_it():
    z0 = torch.ones(2, 3)
    solution = fixed(lambda z: z * torch.nan, mb.Picard(), z0, max_nfe=3)
    assert torch.equal(solution.z, z0)
    assert solution.residual.isnan().all()
    solution.z.zero_()
    assert (z0 == 1).all()


class Dear(mb.Picard):
    """Costs three evaluations a step, and looks at what it may spend and at f(z0)."""

    min_nfe = 3

    def init(self, z, g, problem):
        assert problem.shape == (4,)
        torch.testing.assert_close(problem.origin(), contraction(torch.zeros_like(z), problem.context))
        return [problem.steps_left]

    def step(self, z, g, state, problem):
        torch.testing.assert_close(problem.origin(), contraction(torch.zeros_like(z), problem.context))
        assert state[-1] == problem.steps_left
        state.append(problem.steps_left - 3)
        for _ in range(2):
            z = z + problem.residual(z)
        return Step(z + g, state)


def test_a_dear_step_is_made_only_where_the_budget_reaches_and_f_at_z0_is_known():
    z0, x = inputs()
    for budget, spent in ((3, 1), (4, 4), (5, 4), (6, 4), (7, 7), (9, 7)):
        solution = fixed(Reuses(contraction), Dear(), z0, x, max_nfe=budget)
        assert solution.nfe.tolist() == [spent] * 5
        assert solution.trace.residual.shape == (spent, 5)


def test_halves_tuples_and_bad_contexts():
    z0, x = inputs(n=6, dtype=torch.float32)

    def f(z, x):
        assert z[0].dtype == torch.bfloat16
        image = contraction(torch.cat([z[0].flatten(1), z[1]], dim=1), x)
        return image[:, :4].reshape(-1, 2, 2), image[:, 4:]

    start = z0[:, :4].reshape(-1, 2, 2), z0[:, 4:]
    pair = fixed(f, mb.Picard(), start, x.bfloat16(), max_nfe=9, rtol=2e-2, f_dtype=torch.bfloat16)
    usual = mb.solve(f, start, x.bfloat16(), solver=mb.Picard(), max_nfe=9, rtol=2e-2, f_dtype=torch.bfloat16)
    assert torch.equal(pair.z[0], usual.z[0])
    assert torch.equal(pair.z[1], usual.z[1])
    assert pair.z[0].dtype == torch.float32
    with pytest.raises(ValueError, match="wanted 5 rows as in z0"):
        fixed(contraction, mb.Picard(), z0, x[:3], max_nfe=3)
