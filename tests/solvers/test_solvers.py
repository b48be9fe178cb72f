"""The classical solvers against their textbook definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import optimize

import metabroyden as mb
from metabroyden.solver import SolverBase
from metabroyden.zoo.testbed.cells import blas
from tests.conftest import linear, tanh


@pytest.mark.parametrize("name", mb.list_solvers(learned=False, splitting=False))
def test_every_registered_solver_satisfies_the_protocol_and_is_a_frozen_config(name):
    solver = mb.get_solver(name)
    assert isinstance(solver, SolverBase)
    assert hash(solver) == hash(mb.get_solver(name))
    with pytest.raises(AttributeError):
        solver.damping = 0.1
    with pytest.raises(TypeError, match="dampening"):
        mb.get_solver(name, dampening=1.0)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("picard", {"damping": 0}, "Picard: damping must be a number in"),
        ("anderson", {"memory": 0}, "Anderson: memory must be an integer in"),
        ("anderson", {"ridge": 0.0}, "Anderson: ridge"),
        ("broyden", {"memory": 2.5}, "got 2.5"),
        ("broyden", {"damping": float("nan")}, "Broyden: damping"),
        ("newton", {"krylov": -1}, "Newton: krylov"),
    ],
)
def test_bad_options_are_refused_by_name(name, options, words):
    with pytest.raises(ValueError, match=words):
        mb.get_solver(name, **options)


def test_an_unknown_solver_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown solver 'broiden': known are .*anderson, broyden, .*newton, picard"):
        mb.get_solver("broiden")


def iterates(solver, problem, steps: int) -> list[torch.Tensor]:
    """The points at which f was evaluated, for a batch of one."""
    seen: list[torch.Tensor] = []

    def f(z, x):
        seen.append(z[0].clone())
        return problem.f(z, x)

    mb.solve(f, problem.z0[:1], problem.x[:1], solver=solver, rtol=0.0, max_nfe=steps, throw=False)
    return seen


def dense_broyden(problem, steps: int, memory: int | None = None) -> list[torch.Tensor]:
    """Good Broyden with the inverse Jacobian as a matrix, additive update; the last `memory` updates only."""
    n = problem.x.shape[1]
    start = -torch.eye(n, dtype=problem.x.dtype)
    z = problem.z0[0]
    residual = lambda z: problem.f(z[None], problem.x[:1])[0] - z  # noqa: E731
    g, points, factors = residual(z), [z], []
    b = start
    for _ in range(steps - 1):
        z_next = z - b @ g
        g_next = residual(z_next)
        points.append(z_next)
        dz, dg = z_next - z, g_next - g
        if memory is not None and len(factors) == memory:
            factors.pop(0)
            b = start
            for u, v in factors:
                b = b + torch.outer(u, v @ b)
        u = (dz - b @ dg) / (dz @ b @ dg)
        factors.append((u, dz))
        b = b + torch.outer(u, dz @ b)
        torch.testing.assert_close(b @ dg, dz)  # the secant equation
        z, g = z_next, g_next
    return points


@pytest.mark.parametrize("kind", ["good", "bad"])
@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_broyden_keeps_the_newest_secant_equation_for_ever(damping, kind):
    problem = tanh(batch=3, n=8, gain=2.0)
    solver = mb.Broyden(memory=3, damping=damping, kind=kind)
    z, g = problem.z0, problem.f(problem.z0, problem.x) - problem.z0
    state = solver.init(z, g, None)
    for _ in range(12):
        step = solver.step(z, g, state, None)
        g_next = problem.f(step.z, problem.x) - step.z
        after = solver.step(step.z, g_next, _copy(step.state), None)
        # B⁺g⁺ is read off the step after; B⁺g from a step that pretends to stand at the new pair with residual g
        known = after.state
        dg, dz = g_next - g, step.z - z
        torch.testing.assert_close(_apply(known, dg), dz, rtol=1e-7, atol=1e-9)
        z, g, state = step.z, g_next, step.state


def _copy(state):
    return type(state)(*(item.clone() if isinstance(item, torch.Tensor) else item for item in state))


def _apply(state, r):
    """B r from the updates of a Broyden state, in the order they were made."""
    count, memory = state.steps - 1, state.v.shape[1]
    good = state.mix.dim() == 3
    out = r * state.scale
    for age in range(max(0, count - memory), count):
        v, u = state.v[:, age % memory], state.u[:, age % memory]
        alive = state.alive[:, age % memory, None]  # zero for what a restart has forgotten
        out = out + alive * u * (v * (out if good else r)).sum(1, keepdim=True)
    return out


def test_an_initial_inverse_jacobian_solves_a_linear_problem_at_once(contraction):
    n = contraction.x.shape[1]
    jacobian = torch.func.jacrev(lambda z: contraction.f(z[None], contraction.x[:1])[0])(contraction.z0[0])

    class Exact:
        def init(self, z, g, problem):
            inverse = torch.linalg.inv(torch.eye(n, dtype=z.dtype) - jacobian)
            return (inverse - torch.eye(n, dtype=z.dtype)).expand(len(z), -1, -1)

        def apply(self, r, frozen):
            return torch.bmm(frozen, r.unsqueeze(2)).squeeze(2)

    solver = mb.Broyden(initial=Exact())
    solution = mb.solve(contraction.f, contraction.z0, contraction.x, solver=solver, rtol=1e-10)
    assert solution.nfe.tolist() == [2] * 6


def test_anderson_solves_a_linear_problem_in_as_many_steps_as_gmres_would():
    problem = linear(n=6, radius=0.9)
    solution = mb.solve(problem.f, problem.z0, problem.x, solver=mb.Anderson(memory=8, ridge=1e-14), rtol=1e-9)
    assert solution.nfe.max() <= 9  # n + 1 residuals span the space; one more verifies; one for rounding


def test_anderson_does_not_stall_at_tight_tolerance():
    problem = tanh(batch=16, n=30, gain=1.2)
    solution = mb.solve(problem.f, problem.z0, problem.x, solver=mb.Anderson(), rtol=1e-12, max_nfe=200)
    assert solution.converged.all()


def test_newton_is_exact_on_small_states_and_converges_quadratically():
    problem = tanh(batch=4, n=6, gain=0.95)
    solution = mb.solve(problem.f, problem.z0, problem.x, solver=mb.Newton(krylov=6), rtol=1e-12, max_nfe=60)
    residual = solution.trace.residual.nan_to_num(0)
    assert solution.steps.max() <= 5
    assert (residual[3:] < 1e-4).all()
    one = mb.solve(linear(n=6).f, linear(n=6).z0, linear(n=6).x, solver=mb.Newton(krylov=6), rtol=1e-10)
    assert one.steps.tolist() == [1] * 6
    assert one.nfe.tolist() == [1 + 6 + 1] * 6  # z0, six directions, the check


def test_newton_counts_finite_differences_where_forward_ad_is_missing():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return torch.tanh(z)

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError

    x = torch.rand(3, 4, dtype=torch.float64)
    calls = 0

    def f(z, x):
        nonlocal calls
        calls += 1
        return 0.5 * Opaque.apply(z) + x

    solution = mb.solve(f, torch.zeros_like(x), x, solver=mb.Newton(), rtol=1e-10)
    torch.testing.assert_close(0.5 * torch.tanh(solution.z) + x, solution.z, rtol=1e-9, atol=1e-9)
    assert solution.nfe.max() == calls
    for budget in (1, 2, 3, 5, 8):
        calls = 0
        stopped = mb.solve(f, torch.zeros_like(x), x, solver=mb.Newton(), rtol=0.0, max_nfe=budget, throw=False)
        assert stopped.nfe.max() == calls <= budget


@pytest.mark.parametrize("solver", [mb.Anderson(), mb.Broyden(), mb.Newton()], ids=str)
def test_overflow_and_singular_systems_raise_nothing(solver):
    explosive = mb.solve(lambda z: 1e30 * (z + 1) ** 3, torch.ones(2, 3), solver=solver, max_nfe=20, throw=False)
    assert torch.isfinite(explosive.z).all()
    assert not explosive.converged.any()
    translation = mb.solve(lambda z: z + 1, torch.zeros(2, 3), solver=solver, rtol=1e-9, max_nfe=20, throw=False)
    assert torch.isfinite(translation.z).all()


def dense_bad_broyden(problem, steps: int, memory: int | None = None) -> list[torch.Tensor]:
    """Bad Broyden with the inverse Jacobian as a matrix; the last `memory` updates only."""
    start = -torch.eye(problem.x.shape[1], dtype=problem.x.dtype)
    z = problem.z0[0]
    residual = lambda z: problem.f(z[None], problem.x[:1])[0] - z  # noqa: E731
    g, points, terms = residual(z), [z], []
    b = start
    for _ in range(steps - 1):
        z_next = z - b @ g
        g_next = residual(z_next)
        points.append(z_next)
        dz, dg = z_next - z, g_next - g
        if memory is not None and len(terms) == memory:
            terms.pop(0)
            b = start + sum(terms, torch.zeros_like(start))
        terms.append(torch.outer(dz - b @ dg, dg) / (dg @ dg))
        b = b + terms[-1]
        torch.testing.assert_close(b @ dg, dz)  # the secant equation
        z, g = z_next, g_next
    return points


KINDS = {"good": (dense_broyden, optimize.broyden1), "bad": (dense_bad_broyden, optimize.broyden2)}


@pytest.mark.parametrize("memory", [40, 5, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_broyden_is_dense_broyden_before_and_after_its_memory_is_full(kind, memory):
    problem = tanh(n=10, gain=1.5)
    # up to fifteen iterates: further on, rounding decides which of two nearly equal paths is taken
    ours = iterates(mb.Broyden(memory=memory, kind=kind), problem, 15)
    dense = KINDS[kind][0](problem, 15, memory)
    torch.testing.assert_close(torch.stack(ours), torch.stack(dense), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_broyden_walks_as_scipys_does(kind):
    problem = tanh(n=10, gain=1.2)
    points: list[np.ndarray] = []

    def g(z):
        points.append(z.copy())
        return (problem.f(torch.from_numpy(z)[None], problem.x[:1])[0]).numpy() - z

    with pytest.raises(optimize.NoConvergence):
        KINDS[kind][1](g, np.zeros(10), alpha=1.0, line_search=None, maxiter=8, f_tol=1e-14)
    ours = torch.stack(iterates(mb.Broyden(kind=kind), problem, 8)).numpy()
    np.testing.assert_allclose(ours, np.array(points[: len(ours)]), rtol=1e-6, atol=1e-9)


def test_limited_memory_costs_little_on_symmetric_cells():
    for norm in (0.95, 1.5):
        problem = blas(32, 256, norm, symmetric=True)
        full, limited = (
            mb.solve(
                problem.f,
                problem.z0,
                problem.context,
                solver=mb.Broyden(memory=memory),
                rtol=1e-5,
                max_nfe=budget,
                throw=False,
            )
            for memory, budget in ((200, 200), (10, 400))
        )
        kept = limited.converged & (limited.nfe <= 2 * full.nfe)
        assert full.converged.all()
        assert kept.double().mean() >= 0.9


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_a_breakdown_restarts_that_sample_and_no_other(kind):
    # g(z) = Az + x with A a quarter turn: the first pair has sᵀBy = 0. The second sample is a plain contraction.
    turn = torch.tensor([[[0.0, -1.0], [1.0, 0.0]], [[-0.5, 0.1], [0.0, -0.7]]], dtype=torch.float64)
    x = torch.ones(2, 2, dtype=torch.float64)
    f = lambda z, c: z + (c[0] @ z.unsqueeze(2)).squeeze(2) + c[1]  # noqa: E731
    solver = mb.Broyden(kind=kind)
    z = torch.zeros_like(x)
    g = f(z, (turn, x)) - z
    step = solver.step(z, g, solver.init(z, g, None), None)
    state = solver.step(step.z, f(step.z, (turn, x)) - step.z, step.state, None).state
    if kind == "good":
        torch.testing.assert_close(state.bg[0], state.b[0])  # B₀ again
        assert (state.bg[1] - state.b[1]).abs().max() > 1e-3
    both = mb.solve(f, z, (turn, x), solver=solver, rtol=1e-10, throw=False)
    alone = mb.solve(f, z[1:], (turn[1:], x[1:]), solver=solver, rtol=1e-10)
    assert both.converged[1]
    torch.testing.assert_close(both.z[1:], alone.z)
    assert torch.isfinite(both.z).all()


def test_broyden_goes_on_after_a_pair_without_change():
    def f(z, x):  # constant residual at first, then a contraction: y = 0 once
        return torch.where(z < 2.5, z + 1, 3 + 0.5 * (z - 3)) + 0 * x

    x = torch.zeros(1, 1, dtype=torch.float64)
    for kind in ("good", "bad"):
        solution = mb.solve(f, x, x, solver=mb.Broyden(kind=kind), rtol=1e-8, max_nfe=60)
        torch.testing.assert_close(solution.z, torch.full_like(x, 3.0))


def test_the_line_search_is_counted_per_sample_and_saves_a_sample_that_diverges_without():
    x = torch.tensor([[1.0], [40.0]], dtype=torch.float64)
    seen: list[torch.Tensor] = []

    def f(z, context):  # the textbook's example: g flattens out, full secant steps overshoot ever further
        seen.append(context[0])
        return z - context[1] * torch.atan(z - 3)

    context = (torch.arange(2), x)
    z0 = torch.zeros(2, 1, dtype=torch.float64)
    plain = mb.solve(f, z0, context, solver=mb.Broyden(), rtol=1e-8, max_nfe=60, throw=False)
    assert not plain.converged.any()
    seen.clear()
    searched = mb.solve(f, z0, context, solver=mb.Broyden(line_search=True), rtol=1e-8, max_nfe=60)
    np.testing.assert_array_equal(searched.nfe.numpy(), np.bincount(torch.cat(seen).numpy(), minlength=2))
    torch.testing.assert_close(searched.z, torch.full_like(z0, 3.0))
    assert searched.nfe[1] > searched.steps[1] + 1  # trials
    assert searched.nfe[0] >= searched.steps[0] + 1
    for budget in range(1, 12):
        seen.clear()
        stopped = mb.solve(f, z0, context, solver=mb.Broyden(line_search=True), rtol=0.0, max_nfe=budget, throw=False)
        np.testing.assert_array_equal(stopped.nfe.numpy(), np.bincount(torch.cat(seen).numpy(), minlength=2))
        assert stopped.nfe.max() <= budget


def test_a_line_search_steps_back_from_where_f_is_not_finite():
    x = torch.full((1, 1), 0.5, dtype=torch.float64)
    f = lambda z, x: torch.sqrt(x - z)  # noqa: E731
    assert not mb.solve(f, 0 * x, x, solver=mb.Broyden(), rtol=1e-8, throw=False).converged.any()
    found = mb.solve(f, 0 * x, x, solver=mb.Broyden(line_search=True), rtol=1e-8)
    torch.testing.assert_close(found.z, f(found.z, x), rtol=1e-7, atol=1e-9)


def test_picards_damping_is_tuned_to_the_best_constant_step():
    problem = linear(batch=16, n=20, radius=1.0)
    w = torch.diag(torch.linspace(-3.0, 0.5, 20, dtype=torch.float64))
    f = lambda z, x: z @ w + x  # noqa: E731
    best = mb.Picard.tuned(f, problem.z0[:, :1].expand(-1, 20).contiguous(), problem.x, tolerances=(1e-6,), max_nfe=200)
    assert abs(best.damping - 2 / (2 - (-3.0) - 0.5)) < 0.06  # Richardson's step for a spectrum in [-3, 0.5]
    assert not mb.solve(f, problem.z0, problem.x, solver=mb.Picard(), max_nfe=200, throw=False).converged.any()
    assert mb.solve(f, problem.z0, problem.x, solver=best, rtol=1e-6, max_nfe=200).converged.all()


def test_newton_with_gmres_takes_fewer_products_for_a_looser_forcing_and_none_for_finished_samples():
    problem = tanh(batch=4, n=40, gain=0.95)
    x = problem.x.clone()
    x[0] = 0  # z* = z0
    tight, loose = (
        mb.solve(problem.f, problem.z0, x, solver=mb.Newton(krylov=20, forcing=forcing), rtol=1e-8, max_nfe=300)
        for forcing in (1e-10, 1e-1)
    )
    assert tight.nfe[0] == loose.nfe[0] == 1
    assert (loose.nfe[1:] < tight.nfe[1:]).all()
    torch.testing.assert_close(loose.z, tight.z, rtol=1e-6, atol=1e-7)


def test_anderson_survives_overflow_and_half_precision_cells():
    explosive = mb.solve(
        lambda z: 1e30 * (z + 1) ** 5, torch.ones(2, 3), solver=mb.Anderson(ridge=1e-14), max_nfe=20, throw=False
    )
    assert torch.isfinite(explosive.z).all()
    problem = tanh(batch=4, n=12, gain=0.9, dtype=torch.float32)
    half = lambda z, x: torch.tanh(z.half() * 0.9 + x.half())  # noqa: E731
    found = mb.solve(half, problem.z0, problem.x, solver=mb.Anderson(memory=12, ridge=1e-14), rtol=1e-2)
    assert found.converged.all()
    constant = mb.solve(lambda z: torch.ones_like(z), torch.zeros(2, 3), solver=mb.Anderson(), rtol=0.0)
    assert constant.converged.all()  # steps 0 to 2 with differences that vanish


def steep(c: float, wanted: int = 24, n: int = 40):
    """f whose Jacobian is near c·I: f(z) = cz + tanh(Wz) + x with ‖W‖ = 1."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(n, n, generator=g, dtype=torch.float64)
    w = w / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(wanted, n, generator=g, dtype=torch.float64)
    spread = torch.linspace(0.7, 1.4, n, dtype=torch.float64)
    return lambda z, x: c * spread * z + torch.tanh((z.unsqueeze(1) * w).sum(2)) + x, torch.zeros_like(x), x


QUASI_NEWTON = [mb.Broyden(), mb.Broyden(kind="bad"), mb.Broyden(line_search=True), mb.Anderson()]


@pytest.mark.parametrize("c", [10.0, -10.0, 100.0])
@pytest.mark.parametrize("solver", QUASI_NEWTON, ids=str)
def test_a_jacobian_near_a_multiple_of_the_identity_is_easy_whatever_the_multiple(solver, c):
    f, z0, x = steep(c)
    found = mb.solve(f, z0, x, solver=solver, rtol=1e-6, max_nfe=40)
    torch.testing.assert_close(f(found.z, x), found.z, rtol=1e-4, atol=1e-6)
    without = mb.solve(f, z0, x, solver=replace(solver, rescale=False), rtol=1e-6, max_nfe=200, throw=False)
    assert without.nfe.double().mean() > 3 * found.nfe.double().mean()


@pytest.mark.parametrize("solver", [mb.Broyden(), mb.Broyden(kind="bad"), mb.Anderson()], ids=str)
def test_the_scale_is_found_without_a_look_at_the_host(solver):
    f, z0, x = steep(10.0)
    found = mb.FixedBudget(f, solver, max_nfe=25, rtol=1e-6, compiled=False)(z0, x)
    assert found.converged.all()


@pytest.mark.parametrize("solver", [*QUASI_NEWTON, mb.Anderson(damping=0.7), mb.Broyden(damping=0.7)], ids=str)
def test_where_the_first_step_does_no_harm_the_scale_stays_to_the_last_bit(solver, nonlinear):
    ours, plain = (
        mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=one, rtol=1e-8, max_nfe=80, throw=False)
        for one in (solver, replace(solver, rescale=False))
    )
    assert torch.equal(ours.z, plain.z)
    assert torch.equal(ours.trace.residual.nan_to_num(9), plain.trace.residual.nan_to_num(9))


def test_a_given_initial_inverse_jacobian_is_not_rescaled():
    class Zero:
        def init(self, z, g, problem):
            return ()

        def apply(self, r, frozen):
            return 0 * r

    f, z0, x = steep(10.0)
    ours, plain = (
        mb.solve(f, z0, x, solver=one, rtol=1e-6, max_nfe=30, throw=False)
        for one in (mb.Broyden(initial=Zero()), mb.Broyden(rescale=False))
    )
    assert torch.equal(ours.trace.nfe, plain.trace.nfe)
    torch.testing.assert_close(ours.z, plain.z)


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_the_transposed_inverse_has_the_scale_too(kind):
    f, z0, x = steep(10.0, wanted=3, n=6)
    solver = mb.Broyden(kind=kind)
    _, _, state = _walked(solver, f, z0, x, 5)
    v, w = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    bv = _apply(state, v)
    back = solver.rmatvec(w, solver.inverse(state, torch.arange(3)))
    torch.testing.assert_close((bv * w).sum(1), (v * back).sum(1))


def _walked(solver, f, z, x, steps):
    """(z, g, state) after so many steps."""
    g = f(z, x) - z
    state = solver.init(z, g, None)
    for _ in range(steps):
        z, state, _ = solver.step(z, g, state, None)
        g = f(z, x) - z
    return z, g, state


def _held(state) -> int:
    """Bytes of a solver's state that were written to, or may be."""
    return sum(part.numel() * part.element_size() for part in state if isinstance(part, torch.Tensor))


@pytest.mark.parametrize("solver", [mb.Broyden(), mb.Broyden(kind="bad"), mb.Anderson(memory=10)], ids=str)
def test_many_small_samples_do_not_cost_the_square_of_the_memory(solver):
    z = torch.zeros(1000, 1)
    f = lambda z, x: torch.cos(z)  # noqa: E731
    _, _, state = _walked(solver, f, z, None, 6)
    assert _held(state) < 25 * z.nbytes


def test_a_solve_that_ends_early_does_not_hold_the_whole_mixing_matrix():
    problem = tanh(batch=3, n=60)
    _, _, early = _walked(mb.Broyden(memory=50), problem.f, problem.z0, problem.x, 5)
    _, _, late = _walked(mb.Broyden(memory=50), problem.f, problem.z0, problem.x, 40)
    assert early.mix.shape[1] < 10
    assert late.mix.shape[1] >= 39


def dense_anderson(problem, steps: int, memory: int, beta: float, ridge: float) -> list[torch.Tensor]:
    """Anderson's method as its docstring has it, differences as lists."""
    z = problem.z0[0]
    residual = lambda z: problem.f(z[None], problem.x[:1])[0] - z  # noqa: E731
    g, points, moves, turns = residual(z), [z], [], []
    for _ in range(steps - 1):
        after = z + beta * g
        if turns:
            dz, dg = torch.stack(moves[-memory:], 1), torch.stack(turns[-memory:], 1)
            gram = dg.T @ dg
            gamma = torch.linalg.solve(gram + ridge * torch.diag(gram.diagonal()), dg.T @ g)
            after = after - (dz + beta * dg) @ gamma
        g_after = residual(after)
        moves.append(after - z)
        turns.append(g_after - g)
        z, g = after, g_after
        points.append(z)
    return points


@pytest.mark.parametrize("damping", [1.0, 0.3])
@pytest.mark.parametrize("ridge", [1e-12, 0.1])
def test_anderson_is_its_textbook_definition_with_damping_from_the_first_step_on_and_a_ridge(damping, ridge):
    problem = tanh(n=10, gain=1.2)
    ours = iterates(mb.Anderson(memory=3, damping=damping, ridge=ridge), problem, 9)
    dense = dense_anderson(problem, 9, 3, damping, ridge)
    torch.testing.assert_close(torch.stack(ours), torch.stack(dense), rtol=1e-6, atol=1e-9)


def test_where_andersons_least_squares_overflow_its_step_is_the_plain_one():
    z, g, after = 1e25 * torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))  # squares leave float32
    solver = mb.Anderson()
    step = solver.step(z, g, solver.init(z, g, None), None)
    step = solver.step(step.z, after, step.state, None)
    assert torch.equal(step.z, z + g + after)


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_the_transposed_inverse_forgets_what_a_restart_has_forgotten(kind):
    zs, gs, v, w = torch.randn(4, 8, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gs[4, 0] = gs[3, 0]  # a pair without change: the first sample restarts there
    solver = mb.Broyden(kind=kind)
    state = solver.init(zs[0], gs[0], None)
    for z, g in zip(zs, gs, strict=True):
        state = solver.step(z, g, state, None).state
    assert (state.alive[0] == 0).any()
    assert (state.alive[1] == 1).all()
    back = solver.rmatvec(w[0], solver.inverse(state, torch.arange(2)))
    torch.testing.assert_close((_apply(state, v[0]) * w[0]).sum(1), (v[0] * back).sum(1))


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_the_pair_after_a_failed_line_search_keeps_its_secant_equation(kind, monkeypatch):
    zs, gs = torch.randn(2, 6, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solver, count = mb.Broyden(kind=kind, line_search=True), iter(range(6))

    def search(z, g, step, problem, **_):
        return z + step, g, torch.tensor([next(count) == 4, False])  # the first sample finds nothing at its fifth step

    monkeypatch.setattr("metabroyden.solvers.broyden.backtrack", search)
    state = solver.init(zs[0], gs[0], None)
    for z, g in zip(zs, gs, strict=True):
        state = solver.step(z, g, state, None).state
    assert (state.alive[0, :4] == 0).all()
    torch.testing.assert_close(_apply(state, gs[5] - gs[4]), zs[5] - zs[4])
