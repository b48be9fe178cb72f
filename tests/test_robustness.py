"""What users' cells and surroundings do to a solve: reused memory, autocast, inference mode, errors, strange starts."""

from __future__ import annotations

import time
import warnings
import weakref

import numpy as np
import pytest
import torch

import metabroyden as mb
from metabroyden.learned import GroupedConfig
from metabroyden.learned.safeguard import BY_PROGRESS
from metabroyden.meta.unroll import unroll
from metabroyden.zoo.testbed import make_problem
from metabroyden.zoo.testbed.cells import dense
from tests.conftest import tanh

D = torch.float64
SOLVERS = [mb.Picard(), mb.Anderson(), mb.Broyden(), mb.Broyden(kind="bad"), mb.Broyden(line_search=True), mb.Newton()]


def perturbed(n: int, initializer: int) -> mb.GroupedLSTM:
    torch.manual_seed(0)
    solver = mb.GroupedLSTM(GroupedConfig(layout="vector", shape=(n,), initializer_width=initializer))
    for parameter in solver.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return solver.requires_grad_(False)


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
    problem = dense(4, 60, 0.95, dtype=D)
    shapes = []
    original = type(solver).init

    class Watching(type(solver)):
        def init(self, z, g, view):
            state = original(self, z, g, view)
            shapes.append(state[0].shape)
            return state

    watched = mb.solve(problem.f, problem.z0, problem.context, solver=Watching(memory=10_000), rtol=1e-9)
    assert shapes == [(4, 49, 60)]
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


def through_data(z, x):
    z.data.mul_(0.5)
    return z + x


def through_numpy(z, x):
    z.numpy()[:] += 1
    return 0.5 * z + x


def context_in_place(z, x):
    return 0.5 * z + x.mul_(0.9)


def context_through_data(z, x):
    x.data.mul_(0.9)
    return 0.5 * z + x


WRITERS = [
    (lambda z, x: z.mul_(0.5).add_(x), "its argument z in place"),
    (through_data, "its argument z in place"),
    (through_numpy, "its argument z in place"),
    (context_in_place, r"its context in place, a tensor of shape"),
    (context_through_data, r"its context in place, a tensor of shape"),
]


def run_by(way: str, f, z0, x, **options):
    if way == "solve":
        return mb.solve(f, z0, x, solver=mb.Picard(), throw=False, **options)
    if way == "fixed":
        return mb.FixedBudget(f, mb.Picard(), max_nfe=9, compiled=False, **options)(z0, x)
    return unroll(mb.Picard(), f, z0, x, steps=3, backend="native")


@pytest.mark.parametrize("way", ["solve", "fixed", "unroll"])
@pytest.mark.parametrize(("f", "words"), WRITERS, ids=["z", "z.data", "z.numpy", "context", "context.data"])
@pytest.mark.parametrize("n", [8, 8000], ids=["copied", "summed"])
def test_an_f_that_writes_to_what_it_is_given_is_refused_however_it_is_run(way, f, words, n):
    with pytest.raises(ValueError, match=words):
        run_by(way, f, torch.zeros(6, n), torch.randn(6, n))


@pytest.mark.parametrize("way", ["solve", "fixed"])
def test_an_f_that_writes_is_refused_in_inference_mode_and_in_half_precision_too(way):
    with torch.inference_mode(), pytest.raises(ValueError, match="its context in place"):
        run_by(way, context_in_place, torch.zeros(6, 8), torch.randn(6, 8))
    half = torch.randn(6, 8).bfloat16()
    for f, words in WRITERS[:2]:
        with pytest.raises(ValueError, match=words):
            run_by(way, f, torch.zeros(6, 8), half, f_dtype=torch.bfloat16)


def test_one_that_writes_to_one_tensor_of_many_or_to_a_shared_one_is_refused():
    def f(z, c):
        c["w"].add_(0.1)
        return 0.5 * z + c["x"]

    for mark in (lambda w: w, mb.Shared):
        with pytest.raises(ValueError, match=r"context in place, a tensor of shape \(6, 3\)"):
            mb.solve(f, torch.zeros(6, 8), {"x": torch.ones(6, 8), "w": mark(torch.ones(6, 3))}, solver=mb.Picard())


@pytest.mark.parametrize("way", ["solve", "fixed"])
def test_solutions_never_require_gradients_though_f_takes_some(way):
    def f(z, x):
        with torch.enable_grad():
            z = z.requires_grad_()
            (g,) = torch.autograd.grad((z * z).sum() / 8 + (z * x).sum() / 2, z, create_graph=True)
        return g

    z0, x = torch.zeros(3, 4), torch.randn(3, 4)
    if way == "fixed":
        found = mb.FixedBudget(f, mb.Broyden(), max_nfe=5, compiled=False)(z0, x)
    else:
        found = mb.solve(f, z0, x, solver=mb.Broyden(), snapshots=(1, 2), keep_inverse=True, throw=False)
        assert not found.inverse.rmatvec(x).requires_grad
    assert not any(t.requires_grad for t in (found.z, found.residual, found.trace.residual, *found.snapshots))
    assert not z0.requires_grad


@pytest.mark.parametrize("mode", ["autocast", "inference"])
@pytest.mark.parametrize("solver", SOLVERS[:4], ids=str)
def test_a_fixed_budget_runs_f_in_the_callers_mode_and_its_own_arithmetic_in_none(mode, solver):
    w, x = 0.1 * torch.randn(16, 16), torch.randn(8, 16)
    seen = set()

    def f(z, x):
        seen.add(((z @ w).dtype, torch.is_inference_mode_enabled()))
        return torch.tanh((z.unsqueeze(1) * w.T).sum(2) + x)

    usual = mb.FixedBudget(f, solver, max_nfe=12, rtol=1e-5, compiled=False)(torch.zeros(8, 16), x)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16) if mode == "autocast" else torch.inference_mode():
        inside = mb.FixedBudget(f, solver, max_nfe=12, rtol=1e-5, compiled=False)(torch.zeros(8, 16), x)
    assert seen == {(torch.bfloat16, False) if mode == "autocast" else (torch.float32, True)}
    assert torch.equal(inside.z, usual.z)
    assert torch.equal(inside.residual, usual.residual)


@pytest.mark.parametrize("solver", [mb.Picard(), mb.Anderson(), mb.Broyden()], ids=str)
@pytest.mark.parametrize("way", ["solve", "fixed"])
def test_what_blows_up_is_not_taken_for_better(solver, way):
    f = lambda z, x: 1e3 * z * (1 + z.abs()) + x  # noqa: E731
    x = torch.ones(2, 3, dtype=D)
    if way == "solve":
        found = mb.solve(f, 0 * x, x, solver=solver, max_nfe=9, throw=False)
    else:
        found = mb.FixedBudget(f, solver, max_nfe=9, compiled=False)(0 * x, x)
    sizes = found.trace.absolute
    here = (f(found.z, x) - found.z).norm(dim=1)
    torch.testing.assert_close(here, sizes.nan_to_num(torch.inf).amin(dim=0))
    torch.testing.assert_close(mb.relative_residual(found.z, f(found.z, x)), found.residual)


@pytest.mark.parametrize("value", [1e308, 1.7e308])
def test_what_is_finite_is_never_judged_otherwise(value):
    f = lambda z: 0 * z + value  # noqa: E731
    z0 = torch.zeros(2, 3, dtype=D)
    for found in (
        mb.solve(f, z0, solver=mb.Picard(), max_nfe=4),
        mb.FixedBudget(f, mb.Picard(), max_nfe=4, compiled=False)(z0),
    ):
        assert found.converged.all()
        assert (found.z == value).all()
    once = mb.solve(f, z0, solver=mb.Picard(), max_nfe=1, throw=False)
    assert once.status.tolist() == [mb.Status.MAX_NFE] * 2
    assert torch.isfinite(once.residual).all()


def test_failed_samples_cost_no_more_than_others():
    x = torch.full((60_000, 1), torch.nan)
    began = time.process_time()
    solution = mb.solve(lambda z, x: torch.cos(z) + x, torch.ones(60_000, 1), x, solver=mb.Picard(), throw=False)
    assert time.process_time() - began < 2  # quadratic: a minute
    assert solution.residual.isnan().all()


def test_at_most_one_gathered_context_is_alive():
    alive, most = [], 0

    def f(z, c):
        nonlocal most
        if not any(ref() is c[0] for ref in alive):
            alive.append(weakref.ref(c[0]))
        most = max(most, sum(ref().numel() for ref in alive if ref() is not None))
        return c[1] * z + c[0].mean(1, keepdim=True) + 1

    c = (torch.randn(30, 500), torch.linspace(0.05, 0.9, 30)[:, None])
    for solver in (mb.Picard(), mb.Anderson(), perturbed(1, 0)):
        alive.clear()
        mb.solve(f, torch.zeros(30, 1), c, solver=solver, rtol=1e-4, max_nfe=100)
        assert len(alive) > 3 or not isinstance(solver, mb.Picard)
    assert most < 2 * c[0].numel()


def test_a_trace_can_be_switched_off(nonlinear):
    options = {"solver": mb.Anderson(), "rtol": 1e-8}
    usual = mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, **options)
    without = mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, **options, trace=False)
    assert torch.equal(usual.z, without.z)
    assert torch.equal(usual.residual, without.residual)
    assert without.trace.residual.shape == without.trace.absolute.shape == without.trace.nfe.shape == (0, 6)
    assert without.trace.seconds.shape == (0,)


@pytest.mark.parametrize(
    "numbers", [(k for k in (1, 3)), range(1, 4, 2), np.array([1, 3])], ids=["generator", "range", "array"]
)
def test_snapshots_may_be_any_iterable(numbers, nonlinear):
    solution = mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=mb.Picard(), snapshots=numbers, rtol=1e-6)
    assert len(solution.snapshots) == 2


@pytest.mark.parametrize("shape", [(0, 3), (0, 2, 4), (0,)])
def test_an_empty_batch_has_an_empty_solution(shape):
    never = lambda z, x: 1 / 0  # noqa: E731
    z0, x = torch.zeros(shape, dtype=D), torch.zeros(0, 5)
    for found in (
        mb.solve(never, z0, x, solver=mb.Broyden(), snapshots=(1, 2), keep_inverse=True),
        mb.FixedBudget(never, mb.Broyden(), max_nfe=5, compiled=False)(z0, x),
    ):
        assert (found.z.shape, found.z.dtype) == (shape, D)
        for field in (found.residual, found.nfe, found.steps, found.converged, found.status):
            assert field.shape == (0,)
        assert found.trace.residual.shape == (0, 0)
        assert found.failures() == ""


@pytest.mark.parametrize("form", ["csr", "bsr", "nested", "jagged"])
def test_contexts_and_states_without_rows_are_refused_by_their_layout(form):
    parts = [torch.randn(k + 1) for k in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that some are new
        strange = {
            "csr": lambda: torch.eye(6).to_sparse_csr(),
            "bsr": lambda: torch.eye(6).to_sparse_bsr((2, 2)),
            "nested": lambda: torch.nested.nested_tensor(parts),
            "jagged": lambda: torch.nested.nested_tensor(parts, layout=torch.jagged),
        }[form]()
    name = {"csr": "torch.sparse_csr", "bsr": "torch.sparse_bsr", "nested": "nested"}.get(form, "torch.jagged")
    f = lambda z, c: torch.cos(z)  # noqa: E731
    for way in ("solve", "fixed"):
        with pytest.raises(ValueError, match=rf"cannot be gathered by rows, got .*{name}.*mb.Shared"):
            run_by(way, f, torch.zeros(6, 1), (torch.ones(6, 1), strange))
    with pytest.raises(ValueError, match=rf"z0 must be a dense tensor, got .*{name}"):
        mb.solve(torch.cos, strange, solver=mb.Picard())
    assert mb.solve(f, torch.zeros(6, 1), mb.Shared(strange), solver=mb.Picard()).converged.all()


def test_a_sparse_coo_context_is_gathered_by_rows():
    rates = torch.linspace(0.1, 0.95, 6, dtype=D)
    f = lambda z, c: z * c[1].to_dense().sum(1, keepdim=True) + c[0]  # noqa: E731
    c = torch.ones(6, 2, dtype=D), torch.diag(rates).to_sparse()
    solution = mb.solve(f, torch.zeros(6, 2, dtype=D), c, solver=mb.Picard(), rtol=1e-10, max_nfe=500)
    assert len(solution.nfe.unique()) > 3
    torch.testing.assert_close(solution.z, (1 / (1 - rates))[:, None].expand(6, 2), rtol=1e-7, atol=0)


def test_complex_states_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"z0 must be real, got torch.complex64: .*torch.view_as_real"):
        mb.solve(torch.cos, torch.zeros(2, 3, dtype=torch.complex64), solver=mb.Picard())
    with pytest.raises(ValueError, match=r"what f returns must be real, got torch.complex64: .*torch.view_as_real"):
        mb.solve(lambda z: z.to(torch.complex64), torch.zeros(2, 3), solver=mb.Picard())


@pytest.mark.parametrize("factor", [0.5, 3.0], ids=["vanishes", "blows up"])
def test_a_solver_under_which_z_vanishes_or_blows_up_hands_over_with_its_best_iterate(factor):
    class Guarded(mb.Picard):
        def phases(self):
            return BY_PROGRESS.phases(self)

    f = lambda z, x: factor * z + x  # noqa: E731
    z0, x = torch.ones(2, 3, dtype=D), torch.zeros(2, 3, dtype=D)
    solution = mb.solve(f, z0, x, solver=Guarded(), max_nfe=40)
    assert solution.converged.all()
    assert (solution.trace.phase == 1).any()
    assert (solution.nfe <= 25).all()
