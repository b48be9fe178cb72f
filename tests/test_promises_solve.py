"""What the solver loop promises: who goes on, from where, for how long, and what is written down of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import metabroyden as mb
from metabroyden.solver import Phase
from metabroyden.solvers import Step


class Steps:
    """Goes to given points, one after another, whatever f says. Its state: the steps made, and the samples' numbers."""

    def __init__(self, *points: list[float]) -> None:
        self.points = [torch.tensor(point, dtype=torch.float64)[:, None] for point in points]

    def start(self, z0: Tensor, problem: Any) -> Tensor:
        return z0

    def init(self, z: Tensor, g: Tensor, problem: Any) -> tuple[int, Tensor]:
        return 0, torch.arange(len(z))

    def step(self, z: Tensor, g: Tensor, state: tuple[int, Tensor], problem: Any) -> Step:
        made, samples = state
        return Step(self.points[made][samples], (made + 1, samples))


class Plan(Steps):
    """A solver with a safeguard of these phases."""

    def __init__(self, *phases: Phase) -> None:
        super().__init__()
        self.plan = phases

    def phases(self) -> list[Phase]:
        return list(self.plan)


@pytest.mark.parametrize("x", [torch.ones(2, 1, dtype=torch.float64), None])
def test_what_is_handed_over_stays_as_it_was_though_better_iterates_are_found(x):
    """Broyden remembers the point it was handed. From there sample 0 gets better at once, sample 1 worse first."""

    def f(z, x=None):
        error = 100 - z
        return z + torch.where(error.abs() > 1.5, 3 * error, 0.8 * error)

    z0 = torch.tensor([[101.4], [105.0]], dtype=torch.float64)
    first = Steps([101.3, 105.2])  # sample 0 gets better, sample 1 does not: its best iterate stands beside the new one
    plan = Plan(Phase(first, horizon=1), Phase(mb.Broyden(), origin="best"))
    handed = mb.solve(f, z0, x, solver=plan, rtol=1e-9, max_nfe=40, throw=False).trace
    best = torch.tensor([[101.3], [105.0]], dtype=torch.float64)
    direct = mb.solve(f, best, x, solver=mb.Broyden(), rtol=1e-9, max_nfe=40, throw=False).trace
    assert handed.phase[:2].tolist() == [[0, 0], [0, 0]]
    assert direct.absolute[1, 0] < direct.absolute[0, 0]
    assert direct.absolute[1, 1] > direct.absolute[0, 1]
    for sample in range(2):
        mine, other = handed.absolute[2:, sample], direct.absolute[1:, sample]
        torch.testing.assert_close(mine[~mine.isnan()], other[~other.isnan()], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("progress", [1.0, 0.5])
@pytest.mark.parametrize("patience", [1, 2, 4])
def test_a_sample_is_handed_on_after_exactly_so_many_evaluations_without_progress(patience, progress):
    x = torch.zeros(2, 1, dtype=torch.float64)
    gained, not_enough = (4.0, 3.5) if progress < 1 else (7.9, 7.95)
    first = Steps([gained, 9.0], *([not_enough + 0.01 * k, 9.1 + 0.1 * k] for k in range(9)))
    plan = Plan(Phase(first, patience=patience, progress=progress), Phase(mb.Picard(0.5), origin="best"))
    z0 = torch.full((2, 1), 8.0, dtype=torch.float64)
    solution = mb.solve(shifted, z0, x, solver=plan, rtol=1e-6, max_nfe=60)
    # sample 1 makes no progress after z0, sample 0 none after its first step
    assert (solution.trace.phase == 0).sum(0).tolist() == [2 + patience, 1 + patience]


def shifted(z: Tensor, x: Tensor) -> Tensor:
    """z* = 2, with a relative residual that shrinks with ‖g‖."""
    return 2 + 0.1 * (z - 2) + 0 * x


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("origin", ["start", "best"])
@pytest.mark.parametrize("check_every", [1, 2, 5])
def test_a_phase_ends_at_its_horizon_and_the_next_begins_where_it_says(horizon, origin, check_every):
    x = torch.zeros(2, 1, dtype=torch.float64)
    seen = []

    def f(z, x):
        seen.append(z.clone())
        return shifted(z, x)

    z0 = torch.tensor([[8.0], [5.0]], dtype=torch.float64)
    points = [[6.0, 9.0], [7.0, 4.0], [9.0, 9.0]]
    plan = Plan(Phase(Steps(*points), horizon=horizon), Phase(mb.Picard(), origin=origin))
    solution = mb.solve(f, z0, x, solver=plan, rtol=1e-6, max_nfe=60, check_every=check_every)
    assert (solution.trace.phase[: horizon + 1] == 0).all()
    assert (solution.trace.phase[horizon + 1 :] != 0).all()
    best = {1: [[6.0], [5.0]], 3: [[6.0], [4.0]]}[horizon]
    start = torch.tensor(best, dtype=torch.float64) if origin == "best" else z0
    torch.testing.assert_close(seen[horizon + 1], shifted(start, x))
    assert (solution.steps >= horizon + 1).all()


def test_samples_at_different_points_of_a_plan_are_evaluated_in_one_call():
    calls = []

    def f(z, x):
        calls.append(len(z))
        return shifted(z, x)

    x = torch.zeros(3, 1, dtype=torch.float64)
    first = Steps([7.0, 9.0, 6.0], [6.5, 9.1, 5.0], [6.4, 9.0, 4.5], [6.3, 9.1, 4.4], [6.2, 9.0, 4.3])
    plan = Plan(Phase(first, patience=2, horizon=5), Phase(mb.Picard(), origin="best"))
    solution = mb.solve(f, torch.full((3, 1), 8.0, dtype=torch.float64), x, solver=plan, rtol=1e-9, max_nfe=60)
    assert solution.trace.residual.shape[0] == len(calls)
    assert calls[0] == 3
    assert sum(calls) == solution.nfe.sum()
    alone = mb.solve(shifted, torch.full((1, 1), 8.0, dtype=torch.float64), x[:1], solver=mb.Picard(), rtol=1e-9)
    assert solution.nfe[1] == alone.nfe[0] + 2  # z0's value is handed over, two evaluations found nothing


class Crawl(Steps):
    """Moves each sample by its own share of a rounding of z, to and fro or on and on."""

    def __init__(self, shares: list[float]) -> None:
        super().__init__()
        self.shares = torch.tensor(shares, dtype=torch.float64)[:, None]

    def step(self, z: Tensor, g: Tensor, state: tuple[int, Tensor], problem: Any) -> Step:
        moved = z.clone()
        moved[:, :1] += self.shares[state[1]] * torch.finfo(z.dtype).eps * z.norm(dim=1, keepdim=True)
        return Step(moved, state)


def test_stalled_is_a_step_below_rounding_and_nothing_else():
    """Steps of 0, 0.9 and 3 roundings of ‖z‖: the first two stop at once, the third goes on though its residual stays."""
    z0 = torch.full((3, 4), 0.5, dtype=torch.float64)
    x = torch.zeros(3, 1, dtype=torch.float64)
    solution = mb.solve(lambda z, x: z + 1, z0, x, solver=Crawl([0.0, 0.9, 4.0]), rtol=1e-6, max_nfe=9, throw=False)
    assert solution.status.tolist() == [mb.Status.STALLED, mb.Status.STALLED, mb.Status.MAX_NFE]
    assert solution.nfe.tolist() == [2, 2, 9]


def test_a_turn_of_the_iterate_at_an_unchanged_residual_is_no_stall():
    angle = torch.tensor(math.pi / 3, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    solution = mb.solve(
        lambda z: z @ turn.T,
        torch.ones(2, 2, dtype=torch.float64),
        solver=mb.Picard(),
        rtol=1e-6,
        max_nfe=12,
        throw=False,
    )
    assert solution.status.tolist() == [mb.Status.MAX_NFE] * 2
    assert solution.nfe.tolist() == [12, 12]


def test_a_stalled_sample_is_handed_on_and_the_rest_go_their_way():
    x = torch.zeros(2, 1, dtype=torch.float64)
    first = Steps([8.0, 7.0], [8.0, 6.0], [8.0, 5.0])
    plan = Plan(Phase(first, horizon=3), Phase(mb.Picard(), origin="start"))
    solution = mb.solve(shifted, torch.full((2, 1), 8.0, dtype=torch.float64), x, solver=plan, rtol=1e-6, max_nfe=60)
    assert (solution.trace.phase[:, 0] == 0).sum() == 2
    assert (solution.trace.phase[:, 1] == 0).sum() == 4


@pytest.mark.parametrize("check_every", [1, 2, 3, 7])
@pytest.mark.parametrize("solver", [mb.Picard(), mb.Broyden(), mb.Anderson()], ids=lambda solver: type(solver).__name__)
def test_looking_less_often_costs_evaluations_and_changes_no_result(solver, check_every):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64) * torch.logspace(-3, 1, 6)[:, None].double()
    z0 = torch.zeros_like(x)
    f = lambda z, x: torch.tanh(0.6 * z.roll(1, 1)) + x  # noqa: E731
    often = mb.solve(f, z0, x, solver=solver, rtol=1e-6, max_nfe=60)
    rarely = mb.solve(f, z0, x, solver=solver, rtol=1e-6, max_nfe=60, check_every=check_every)
    torch.testing.assert_close(rarely.z, often.z, rtol=0, atol=1e-12)
    torch.testing.assert_close(rarely.residual, often.residual, rtol=1e-9, atol=0)
    extra = rarely.nfe - often.nfe
    assert (extra >= 0).all()
    assert (extra <= check_every - 1).all()
    assert (rarely.nfe == (rarely.trace.residual.isfinite()).sum(0)).all()
    for budget in (1, 2, 3, 5):
        spent = mb.solve(f, z0, x, solver=solver, rtol=0.0, max_nfe=budget, check_every=check_every, throw=False)
        assert (spent.nfe == budget).all()
        assert (spent.steps == budget - 1).all()


def test_snapshots_are_the_best_iterates_after_so_many_evaluations():
    x = torch.zeros(2, 1, dtype=torch.float64)
    z0 = torch.tensor([[8.0], [5.0]], dtype=torch.float64)
    points = [[6.0, 9.0], [7.0, 4.0], [5.0, 3.0], [9.0, 2.5], [4.0, 2.4]]
    solution = mb.solve(
        shifted, z0, x, solver=Steps(*points), rtol=1e-9, max_nfe=6, snapshots=(1, 2, 3, 5, 9), throw=False
    )
    kept = [snapshot.flatten().tolist() for snapshot in solution.snapshots]
    assert kept == [[8.0, 5.0], [6.0, 5.0], [6.0, 4.0], [5.0, 2.5], [4.0, 2.4]]
    assert [len({id(part) for part in (*solution.snapshots, solution.z)})] == [6]


@pytest.mark.parametrize("snapshots", [(0,), (2, 1), (1, 1), (True,), (1.0,), ("1",)])
def test_snapshots_that_do_not_rise_are_refused(snapshots):
    with pytest.raises(ValueError, match="snapshots must be rising integers of at least 1"):
        mb.solve(torch.cos, torch.zeros(1, 1), solver=mb.Picard(), snapshots=snapshots)


def test_a_start_of_another_shape_is_refused():
    class Wide(mb.Picard):
        def start(self, z0, problem):
            return torch.cat([z0, z0], dim=1)

    with pytest.raises(ValueError, match=r"start must return shape \(2, 1\), got \(2, 2\)"):
        mb.solve(torch.cos, torch.zeros(2, 1), solver=Wide())


def test_a_solver_that_overdraws_the_budget_is_told_so():
    class Greedy(mb.Picard):
        def step(self, z, g, state, problem):
            for _ in range(3):
                z = z + problem.residual(z)
            return Step(z, state)

    with pytest.raises(RuntimeError, match="asked for more than max_nfe=6 evaluations"):
        mb.solve(torch.cos, torch.zeros(2, 1), solver=Greedy(), rtol=0.0, max_nfe=6)
    assert mb.solve(torch.cos, torch.zeros(2, 1), solver=Greedy(), rtol=0.0, max_nfe=9, throw=False).nfe.tolist() == [
        9,
        9,
    ]


@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 0.0), (0.0, 1e-3), (1e-4, 1e-3), (1e-2, 1e-5)])
def test_a_sample_stops_at_the_first_iterate_within_the_tolerances(rtol, atol):
    x = torch.linspace(-2, 3, 8, dtype=torch.float64)[:, None]
    f = lambda z, x: 0.7 * z + x  # noqa: E731
    solution = mb.solve(f, torch.zeros_like(x), x, solver=mb.Picard(), rtol=rtol, atol=atol, max_nfe=90)
    for sample in range(8):
        z, nfe = torch.zeros(1, dtype=torch.float64), 1
        while (f(z, x[sample]) - z).abs() > atol + rtol * f(z, x[sample]).abs():
            z, nfe = f(z, x[sample]), nfe + 1
        assert solution.nfe[sample] == nfe
        assert solution.steps[sample] == nfe - 1
        torch.testing.assert_close(solution.z[sample], z)
