"""What a solve promises of its books: the best iterate, what an evaluation measures, what a solver sees of f."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import metabroyden as mb
from metabroyden.solvers import Step
from tests.test_promises_solve import Steps, shifted

CLASSICAL = [mb.Picard(), mb.Anderson(), mb.Broyden(), mb.Broyden(kind="bad", line_search=True), mb.Newton()]


def contraction(z: Tensor, x: Tensor) -> Tensor:
    return 0.4 * z.roll(1, 1) - 0.1 * z + x


def inputs(batch: int = 5, n: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[0], x[1] = 0, 1e-2 * x[1]
    return torch.zeros(batch, n, dtype=dtype), x.to(dtype)


class Reuses:
    """f that writes every value to the memory of the one before, of as many rows."""

    def __init__(self, f: Any) -> None:
        self.f, self.memory = f, {}

    def __call__(self, *arguments: Tensor) -> Tensor:
        value = self.f(*arguments)
        if torch._C._functorch.maybe_current_level() is not None:  # forward AD cannot write there
            return value
        return self.memory.setdefault(len(value), torch.empty_like(value)).copy_(value)


@pytest.mark.parametrize("check_every", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 2.0**-90, 2.0**90])
@pytest.mark.parametrize("solver", CLASSICAL, ids=str)
def test_f_may_use_its_memory_again(solver, scale, check_every):
    """In float32 squares of 2^±90 under- or overflow: norms are then measured anew, from the values themselves."""
    z0, x = inputs(dtype=torch.float32)
    options = {"solver": solver, "rtol": 1e-5, "max_nfe": 30, "check_every": check_every, "throw": False}
    plain = mb.solve(contraction, z0, scale * x, **options)
    again = mb.solve(Reuses(contraction), z0, scale * x, **options)
    assert torch.equal(again.z, plain.z)
    torch.testing.assert_close(again.residual, plain.residual, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(again.trace.residual, plain.trace.residual, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(again.trace.absolute, plain.trace.absolute, rtol=0, atol=0, equal_nan=True)
    closed = mb.solve(Reuses(lambda z: contraction(z, scale * x)), z0, **options)
    assert torch.equal(closed.status, plain.status)


@pytest.mark.parametrize(
    ("dtype", "power"),
    [(torch.float32, -90), (torch.float32, 90), (torch.float32, -55), (torch.float64, -700), (torch.float64, 700)],
)
def test_a_problem_of_any_size_takes_the_same_way(dtype, power):
    z0, x = inputs(dtype=dtype)
    scale = 2.0**power
    options = {"solver": mb.Picard(), "rtol": 1e-4, "max_nfe": 30}
    plain = mb.solve(contraction, z0, x, **options)
    scaled = mb.solve(contraction, z0, scale * x, **options)
    assert torch.equal(scaled.z, scale * plain.z)
    assert torch.equal(scaled.nfe, plain.nfe)
    torch.testing.assert_close(scaled.residual, plain.residual, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.trace.residual, plain.trace.residual, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(scaled.trace.absolute, scale * plain.trace.absolute, rtol=1e-6, atol=0, equal_nan=True)
    mixed = mb.solve(contraction, z0, torch.cat([x[:3], scale * x[3:]]), **options)
    assert torch.equal(mixed.nfe, plain.nfe)
    torch.testing.assert_close(mixed.residual, plain.residual, rtol=1e-6, atol=0)
    close = mb.solve(contraction, z0, scale * x, **{**options, "rtol": 0.0, "atol": 1e-3 * scale})
    like = mb.solve(contraction, z0, x, **{**options, "rtol": 0.0, "atol": 1e-3})
    assert torch.equal(close.nfe, like.nfe)


@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("with_context", [True, False])
def test_the_iterate_returned_is_the_best_of_all_that_were_evaluated(with_context, check_every):
    points = 2.1 + 7 * np.random.default_rng(0).random((14, 5))
    z0 = torch.tensor(points[0])[:, None]
    x = torch.zeros(5, 1, dtype=torch.float64)
    f = shifted if with_context else lambda z: shifted(z, x)
    solution = mb.solve(
        f,
        z0,
        x if with_context else None,
        solver=Steps(*points[1:].tolist()),
        rtol=1e-9,
        max_nfe=14,
        check_every=check_every,
        snapshots=(4, 9) if check_every == 1 else (),
        throw=False,
    )
    assert solution.z.flatten().tolist() == points.min(0).tolist()
    assert torch.equal(solution.residual, solution.trace.residual.amin(0))
    for snapshot, spent in zip(solution.snapshots, (4, 9), strict=False):
        assert snapshot.flatten().tolist() == points[:spent].min(0).tolist()
    torch.testing.assert_close(solution.residual, mb.relative_residual(solution.z, shifted(solution.z, x)))
    assert torch.equal(solution.trace.nfe, torch.arange(1, 15)[:, None].expand(14, 5))
    assert (solution.trace.seconds.diff() >= 0).all()


@pytest.mark.parametrize("f", [lambda z: 2 * z, lambda z: z + z.flip(1)], ids=["doubling", "turning"])
def test_of_equally_good_iterates_the_first_is_returned(f):
    class Turns(mb.Picard):
        def step(self, z, g, state, problem):
            return Step(z.flip(1), state)

    z0 = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    found = mb.solve(f, z0, solver=Turns(), rtol=1e-9, max_nfe=4, throw=False)
    fixed = mb.FixedBudget(f, Turns(), max_nfe=4, rtol=1e-9, compiled=False)(z0)
    assert torch.equal(found.z, z0)
    assert torch.equal(fixed.z, z0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("check_every", [1, 3])
def test_a_value_that_is_not_finite_ends_its_sample_and_touches_no_other(value, check_every):
    z0, x = inputs()
    x = torch.cat([x, torch.arange(5, dtype=torch.float64)[:, None]], dim=1)

    def f(z, x):
        number, image = x[:, -1:], contraction(z, x[:, :-1])
        return torch.where((number == 3) & (z.abs().amax(1, keepdim=True) > 1e-9), value, image)

    options = {"solver": mb.Picard(), "rtol": 1e-6, "max_nfe": 40, "check_every": check_every, "throw": False}
    healthy = mb.solve(lambda z, x: contraction(z, x[:, :-1]), z0, x, **options)
    solution = mb.solve(f, z0, x, **options)
    others = torch.tensor([0, 1, 2, 4])
    assert torch.equal(solution.z[others], healthy.z[others])
    assert torch.equal(solution.residual[others], healthy.residual[others])
    assert solution.status.tolist() == [0, 0, 0, mb.Status.NON_FINITE, 0]
    assert solution.z[3].tolist() == z0[3].tolist()
    assert solution.residual[3] == 1
    assert solution.nfe[3] == (2 if check_every == 1 else 3)
    assert solution.trace.residual[1, 3].isnan()
    assert solution.trace.absolute[1, 3].isnan()
    with pytest.raises(
        mb.SolveError, match=r"1 of 5 samples did not converge: 1 × non_finite \(f returned a value"
    ) as caught:
        mb.solve(f, z0, x, **{**options, "throw": True})
    assert caught.value.solution.nfe.tolist() == solution.nfe.tolist()


def test_a_trial_of_a_line_search_that_is_not_finite_is_dropped_and_ends_nothing():
    def f(z, x):
        return torch.where(z.abs() > 3, torch.nan, z - (z**3 + z - x))

    x = torch.tensor([[8.0], [-6.0], [0.1]], dtype=torch.float64)
    solution = mb.solve(f, torch.zeros_like(x), x, solver=mb.Broyden(line_search=True), rtol=1e-8, max_nfe=60)
    torch.testing.assert_close(solution.z**3 + solution.z, x, rtol=1e-6, atol=1e-7)
    assert solution.trace.residual[1, :2].isnan().all()


class Probe(mb.Picard):
    """Looks at everything a solver may ask of its problem, then takes a Picard step."""

    min_nfe = 4

    def init(self, z: Tensor, g: Tensor, problem: Any) -> tuple[Tensor, list[Any]]:
        return (torch.arange(len(z)), [])

    def step(self, z: Tensor, g: Tensor, state: Any, problem: Any) -> Step:
        samples, notes = state
        x = problem.context
        live = torch.from_numpy(problem.alive)
        before = problem.budget.copy()
        assert problem.shape == (4,)
        assert problem.steps_left == before.max()
        assert (before[~problem.alive] == 0).all()
        torch.testing.assert_close(problem.origin(), contraction(torch.zeros_like(z), x))
        torch.testing.assert_close(problem.image(z, g)[live], contraction(z, x)[live], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(g[live], (contraction(z, x) - z)[live], rtol=1e-12, atol=1e-12)
        assert (problem.budget == before).all()
        among = problem.alive & (samples.numpy() % 2 == 0)
        chosen = torch.from_numpy(among)
        moved = problem.residual(z + 1, among=among) if among.any() else torch.zeros_like(z)
        torch.testing.assert_close(moved[chosen], (contraction(z + 1, x) - z - 1)[chosen], rtol=1e-12, atol=1e-12)
        assert (moved[~chosen] == 0).all()
        assert (problem.budget == before - among).all()
        v = torch.arange(4.0, dtype=torch.float64).expand_as(z)
        product = problem.jvp(z, v, z + g)
        torch.testing.assert_close(product[live], contraction(v, 0 * x)[live], rtol=1e-6, atol=1e-6)
        assert (product[~live] == 0).all()
        spent = before - among - problem.budget
        assert (spent[problem.alive] == (1 if notes or not self.half else 2)).all()
        notes.append(len(z))
        return Step(z + g, (samples, notes))

    half = False


@pytest.mark.parametrize("one_way", [False, True])
def test_a_solver_sees_f_its_own_rows_and_what_they_can_still_afford(one_way):
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return contraction(z, torch.zeros_like(z))

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError

    z0, x = inputs()
    f = (lambda z, x: OneWay.apply(z) + x) if one_way else contraction
    probe = Probe()
    object.__setattr__(probe, "half", one_way)
    solution = mb.solve(f, z0, x, solver=probe, rtol=1e-4, max_nfe=80)
    plain = mb.solve(f, z0, x, solver=mb.Picard(), rtol=1e-4, max_nfe=80)
    assert torch.equal(solution.steps, plain.steps)
    even = (torch.arange(5) % 2 == 0).long()
    assert torch.equal(solution.nfe, 1 + plain.steps * (2 + even) + one_way * (plain.steps > 0))
    measured = solution.trace.nfe
    assert torch.equal(measured.amax(0), solution.nfe)


def test_a_start_elsewhere_makes_f_at_z0_cost_one_evaluation_more():
    class Elsewhere(mb.Picard):
        def start(self, z0, problem):
            return z0 + 0.5

        def init(self, z, g, problem):
            assert torch.equal(problem.origin(), problem.context)
            assert torch.equal(problem.origin(), problem.context)
            return ()

    z0, x = inputs()
    x = x + 1
    solution = mb.solve(contraction, z0, x, solver=Elsewhere(), rtol=1e-6, max_nfe=60)
    plain = mb.solve(contraction, z0 + 0.5, x, solver=mb.Picard(), rtol=1e-6, max_nfe=60)
    assert ((solution.nfe - plain.nfe) == 1).all()


def test_f_in_half_precision_is_handed_halves_and_measured_as_it_is():
    seen = set()

    def f(z, x):
        seen.add(z.dtype)
        return contraction(z, x)

    z0, x = inputs(dtype=torch.float32)
    solution = mb.solve(f, z0, x.bfloat16(), solver=mb.Broyden(), rtol=2e-2, max_nfe=40, f_dtype=torch.bfloat16)
    assert seen == {torch.bfloat16}
    assert solution.z.dtype == solution.residual.dtype == torch.float32
    image = contraction(solution.z.bfloat16(), x.bfloat16()).float()
    torch.testing.assert_close(solution.residual, mb.relative_residual(solution.z, image), rtol=1e-5, atol=1e-7)


def test_a_state_of_several_tensors_comes_and_goes_as_one():
    z0, x = inputs(n=6)

    def f(z, x):
        assert isinstance(z, tuple)
        assert [tuple(part.shape[1:]) for part in z] == [(2, 2), (2,)]
        image = contraction(torch.cat([z[0].flatten(1), z[1]], dim=1), x)
        return image[:, :4].reshape(-1, 2, 2), image[:, 4:]

    start = z0[:, :4].reshape(-1, 2, 2), z0[:, 4:]
    for solver in CLASSICAL:
        pair = mb.solve(f, start, x, solver=solver, rtol=1e-8, max_nfe=80, snapshots=(2,))
        single = mb.solve(contraction, z0, x, solver=solver, rtol=1e-8, max_nfe=80, snapshots=(2,))
        assert torch.equal(torch.cat([pair.z[0].flatten(1), pair.z[1]], dim=1), single.z)
        kept = pair.snapshots[0]
        assert torch.equal(torch.cat([kept[0].flatten(1), kept[1]], dim=1), single.snapshots[0])
        assert torch.equal(pair.nfe, single.nfe)
