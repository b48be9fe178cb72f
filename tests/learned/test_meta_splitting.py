"""MetaBroyden on Peaceman–Rachford's map."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import metabroyden as mb
from metabroyden.deq import initial_state
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet
from metabroyden.meta.defaults import state_layout
from metabroyden.meta.fit import make_learned
from metabroyden.meta.unroll import BACKENDS, unroll
from tests.zoo.test_monotone import Counted, flat, problem, recomputed, zeros

every_structure = pytest.mark.parametrize("name", ["dense", "conv", "two tiers"])


def learned(cell, x, *, noise=0.0, conditioning="input", **options):
    """A solver for a cell in float64, its weights moved by so much noise."""
    layout = state_layout(cell, x, None)
    channels = layout.context_channels(x, layout.shape) if conditioning == "input" else 0
    solver = make_learned(
        "meta-splitting", layout, conditioning=conditioning, context_channels=channels, **options
    ).double()
    for number, parameter in enumerate(solver.parameters()):
        parameter.data += noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).double()
    return solver.eval()


@every_structure
@pytest.mark.parametrize("conditioning", ["input", "initial_value"])
def test_untrained_it_is_peaceman_rachford(name, conditioning):
    cell, x = problem(name, gain=2.0)
    ours = mb.solve(
        cell,
        zeros(x),
        x,
        solver=learned(cell, x, alpha=0.4, learned_steps=200, conditioning=conditioning),
        rtol=1e-8,
        max_nfe=200,
    )
    theirs = mb.solve(cell, zeros(x), x, solver=mb.PeacemanRachford(0.4), rtol=1e-8, max_nfe=200)
    if conditioning == "input":  # else it begins at f(z0)
        torch.testing.assert_close(ours.nfe, theirs.nfe)
    atol = 1e-14 if conditioning == "input" else 3e-6
    torch.testing.assert_close(flat(ours.z), flat(theirs.z), rtol=0, atol=atol)


@every_structure
def test_evaluations_are_uses_of_a_part_and_the_residual_is_true(name):
    cell, x = problem(name, gain=1.6)
    counted = Counted(cell)
    solver = learned(cell, x, noise=0.03, alpha=0.5, learned_steps=6)
    solution = mb.solve(counted, zeros(x), (torch.arange(7), x), solver=_first(solver), rtol=1e-7, max_nfe=200)
    np.testing.assert_array_equal(solution.nfe.numpy(), np.bincount(torch.cat(counted.seen).numpy(), minlength=7))
    assert len(solution.nfe.unique()) > 1
    torch.testing.assert_close(recomputed(cell, solution, x), solution.residual, rtol=1e-6, atol=1e-14)


def _first(solver):
    """The solver, told that the context's second tensor is its own."""
    take = solver.context_feature
    solver.context_feature = lambda problem, shape: take(_Second(problem), shape)
    return solver


class _Second:
    def __init__(self, problem):
        self.problem, self.context = problem, problem.context[1]

    def __getattr__(self, name):
        return getattr(self.problem, name)


@every_structure
def test_with_any_weights_it_ends_where_peaceman_rachford_does(name):
    cell, x = problem(name, gain=2.6)
    solver = learned(cell, x, noise=1.0, alpha=0.4)
    solution = mb.solve(cell, zeros(x), x, solver=solver, rtol=1e-8, max_nfe=4000)
    assert (solution.trace.phase == 1).any(), "weights this bad must be handed over"
    wanted = mb.solve(cell, zeros(x), x, solver=mb.PeacemanRachford(0.4), rtol=1e-8, max_nfe=4000)
    torch.testing.assert_close(flat(solution.z), flat(wanted.z), rtol=0, atol=3e-6)


@every_structure
def test_an_unroll_takes_the_steps_of_a_solve_by_either_backend(name):
    cell, x = problem(name, gain=2.0)
    cell.requires_grad_(False)
    solver = learned(cell, x, noise=0.05, alpha=0.5)
    solved = mb.solve(cell, zeros(x), x, solver=solver, rtol=0.0, max_nfe=8, throw=False).trace.residual
    gradients = []
    for backend in BACKENDS:
        solver.zero_grad()
        rollout = unroll(solver, cell, zeros(x), x, steps=4, backend=backend)
        rest = unroll(solver, cell, zeros(x), x, steps=3, backend=backend, begin=rollout.carry())
        torch.testing.assert_close(torch.cat([rollout.residuals, rest.residuals[1:]]), solved)
        rollout.residuals.log().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in solver.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    weight, eps = solver.coefficients.step_size, 1e-6
    direction = torch.randn_like(weight)
    ends = []
    for sign in (-1, 1):
        with torch.no_grad():
            weight += sign * eps * direction
            ends.append(unroll(solver, cell, zeros(x), x, steps=4, backend="native").residuals.log().sum())
            weight -= sign * eps * direction
    wanted = (ends[1] - ends[0]) / (2 * eps)
    torch.testing.assert_close((gradients[0][_place(solver)] * direction).sum(), wanted, rtol=1e-5, atol=1e-6)


def _place(solver):
    return [name for name, _ in solver.named_parameters()].index("coefficients.step_size")


def test_training_makes_it_faster_than_what_it_begins_as():
    cell, _ = problem("dense", gain=4.0)
    cell = cell.float()
    x = torch.randn(400, 12, generator=torch.Generator().manual_seed(1))
    tasks = TaskSet(cell, x[:300], x[300:350], x[350:], z0=lambda x: initial_state(cell, x))
    classical = mb.PeacemanRachford.tuned(cell, zeros(x[:50]), x[:50], max_nfe=60)
    solver = make_learned(
        "meta-splitting", state_layout(cell, x, None), conditioning="input", context_channels=12, alpha=classical.alpha
    )
    config = MetaConfig(steps=60, unroll=8, learning_rate=5e-3, orthogonal_rate=0.05, validate_every=20)
    solver = MetaTrainer(solver, tasks, config).run()
    z0, held = tasks.problems("test")
    ours, theirs = (
        mb.solve(cell, z0, held, solver=one, rtol=1e-3, max_nfe=60).nfe.double().mean() for one in (solver, classical)
    )
    assert ours < 0.8 * theirs


def test_it_says_what_it_needs():
    cell, x = problem("dense")
    solver = learned(cell, x)
    with pytest.raises(TypeError, match="MetaSplitting needs a cell with the methods linear, prox, resolvent"):
        mb.solve(lambda z, x: torch.tanh(z + x), zeros(x), x, solver=solver)
    with pytest.raises(TypeError, match="uses parts of f, and function has no method 'resolvent'"):
        unroll(solver, lambda z, x: torch.tanh(z + x), zeros(x), x, steps=2)
    with pytest.raises(ValueError, match="no detach_features, checkpoint_steps or half, got False, True, False"):
        unroll(solver, cell, zeros(x), x, steps=2, checkpoint_steps=True)
    with pytest.raises(ValueError, match="alpha must be a number in"):
        learned(cell, x, alpha=0.0)
    with pytest.raises(ValueError, match="uses parts of it"):
        mb.FixedBudget(cell, solver, max_nfe=4)


@pytest.mark.parametrize("kind", ["classical", "input", "initial_value"])
def test_a_solve_may_begin_with_a_step(kind):
    cell, x = problem("dense", gain=2.0)
    solver = (
        mb.PeacemanRachford(0.5) if kind == "classical" else learned(cell, x, noise=0.03, alpha=0.5, conditioning=kind)
    )
    options = {"solver": solver, "rtol": 0.0, "throw": False}
    first = 2 if kind == "initial_value" else 1
    whole = mb.solve(cell, zeros(x), x, max_nfe=5, snapshots=[first, 3], **options)
    assert (whole.nfe == 5).all()
    assert (whole.steps == 4 - (kind == "initial_value")).all()  # there f(z0) and f(u) come first
    for nfe, kept in zip((first, 3), whole.snapshots, strict=True):
        part = mb.solve(cell, zeros(x), x, max_nfe=nfe, **options)
        assert (part.nfe == nfe).all()
        torch.testing.assert_close(kept, part.z, rtol=0, atol=0)
    if kind == "initial_value":
        assert (mb.solve(cell, zeros(x), x, max_nfe=1, **options).nfe == 1).all()
    at_once = mb.solve(cell, zeros(x), x, solver=solver, rtol=10.0)
    assert (at_once.nfe == 1).all()
    assert at_once.converged.all()
    assert mb.solve(cell, zeros(x), x, max_nfe=5, keep_inverse=True, **options).nfe.max() == 5


@every_structure
def test_where_peaceman_rachford_converges_it_does_given_what_it_had_spent(name):
    """Of a sample that is handed over every evaluation is its own learned steps' or the fallback's."""
    cell, x = problem(name, gain=2.6)
    solver = learned(cell, x, noise=1.0, alpha=0.4)
    options = {"rtol": 1e-6, "max_nfe": 4000}
    solution = mb.solve(cell, zeros(x), x, solver=solver, **options)
    alone = mb.solve(cell, zeros(x), x, solver=solver.fallback()[0], **options)
    phase = solution.trace.phase
    handed = (phase == 1).any(dim=0)
    assert handed.any()
    before = torch.where(phase == 0, solution.trace.nfe, 0).amax(dim=0)
    torch.testing.assert_close((solution.nfe - before)[handed], alone.nfe[handed])


@every_structure
def test_peaceman_rachford_knows_a_solution_when_it_is_given_one(name):
    cell, x = problem(name, gain=2.0)
    star = mb.solve(cell, zeros(x), x, solver=mb.PeacemanRachford(0.5), rtol=1e-12, max_nfe=2000).z
    found = mb.solve(cell, star, x, solver=mb.PeacemanRachford(0.5), rtol=1e-9)
    assert (found.nfe == 1).all()
    near = mb.solve(cell, star, x, solver=mb.PeacemanRachford(0.5), rtol=0.0, max_nfe=4, throw=False)
    assert near.trace.residual.nan_to_num(0).max() < 1e-10  # and stays there


def test_a_learned_start_for_peaceman_rachford_costs_it_nothing():
    cell, x = problem("dense", gain=2.0)
    layout = state_layout(cell, x, None)
    classical = mb.PeacemanRachford(0.5)
    options = {"conditioning": "input", "context_channels": 12, "safeguard": None}
    started = make_learned("started", layout, classical=classical, **options).double().eval()
    assert started.required_methods == classical.required_methods
    ours, theirs = (mb.solve(cell, zeros(x), x, solver=one, rtol=1e-6, max_nfe=200) for one in (started, classical))
    torch.testing.assert_close(ours.nfe, theirs.nfe)
    with pytest.raises(ValueError, match="uses parts of it"):
        mb.FixedBudget(cell, started, max_nfe=4)
    with pytest.raises(ValueError, match="no f_dtype"):
        mb.solve(cell, zeros(x), x, solver=started, f_dtype=torch.bfloat16)


def test_a_backward_pass_that_wants_an_inverse_is_refused():
    cell, x = problem("dense")
    deq = mb.DEQ(cell, solver=learned(cell, x), backward=mb.Implicit(precondition=True))
    with pytest.raises(ValueError, match="needs a forward solver with an inverse Jacobian"):
        deq(x)
