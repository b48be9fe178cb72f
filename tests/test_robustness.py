"""What users' cells and surroundings do to a solve: reused memory, autocast, inference mode, errors, strange starts."""

from __future__ import annotations

import pytest
import torch

import metabroyden as mb
from metabroyden.learned import GroupedConfig
from metabroyden.testbed import make_problem
from metabroyden.testbed.cells import dense
from tests.conftest import tanh
from tests.test_solvers import _apply, _copy

D = torch.float64
SOLVERS = [mb.Picard(), mb.Anderson(), mb.Broyden(), mb.Broyden(kind="bad"), mb.Broyden(line_search=True), mb.Newton()]


def perturbed(n: int, initializer: int) -> mb.GroupedLSTM:
    torch.manual_seed(0)
    solver = mb.GroupedLSTM(GroupedConfig(layout="nd", shape=(n,), initializer=initializer))
    for parameter in solver.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return solver.requires_grad_(False)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("every", [1, 4])
def test_f_may_write_its_value_where_it_wrote_the_last_one(solver, every):
    problem = make_problem("nan_throwing")
    buffer = torch.empty_like(problem.z0)
    reusing = lambda z: buffer.copy_(problem.f(z, problem.context))  # noqa: E731
    fresh = lambda z: problem.f(z, problem.context)  # noqa: E731
    options = {"solver": solver, "rtol": 1e-6, "max_nfe": 40, "check_every": every, "throw": False}
    if isinstance(solver, mb.Newton):
        reusing = lambda z: problem.f(z, problem.context)  # noqa: E731  (forward AD and written memory do not go together)
    ours, theirs = mb.solve(reusing, problem.z0, **options), mb.solve(fresh, problem.z0, **options)
    assert torch.equal(ours.z, theirs.z)
    assert torch.equal(ours.residual.nan_to_num(-1), theirs.residual.nan_to_num(-1))


def test_a_late_look_judges_each_evaluation_by_its_own_value():
    buffer = torch.empty(2, 1, dtype=D)

    def f(z):  # the first sample is exact at once, which has its norms measured again
        buffer[0] = 1.0
        buffer[1] = 2 * z[1] + 1
        return buffer

    solution = mb.solve(f, torch.ones(2, 1, dtype=D), solver=mb.Picard(), max_nfe=30, check_every=20, throw=False)
    assert solution.status.tolist() == [mb.Status.CONVERGED, mb.Status.MAX_NFE]
    torch.testing.assert_close(mb.relative_residual(solution.z, f(solution.z).clone()), solution.residual)


@pytest.mark.parametrize("initializer", [0, 8])
def test_a_fixed_budget_keeps_the_first_image_and_the_budget(initializer):
    learned = perturbed(8, initializer)
    x, w, buffer = torch.randn(5, 8), 0.2 * torch.randn(8, 8), torch.empty(5, 8)
    f = lambda z, x: torch.tanh(z @ w.T + x)  # noqa: E731
    calls = 0

    def reusing(z, x):
        nonlocal calls
        calls += 1
        return buffer.copy_(f(z, x))

    for budget in (1, 2, 8):
        calls = 0
        ours = mb.FixedBudget(reusing, learned, max_nfe=budget, compiled=False)(torch.zeros(5, 8), x)
        assert calls == budget
        assert ours.nfe.tolist() == [budget] * 5
        theirs = mb.FixedBudget(f, learned, max_nfe=budget, compiled=False)(torch.zeros(5, 8), x)
        assert torch.equal(ours.z, theirs.z)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_inference_mode_changes_nothing_and_an_in_place_cell_is_still_refused(solver):
    problem = make_problem("tanh_gaussian_0.95")
    usual = mb.solve(problem.f, problem.z0, problem.context, solver=solver, rtol=1e-8)
    with torch.inference_mode():
        inside = mb.solve(problem.f, problem.z0.clone(), problem.context.clone(), solver=solver, rtol=1e-8)
        z0 = torch.ones(1, 3)
        with pytest.raises(ValueError, match="in place"):
            mb.solve(lambda z, x: z.mul_(0.5), z0, torch.ones(1), solver=solver)
        assert (z0 == 1).all()
    assert torch.equal(usual.z, inside.z)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_under_autocast_f_is_cast_and_the_solvers_arithmetic_is_not(solver):
    w, x = 0.1 * torch.randn(16, 16), torch.randn(8, 16)
    dtypes = set()

    def f(z, x):
        product = z @ w
        dtypes.add(product.dtype)
        return torch.tanh(product + x)

    exact = lambda z, x: torch.tanh((z.unsqueeze(1) * w.T).sum(2) + x)  # noqa: E731  (nothing here is cast)
    usual = mb.solve(exact, torch.zeros(8, 16), x, solver=solver, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = mb.solve(f, torch.zeros(8, 16), x, solver=solver, rtol=2e-2)
        inside = mb.solve(exact, torch.zeros(8, 16), x, solver=solver, rtol=1e-5)
    assert dtypes == {torch.bfloat16}
    assert half.z.dtype == torch.float32
    assert torch.equal(inside.z, usual.z)
    assert torch.equal(inside.nfe, usual.nfe)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_expanded_starts_that_require_gradients_are_starts_like_others(solver):
    problem = tanh(batch=5, n=6, gain=0.9)
    plain = mb.solve(problem.f, torch.full((5, 6), 0.1, dtype=D), problem.x, solver=solver, rtol=1e-8)
    z0 = torch.full((1, 6), 0.1, dtype=D).requires_grad_().expand(5, 6)
    strange = mb.solve(problem.f, z0, problem.x, solver=solver, rtol=1e-8)
    assert torch.equal(plain.z, strange.z)
    assert torch.equal(plain.nfe, strange.nfe)
    assert (z0 == 0.1).all()


def test_what_a_cell_raises_in_the_middle_is_passed_on():
    for solver in SOLVERS:
        calls = 0

        def f(z, x):
            nonlocal calls
            calls += 1
            if calls == 4:
                raise RuntimeError("out of memory")
            return torch.tanh(0.5 * z + x)

        with pytest.raises(RuntimeError, match="out of memory"):
            mb.solve(f, torch.zeros(2, 3), torch.ones(2, 3), solver=solver, rtol=1e-14, throw=False)


@pytest.mark.parametrize("budget", [7, 9, 10, 15, 25])
def test_newton_at_the_end_of_its_budget_does_not_depend_on_the_other_samples(budget):
    scale = torch.linspace(0.1, 1.6, 12, dtype=D)[:, None]
    problem = tanh(batch=12, n=12, gain=1.0)
    f = lambda z, c: problem.f(c[0] * z, c[1])  # noqa: E731
    options = {"solver": mb.Newton(krylov=4), "rtol": 1e-3, "max_nfe": budget, "throw": False}
    together = mb.solve(f, problem.z0, (scale, problem.x), **options)
    for i in range(12):
        alone = mb.solve(f, problem.z0[:1], (scale[i : i + 1], problem.x[i : i + 1]), **options)
        assert int(alone.nfe[0]) == int(together.nfe[i])
        torch.testing.assert_close(alone.z[0], together.z[i], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_a_failed_line_search_restarts_and_the_next_secant_equation_holds(kind, monkeypatch):
    problem = tanh(batch=3, n=8, gain=2.0)
    solver = mb.Broyden(memory=30, kind=kind, line_search=True)
    calls = 0

    def failing_once(z, g, step, view, **options):
        nonlocal calls
        calls += 1
        point = z + step
        failed = torch.tensor([calls == 3, False, False])
        return point, problem.f(point, problem.x) - point, failed

    monkeypatch.setattr("metabroyden.solvers.broyden.backtrack", failing_once)
    z, g = problem.z0, problem.f(problem.z0, problem.x) - problem.z0
    state = solver.init(z, g, None)
    for k in range(8):
        step = solver.step(z, g, state, None)
        after = solver.step(step.z, step.g, _copy(step.state), None).state
        if k != 2:  # the pair of the failed step itself is forgotten with the rest, once it is known to have failed
            torch.testing.assert_close(_apply(after, step.g - g), step.z - z, rtol=1e-7, atol=1e-9)
        z, g, state = step.z, step.g, step.state
    assert (state.alive[:, 3:] == 1).all()


@pytest.mark.parametrize("every", [1, 2, 4])
def test_what_a_line_search_dropped_does_not_count_as_not_finite(every):
    def g(z, x):
        return z + torch.where(z <= 0, 1 + 0 * z, torch.where(z > 0.999, 10 + 0 * z, torch.nan))

    x = torch.zeros(1, dtype=D)
    solution = mb.solve(
        g,
        torch.zeros(1, 1, dtype=D),
        x,
        solver=mb.Broyden(line_search=True),
        max_nfe=30,
        check_every=every,
        throw=False,
    )
    assert solution.nfe.tolist() == [30]  # it went on from the finite point each time, to the end of its budget
    assert solution.steps[0] > 5


def test_ties_are_broken_in_a_sample_without_a_look_at_the_others():
    f = lambda z, x: torch.stack([-z[:, 1], z[:, 0]], dim=1) + 0 * x  # noqa: E731
    z0 = torch.tensor([[1.0, 2.0], [1e-200, 1e-200]], dtype=D)
    options = {"solver": mb.Picard(), "max_nfe": 4, "throw": False}
    both = mb.solve(f, z0, torch.zeros(2, 1, dtype=D), **options)
    alone = mb.solve(f, z0[:1], torch.zeros(1, 1, dtype=D), **options)
    assert torch.equal(both.z[0], alone.z[0])


@pytest.mark.parametrize("solver", [mb.Broyden(memory=10_000), mb.Anderson(memory=10_000)], ids=str)
def test_no_more_memory_is_taken_than_there_can_be_steps(solver):
    problem = dense(4, 6, 0.95, dtype=D)
    shapes = []
    original = type(solver).init

    class Watching(type(solver)):
        def init(self, z, g, view):
            state = original(self, z, g, view)
            shapes.append(state[0].shape)
            return state

    watched = mb.solve(problem.f, problem.z0, problem.context, solver=Watching(memory=10_000), rtol=1e-8)
    assert shapes == [(4, 49, 6)]
    torch.testing.assert_close(watched.z, problem.star, rtol=1e-6, atol=1e-8)


def test_a_learned_solver_that_hands_over_may_be_looked_at_seldom():
    problem = make_problem("tanh_gaussian_1.5", dtype=torch.float32)
    learned = perturbed(32, 8)
    for every in (1, 3):
        solution = mb.solve(
            problem.f, problem.z0, problem.context, solver=learned, rtol=1e-4, max_nfe=120, check_every=every
        )
        again = mb.relative_residual(solution.z, problem.f(solution.z, problem.context))
        torch.testing.assert_close(again, solution.residual, rtol=1e-3, atol=1e-7)
