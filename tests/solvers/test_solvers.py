"""The classical solvers take the steps of their formulas, against dense one-sample versions in NumPy; what guards them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.solver import SolverBase
from metabroyden.solvers.classical import tuned_solvers
from metabroyden.solvers.tuning import tune
from metabroyden.zoo.models import MonotoneDense
from metabroyden.zoo.testbed.cells import blas
from tests.conftest import linear, tanh
from tests.helpers import solved
from tests.zoo.test_monotone import Counted, matrix

Vector = np.ndarray
Map = Callable[[Vector], Vector]  # z ↦ f(z) − z
every_kind = pytest.mark.parametrize("kind", ["good", "bad"])


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
        ("broiden", {}, r"unknown solver 'broiden': known are .*anderson, broyden, .*newton, picard"),
    ],
)
def test_bad_options_and_unknown_names_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        mb.get_solver(name, **options)


# --- the formulas


def picard(g: Map, z: Vector, damping: float) -> Iterator[Vector]:
    while True:
        yield z
        z = z + damping * g(z)


def anderson(g: Map, z: Vector, memory: int, damping: float, ridge: float) -> Iterator[Vector]:
    points, residuals = [], []
    while True:
        yield z
        points, residuals = [*points, z][-memory - 1 :], [*residuals, g(z)][-memory - 1 :]
        step = damping * residuals[-1]
        if len(points) > 1:
            dz, dg = np.diff(np.stack(points), axis=0).T, np.diff(np.stack(residuals), axis=0).T
            gram = dg.T @ dg
            gamma = np.linalg.solve(gram + ridge * np.diag(np.diag(gram)), dg.T @ residuals[-1])
            step = step - (dz + damping * dg) @ gamma
        z = z + step


class Good:
    """B = ∏(I + u sᵀ) B₀, B₀ = −I: the newest factor last. By = s for the newest pair (s, y)."""

    def __init__(self, memory: int, guard: float = 1e-2) -> None:
        self.memory, self.guard, self.factors = memory, guard, []

    def times(self, r: Vector) -> Vector:
        r = -r
        for u, s in self.factors:
            r = r + u * (s @ r)
        return r

    def learn(self, s: Vector, y: Vector, g_before: Vector) -> None:
        if len(self.factors) == self.memory:
            self.factors = self.factors[1:]
        slope, behind = s @ self.times(y), s @ self.times(g_before)
        if abs(slope) > self.guard * abs(behind):
            self.factors = [*self.factors, ((s - self.times(y)) / slope, s)]
        else:
            self.factors = []


class Bad(Good):
    """B = B₀ + Σ u yᵀ / ‖y‖."""

    def times(self, r: Vector) -> Vector:
        return -r + sum((u * (v @ r) for u, v in self.factors), np.zeros_like(r))

    def learn(self, s: Vector, y: Vector, g_before: Vector) -> None:
        if len(self.factors) == self.memory:
            self.factors = self.factors[1:]
        size = np.linalg.norm(y)
        self.factors = [*self.factors, ((s - self.times(y)) / size, y / size)] if size > 0 else []


INVERSES = {"good": Good, "bad": Bad}


def broyden(g: Map, z: Vector, memory: int, damping: float, kind: str, guard: float = 1e-2) -> Iterator[Vector]:
    inverse, before, g_before = INVERSES[kind](memory, guard), None, None
    while True:
        yield z
        value = g(z)
        if before is not None:
            inverse.learn(z - before, value - g_before, g_before)
        before, g_before = z, value
        z = z - damping * inverse.times(value)


def searched(g: Map, z: Vector, memory: int, damping: float, kind: str) -> Iterator[Vector]:
    """Broyden's steps, each shortened by at most six trials; a search without success restarts."""
    inverse, value, recent, before, g_before = INVERSES[kind](memory), g(z), [], None, None
    yield z
    while True:
        if before is not None:
            inverse.learn(z - before, value - g_before, g_before)
        before, g_before = z, value
        step, start, length = -damping * inverse.times(value), np.linalg.norm(value), 1.0
        recent = [*recent, start][-20:]
        tried = []
        for _ in range(7):
            yield z + length * step
            tried.append((np.linalg.norm(g(z + length * step)), z + length * step))
            reached = tried[-1][0]
            if reached <= max(*recent, (1 - 1e-4 * length) * start):
                break
            curvature = reached**2 - start**2 + 2 * start**2 * length
            length = np.clip(start**2 * length**2 / curvature if curvature > 0 else 0, 0.1 * length, 0.5 * length)
        else:
            inverse.factors = []
        z = min(tried, key=lambda pair: pair[0])[1]
        value = g(z)


SIZE = 26  # of the state: more than there are steps, so that a memory of 30 keeps all of them


def rotation(n: int = SIZE) -> Callable[[Tensor, Tensor], Tensor]:
    """A mildly nonlinear map whose linear part is not symmetric and does not contract; row by row, in float64."""
    w = torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    w = 1.1 * w / torch.linalg.matrix_norm(w, 2)
    return lambda z, x: (z.unsqueeze(1) * w).sum(2) + 0.2 * torch.sin(z) + x


def wavy(z: Tensor, x: Tensor) -> Tensor:
    """Steep in places: steps overshoot, updates break down. A first step makes the residual grow less than threefold."""
    return 1.6 * torch.sin(1.1 * z.roll(1, dims=1)) + x


PROBLEMS = {"rotation": rotation(), "wavy": wavy}


class Recorded:
    """f, remembering at which points it saw which sample; x holds the sample's number in its last column."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.f, self.points = f, {}

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        for row, number in zip(z, x[:, -1], strict=True):
            self.points.setdefault(int(number), []).append(row.numpy().copy())
        return self.f(z, x[:, :-1])


def numbered(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """f of a context with the sample's number in its last column."""
    return lambda z, x: f(z, x[:, :-1])


def inputs(batch: int = 5, n: int = SIZE) -> tuple[Tensor, Tensor]:
    """(z0, x): sample 0 is solved at once, sample 1 soon, so that the others go on in a smaller batch."""
    generator = torch.Generator().manual_seed(1)
    x, z0 = (torch.randn(batch, n, generator=generator, dtype=torch.float64) for _ in range(2))
    z0, x[0], x[1] = 0.3 * z0, 0, 1e-3 * x[1]
    z0[:2] = 0
    return z0, torch.cat([x, torch.arange(batch, dtype=torch.float64)[:, None]], dim=1)


def residual_of(f: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Map:
    return lambda z: (f(torch.from_numpy(z)[None], x[None, :-1])[0] - torch.from_numpy(z)).numpy()


def options_of(*cases: tuple) -> Iterator[tuple]:
    """(kind, memory, damping) of both kinds."""
    return ((kind, *case) for kind in ("good", "bad") for case in cases)


CASES = [
    *((mb.Picard(damping), picard, (damping,)) for damping in (1.0, 0.6)),
    *(
        (mb.Anderson(*options), anderson, options)
        for options in ((1, 1.0, 1e-8), (3, 0.3, 1e-12), (3, 0.7, 1e-2), (5, 1.3, 0.3), (30, 1.0, 1e-8))
    ),
    *(
        (mb.Broyden(memory, damping, kind), broyden, (memory, damping, kind))
        for kind, memory, damping in options_of((1, 1.0), (2, 0.8), (4, 1.0), (30, 1.2))
    ),
    *(
        (mb.Broyden(memory, 1.0, "good", guard=guard), broyden, (memory, 1.0, "good", guard))
        for memory, guard in ((30, 0.3), (30, 1.0), (3, 0.3))
    ),
    *(
        (mb.Broyden(memory, damping, kind, line_search=True), searched, (memory, damping, kind))
        for kind, memory, damping in options_of((3, 1.0), (30, 1.4))
    ),
]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("solver", "reference", "options"), CASES, ids=[str(case[0]) for case in CASES])
def test_every_evaluation_is_where_the_formula_puts_it(name, solver, reference, options):
    f, (z0, x) = Recorded(PROBLEMS[name]), inputs()
    solution = mb.solve(f, z0, x, solver=solver, rtol=1e-9, max_nfe=22, throw=False)
    for sample, points in f.points.items():
        g = residual_of(f.f, x[sample])
        expected = [z for z, _ in zip(reference(g, z0[sample].numpy(), *options), points, strict=False)]
        assert len(points) == solution.nfe[sample]
        for k, (ours, theirs) in enumerate(zip(points, expected, strict=True)):
            scale = 1e-8 * max(1.0, np.abs(theirs).max())
            if not np.isfinite(theirs).all() or scale > 1:  # blown up: rounding is all that is left
                break
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=scale, err_msg=f"evaluation {k}")
        measured = [np.linalg.norm(g(z)) for z in points]
        trace = solution.trace.absolute[:, sample]
        np.testing.assert_allclose(trace[~trace.isnan()].numpy(), measured, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize(("kind", "theirs"), [("good", optimize.broyden1), ("bad", optimize.broyden2)])
def test_broyden_walks_as_scipys_does(kind, theirs):
    problem, points = tanh(n=10, gain=1.2), []
    f = Recorded(lambda z, x: problem.f(z, problem.x[:1]))
    mb.solve(f, problem.z0[:1], torch.zeros(1, 1), solver=mb.Broyden(kind=kind), rtol=0.0, max_nfe=8, throw=False)

    def g(z):
        points.append(z.copy())
        return (problem.f(torch.from_numpy(z)[None], problem.x[:1])[0]).numpy() - z

    with pytest.raises(optimize.NoConvergence):
        theirs(g, np.zeros(10), alpha=1.0, line_search=None, maxiter=8, f_tol=1e-14)
    np.testing.assert_allclose(f.points[0], points[:8], rtol=1e-6, atol=1e-9)


@every_kind
@pytest.mark.parametrize("memory", [3, 30])
def test_the_inverse_jacobian_that_is_left_is_the_one_of_the_last_step(kind, memory):
    f, (z0, x) = PROBLEMS["rotation"], inputs()
    solver = mb.Broyden(memory, kind=kind)
    solution = mb.solve(numbered(f), z0, x, solver=solver, rtol=1e-6, max_nfe=15, throw=False, keep_inverse=True)
    assert solution.inverse.known == 4  # sample 0 made no step
    w = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    found = solution.inverse.rmatvec(w)
    some = solution.inverse.rmatvec(w[[4, 2]], torch.tensor([4, 2]))
    assert_close(some, found[[4, 2]])
    assert_close(found[0], -w[0])
    for sample in range(1, 5):
        inverse, g = INVERSES[kind](memory), residual_of(f, x[sample])
        z = before = z0[sample].numpy()
        for step in range(int(solution.steps[sample])):
            if step:
                inverse.learn(z - before, g(z) - g(before), g(before))
                before = z
            z = before - inverse.times(g(before))
        matrix = np.stack([inverse.times(column) for column in np.eye(SIZE)], axis=1)
        np.testing.assert_allclose(found[sample], matrix.T @ w[sample].numpy(), rtol=1e-7, atol=1e-7)


# --- Newton


def newton(f, z: Tensor, x: Tensor, solver: mb.Newton) -> Iterator[tuple[Vector, int]]:
    """Iterates and the evaluations spent: exact steps of a small state, of a large one those of least linear residual."""
    spent, g, n = 1, residual_of(f, x), len(z)
    while True:
        yield z.numpy(), spent
        right = g(z.numpy())
        jacobian = torch.autograd.functional.jacobian(lambda z: f(z[None], x[None, :-1])[0], z)
        matrix, space, step = np.eye(n) - jacobian.numpy(), [right], None
        for _ in range(min(solver.krylov, n)):
            spent += 1
            basis = np.linalg.qr(np.stack(space, axis=1))[0]
            step = basis @ np.linalg.lstsq(matrix @ basis, right, rcond=None)[0]
            if n > solver.krylov and np.linalg.norm(right - matrix @ step) <= solver.forcing * np.linalg.norm(right):
                break
            space.append(matrix @ basis[:, -1])
        if n <= solver.krylov:
            step = np.linalg.solve(matrix, right)
        z, spent = z + solver.damping * torch.from_numpy(step), spent + 1


@pytest.mark.parametrize(
    ("name", "n", "solver"),
    [
        *(("wavy", 7, solver) for solver in (mb.Newton(), mb.Newton(0.7), mb.Newton(krylov=7))),
        *(("rotation", SIZE, mb.Newton(1.0, krylov, forcing)) for krylov in (2, 4) for forcing in (1e-6, 0.3)),
    ],
)
def test_newton_takes_the_exact_step_or_the_best_of_a_krylov_space_for_as_many_products(name, n, solver):
    f, (z0, x) = PROBLEMS[name], inputs(n=n)
    solution = mb.solve(numbered(f), z0, x, solver=solver, rtol=1e-9, max_nfe=40, throw=False)
    assert solution.nfe[0] == 1  # no products for a sample that is finished
    for sample in range(2, 5):
        g, steps = residual_of(f, x[sample]), zip(range(4), newton(f, z0[sample], x[sample], solver), strict=False)
        for k, (z, spent) in steps:
            np.testing.assert_allclose(solution.trace.absolute[k, sample], np.linalg.norm(g(z)), rtol=1e-6, atol=1e-12)
            assert solution.trace.nfe[k, sample] == spent
            if solution.trace.residual[k, sample] <= 1e-9:
                break


class OneWay(torch.autograd.Function):
    """The sine without forward AD."""

    @staticmethod
    def forward(ctx, z):
        return torch.sin(z)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def test_newton_makes_do_with_the_budget_and_without_forward_ad_for_one_product_more():
    def spent(f, solver, budgets):
        return [
            mb.solve(f, z0, x, solver=solver, rtol=1e-14, max_nfe=budget, throw=False).nfe[2:].tolist()
            for budget in budgets
        ]

    z0, x = inputs(n=7)
    # one is kept for a first product that finds no forward AD, until that is known; a step wants three
    wanted = [[n] * 3 for n in (1, 1, 1, 3, 4, 5, 6, 7, 8, 9, 9, 12, 13)]
    assert spent(numbered(rotation(7)), mb.Newton(), range(1, 14)) == wanted
    calls = []
    f = lambda z, x: calls.append(1) or 0.9 * OneWay.apply(z) + x[:, :-1]  # noqa: E731
    # one evaluation, a try that fails, two products, one evaluation; from then on three a step
    assert spent(f, mb.Newton(krylov=2), range(1, 10)) == [[n] * 3 for n in (1, 1, 1, 4, 5, 5, 5, 8, 8)]
    calls.clear()
    options = {"solver": mb.Newton(), "rtol": 1e-5, "max_nfe": 60, "throw": False}
    found = mb.solve(f, z0, x, **options)
    assert found.nfe.max() == len(calls)
    known = mb.solve(lambda z, x: 0.9 * torch.sin(z) + x[:, :-1], z0, x, **options)
    assert_close(found.trace.absolute[:4, 2:], known.trace.absolute[:4, 2:], rtol=1e-3, atol=1e-5)


# --- what guards the formulas


class Started:
    """A known initial inverse Jacobian, −(I + P) with this matrix P."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def init(self, z, g, problem):
        return self.matrix.expand(len(z), -1, -1)

    def apply(self, r, frozen):
        return torch.bmm(frozen, r.unsqueeze(2)).squeeze(2)


def test_an_initial_inverse_jacobian_solves_a_linear_problem_at_once(contraction):
    eye = torch.eye(contraction.x.shape[1], dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda z: contraction.f(z[None], contraction.x[:1])[0])(contraction.z0[0])
    solver = mb.Broyden(initial=Started(torch.linalg.inv(eye - jacobian) - eye))
    assert mb.solve(contraction.f, contraction.z0, contraction.x, solver=solver, rtol=1e-10).nfe.tolist() == [2] * 6


def test_anderson_takes_as_many_steps_as_gmres_and_does_not_stall_at_tight_tolerance():
    problem = linear(n=6, radius=0.9)
    solution = mb.solve(problem.f, problem.z0, problem.x, solver=mb.Anderson(memory=8, ridge=1e-14), rtol=1e-9)
    assert solution.nfe.max() <= 9  # n + 1 residuals span the space; one more verifies; one for rounding
    problem = tanh(batch=16, n=30, gain=1.2)
    mb.solve(problem.f, problem.z0, problem.x, solver=mb.Anderson(), rtol=1e-12, max_nfe=200)


@pytest.mark.parametrize("solver", [mb.Anderson(), mb.Anderson(ridge=1e-14), mb.Broyden(), mb.Newton()], ids=str)
def test_overflow_and_singular_systems_raise_nothing(solver):
    for f in (lambda z: 1e30 * (z + 1) ** 3, lambda z: 1e30 * (z + 1) ** 5):
        explosive = mb.solve(f, torch.ones(2, 3), solver=solver, max_nfe=20, throw=False)
        assert torch.isfinite(explosive.z).all()
        assert not explosive.converged.any()
    translation = mb.solve(lambda z: z + 1, torch.zeros(2, 3), solver=solver, rtol=1e-9, max_nfe=20, throw=False)
    assert torch.isfinite(translation.z).all()


def test_anderson_takes_the_plain_step_where_its_least_squares_overflow_and_cells_may_be_coarse():
    z, g, after = 1e25 * torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))  # squares leave float32
    solver = mb.Anderson()
    step = solver.step(z, g, solver.init(z, g, None), None)
    step = solver.step(step.z, after, step.state, None)
    assert torch.equal(step.z, z + g + after)
    problem = tanh(batch=4, n=12, gain=0.9, dtype=torch.float32)
    half = lambda z, x: torch.tanh(z.half() * 0.9 + x.half())  # noqa: E731
    mb.solve(half, problem.z0, problem.x, solver=mb.Anderson(memory=12, ridge=1e-14), rtol=1e-2)
    mb.solve(lambda z: torch.ones_like(z), torch.zeros(2, 3), solver=solver, rtol=0.0)  # differences vanish


def test_limited_memory_costs_little_on_symmetric_cells():
    for norm in (0.95, 1.5):
        problem = blas(32, 256, norm, symmetric=True)
        options = {"rtol": 1e-5, "throw": False}
        full, limited = (
            mb.solve(problem.f, problem.z0, problem.context, solver=mb.Broyden(memory), max_nfe=budget, **options)
            for memory, budget in ((200, 200), (10, 400))
        )
        assert full.converged.all()
        assert (limited.converged & (limited.nfe <= 2 * full.nfe)).double().mean() >= 0.9


@every_kind
def test_a_breakdown_restarts_that_sample_and_no_other(kind):
    # g(z) = Az + x with A a quarter turn: the first pair has sᵀBy = 0. The second sample is a plain contraction.
    turn = torch.tensor([[[0.0, -1.0], [1.0, 0.0]], [[-0.5, 0.1], [0.0, -0.7]]], dtype=torch.float64)
    x = torch.ones(2, 2, dtype=torch.float64)
    f = lambda z, c: z + (c[0] @ z.unsqueeze(2)).squeeze(2) + c[1]  # noqa: E731
    solver = mb.Broyden(kind=kind)
    z = torch.zeros_like(x)
    if kind == "good":
        state = walked(solver, f, z, (turn, x), 2)
        assert_close(state.bg[0], state.b[0])  # B₀ again
        assert (state.bg[1] - state.b[1]).abs().max() > 1e-3
    both = mb.solve(f, z, (turn, x), solver=solver, rtol=1e-10, throw=False)
    alone = mb.solve(f, z[1:], (turn[1:], x[1:]), solver=solver, rtol=1e-10)
    assert both.converged[1]
    assert_close(both.z[1:], alone.z)
    assert torch.isfinite(both.z).all()


@every_kind
def test_broyden_goes_on_after_a_pair_without_change(kind):
    def f(z, x):  # constant residual at first, then a contraction: y = 0 once
        return torch.where(z < 2.5, z + 1, 3 + 0.5 * (z - 3)) + 0 * x

    x = torch.zeros(1, 1, dtype=torch.float64)
    assert_close(mb.solve(f, x, x, solver=mb.Broyden(kind=kind), rtol=1e-8, max_nfe=60).z, torch.full_like(x, 3.0))


def test_the_line_search_is_counted_per_sample_and_saves_a_sample_that_diverges_without():
    x, z0 = torch.tensor([[1.0, 0], [40.0, 1]], dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    # the textbook's example: g flattens out, full secant steps overshoot ever further
    f = Recorded(lambda z, x: z - x * torch.atan(z - 3))
    assert not mb.solve(f, z0, x, solver=mb.Broyden(), rtol=1e-8, max_nfe=60, throw=False).converged.any()
    for budget in (60, *range(1, 12)):
        f.points, rtol = {}, 1e-8 if budget == 60 else 0.0
        found = mb.solve(f, z0, x, solver=mb.Broyden(line_search=True), rtol=rtol, max_nfe=budget, throw=False)
        assert found.nfe.tolist() == [len(f.points[0]), len(f.points[1])]
        assert found.nfe.max() <= budget
        if budget == 60:
            assert_close(found.z, torch.full_like(z0, 3.0))
            assert found.nfe[1] > found.steps[1] + 1  # trials
            assert found.nfe[0] >= found.steps[0] + 1


def test_a_line_search_steps_back_from_where_f_is_not_finite():
    x = torch.full((1, 1), 0.5, dtype=torch.float64)
    f = lambda z, x: torch.sqrt(x - z)  # noqa: E731
    assert not mb.solve(f, 0 * x, x, solver=mb.Broyden(), rtol=1e-8, throw=False).converged.any()
    found = mb.solve(f, 0 * x, x, solver=mb.Broyden(line_search=True), rtol=1e-8)
    assert_close(found.z, f(found.z, x), rtol=1e-7, atol=1e-9)


@every_kind
def test_the_pair_after_a_failed_line_search_keeps_its_secant_equation(kind, monkeypatch):
    zs, gs = torch.randn(2, 6, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solver, count = mb.Broyden(kind=kind, line_search=True), iter(range(6))

    def search(z, g, step, problem, **_):
        return z + step, g, torch.tensor([next(count) == 4, False])  # the first sample finds nothing at its fifth step

    monkeypatch.setattr("metabroyden.solvers.broyden.backtrack", search)
    state = shown(solver, zs, gs)
    assert (state.alive[0, :4] == 0).all()
    assert_close(applied(state, gs[5] - gs[4]), zs[5] - zs[4])


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
    assert_close(f(found.z, x), found.z, rtol=1e-4, atol=1e-6)
    without = mb.solve(f, z0, x, solver=replace(solver, rescale=False), rtol=1e-6, max_nfe=200, throw=False)
    assert without.nfe.double().mean() > 3 * found.nfe.double().mean()
    if c == 10 and solver.fixed_cost:  # the scale is found without a look at the host
        assert mb.FixedBudget(f, solver, max_nfe=25, rtol=1e-6, compiled=False)(z0, x).converged.all()


@pytest.mark.parametrize("solver", [*QUASI_NEWTON, mb.Anderson(damping=0.7), mb.Broyden(damping=0.7)], ids=str)
def test_where_the_first_step_does_no_harm_the_scale_stays_to_the_last_bit(solver, nonlinear):
    ours, plain = (
        mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=one, rtol=1e-8, max_nfe=80, throw=False)
        for one in (solver, replace(solver, rescale=False))
    )
    assert torch.equal(ours.z, plain.z)
    assert torch.equal(ours.trace.residual.nan_to_num(9), plain.trace.residual.nan_to_num(9))


def test_a_given_initial_inverse_jacobian_is_not_rescaled():
    f, z0, x = steep(10.0)
    ours, plain = (
        mb.solve(f, z0, x, solver=one, rtol=1e-6, max_nfe=30, throw=False)
        for one in (mb.Broyden(initial=Started(torch.zeros(40, 40).double())), mb.Broyden(rescale=False))
    )
    assert torch.equal(ours.trace.nfe, plain.trace.nfe)
    assert_close(ours.z, plain.z)


def walked(solver, f, z, x, steps):
    """The state after so many steps."""
    g = f(z, x) - z
    state = solver.init(z, g, None)
    for _ in range(steps):
        z, state, _ = solver.step(z, g, state, None)
        g = f(z, x) - z
    return state


def shown(solver, zs, gs):
    """The state after these iterates and residuals."""
    state = solver.init(zs[0], gs[0], None)
    for z, g in zip(zs, gs, strict=True):
        state = solver.step(z, g, state, None).state
    return state


def applied(state, r):
    """B r from the updates of a Broyden state, in the order they were made."""
    count, memory = state.steps - 1, state.v.shape[1]
    good = state.mix.dim() == 3
    out = r * state.scale
    for age in range(max(0, count - memory), count):
        v, u = state.v[:, age % memory], state.u[:, age % memory]
        alive = state.alive[:, age % memory, None]  # zero for what a restart has forgotten
        out = out + alive * u * (v * (out if good else r)).sum(1, keepdim=True)
    return out


@every_kind
@pytest.mark.parametrize("what", ["scaled", "restarted"])
def test_the_transposed_inverse_has_the_scale_and_forgets_what_a_restart_has_forgotten(kind, what):
    solver, generator = mb.Broyden(kind=kind), torch.Generator().manual_seed(0)
    zs, gs, (v, *_), (w, *_) = torch.randn(4, 8, 3, 6, dtype=torch.float64, generator=generator)
    if what == "scaled":
        state = walked(solver, *steep(10.0, wanted=3, n=6), 5)
        assert (state.scale + 1).abs().min() > 0.1
    else:
        gs[4, 0] = gs[3, 0]  # a pair without change: the first sample restarts there
        state = shown(solver, zs, gs)
        assert (state.alive[0] == 0).any()
        assert (state.alive[1] == 1).all()
    back = solver.rmatvec(w, solver.inverse(state, torch.arange(3)))
    assert_close((applied(state, v) * w).sum(1), (v * back).sum(1))


@pytest.mark.parametrize("solver", [mb.Broyden(), mb.Broyden(kind="bad"), mb.Anderson(memory=10)], ids=str)
def test_many_small_samples_do_not_cost_the_square_of_the_memory(solver):
    z = torch.zeros(1000, 1)
    state = walked(solver, lambda z, x: torch.cos(z), z, None, 6)
    assert sum(part.nbytes for part in state if isinstance(part, Tensor)) < 25 * z.nbytes


def test_a_solve_that_ends_early_does_not_hold_the_whole_mixing_matrix():
    problem = tanh(batch=3, n=60)
    early, late = (walked(mb.Broyden(memory=50), problem.f, problem.z0, problem.x, steps) for steps in (5, 40))
    assert early.mix.shape[1] < 10
    assert late.mix.shape[1] >= 39


# --- splitting, and tuning


def forward_backward(w: Tensor, z: Tensor, x: Tensor, alpha: float) -> Iterator[Tensor]:
    yield z
    z = z + alpha * ((w @ z + x).relu() - z)
    while True:
        yield z
        z = ((1 - alpha) * z + alpha * (w @ z + x)).relu()


def peaceman_rachford(w: Tensor, z: Tensor, x: Tensor, alpha: float) -> Iterator[Tensor]:
    u = z + alpha * (w @ z + x - z)
    if z.any():
        yield z
    else:
        u = z
    left = (1 + alpha) * torch.eye(len(z), dtype=torch.float64) - alpha * w
    while True:
        reflected = 2 * u.relu() - u
        z = torch.linalg.solve(left, reflected + alpha * x)
        yield z
        u = 2 * z - reflected


SPLITTING = [
    *((mb.ForwardBackward(alpha), forward_backward, "linear") for alpha in (0.1, 0.25)),
    *((mb.PeacemanRachford(alpha), peaceman_rachford, "resolvent") for alpha in (0.5, 3.0)),
]


@pytest.mark.parametrize("start", [0.0, 0.4])
@pytest.mark.parametrize(("solver", "reference", "part"), SPLITTING, ids=[str(case[0]) for case in SPLITTING])
def test_splitting_takes_its_steps_for_one_use_of_a_part_each(solver, reference, part, start):
    cell, x = MonotoneDense(6, 0.4).double().requires_grad_(False), linear(4, 6).x
    used, w = [], matrix(cell, x)
    assert (w - w.T).abs().max() > 0.01
    counted, x[1] = Counted(cell, used), 1e-4 * x[1]
    solution = solved(counted, torch.full_like(x, start), (torch.arange(4), x), solver=solver, rtol=1e-4, max_nfe=25)
    for sample in range(4):
        points = reference(w, torch.full_like(x[0], start), x[sample], solver.alpha)
        spent = range(int(solution.nfe[sample]))
        sizes = torch.stack([((w @ z + x[sample]).relu() - z).norm() for z, _ in zip(points, spent, strict=False)])
        trace = solution.trace.absolute[:, sample]
        assert_close(trace[~trace.isnan()], sizes, rtol=1e-8, atol=1e-12)
    first = {forward_backward: "f", peaceman_rachford: "linear" if start else part}[reference]
    assert used == [first] + [part] * (int(solution.nfe.max()) - 1)


def test_options_are_chosen_by_the_mean_logarithm_of_evaluations_a_failure_being_twice_the_budget():
    x = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    f = lambda z, x: -0.5 * z + x  # noqa: E731
    candidates = [mb.Picard(d) for d in (1.0, 0.1, 0.6, 1.9)]
    found = tune(candidates, f, torch.zeros_like(x), x, tolerances=(1e-2, 1e-4), max_nfe=12)
    for solver, score in found:
        factor, counts = 1 - 1.5 * solver.damping, []  # by which the distance to z* changes in a step
        for tolerance in (1e-2, 1e-4):
            relative = [abs(1.5 * factor**k) / abs(1 + 0.5 * factor**k) for k in range(12)]
            reached = [k + 1 for k, value in enumerate(relative) if value <= tolerance]
            counts.append(reached[0] if reached else 24)
        np.testing.assert_allclose(score, np.mean(np.log(counts)), rtol=1e-12)
    assert [score for _, score in found] == sorted(score for _, score in found)
    assert found[0][0] == mb.Picard(0.6)


def test_picards_damping_is_tuned_to_the_best_constant_step():
    z0, x = torch.zeros(16, 20, dtype=torch.float64), linear(batch=16, n=20).x
    w = torch.diag(torch.linspace(-3.0, 0.5, 20, dtype=torch.float64))
    f = lambda z, x: z @ w + x  # noqa: E731
    best = mb.Picard.tuned(f, z0, x, tolerances=(1e-6,), max_nfe=200)
    assert abs(best.damping - 2 / (2 - (-3.0) - 0.5)) < 0.06  # Richardson's step for a spectrum in [-3, 0.5]
    assert not mb.solve(f, z0, x, solver=mb.Picard(), max_nfe=200, throw=False).converged.any()
    mb.solve(f, z0, x, solver=best, rtol=1e-6, max_nfe=200)


def test_the_best_of_a_grid_is_no_worse_than_the_plain_solver():
    problem = tanh(batch=16, n=12, gain=1.2)
    options = {"tolerances": (1e-2, 1e-3), "max_nfe": 30}
    found = tuned_solvers(problem.f, problem.z0, problem.x, budget=30)
    for name, plain in (("Picard", mb.Picard()), ("Anderson", mb.Anderson(5)), ("Broyden", mb.Broyden())):
        scores = dict(tune([plain, found[f"tuned {name}"]], problem.f, problem.z0, problem.x, **options))
        assert scores[found[f"tuned {name}"]] <= scores[plain]
