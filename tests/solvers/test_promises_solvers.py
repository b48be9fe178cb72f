"""The classical solvers take the steps of their formulas, to rounding: against dense one-sample versions in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import metabroyden as mb
from metabroyden.solvers.tuning import tune

Vector = np.ndarray
Map = Callable[[Vector], Vector]  # z ↦ f(z) − z


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
    """B = ∏(I + u sᵀ) B₀, B₀ = −I: the newest factor last."""

    def __init__(self, memory: int, guard: float) -> None:
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


def broyden(g: Map, z: Vector, memory: int, damping: float, kind: str, guard: float = 1e-2) -> Iterator[Vector]:
    inverse = (Good if kind == "good" else Bad)(memory, guard)
    before, g_before = None, None
    while True:
        yield z
        value = g(z)
        if before is not None:
            inverse.learn(z - before, value - g_before, g_before)
        before, g_before = z, value
        z = z - damping * inverse.times(value)


def searched(g: Map, z: Vector, memory: int, damping: float, kind: str) -> Iterator[Vector]:
    """Broyden's steps, each shortened by at most six trials; a search without success restarts."""
    inverse = (Good if kind == "good" else Bad)(memory, 1e-2)
    value, recent, before, g_before = g(z), [], None, None
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
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(n, n, generator=generator, dtype=torch.float64)
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
    x = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    z0 = 0.3 * torch.randn(batch, n, generator=generator, dtype=torch.float64)
    x[0], z0[0], x[1], z0[1] = 0, 0, 1e-3 * x[1], 0
    return z0, torch.cat([x, torch.arange(batch, dtype=torch.float64)[:, None]], dim=1)


def residual_of(f: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Map:
    return lambda z: (f(torch.from_numpy(z)[None], x[None, :-1])[0] - torch.from_numpy(z)).numpy()


CASES = [
    *((mb.Picard(damping), picard, (damping,)) for damping in (1.0, 0.6)),
    *(
        (mb.Anderson(memory, damping, ridge), anderson, (memory, damping, ridge))
        for memory, damping, ridge in ((1, 1.0, 1e-8), (3, 0.7, 1e-2), (5, 1.3, 0.3), (30, 1.0, 1e-8))
    ),
    *(
        (mb.Broyden(memory, damping, kind), broyden, (memory, damping, kind))
        for kind in ("good", "bad")
        for memory, damping in ((1, 1.0), (2, 0.8), (4, 1.0), (30, 1.2))
    ),
    *((mb.Broyden(30, 1.0, "good", guard=guard), broyden, (30, 1.0, "good", guard)) for guard in (0.3, 1.0)),
    (mb.Broyden(3, 1.0, "good", guard=0.3), broyden, (3, 1.0, "good", 0.3)),
    *(
        (mb.Broyden(memory, damping, kind, line_search=True), searched, (memory, damping, kind))
        for kind in ("good", "bad")
        for memory, damping in ((3, 1.0), (30, 1.4))
    ),
]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("solver", "reference", "options"), CASES, ids=[str(case[0]) for case in CASES])
def test_every_evaluation_is_where_the_formula_puts_it(name, solver, reference, options):
    f, (z0, x) = Recorded(PROBLEMS[name]), inputs()
    solution = mb.solve(f, z0, x, solver=solver, rtol=1e-9, max_nfe=24, throw=False)
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


@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_newton_takes_the_exact_step_for_n_products(damping):
    z0, x = inputs(n=7)
    solution = mb.solve(numbered(wavy), z0, x, solver=mb.Newton(damping), rtol=1e-9, max_nfe=34, throw=False)
    for sample in range(2, 5):
        z, g = z0[sample], residual_of(wavy, x[sample])
        spent = []
        for k in range(4):
            spent.append(1 + 8 * k)
            relative = np.linalg.norm(g(z.numpy())) / np.linalg.norm(g(z.numpy()) + z.numpy())
            np.testing.assert_allclose(solution.trace.residual[k, sample], relative, rtol=1e-7, atol=1e-13)
            jacobian = torch.autograd.functional.jacobian(lambda z, s=sample: wavy(z[None], x[s, None, :-1])[0], z)
            z = z + damping * torch.linalg.solve(torch.eye(7) - jacobian, torch.from_numpy(g(z.numpy())))
            if relative <= 1e-9:
                break
        nfe = solution.trace.nfe[:, sample]
        assert nfe[nfe > 0].tolist()[: len(spent)] == spent


@pytest.mark.parametrize("krylov", [2, 4])
@pytest.mark.parametrize("forcing", [1e-6, 0.3])
def test_newton_of_a_large_state_minimises_the_linear_residual_over_a_krylov_space(krylov, forcing):
    f, (z0, x) = PROBLEMS["rotation"], inputs()
    solver = mb.Newton(krylov=krylov, forcing=forcing)
    solution = mb.solve(numbered(f), z0, x, solver=solver, rtol=1e-9, max_nfe=40, throw=False)
    for sample in range(2, 5):
        z, nfe, g = z0[sample], 1, residual_of(f, x[sample])
        for k in range(4):
            size = np.linalg.norm(g(z.numpy()))
            np.testing.assert_allclose(solution.trace.absolute[k, sample], size, rtol=1e-6, atol=1e-12)
            assert solution.trace.nfe[k, sample] == nfe
            jacobian = torch.autograd.functional.jacobian(lambda z, s=sample: f(z[None], x[s, None, :-1])[0], z)
            matrix, right = np.eye(SIZE) - jacobian.numpy(), g(z.numpy())
            space, step = [right], None
            for _ in range(krylov):
                nfe += 1
                basis = np.linalg.qr(np.stack(space, axis=1))[0]
                step = basis @ np.linalg.lstsq(matrix @ basis, right, rcond=None)[0]
                if np.linalg.norm(right - matrix @ step) <= forcing * size:
                    break
                space.append(matrix @ basis[:, -1])
            z, nfe = z + torch.from_numpy(step), nfe + 1


def test_the_last_newton_step_makes_do_with_the_products_that_the_budget_leaves():
    f, (z0, x) = numbered(rotation(7)), inputs(n=7)
    spent = [
        mb.solve(f, z0, x, solver=mb.Newton(), rtol=1e-14, max_nfe=budget, throw=False).nfe[2:].tolist()
        for budget in range(1, 14)
    ]
    # one is kept for a first product that finds no forward AD, until that is known; a step wants three
    assert spent == [[n] * 3 for n in (1, 1, 1, 3, 4, 5, 6, 7, 8, 9, 9, 12, 13)]


def test_newton_does_without_forward_ad_for_one_product_more():
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return torch.sin(z)

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError

    def f(z, x):
        return 0.9 * OneWay.apply(z) + x[:, :-1]

    z0, x = inputs(n=7)
    spent = [
        mb.solve(f, z0, x, solver=mb.Newton(krylov=2), rtol=1e-14, max_nfe=budget, throw=False).nfe[2:].tolist()
        for budget in range(1, 10)
    ]
    # one evaluation, a try that fails, two products, one evaluation; from then on three a step
    assert spent == [[n] * 3 for n in (1, 1, 1, 4, 5, 5, 5, 8, 8)]
    found = mb.solve(f, z0, x, solver=mb.Newton(), rtol=1e-5, max_nfe=60, throw=False)
    known = mb.solve(
        lambda z, x: 0.9 * torch.sin(z) + x[:, :-1], z0, x, solver=mb.Newton(), rtol=1e-5, max_nfe=60, throw=False
    )
    torch.testing.assert_close(found.trace.absolute[:4, 2:], known.trace.absolute[:4, 2:], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["good", "bad"])
@pytest.mark.parametrize("memory", [3, 30])
def test_the_inverse_jacobian_that_is_left_is_the_one_of_the_last_step(kind, memory):
    f, (z0, x) = PROBLEMS["rotation"], inputs()
    solver = mb.Broyden(memory, kind=kind)
    solution = mb.solve(numbered(f), z0, x, solver=solver, rtol=1e-6, max_nfe=15, throw=False, keep_inverse=True)
    assert solution.inverse.known == 4  # sample 0 made no step
    w = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    found = solution.inverse.rmatvec(w)
    some = solution.inverse.rmatvec(w[[4, 2]], torch.tensor([4, 2]))
    torch.testing.assert_close(some, found[[4, 2]])
    torch.testing.assert_close(found[0], -w[0])
    for sample in range(1, 5):
        inverse = (Good if kind == "good" else Bad)(memory, 1e-2)
        g = residual_of(f, x[sample])
        z = before = z0[sample].numpy()
        for step in range(int(solution.steps[sample])):
            if step:
                inverse.learn(z - before, g(z) - g(before), g(before))
                before = z
            z = before - inverse.times(g(before))
        matrix = np.stack([inverse.times(column) for column in np.eye(SIZE)], axis=1)
        np.testing.assert_allclose(found[sample], matrix.T @ w[sample].numpy(), rtol=1e-7, atol=1e-7)


class Monotone:
    """f(z, x) = relu(Wz + x), with its parts; I − W is strongly monotone, W not symmetric."""

    def __init__(self, n: int = 6) -> None:
        a = torch.randn(n, n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        self.w = 0.6 * torch.eye(n, dtype=torch.float64) - 0.1 * a @ a.T + 0.4 * (a - a.T)
        self.used: list[str] = []

    def linear(self, z: Tensor, x: Tensor) -> Tensor:
        self.used.append("linear")
        return z @ self.w.T + x

    def prox(self, v: Tensor) -> Tensor:
        return v.relu()

    def resolvent(self, alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
        inverse = torch.linalg.inv((1 + alpha) * torch.eye(len(self.w), dtype=torch.float64) - alpha * self.w)

        def apply(v: Tensor, x: Tensor) -> Tensor:
            self.used.append("resolvent")
            return (v + alpha * x) @ inverse.T

        return apply

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        self.used.append("f")
        return (z @ self.w.T + x).relu()


def forward_backward(cell: Monotone, z: Tensor, x: Tensor, alpha: float) -> Iterator[Tensor]:
    yield z
    z = z + alpha * ((cell.w @ z + x).relu() - z)
    while True:
        yield z
        z = ((1 - alpha) * z + alpha * (cell.w @ z + x)).relu()


def peaceman_rachford(cell: Monotone, z: Tensor, x: Tensor, alpha: float) -> Iterator[Tensor]:
    u = z + alpha * (cell.w @ z + x - z)
    if z.any():
        yield z
    else:
        u = z
    while True:
        reflected = 2 * u.relu() - u
        z = torch.linalg.solve(
            (1 + alpha) * torch.eye(len(z), dtype=torch.float64) - alpha * cell.w, reflected + alpha * x
        )
        yield z
        u = 2 * z - reflected


SPLITTING = [
    *((mb.ForwardBackward(alpha), forward_backward, "linear") for alpha in (0.1, 0.25)),
    *((mb.PeacemanRachford(alpha), peaceman_rachford, "resolvent") for alpha in (0.5, 3.0)),
]


@pytest.mark.parametrize("start", [0.0, 0.4])
@pytest.mark.parametrize(("solver", "reference", "part"), SPLITTING, ids=[str(case[0]) for case in SPLITTING])
def test_splitting_takes_its_steps_for_one_use_of_a_part_each(solver, reference, part, start):
    cell = Monotone()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x[1] *= 1e-4
    z0 = torch.full_like(x, start)
    solution = mb.solve(cell, z0, x, solver=solver, rtol=1e-4, max_nfe=25, throw=False)
    for sample in range(4):
        spent = int(solution.nfe[sample])
        points = [z for z, _ in zip(reference(cell, z0[sample], x[sample], solver.alpha), range(spent), strict=False)]
        sizes = torch.stack([((cell.w @ z + x[sample]).relu() - z).norm() for z in points])
        trace = solution.trace.absolute[:, sample]
        torch.testing.assert_close(trace[~trace.isnan()], sizes, rtol=1e-8, atol=1e-12)
    first = {forward_backward: "f", peaceman_rachford: "linear" if start else part}[reference]
    assert cell.used == [first] + [part] * (int(solution.nfe.max()) - 1)


def test_options_are_chosen_by_the_mean_logarithm_of_evaluations_a_failure_being_twice_the_budget():
    x = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    f = lambda z, x: -0.5 * z + x  # noqa: E731
    found = tune(
        [mb.Picard(d) for d in (1.0, 0.1, 0.6, 1.9)], f, torch.zeros_like(x), x, tolerances=(1e-2, 1e-4), max_nfe=12
    )
    for solver, score in found:
        factor, counts = 1 - 1.5 * solver.damping, []  # by which the distance to z* changes in a step
        for tolerance in (1e-2, 1e-4):
            relative = [abs(1.5 * factor**k) / abs(1 + 0.5 * factor**k) for k in range(12)]
            reached = [k + 1 for k, value in enumerate(relative) if value <= tolerance]
            counts.append(reached[0] if reached else 24)
        np.testing.assert_allclose(score, np.mean(np.log(counts)), rtol=1e-12)
    assert [score for _, score in found] == sorted(score for _, score in found)
    assert found[0][0] == mb.Picard(0.6)
    tuned = mb.Picard.tuned(f, torch.zeros_like(x), x, tolerances=(1e-6,), max_nfe=40)
    assert abs(tuned.damping - 2 / 3) < 0.02
