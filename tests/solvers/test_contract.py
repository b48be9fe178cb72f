"""The contract of `solve` over the registry of problems with known answers, for every classical solver."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import metabroyden as mb
from metabroyden.evaluator import Evaluator
from metabroyden.solution import relative_residual
from metabroyden.state import Packing
from metabroyden.zoo.testbed import PROBLEMS, KnownProblem, make_problem
from metabroyden.zoo.testbed.base import distance

SOLVERS = {
    "picard": mb.Picard(),
    "anderson": mb.Anderson(),
    "broyden": mb.Broyden(),
    "broyden-bad": mb.Broyden(kind="bad"),
    "broyden-search": mb.Broyden(line_search=True),
    "newton": mb.Newton(),
}
CLASSICAL = mb.list_solvers(learned=False, splitting=False)
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
    settings = {"rtol": problem.rtol, "max_nfe": problem.max_nfe, "throw": False} | options
    return mb.solve(problem.f, problem.z0, problem.context, solver=solver, **settings)


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
    problem = make_problem(name)
    seen: list[Tensor] = []

    def numbered(z, context):
        seen.append(context[0])
        return problem.f(z, context[1])

    context = (torch.arange(8), problem.context)
    solution = mb.solve(
        numbered,
        problem.z0,
        context,
        solver=SOLVERS[name_of_solver],
        rtol=problem.rtol,
        max_nfe=problem.max_nfe,
        throw=False,
    )
    expected = problem.expected(name_of_solver.split("-")[0]) if name_of_solver in CLASSICAL else "open"
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
    torch.testing.assert_close(
        recomputed(problem, solution.z), solution.residual, rtol=1e-6, atol=1e-12, equal_nan=True
    )
    assert ((solution.status == mb.Status.CONVERGED) == solution.converged).all()
    assert ((solution.residual <= problem.rtol) == solution.converged).all()
    if problem.star is not None:
        found = distance(flat(solution.z), flat(problem.star))[solution.converged]
        assert (found <= problem.distance).all(), found


@every_problem
def test_the_answer_of_a_problem_is_a_fixed_point_and_says_what_is_correct(name):
    problem = make_problem(name, batch=3, seed=5)
    assert problem.correct.endswith(".")
    assert set(problem.expects) <= set(CLASSICAL)
    if problem.star is not None:
        assert (recomputed(problem, problem.star) < 1e-9).all()
    for part in parts(make_problem(name, dtype=torch.float32, batch=3).z0):
        assert part.dtype == torch.float32
        assert len(part) == 3


def test_an_unknown_problem_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown problem 'linaer': known are .*linear_normal"):
        make_problem("linaer")


@every_solver
@pytest.mark.parametrize("name", CONTRACTIVE)
def test_a_sample_alone_and_among_others_takes_the_same_iterates(name, solver):
    problem = make_problem(name, batch=6)
    together = run(problem, solver)
    for i in (0, 2, 5):
        alone = run(rows(problem, [i]), solver)
        assert abs(int(alone.nfe[0]) - int(together.nfe[i])) <= 1
        ours = together.trace.residual[:, i]
        ours = ours[~ours.isnan()][:10]
        torch.testing.assert_close(ours, alone.trace.residual[: len(ours), 0], rtol=1e-7, atol=1e-10)


@every_solver
@pytest.mark.parametrize("name", CONTRACTIVE)
def test_the_order_of_samples_does_not_matter(name, solver):
    problem = make_problem(name, batch=6)
    order = [4, 0, 5, 2, 1, 3]
    plain, mixed = run(problem, solver), run(rows(problem, order), solver)
    assert (plain.nfe[order] - mixed.nfe).abs().max() <= 1
    torch.testing.assert_close(flat(plain.z)[order], flat(mixed.z), rtol=1e-6, atol=1e-8)


@every_solver
@every_problem
def test_the_same_solve_twice_is_the_same_bit_for_bit(name, solver):
    problem = make_problem(name, batch=4)
    one, two = (run(problem, solver, max_nfe=40) for _ in range(2))
    assert torch.equal(flat(one.z), flat(two.z))
    assert torch.equal(one.nfe, two.nfe)
    assert torch.equal(one.trace.residual.nan_to_num(-1), two.trace.residual.nan_to_num(-1))


@every_solver
@pytest.mark.parametrize("name", ["two_tensors", "tanh_symmetric_3", "riccati", "nan_throwing"])
def test_shapes_and_dtypes_are_kept_in_single_precision(name, solver):
    problem = make_problem(name, dtype=torch.float32)
    solution = run(problem, solver, rtol=1e-4)
    for got, start in zip(parts(solution.z), parts(problem.z0), strict=True):
        assert (got.shape, got.dtype, got.device) == (start.shape, start.dtype, start.device)
        assert torch.isfinite(got).all()
    torch.testing.assert_close(recomputed(problem, solution.z), solution.residual, rtol=1e-3, atol=1e-6, equal_nan=True)


@every_solver
@pytest.mark.parametrize("name", ["tanh_gaussian_0.95", "tanh_symmetric_1.5", "nan_throwing", "logistic"])
@pytest.mark.parametrize("share", [0.0, 2.0], ids=["never", "at-once"])
def test_gathering_a_solvers_memory_never_or_at_once_changes_nothing(name, solver, share, monkeypatch):
    problem = make_problem(name)
    usual = run(problem, solver, rtol=1e-6, max_nfe=60)
    monkeypatch.setattr(importlib.import_module("metabroyden.solve"), "_COMPACT_AT", share)
    other = run(problem, solver, rtol=1e-6, max_nfe=60)
    assert (usual.nfe - other.nfe).abs().max() <= 1
    assert torch.equal(usual.status, other.status)
    torch.testing.assert_close(flat(usual.z), flat(other.z), rtol=1e-5, atol=1e-7)


@every_solver
@pytest.mark.parametrize("every", [2, 5])
def test_looking_less_often_gives_the_same_answer_for_fewer_waits(solver, every, monkeypatch):
    problem = make_problem("tanh_gaussian_0.95")
    looks = 0
    synchronize = Evaluator.synchronize

    def counted(self):
        nonlocal looks
        looks += bool(self._pending)
        synchronize(self)

    monkeypatch.setattr(Evaluator, "synchronize", counted)
    often = run(problem, solver)
    waits, looks = looks, 0
    seldom = run(problem, solver, check_every=every)
    assert looks <= waits // every + 2
    assert torch.equal(often.z, seldom.z)
    assert torch.equal(often.residual, seldom.residual)
    assert torch.equal(often.status, seldom.status)
    assert (seldom.nfe >= often.nfe).all()
    if not isinstance(solver, mb.Newton) and not getattr(solver, "line_search", False):
        assert (seldom.nfe - often.nfe).max() < every
        assert waits == int(often.nfe.max())  # one a step


def test_looking_less_often_keeps_to_the_budget_and_sees_what_was_not_finite_for_a_while():
    problem = make_problem("overflowing")
    for budget in (1, 3, 7):
        solution = run(problem, mb.Broyden(), max_nfe=budget, check_every=4)
        assert (solution.nfe == budget).all() or (solution.status == mb.Status.NON_FINITE).any()
        assert solution.nfe.max() <= budget
    blinking = torch.tensor([torch.inf, 1.0, 2.0, 3.0, 4.0, 5.0])
    calls = iter(blinking)
    solution = mb.solve(
        lambda z: 0 * z + next(calls), torch.ones(1, 2), solver=mb.Picard(0.5), check_every=3, throw=False
    )
    assert solution.status.tolist() == [mb.Status.NON_FINITE]


@pytest.mark.parametrize("solver", [mb.Picard(), mb.Anderson(), mb.Broyden(), mb.Broyden(kind="bad")], ids=str)
def test_f_may_run_in_bfloat16_with_iterates_in_single_precision(solver):
    problem = make_problem("tanh_gaussian_0.95", dtype=torch.float32)
    dtypes = set()

    def half(z, x):
        dtypes.add(z.dtype)
        return problem.f(z.float(), x).bfloat16()

    found = mb.solve(half, problem.z0, problem.context, solver=solver, rtol=1e-2, f_dtype=torch.bfloat16)
    assert dtypes == {torch.bfloat16}
    assert found.z.dtype == torch.float32
    again = relative_residual(found.z, half(found.z.bfloat16(), problem.context).float())
    torch.testing.assert_close(again, found.residual, rtol=1e-3, atol=1e-6)
    assert (distance(found.z, problem.star) < 0.1).all()
    tight = mb.solve(half, problem.z0, problem.context, solver=solver, rtol=1e-7, f_dtype=torch.bfloat16, throw=False)
    assert torch.isfinite(tight.z).all()  # below what rounding allows: nothing raises, the residual is true
    assert (tight.residual < 1e-2).all()


def test_a_solver_that_writes_into_its_iterate_is_refused():
    class Careless(mb.Picard):
        def step(self, z, g, state, problem):
            return super().step(z.add_(g), g, state, problem)

    with pytest.raises(ValueError, match=r"Careless\(damping=1.0\).step changed the iterate z in place"):
        mb.solve(torch.cos, torch.zeros(2, 3), solver=Careless())


def _random_map(family: str, n: int, gain: float, seed: int):
    """A random map of one of several kinds, acting on every row alone."""
    g = torch.Generator().manual_seed(seed)
    w = gain * torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
    times = lambda z: (z.unsqueeze(1) * w.to(z)).sum(2)  # noqa: E731
    return {
        "tanh": lambda z, x: torch.tanh(times(z) + x),
        "linear": lambda z, x: times(z) + x,
        "relu": lambda z, x: torch.relu(times(z) + x),
        "cubic": lambda z, x: times(z) ** 3 + x,
        "root": lambda z, x: torch.sqrt(times(z) + x),
        "quotient": lambda z, x: x / times(z),
        "exponential": lambda z, x: torch.exp(times(z)) - x,
        "step": lambda z, x: torch.sign(times(z)) * x,
    }[family]


FAMILIES = ("tanh", "linear", "relu", "cubic", "root", "quotient", "exponential", "step")
solvers = st.one_of(
    st.builds(mb.Picard, st.floats(0.1, 2)),
    st.builds(mb.Anderson, st.integers(1, 8), st.floats(0.1, 2), st.sampled_from([1e-14, 1e-8, 1e-2])),
    st.builds(mb.Broyden, st.integers(1, 12), st.floats(0.1, 2), st.sampled_from(["good", "bad"]), st.booleans()),
    st.builds(mb.Newton, st.floats(0.1, 2), st.integers(1, 6)),
)


@settings(max_examples=1000, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    solver=solvers,
    batch=st.integers(1, 5),
    n=st.integers(1, 10),
    gain=st.floats(0.0, 5.0),
    power=st.integers(-25, 25),
    double=st.booleans(),
    rtol=st.sampled_from([0.0, 1e-9, 1e-4, 1e-1]),
    budget=st.integers(1, 40),
    every=st.integers(1, 4),
    gathered=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_no_solver_returns_what_recomputation_does_not_confirm(
    family, solver, batch, n, gain, power, double, rtol, budget, every, gathered, seed
):
    dtype = torch.float64 if double else torch.float32
    scale = 10.0**power
    x = torch.randn(batch, n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).to(dtype)
    inner = _random_map(family, n, gain, seed)
    f = lambda z, x: scale * inner(z / scale, x)  # noqa: E731
    z0 = torch.zeros(batch, n, dtype=dtype)
    options = {"solver": solver, "rtol": rtol, "max_nfe": budget, "throw": False, "check_every": every}
    solution = mb.solve(f, z0, x, **options) if gathered else mb.solve(lambda z: f(z, x), z0, **options)
    assert torch.isfinite(solution.z).all()
    again = relative_residual(solution.z, f(solution.z, x))
    atol = 1e-12 if double else 1e-6
    torch.testing.assert_close(again, solution.residual, rtol=1e-4, atol=atol, equal_nan=True)
    assert (solution.residual.isnan() <= (solution.status == mb.Status.NON_FINITE)).all()
    assert ((solution.status == mb.Status.CONVERGED) == solution.converged).all()
    assert ((solution.nfe >= 1) & (solution.nfe <= budget)).all()


def test_packing_refuses_what_does_not_come_back_in_shape():
    packing = Packing.of(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"wanted \[\(2, 3, 4\)\]"):
        packing.take(torch.zeros(2, 4, 3), torch.zeros(2, 12))
