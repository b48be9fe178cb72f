"""MetaBroyden on Peaceman–Rachford's map."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import metabroyden as mb
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet
from metabroyden.meta.defaults import state_layout
from metabroyden.meta.fit import make_learned
from metabroyden.meta.unroll import BACKENDS, unroll
from tests.helpers import normal, perturbed, refused
from tests.zoo.test_monotone import Counted, flat, problem, recomputed, zeros

every_structure = pytest.mark.parametrize("name", ["dense", "conv", "two tiers"])


def learned(cell, x, *, noise=0.0, conditioning="input", **options):
    """A solver for a cell in float64, its weights moved by so much noise."""
    layout = state_layout(cell, x, None)
    channels = layout.context_channels(x, layout.shape) if conditioning == "input" else 0
    options |= {"conditioning": conditioning, "context_channels": channels}
    return perturbed(make_learned("meta-splitting", layout, **options).double(), noise).eval()


def solved(cell, x, solver, **options):
    return mb.solve(cell, zeros(x), x, solver=solver, **options)


@every_structure
@pytest.mark.parametrize("conditioning", ["input", "initial_value"])
def test_untrained_it_is_peaceman_rachford(name, conditioning):
    cell, x = problem(name, gain=2.0)
    solver = learned(cell, x, alpha=0.4, learned_steps=200, conditioning=conditioning)
    ours, theirs = (solved(cell, x, one, rtol=1e-8, max_nfe=200) for one in (solver, mb.PeacemanRachford(0.4)))
    atol = 3e-6
    if conditioning == "input":  # else it begins at f(z0)
        torch.testing.assert_close(ours.nfe, theirs.nfe)
        atol = 1e-14
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
def test_with_any_weights_it_ends_where_peaceman_rachford_does_given_what_it_had_spent(name):
    """Of a sample that is handed over every evaluation is its own learned steps' or the fallback's."""
    cell, x = problem(name, gain=2.6)
    solver, options = learned(cell, x, noise=1.0, alpha=0.4), {"rtol": 1e-8, "max_nfe": 4000}
    ours, alone = (solved(cell, x, one, **options) for one in (solver, solver.fallback()[0]))
    phase = ours.trace.phase
    handed = (phase == 1).any(dim=0)
    assert handed.any(), "weights this bad must be handed over"
    wanted = solved(cell, x, mb.PeacemanRachford(0.4), **options)
    torch.testing.assert_close(flat(ours.z), flat(wanted.z), rtol=0, atol=3e-6)
    before = torch.where(phase == 0, ours.trace.nfe, 0).amax(dim=0)
    torch.testing.assert_close((ours.nfe - before)[handed], alone.nfe[handed])


@every_structure
def test_an_unroll_takes_the_steps_of_a_solve_by_either_backend(name):
    cell, x = problem(name, gain=2.0)
    cell.requires_grad_(False)
    solver, steps = (
        learned(cell, x, noise=0.05, alpha=0.5),
        lambda n, **more: unroll(solver, cell, zeros(x), x, steps=n, **more),
    )
    residuals = solved(cell, x, solver, rtol=0.0, max_nfe=8, throw=False).trace.residual
    gradients, weights = [], list(solver.parameters())
    for backend in BACKENDS:
        rollout = steps(4, backend=backend)
        rest = steps(3, backend=backend, begin=rollout.carry())
        torch.testing.assert_close(torch.cat([rollout.residuals, rest.residuals[1:]]), residuals)
        gradients.append(torch.autograd.grad(rollout.residuals.log().sum(), weights))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    weight, eps, ends = solver.coefficients.step_size, 1e-6, []
    direction = torch.randn_like(weight)
    for by in (eps, -2 * eps):
        weight.data += by * direction
        ends.append(steps(4, backend="native").residuals.log().sum().detach())
    (found,) = [grad for one, grad in zip(weights, gradients[0], strict=True) if one is weight]
    torch.testing.assert_close((found * direction).sum(), (ends[0] - ends[1]) / (2 * eps), rtol=1e-5, atol=1e-6)


def test_training_makes_it_faster_than_what_it_begins_as():
    cell, x = problem("dense", gain=4.0)[0].float(), normal(400, 12, seed=1)
    tasks = TaskSet(cell, x[:300], x[300:350], x[350:], z0=zeros)
    classical = mb.PeacemanRachford.tuned(cell, zeros(x[:50]), x[:50], max_nfe=60)
    solver = learned(cell, x, alpha=classical.alpha).float()
    config = MetaConfig(steps=60, unroll=8, learning_rate=5e-3, orthogonal_rate=0.05, validate_every=20)
    MetaTrainer(solver, tasks, config).run()
    _, held = tasks.problems("test")
    ours, theirs = (solved(cell, held, one, rtol=1e-3, max_nfe=60).nfe.double().mean() for one in (solver, classical))
    assert ours < 0.8 * theirs


def test_it_says_what_it_needs():
    cell, x = problem("dense")
    solver, f = learned(cell, x), lambda z, x: torch.tanh(z + x)
    words = "MetaSplitting needs a cell with the methods linear, prox, resolvent"
    refused(words, lambda: solved(f, x, solver), TypeError)
    words = "uses parts of f, and function has no method 'resolvent'"
    refused(words, lambda: unroll(solver, f, zeros(x), x, steps=2), TypeError)
    words = "no detach_features, checkpoint_steps or half, got False, True, False"
    refused(words, lambda: unroll(solver, cell, zeros(x), x, steps=2, checkpoint_steps=True))
    refused("alpha must be a number in", lambda: learned(cell, x, alpha=0.0))
    refused("uses parts of it", lambda: mb.FixedBudget(cell, solver, max_nfe=4))
    deq = mb.DEQ(cell, solver=solver, backward=mb.Implicit(precondition=True))
    refused("needs a forward solver with an inverse Jacobian", lambda: deq(x))


@pytest.mark.parametrize("kind", ["classical", "input", "initial_value"])
def test_a_solve_may_begin_with_a_step(kind):
    cell, x = problem("dense", gain=2.0)
    first = 2 if kind == "initial_value" else 1  # there f(z0) and f(u) come first
    solver = mb.PeacemanRachford(0.5)
    if kind != "classical":
        solver = learned(cell, x, noise=0.03, alpha=0.5, conditioning=kind)
    options = {"rtol": 0.0, "throw": False}
    whole = solved(cell, x, solver, max_nfe=5, snapshots=[first, 3], **options)
    assert (whole.nfe == 5).all()
    assert (whole.steps == 5 - first).all()
    for nfe, kept in zip((first, 3), whole.snapshots, strict=True):
        part = solved(cell, x, solver, max_nfe=nfe, **options)
        assert (part.nfe == nfe).all()
        torch.testing.assert_close(kept, part.z, rtol=0, atol=0)
    assert (solved(cell, x, solver, max_nfe=1, **options).nfe == 1).all()
    at_once = solved(cell, x, solver, rtol=10.0)
    assert (at_once.nfe == 1).all()
    assert at_once.converged.all()
    assert solved(cell, x, solver, max_nfe=5, keep_inverse=True, **options).nfe.max() == 5


@every_structure
def test_peaceman_rachford_knows_a_solution_when_it_is_given_one(name):
    cell, x = problem(name, gain=2.0)
    solver = mb.PeacemanRachford(0.5)
    star = solved(cell, x, solver, rtol=1e-12, max_nfe=2000).z
    assert (mb.solve(cell, star, x, solver=solver, rtol=1e-9).nfe == 1).all()
    near = mb.solve(cell, star, x, solver=solver, rtol=0.0, max_nfe=4, throw=False)
    assert near.trace.residual.nan_to_num(0).max() < 1e-10  # and stays there


def test_a_learned_start_for_peaceman_rachford_costs_it_nothing():
    cell, x = problem("dense", gain=2.0)
    classical = mb.PeacemanRachford(0.5)
    options = {"conditioning": "input", "context_channels": 12, "safeguard": None}
    started = make_learned("started", state_layout(cell, x, None), classical=classical, **options).double().eval()
    assert started.required_methods == classical.required_methods
    ours, theirs = (solved(cell, x, one, rtol=1e-6, max_nfe=200) for one in (started, classical))
    torch.testing.assert_close(ours.nfe, theirs.nfe)
    refused("uses parts of it", lambda: mb.FixedBudget(cell, started, max_nfe=4))
    refused("no f_dtype", lambda: solved(cell, x, started, f_dtype=torch.bfloat16))
