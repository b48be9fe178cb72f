"""What the solver loop promises: who goes on, from where, for how long, what is written down of it, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.learned.safeguard import BY_PROGRESS
from metabroyden.solver import Phase
from metabroyden.solvers import Step
from metabroyden.state import Packing
from tests.conftest import tanh
from tests.helpers import CLASSICAL, Steps, moved, shifted, solved
from tests.helpers import DOUBLE as D

LEARNED = mb.list_solvers(learned=True, splitting=False, adjoint=False)


class Plan(Steps):
    """A solver with a safeguard of these phases."""

    def __init__(self, *phases: Phase) -> None:
        super().__init__()
        self.plan = phases

    def phases(self) -> list[Phase]:
        return list(self.plan)


@pytest.mark.parametrize("name", LEARNED)
def test_a_sample_takes_the_same_path_alone_and_among_others_in_any_order(name):
    problem, solver, order = tanh(batch=7, gain=1.2), moved(name, 12), [3, 0, 6, 4, 2, 1, 5]
    run = lambda rows: solved(problem.f, problem.z0[rows], problem.x[rows], solver=solver, rtol=1e-8, max_nfe=70)  # noqa: E731
    together, mixed = run(slice(None)), run(order)
    for i in (0, 3, 6):
        alone = run([i])
        assert abs(int(alone.nfe) - int(together.nfe[i])) <= 1
        ours = together.trace.residual[:10, i]
        ours, theirs = ours[~ours.isnan()], alone.trace.residual[:10, 0]
        assert_close(ours, theirs[: len(ours)], rtol=1e-8, atol=1e-13)
    assert (together.nfe[order] - mixed.nfe).abs().max() <= 1
    assert_close(together.z[order], mixed.z, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "solver", [*CLASSICAL.values(), moved("grouped", 12, conditioning="initial_value")], ids=lambda s: str(s)[:60]
)
def test_with_and_without_a_context_the_same_is_found(solver, nonlinear):
    given = mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=solver, rtol=1e-8, max_nfe=80)
    closure = mb.solve(lambda z: nonlinear.f(z, nonlinear.x), nonlinear.z0, solver=solver, rtol=1e-8, max_nfe=80)
    assert_close(given.z, closure.z, rtol=1e-9, atol=1e-11)
    assert (given.nfe - closure.nfe).abs().max() <= 1


def test_finished_samples_cost_nothing_more_and_f_at_z0_is_known_to_a_solver_that_begins_there(nonlinear):
    class Curious(mb.Picard):
        def init(self, z, g, problem):
            return (problem.origin(),)

    x = nonlinear.x.clone()
    x[0] = 0  # z* = 0 = z0: done at the first look
    plain, solution = (
        mb.solve(nonlinear.f, nonlinear.z0, x, solver=solver, rtol=1e-8, max_nfe=200)
        for solver in (mb.Picard(), Curious())
    )
    assert solution.nfe.tolist() == plain.nfe.tolist()
    assert (solution.nfe[0], solution.residual[0]) == (1, 0)
    assert solution.nfe[1:].min() > 5
    assert solution.trace.residual.shape == (int(solution.nfe.max()), 6)
    assert solution.trace.residual[1:, 0].isnan().all()
    assert (solution.trace.seconds.diff() >= 0).all()


@pytest.mark.parametrize(
    "solver", [*CLASSICAL.values(), *(moved(name, 12) for name in LEARNED)], ids=lambda s: str(s)[:60]
)
def test_the_budget_is_kept_and_failure_raises_with_the_solution_attached(solver, nonlinear):
    for budget in (1, 2, 5):
        with pytest.raises(mb.SolveError, match="6 of 6 samples did not converge: 6 × max_nfe") as caught:
            mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=solver, rtol=1e-14, max_nfe=budget)
        assert caught.value.solution.nfe.max() <= budget


BAD = [
    ({"z0": torch.zeros(3)[0]}, ValueError, "batch axis"),
    ({"z0": torch.zeros(2, 0)}, ValueError, r"at least one coordinate a sample, got shape \(2, 0\)"),
    ({"z0": torch.zeros(0, 0)}, ValueError, r"at least one coordinate a sample, got shape \(0, 0\)"),
    ({"z0": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "floating dtype, got torch.int64"),
    ({"z0": torch.full((2, 3), torch.inf)}, ValueError, "finite"),
    ({"z0": [1.0, 2.0]}, TypeError, "tensor or a non-empty tuple of tensors, got list"),
    ({"z0": (torch.zeros(2, 3), torch.zeros(3, 3))}, ValueError, "agree in batch size"),
    ({"z0": torch.zeros(2, 3, dtype=torch.complex64)}, ValueError, r"z0 must be real, got .*64: .*torch.view_as_real"),
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
    ({"f": lambda z, x: z.to(torch.complex64)}, ValueError, r"what f returns must be real.*torch.view_as_real"),
    ({"tolerance": 1e-3}, TypeError, "tolerance"),
    *(
        ({"snapshots": wrong}, ValueError, "snapshots must be rising integers of at least 1")
        for wrong in ((0,), (2, 1), (1, 1), (True,), (1.0,), ("1",))
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=[str(next(iter(case[0]))) + case[2] for case in BAD])
def test_bad_input_is_refused_with_what_was_given_and_what_is_wanted(change, error, words):
    wanted = {
        "f": lambda z, x: 0.5 * z + x,
        "z0": torch.zeros(2, 3),
        "context": torch.ones(2, 3),
        "solver": mb.Broyden(),
    }
    arguments = wanted | change
    with pytest.raises(error, match=words):
        mb.solve(arguments.pop("f"), arguments.pop("z0"), arguments.pop("context"), **arguments)


def test_packing_refuses_what_does_not_come_back_in_shape():
    with pytest.raises(ValueError, match=r"wanted \[\(2, 3, 4\)\]"):
        Packing.of(torch.zeros(2, 3, 4)).take(torch.zeros(2, 4, 3), torch.zeros(2, 12))


def test_a_start_of_another_shape_and_a_solver_that_overdraws_are_refused():
    class Wide(mb.Picard):
        def start(self, z0, problem):
            return torch.cat([z0, z0], dim=1)

    class Greedy(mb.Picard):
        def step(self, z, g, state, problem):
            for _ in range(3):
                z = z + problem.residual(z)
            return Step(z, state)

    with pytest.raises(ValueError, match=r"start must return shape \(2, 1\), got \(2, 2\)"):
        mb.solve(torch.cos, torch.zeros(2, 1), solver=Wide())
    with pytest.raises(RuntimeError, match="asked for more than max_nfe=6 evaluations"):
        mb.solve(torch.cos, torch.zeros(2, 1), solver=Greedy(), rtol=0.0, max_nfe=6)
    assert solved(torch.cos, torch.zeros(2, 1), solver=Greedy(), rtol=0.0, max_nfe=9).nfe.tolist() == [9, 9]


# --- phases


@pytest.mark.parametrize("x", [torch.ones(2, 1, dtype=D), None])
def test_what_is_handed_over_stays_as_it_was_though_better_iterates_are_found(x):
    """Broyden remembers the point it was handed. From there sample 0 gets better at once, sample 1 worse first."""

    def f(z, x=None):
        error = 100 - z
        return z + torch.where(error.abs() > 1.5, 3 * error, 0.8 * error)

    z0, best = torch.tensor([[[101.4], [105.0]], [[101.3], [105.0]]], dtype=D)
    first = Steps([101.3, 105.2])  # sample 0 gets better, sample 1 does not: its best iterate stands beside the new one
    plan = Plan(Phase(first, horizon=1), Phase(mb.Broyden(), origin="best"))
    handed = solved(f, z0, x, solver=plan, rtol=1e-9, max_nfe=40).trace
    direct = solved(f, best, x, solver=mb.Broyden(), rtol=1e-9, max_nfe=40).trace
    assert handed.phase[:2].tolist() == [[0, 0], [0, 0]]
    assert direct.absolute[1, 0] < direct.absolute[0, 0]
    assert direct.absolute[1, 1] > direct.absolute[0, 1]
    for sample in range(2):
        mine, other = handed.absolute[2:, sample], direct.absolute[1:, sample]
        assert_close(mine[~mine.isnan()], other[~other.isnan()], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("progress", [1.0, 0.5])
@pytest.mark.parametrize("patience", [1, 2, 4])
def test_a_sample_is_handed_on_after_exactly_so_many_evaluations_without_progress(patience, progress):
    gained, not_enough = (4.0, 3.5) if progress < 1 else (7.9, 7.95)
    first = Steps([gained, 9.0], *([not_enough + 0.01 * k, 9.1 + 0.1 * k] for k in range(9)))
    plan = Plan(Phase(first, patience=patience, progress=progress), Phase(mb.Picard(0.5), origin="best"))
    z0 = torch.full((2, 1), 8.0, dtype=D)
    solution = mb.solve(shifted, z0, 0 * z0, solver=plan, rtol=1e-6, max_nfe=60)
    # sample 1 makes no progress after z0, sample 0 none after its first step
    assert (solution.trace.phase == 0).sum(0).tolist() == [2 + patience, 1 + patience]


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("origin", ["start", "best"])
@pytest.mark.parametrize("check_every", [1, 2, 5])
def test_a_phase_ends_at_its_horizon_and_the_next_begins_where_it_says(horizon, origin, check_every):
    seen, z0 = [], torch.tensor([[8.0], [5.0]], dtype=D)
    plan = Plan(Phase(Steps([6.0, 9.0], [7.0, 4.0], [9.0, 9.0]), horizon=horizon), Phase(mb.Picard(), origin=origin))
    f = lambda z, x: seen.append(z.clone()) or shifted(z, x)  # noqa: E731
    solution = mb.solve(f, z0, 0 * z0, solver=plan, rtol=1e-6, max_nfe=60, check_every=check_every)
    assert (solution.trace.phase[: horizon + 1] == 0).all()
    assert (solution.trace.phase[horizon + 1 :] != 0).all()
    best = {1: [[6.0], [5.0]], 3: [[6.0], [4.0]]}[horizon]
    start = torch.tensor(best, dtype=D) if origin == "best" else z0
    assert_close(seen[horizon + 1], shifted(start, 0 * z0))
    assert (solution.steps >= horizon + 1).all()


def test_samples_at_different_points_of_a_plan_are_evaluated_in_one_call():
    calls, z0 = [], torch.full((3, 1), 8.0, dtype=D)
    first = Steps([7.0, 9.0, 6.0], [6.5, 9.1, 5.0], [6.4, 9.0, 4.5], [6.3, 9.1, 4.4], [6.2, 9.0, 4.3])
    plan = Plan(Phase(first, patience=2, horizon=5), Phase(mb.Picard(), origin="best"))
    f = lambda z, x: calls.append(len(z)) or shifted(z, x)  # noqa: E731
    solution = mb.solve(f, z0, 0 * z0, solver=plan, rtol=1e-9, max_nfe=60)
    assert solution.trace.residual.shape[0] == len(calls)
    assert (calls[0], sum(calls)) == (3, solution.nfe.sum())
    alone = mb.solve(shifted, z0[:1], 0 * z0[:1], solver=mb.Picard(), rtol=1e-9)
    assert solution.nfe[1] == alone.nfe[0] + 2  # z0's value is handed over, two evaluations found nothing


@pytest.mark.parametrize("factor", [0.5, 3.0], ids=["vanishes", "blows up"])
def test_a_solver_under_which_z_vanishes_or_blows_up_hands_over_with_its_best_iterate(factor):
    class Guarded(mb.Picard):
        def phases(self):
            return replace(BY_PROGRESS, resume_below=2.0).phases(self)

    z0 = torch.ones(2, 3, dtype=D)
    solution = mb.solve(lambda z, x: factor * z + x, z0, 0 * z0, solver=Guarded(), max_nfe=40)
    assert (solution.trace.phase == 1).any()
    assert (solution.nfe <= 25).all()


# --- stalls


class Crawl(Steps):
    """Moves each sample by its own share of a rounding of z, to and fro or on and on."""

    def __init__(self, shares: list[float], dtype: torch.dtype) -> None:
        super().__init__()
        self.shares = torch.tensor(shares, dtype=dtype)[:, None]

    def step(self, z: Tensor, g: Tensor, state: tuple[int, Tensor], problem: Any) -> Step:
        after = z.clone()
        after[:, :1] += self.shares[state[1]] * torch.finfo(z.dtype).eps * z.norm(dim=1, keepdim=True)
        return Step(after, state)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_stalled_is_a_step_below_rounding_and_nothing_else(dtype):
    """Steps of 0, 0.9 and 1.5 roundings of ‖z‖: the first two stop at once, the third goes on though its residual stays."""
    z0, crawl = torch.full((3, 4), 0.5, dtype=dtype), Crawl([0.0, 0.9, 1.5], dtype)
    tiny = 1e-9 if dtype == torch.float32 else 1e-18
    solution = solved(lambda z, x: z + 1, z0, z0[:, :1], solver=crawl, rtol=1e-6, max_nfe=9)
    assert solution.status.tolist() == [mb.Status.STALLED, mb.Status.STALLED, mb.Status.MAX_NFE]
    assert solution.nfe.tolist() == [2, 2, 9]
    picard = solved(lambda z: z + 1, torch.ones(1, 2, dtype=dtype), solver=mb.Picard(tiny), rtol=1e-6, max_nfe=40)
    assert (picard.status.tolist(), picard.nfe.tolist()) == ([mb.Status.STALLED], [2])


def test_a_turn_of_the_iterate_at_an_unchanged_residual_is_no_stall():
    sine, cosine = math.sin(math.pi / 3), math.cos(math.pi / 3)
    turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=D)
    solution = solved(lambda z: z @ turn.T, torch.ones(2, 2, dtype=D), solver=mb.Picard(), rtol=1e-6, max_nfe=12)
    assert solution.status.tolist() == [mb.Status.MAX_NFE] * 2
    assert solution.nfe.tolist() == [12, 12]


def test_a_stalled_sample_is_handed_on_and_the_rest_go_their_way():
    z0, first = torch.full((2, 1), 8.0, dtype=D), Steps([8.0, 7.0], [8.0, 6.0], [8.0, 5.0])
    plan = Plan(Phase(first, horizon=3), Phase(mb.Picard(), origin="start"))
    solution = mb.solve(shifted, z0, 0 * z0, solver=plan, rtol=1e-6, max_nfe=60)
    assert (solution.trace.phase == 0).sum(0).tolist() == [2, 4]


# --- what is written down


def test_snapshots_are_the_best_iterates_after_so_many_evaluations():
    z0 = torch.tensor([[8.0], [5.0]], dtype=D)
    steps = Steps([6.0, 9.0], [7.0, 4.0], [5.0, 3.0], [9.0, 2.5], [4.0, 2.4])
    solution = solved(shifted, z0, 0 * z0, solver=steps, rtol=1e-9, max_nfe=6, snapshots=(1, 2, 3, 5, 9))
    kept = [snapshot.flatten().tolist() for snapshot in solution.snapshots]
    assert kept == [[8.0, 5.0], [6.0, 5.0], [6.0, 4.0], [5.0, 2.5], [4.0, 2.4]]
    assert len({id(part) for part in (*solution.snapshots, solution.z)}) == 6


@pytest.mark.parametrize(
    "numbers", [(k for k in (1, 3)), range(1, 4, 2), np.array([1, 3])], ids=["generator", "range", "array"]
)
def test_snapshots_may_be_any_iterable(numbers, nonlinear):
    solution = mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=mb.Picard(), snapshots=numbers, rtol=1e-6)
    assert len(solution.snapshots) == 2


def test_a_trace_can_be_switched_off(nonlinear):
    usual, without = (
        mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=mb.Anderson(), rtol=1e-8, trace=trace)
        for trace in (True, False)
    )
    assert torch.equal(usual.z, without.z)
    assert torch.equal(usual.residual, without.residual)
    assert without.trace.residual.shape == without.trace.absolute.shape == without.trace.nfe.shape == (0, 6)
    assert without.trace.seconds.shape == (0,)


@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 0.0), (0.0, 1e-3), (1e-4, 1e-3), (1e-2, 1e-5)])
def test_a_sample_stops_at_the_first_iterate_within_the_tolerances(rtol, atol):
    x = torch.linspace(-2, 3, 8, dtype=D)[:, None]
    f = lambda z, x: 0.7 * z + x  # noqa: E731
    solution = mb.solve(f, torch.zeros_like(x), x, solver=mb.Picard(), rtol=rtol, atol=atol, max_nfe=90)
    for sample in range(8):
        z, nfe = torch.zeros(1, dtype=D), 1
        while (f(z, x[sample]) - z).abs() > atol + rtol * f(z, x[sample]).abs():
            z, nfe = f(z, x[sample]), nfe + 1
        assert (solution.nfe[sample], solution.steps[sample]) == (nfe, nfe - 1)
        assert_close(solution.z[sample], z)
