"""What both drivers promise of their books: the best iterate, what an evaluation measures, what a solver sees of f."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.solvers import Step
from tests.helpers import DOUBLE as D
from tests.helpers import DRIVERS, Reuses, Steps, contraction, fixed, inputs, same, shifted, solved

CLASSICAL = [mb.Picard(), mb.Anderson(), mb.Broyden(), mb.Broyden(kind="bad", line_search=True), mb.Newton()]
every_driver = pytest.mark.parametrize("way", DRIVERS)


def same_books(one: mb.Solution, other: mb.Solution) -> bool:
    pairs = (one.z, other.z), (one.residual, other.residual), (one.status, other.status), (one.nfe, other.nfe)
    traces = ((getattr(one.trace, name), getattr(other.trace, name)) for name in ("residual", "absolute"))
    return all(same(a, b) for a, b in (*pairs, *traces))


@pytest.mark.parametrize("scale", [1.0, 2.0**-90, 2.0**90])
@pytest.mark.parametrize(
    "solver", [*CLASSICAL, mb.Picard(0.9), mb.Anderson(2), mb.Broyden(3), mb.Broyden(3, 1.0, "bad")], ids=str
)
def test_f_may_use_its_memory_again(solver, scale):
    """In float32 squares of 2^±90 under- or overflow: norms are then measured anew, from the values themselves."""
    z0, x = inputs(dtype=torch.float32)
    options = {"solver": solver, "rtol": 1e-5}
    for run in [lambda *a, e=e: solved(*a, max_nfe=30, check_every=e, **options) for e in (1, 3)] + [
        lambda *a: fixed(*a, max_nfe=12, **options)
    ] * solver.fixed_cost:
        plain = run(contraction, z0, scale * x)
        assert same_books(run(Reuses(contraction), z0, scale * x), plain)
        closed = run(Reuses(lambda z: contraction(z, scale * x)), z0)
        assert torch.equal(closed.status, plain.status)


@every_driver
@pytest.mark.parametrize(
    ("dtype", "power"),
    [(torch.float32, -90), (torch.float32, 90), (torch.float32, -55), (D, -700), (D, 700)],
)
def test_a_problem_of_any_size_takes_the_same_way(dtype, power, way):
    (z0, x), scale = inputs(dtype=dtype), 2.0**power
    options = {"solver": mb.Picard(), "max_nfe": 30 if way == "solve" else 9}
    run = lambda x, rtol=1e-3, atol=0.0: DRIVERS[way](contraction, z0, x, rtol=rtol, atol=atol, **options)  # noqa: E731
    plain, scaled, mixed = run(x), run(scale * x), run(torch.cat([x[:3], scale * x[3:]]))
    assert torch.equal(scaled.z, scale * plain.z)
    assert_close(scaled.trace.residual, plain.trace.residual, rtol=1e-6, atol=0, equal_nan=True)
    assert_close(scaled.trace.absolute, scale * plain.trace.absolute, rtol=1e-6, atol=0, equal_nan=True)
    for one, other in ((scaled, plain), (mixed, plain)):
        assert torch.equal(one.nfe, other.nfe)
        assert torch.equal(one.converged, other.converged)
        assert_close(one.residual, other.residual, rtol=1e-6, atol=0)
    close, like = run(scale * x, 0.0, 1e-3 * scale), run(x, 0.0, 1e-3)
    assert torch.equal(close.nfe, like.nfe)
    assert torch.equal(close.converged, like.converged)


@pytest.mark.parametrize("way", ["solve", "closure", "late", "late closure", "fixed"])
def test_the_iterate_returned_is_the_best_of_all_that_were_evaluated(way):
    points = 2.1 + 7 * np.random.default_rng(0).random((14, 5))
    z0, x = torch.tensor(points[0])[:, None], torch.zeros(5, 1, dtype=D)
    options = {"solver": Steps(*points[1:].tolist()), "rtol": 1e-9, "max_nfe": 14}
    if way == "fixed":
        solution = fixed(shifted, z0, x, **options)
        assert solution.trace.phase.tolist() == [[0] * 5] * 14
        assert solution.trace.seconds[:-1].isnan().all()
        assert 0 < solution.trace.seconds[-1] < 60
        assert solution.steps.tolist() == [13] * 5
    else:
        options |= {"check_every": 4} if "late" in way else {"snapshots": (4, 9)}
        given = (lambda z: shifted(z, x), z0) if "closure" in way else (shifted, z0, x)
        solution = solved(*given, **options)
        for snapshot, spent in zip(solution.snapshots, (4, 9), strict=False):
            assert snapshot.flatten().tolist() == points[:spent].min(0).tolist()
        assert (solution.trace.seconds.diff() >= 0).all()
    assert solution.z.flatten().tolist() == points.min(0).tolist()
    assert torch.equal(solution.residual, solution.trace.residual.amin(0))
    assert_close(solution.residual, mb.relative_residual(solution.z, shifted(solution.z, x)))
    assert torch.equal(solution.trace.nfe, torch.arange(1, 15)[:, None].expand(14, 5))
    assert solution.status.tolist() == [mb.Status.MAX_NFE] * 5
    assert (z0.flatten() == torch.tensor(points[0])).all()


@every_driver
@pytest.mark.parametrize("f", [lambda z: 2 * z, lambda z: z + z.flip(1)], ids=["doubling", "turning"])
def test_of_equally_good_iterates_the_first_is_returned(f, way):
    class Turns(mb.Picard):
        def step(self, z, g, state, problem):
            return Step(z.flip(1), state)

    z0 = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=D)
    assert torch.equal(DRIVERS[way](f, z0, solver=Turns(), rtol=1e-9, max_nfe=4).z, z0)


@every_driver
def test_an_iterate_within_the_tolerance_is_returned_though_an_earlier_one_had_a_smaller_residual(way):
    f = lambda z: torch.where(z < 500, z + 0.5, z + 1.0)  # noqa: E731  (of 1000 one is a thousandth)
    z0 = torch.zeros(1, 1, dtype=D)
    found = DRIVERS[way](f, z0, solver=Steps([1000.0], [10.0]), rtol=1e-2, max_nfe=3)
    assert found.z.item() == 1000
    assert found.converged.all()


def test_ties_are_broken_in_a_sample_without_a_look_at_the_others():
    f = lambda z, x: torch.stack([-z[:, 1], z[:, 0]], dim=1) + 0 * x  # noqa: E731
    z0, x = torch.tensor([[1.0, 2.0], [1e-200, 1e-200]], dtype=D), torch.zeros(2, 1, dtype=D)
    both, alone = (solved(f, z0[:n], x[:n], solver=mb.Picard(), max_nfe=4) for n in (2, 1))
    assert torch.equal(both.z[0], alone.z[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("check_every", [1, 3])
def test_a_value_that_is_not_finite_ends_its_sample_and_touches_no_other(value, check_every):
    z0, x = inputs()
    x = torch.cat([x, torch.arange(5, dtype=D)[:, None]], dim=1)

    def f(z, x):
        number, image = x[:, -1:], contraction(z, x[:, :-1])
        return torch.where((number == 3) & (z.abs().amax(1, keepdim=True) > 1e-9), value, image)

    options = {"solver": mb.Picard(), "rtol": 1e-6, "max_nfe": 40, "check_every": check_every}
    healthy = mb.solve(lambda z, x: contraction(z, x[:, :-1]), z0, x, **options)
    with pytest.raises(
        mb.SolveError, match=r"1 of 5 samples did not .*: 1 × non_finite \(f returned a value"
    ) as caught:
        mb.solve(f, z0, x, **options)
    solution, others = caught.value.solution, [0, 1, 2, 4]
    assert torch.equal(solution.z[others], healthy.z[others])
    assert torch.equal(solution.residual[others], healthy.residual[others])
    assert solution.status.tolist() == [0, 0, 0, mb.Status.NON_FINITE, 0]
    assert solution.z[3].tolist() == z0[3].tolist()
    assert solution.residual[3] == 1
    assert solution.nfe[3] == (2 if check_every == 1 else 3)
    assert solution.trace.residual[1, 3].isnan()
    assert solution.trace.absolute[1, 3].isnan()


@every_driver
def test_nothing_finite_gives_back_z0_and_shares_no_memory_with_it(way):
    z0 = torch.ones(2, 3)
    solution = DRIVERS[way](lambda z: z * torch.nan, z0, solver=mb.Broyden(), max_nfe=3)
    assert torch.equal(solution.z, z0)
    assert solution.residual.isnan().all()
    assert (solution.status == mb.Status.NON_FINITE).all()
    assert (solution.nfe == (1 if way == "solve" else 3)).all()
    solution.z.zero_()
    assert (z0 == 1).all()


def test_a_trial_of_a_line_search_that_is_not_finite_is_dropped_and_ends_nothing():
    f = lambda z, x: torch.where(z.abs() > 3, torch.nan, z - (z**3 + z - x))  # noqa: E731
    x = torch.tensor([[8.0], [-6.0], [0.1]], dtype=D)
    solution = mb.solve(f, torch.zeros_like(x), x, solver=mb.Broyden(line_search=True), rtol=1e-8, max_nfe=60)
    assert_close(solution.z**3 + solution.z, x, rtol=1e-6, atol=1e-7)
    assert solution.trace.residual[1, :2].isnan().all()
    f = lambda z: z + torch.where(z <= 0, 1 + 0 * z, torch.where(z > 0.999, 10 + 0 * z, torch.nan))  # noqa: E731
    for every in (1, 2, 4):  # it goes on from the finite point each time, to the end of its budget
        options = {"solver": mb.Broyden(line_search=True), "max_nfe": 30, "check_every": every}
        solution = solved(f, torch.zeros(1, 1, dtype=D), **options)
        assert solution.nfe.tolist() == [30]
        assert solution.steps[0] > 5


def test_a_late_look_judges_each_evaluation_by_its_own_value():
    buffer = torch.empty(2, 1, dtype=D)

    def f(z):  # the first sample is exact at once, which has its norms measured again
        buffer[0] = 1.0
        buffer[1] = 2 * z[1] + 1
        return buffer

    solution = solved(f, torch.ones(2, 1, dtype=D), solver=mb.Picard(), max_nfe=30, check_every=20)
    assert solution.status.tolist() == [mb.Status.CONVERGED, mb.Status.MAX_NFE]
    assert_close(mb.relative_residual(solution.z, f(solution.z).clone()), solution.residual)


@every_driver
@pytest.mark.parametrize("solver", [mb.Picard(), mb.Anderson(), mb.Broyden()], ids=str)
def test_what_blows_up_is_not_taken_for_better(solver, way):
    f = lambda z, x: 1e3 * z * (1 + z.abs()) + x  # noqa: E731
    x = torch.ones(2, 3, dtype=D)
    found = DRIVERS[way](f, 0 * x, x, solver=solver, max_nfe=9)
    assert_close((f(found.z, x) - found.z).norm(dim=1), found.trace.absolute.nan_to_num(torch.inf).amin(dim=0))
    assert_close(mb.relative_residual(found.z, f(found.z, x)), found.residual)


@pytest.mark.parametrize("value", [1e308, 1.7e308])
def test_what_is_finite_is_never_judged_otherwise(value):
    f, z0 = lambda z: 0 * z + value, torch.zeros(2, 3, dtype=D)
    for run in DRIVERS.values():
        found = run(f, z0, solver=mb.Picard(), max_nfe=4)
        assert found.converged.all()
        assert (found.z == value).all()
    once = solved(f, z0, solver=mb.Picard(), max_nfe=1)
    assert once.status.tolist() == [mb.Status.MAX_NFE] * 2
    assert torch.isfinite(once.residual).all()


class Probe(mb.Picard):
    """Looks at everything a solver may ask of its problem, then takes a Picard step."""

    min_nfe = 4
    half = False

    def init(self, z: Tensor, g: Tensor, problem: Any) -> tuple[Tensor, list[Any]]:
        return (torch.arange(len(z)), [])

    def step(self, z: Tensor, g: Tensor, state: Any, problem: Any) -> Step:
        (samples, notes), x = state, problem.context
        live = torch.from_numpy(problem.alive)
        before = problem.budget.copy()
        assert problem.shape == (4,)
        assert problem.steps_left == before.max()
        assert (before[~problem.alive] == 0).all()
        assert_close(problem.origin(), contraction(torch.zeros_like(z), x))
        assert_close(problem.image(z, g)[live], contraction(z, x)[live], rtol=1e-12, atol=1e-12)
        assert_close(g[live], (contraction(z, x) - z)[live], rtol=1e-12, atol=1e-12)
        assert (problem.budget == before).all()
        among = problem.alive & (samples.numpy() % 2 == 0)
        chosen = torch.from_numpy(among)
        there = problem.residual(z + 1, among=among) if among.any() else torch.zeros_like(z)
        assert_close(there[chosen], (contraction(z + 1, x) - z - 1)[chosen], rtol=1e-12, atol=1e-12)
        assert (there[~chosen] == 0).all()
        assert (problem.budget == before - among).all()
        v = torch.arange(4.0, dtype=D).expand_as(z)
        product = problem.jvp(z, v, z + g)
        assert_close(product[live], contraction(v, 0 * x)[live], rtol=1e-6, atol=1e-6)
        assert (product[~live] == 0).all()
        spent = before - among - problem.budget
        assert (spent[problem.alive] == (1 if notes or not self.half else 2)).all()
        notes.append(len(z))
        return Step(z + g, (samples, notes))


class OneWay(torch.autograd.Function):
    """The contraction without forward AD."""

    @staticmethod
    def forward(ctx, z):
        return contraction(z, torch.zeros_like(z))

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


@pytest.mark.parametrize("one_way", [False, True])
def test_a_solver_sees_f_its_own_rows_and_what_they_can_still_afford(one_way):
    z0, x = inputs()
    f = (lambda z, x: OneWay.apply(z) + x) if one_way else contraction
    probe = Probe()
    object.__setattr__(probe, "half", one_way)
    solution = mb.solve(f, z0, x, solver=probe, rtol=1e-4, max_nfe=80)
    plain = mb.solve(f, z0, x, solver=mb.Picard(), rtol=1e-4, max_nfe=80)
    assert torch.equal(solution.steps, plain.steps)
    even = (torch.arange(5) % 2 == 0).long()
    assert torch.equal(solution.nfe, 1 + plain.steps * (2 + even) + one_way * (plain.steps > 0))
    assert torch.equal(solution.trace.nfe.amax(0), solution.nfe)


def test_a_start_elsewhere_makes_f_at_z0_cost_one_evaluation_more():
    class Elsewhere(mb.Picard):
        def start(self, z0, problem):
            return z0 + 0.5

        def init(self, z, g, problem):
            assert torch.equal(problem.origin(), problem.context)
            assert torch.equal(problem.origin(), problem.context)
            return ()

    z0, x = inputs()
    solution = mb.solve(contraction, z0, x + 1, solver=Elsewhere(), rtol=1e-6, max_nfe=60)
    plain = mb.solve(contraction, z0 + 0.5, x + 1, solver=mb.Picard(), rtol=1e-6, max_nfe=60)
    assert ((solution.nfe - plain.nfe) == 1).all()


@pytest.mark.parametrize("solver", [*CLASSICAL, "half"], ids=str)
def test_a_state_of_several_tensors_comes_and_goes_as_one_in_half_precision_too(solver):
    half, solver = solver == "half", mb.Picard() if solver == "half" else solver
    z0, x = inputs(n=6, dtype=torch.float32 if half else D)
    options = {"rtol": 2e-2, "max_nfe": 9, "f_dtype": torch.bfloat16} if half else {"rtol": 1e-8, "max_nfe": 80}
    x = x.bfloat16() if half else x

    def f(z, x):
        assert isinstance(z, tuple)
        assert [tuple(part.shape[1:]) for part in z] == [(2, 2), (2,)]
        assert z[0].dtype == x.dtype
        image = contraction(join(z), x)
        return image[:, :4].reshape(-1, 2, 2), image[:, 4:]

    join = lambda z: torch.cat([z[0].flatten(1), z[1]], dim=1)  # noqa: E731
    start = z0[:, :4].reshape(-1, 2, 2), z0[:, 4:]
    pair, single = (
        mb.solve(*given, x, solver=solver, snapshots=(2,), **options) for given in ((f, start), (contraction, z0))
    )
    assert torch.equal(join(pair.z), single.z)
    assert torch.equal(join(pair.snapshots[0]), single.snapshots[0])
    assert torch.equal(pair.nfe, single.nfe)
    assert pair.z[0].dtype == z0.dtype
    if solver == mb.Picard():
        assert torch.equal(join(fixed(f, start, x, solver=solver, **options).z), single.z)
