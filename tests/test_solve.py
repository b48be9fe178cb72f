"""The contract of `solve`, for every classical solver and for untrained learned ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metabroyden as mb
from tests.conftest import linear, tanh


def learned(kind: str, n: int, dtype: torch.dtype = torch.float64, **options):
    torch.manual_seed(1)
    solver = mb.get_solver(kind, layout="vector", shape=(n,), **options).to(dtype)
    for parameter in solver.parameters():  # not at the zero read-outs it starts with
        parameter.data += 0.02 * torch.randn_like(parameter)
    return solver.eval().requires_grad_(False)


CLASSICAL = [mb.get_solver(name) for name in mb.list_solvers(learned=False, splitting=False)]
KINDS = mb.list_solvers(learned=True, splitting=False, adjoint=False)


def every_solver(n: int, dtype: torch.dtype = torch.float64) -> list:
    return CLASSICAL + [mb.Broyden(memory=3), mb.Anderson(memory=2)] + [learned(kind, n, dtype) for kind in KINDS]


@pytest.mark.parametrize("solver", every_solver(12), ids=str)
def test_a_sample_alone_takes_the_same_path_bit_for_bit(solver):
    problem = tanh(batch=7, gain=1.2)
    together = mb.solve(problem.f, problem.z0, problem.x, solver=solver, rtol=1e-8, max_nfe=60, throw=False)
    for i in (0, 3, 6):
        alone = mb.solve(
            problem.f, problem.z0[i : i + 1], problem.x[i : i + 1], solver=solver, rtol=1e-8, max_nfe=60, throw=False
        )
        assert abs(int(alone.nfe) - int(together.nfe[i])) <= 1
        ours = together.trace.residual[:10, i]
        ours, theirs = ours[~ours.isnan()], alone.trace.residual[:10, 0]
        torch.testing.assert_close(ours, theirs[: len(ours)], rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("solver", every_solver(12), ids=str)
def test_the_order_of_samples_does_not_matter(solver):
    problem = tanh(batch=5, gain=1.1)
    order = torch.tensor([3, 0, 4, 2, 1])
    plain = mb.solve(problem.f, problem.z0, problem.x, solver=solver, rtol=1e-7, max_nfe=70, throw=False)
    mixed = mb.solve(problem.f, problem.z0, problem.x[order], solver=solver, rtol=1e-7, max_nfe=70, throw=False)
    assert (plain.nfe[order] - mixed.nfe).abs().max() <= 1
    torch.testing.assert_close(plain.z[order], mixed.z, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", [*CLASSICAL, learned("grouped", 12, conditioning="initial_value")], ids=str)
def test_with_and_without_a_context_the_same_is_found(solver, nonlinear):
    given_context = mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=solver, rtol=1e-8, max_nfe=80)
    closure = mb.solve(lambda z: nonlinear.f(z, nonlinear.x), nonlinear.z0, solver=solver, rtol=1e-8, max_nfe=80)
    torch.testing.assert_close(given_context.z, closure.z, rtol=1e-9, atol=1e-11)
    assert (given_context.nfe - closure.nfe).abs().max() <= 1


@pytest.mark.parametrize("solver", CLASSICAL, ids=str)
def test_the_known_answer_is_found(solver, contraction):
    solution = mb.solve(contraction.f, contraction.z0, contraction.x, solver=solver, rtol=1e-10, max_nfe=300)
    torch.testing.assert_close(solution.z, contraction.star, rtol=1e-8, atol=1e-8)
    assert not solution.z.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape_are_kept(dtype):
    problem = tanh(dtype=dtype)
    f = lambda z, x: problem.f(z.flatten(1), x.flatten(1)).reshape(z.shape)  # noqa: E731
    shaped = problem.z0.reshape(6, 3, 2, 2)
    solution = mb.solve(f, shaped, problem.x.reshape(6, 3, 2, 2), solver=mb.Broyden(), rtol=1e-4)
    assert solution.z.shape == shaped.shape
    assert solution.z.dtype == dtype


def test_several_tensors_are_one_state(nonlinear):
    def f(z, x):
        whole = nonlinear.f(torch.cat([z[0].flatten(1), z[1]], dim=1), x)
        return whole[:, :8].reshape(-1, 2, 4), whole[:, 8:]

    z0 = (nonlinear.z0[:, :8].reshape(-1, 2, 4), nonlinear.z0[:, 8:])
    pair = mb.solve(f, z0, nonlinear.x, solver=mb.Broyden(), rtol=1e-9)
    single = mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=mb.Broyden(), rtol=1e-9)
    torch.testing.assert_close(torch.cat([pair.z[0].flatten(1), pair.z[1]], dim=1), single.z)


def test_finished_samples_cost_nothing_more(nonlinear):
    x = nonlinear.x.clone()
    x[0] = 0  # z* = 0 = z0: done at the first look
    solution = mb.solve(nonlinear.f, nonlinear.z0, x, solver=mb.Picard(), rtol=1e-8, max_nfe=200)
    assert solution.nfe[0] == 1
    assert solution.residual[0] == 0
    assert solution.nfe[1:].min() > 5
    trace = solution.trace
    assert trace.residual.shape == (int(solution.nfe.max()), 6)
    assert trace.residual[1:, 0].isnan().all()
    assert (trace.seconds.diff() >= 0).all()


def test_an_evaluation_that_raises_nan_is_reported_and_the_best_iterate_kept():
    def f(z, x):
        return torch.where(x > 0, 0.5 * z + x, torch.where(z.abs() > 3, torch.nan, 2 * z + x))

    x = torch.tensor([[1.0], [-1.0]])
    solution = mb.solve(f, torch.zeros(2, 1), x, solver=mb.Picard(), throw=False)
    assert solution.status.tolist() == [mb.Status.CONVERGED, mb.Status.NON_FINITE]
    assert torch.isfinite(solution.z).all()
    again = mb.relative_residual(solution.z, f(solution.z, x))
    torch.testing.assert_close(again, solution.residual)


def test_nan_from_the_start_gives_back_z0():
    z0 = torch.ones(2, 3)
    solution = mb.solve(lambda z: z * torch.nan, z0, solver=mb.Broyden(), throw=False)
    assert (solution.z == z0).all()
    assert solution.residual.isnan().all()
    assert (solution.status == mb.Status.NON_FINITE).all()
    assert (solution.nfe == 1).all()


def test_a_solver_that_no_longer_moves_is_stalled():
    solution = mb.solve(
        lambda z: z + 1, torch.ones(1, 2), solver=mb.Picard(damping=1e-9), rtol=1e-6, max_nfe=40, throw=False
    )
    assert solution.status.tolist() == [mb.Status.STALLED]
    assert solution.nfe.tolist() == [2]


def test_the_budget_is_kept_and_failure_raises_with_the_solution_attached(nonlinear):
    for budget in (1, 2, 5):
        for solver in every_solver(12):
            with pytest.raises(mb.SolveError, match="6 of 6 samples did not converge: 6 × max_nfe") as caught:
                mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=solver, rtol=1e-14, max_nfe=budget)
            assert caught.value.solution.nfe.max() <= budget


def test_f_at_z0_is_known_to_a_solver_that_begins_there_and_costs_finished_samples_nothing(nonlinear):
    x = nonlinear.x.clone()
    x[0] = 0

    class Curious(mb.Picard):
        def init(self, z, g, problem):
            return (problem.origin(),)

    solution = mb.solve(nonlinear.f, nonlinear.z0, x, solver=Curious(), rtol=1e-8, max_nfe=200)
    plain = mb.solve(nonlinear.f, nonlinear.z0, x, solver=mb.Picard(), rtol=1e-8, max_nfe=200)
    assert solution.nfe.tolist() == plain.nfe.tolist()
    assert solution.nfe[0] == 1


def test_the_result_shares_no_memory_with_z0():
    z0 = torch.ones(2, 3)
    solution = mb.solve(lambda z: z * torch.nan, z0, solver=mb.Broyden(), throw=False)
    solution.z.zero_()
    assert (z0 == 1).all()


def test_atol_counts_in_absolute_terms(contraction):
    solution = mb.solve(contraction.f, contraction.z0, contraction.x, solver=mb.Picard(), rtol=0.0, atol=1e-3)
    g = (contraction.f(solution.z, contraction.x) - solution.z).norm(dim=1)
    assert (g <= 1e-3).all()


BAD = [
    ({"z0": torch.zeros(3)[0]}, ValueError, "batch axis"),
    ({"z0": torch.zeros(2, 0)}, ValueError, r"at least one coordinate a sample, got shape \(2, 0\)"),
    ({"z0": torch.zeros(0, 0)}, ValueError, r"at least one coordinate a sample, got shape \(0, 0\)"),
    ({"z0": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "floating dtype, got torch.int64"),
    ({"z0": torch.full((2, 3), torch.inf)}, ValueError, "finite"),
    ({"z0": [1.0, 2.0]}, TypeError, "tensor or a non-empty tuple of tensors, got list"),
    ({"z0": (torch.zeros(2, 3), torch.zeros(3, 3))}, ValueError, "agree in batch size"),
    ({"context": torch.zeros(5, 3)}, ValueError, r"wanted 2 rows as in z0, got shape \(5, 3\)"),
    ({"z0": torch.zeros(2, 3, dtype=torch.float16)}, ValueError, "float32 or float64, got torch.float16"),
    ({"context": np.zeros((2, 3))}, TypeError, "got ndarray in it"),
    ({"rtol": -1e-3}, ValueError, "rtol must be a finite number of at least 0, got -0.001"),
    ({"atol": float("nan")}, ValueError, "atol"),
    ({"max_nfe": 0}, ValueError, "max_nfe must be an integer of at least 1, got 0"),
    ({"max_nfe": 10.0}, ValueError, "max_nfe"),
    ({"check_every": 0}, ValueError, "check_every must be an integer of at least 1, got 0"),
    ({"check_every": 1.5}, ValueError, "check_every must be an integer of at least 1, got 1.5"),
    ({"f_dtype": "bfloat16"}, ValueError, "f_dtype must be a floating dtype such as torch.bfloat16, got 'bfloat16'"),
    ({"f_dtype": torch.int32}, ValueError, "f_dtype must be a floating dtype"),
    ({"f": 3}, TypeError, "f must be callable, got int"),
    ({"f": lambda z, x: z[:, :2]}, ValueError, r"wanted \[\(2, 3\)\] floating, got \[\(2, 2\)\]"),
    ({"f": lambda z, x: z > 0}, ValueError, "floating"),
    ({"f": lambda z, x: None}, TypeError, "got NoneType"),
    ({"tolerance": 1e-3}, TypeError, "tolerance"),
    ({"f": lambda z, x: z.mul_(0.5).add_(x)}, ValueError, "f changed its argument z in place"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=[str(next(iter(case[0]))) + case[2] for case in BAD])
def test_bad_input_is_refused_with_what_was_given_and_what_is_wanted(change, error, words):
    arguments = {
        "f": lambda z, x: 0.5 * z + x,
        "z0": torch.zeros(2, 3),
        "context": torch.ones(2, 3),
        "solver": mb.Broyden(),
    } | change
    with pytest.raises(error, match=words):
        mb.solve(arguments.pop("f"), arguments.pop("z0"), arguments.pop("context"), **arguments)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    n=st.integers(1, 9),
    gain=st.floats(0.0, 4.0),
    scale=st.sampled_from([1e-8, 1e-3, 1.0, 1e3, 1e8]),
    name=st.sampled_from(mb.list_solvers(splitting=False, adjoint=False)),
    seed=st.integers(0, 10_000),
    rtol=st.sampled_from([0.0, 1e-10, 1e-4, 1e-1]),
)
def test_whatever_the_problem_the_answer_is_finite_and_its_residual_true(batch, n, gain, scale, name, seed, rtol):
    problem = tanh(batch, n, gain, seed=seed)

    def f(z, x):
        return scale * problem.f(z / scale, x)

    solver = learned(name, n) if name in KINDS else mb.get_solver(name)
    solution = mb.solve(f, problem.z0, problem.x, solver=solver, rtol=rtol, max_nfe=30, throw=False)
    assert torch.isfinite(solution.z).all()
    again = mb.relative_residual(solution.z, f(solution.z, problem.x))
    torch.testing.assert_close(again, solution.residual, rtol=1e-5, atol=1e-12)
    assert ((solution.residual <= rtol) == solution.converged).all()
    assert (solution.nfe <= 30).all()
    assert (solution.nfe >= 1).all()


def test_linear_problems_are_shared_between_tests_with_their_answers():
    problem = linear()
    torch.testing.assert_close(problem.f(problem.star, problem.x), problem.star)
