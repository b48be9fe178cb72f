"""What a fit finds out about its solver on validation: when to give a sample up, when a given start is warm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import metabroyden as mb
from metabroyden.learned.base import apart
from metabroyden.learned.safeguard import BY_PROGRESS
from metabroyden.meta.calibrate import PATIENCES, RESUMED, SLACK, calibrated
from metabroyden.meta.tasks import TaskSet
from metabroyden.solvers.tuning import score
from tests.helpers import ConvTanh, contexts, perturbed, same_parameters

LIMITS = {"rtol": 1e-3, "max_nfe": 60}


def solver_and_tasks(conditioning="input", z0=None, **options):
    tasks = TaskSet(ConvTanh(), contexts(20), contexts(24, 1), z0=z0)
    layout = mb.Layout("image", (3, 4, 4))
    solver = mb.MetaBroyden(layout=layout, conditioning=conditioning, damping=0.5, schedule_length=6, **options)
    return perturbed(solver, 0.02).eval().requires_grad_(False), tasks


def solved(solver, tasks, **options):
    z0, x = tasks.problems("validation")
    return mb.solve(tasks.f, z0, x, solver=solver, throw=False, **{**LIMITS, **options})


@pytest.mark.parametrize("conditioning", ["input", "initial_value"])
def test_the_envelope_is_what_the_slowest_validation_sample_reaches_with_slack(conditioning):
    solver, tasks = solver_and_tasks(conditioning)
    before = solver.config
    found = calibrated(solver, tasks, **LIMITS, most=100)["safeguard"]
    assert solver.config == before, "the caller decides what to do with it"
    solver.config = replace(before, safeguard=None)
    residual = solved(solver, tasks).trace.residual.numpy()
    first = 1 if conditioning == "initial_value" else 0  # a look at z0 comes before
    slowest = np.fmin.accumulate(np.where(np.isnan(residual), np.inf, residual))[first:].max(axis=1)
    assert len(found.envelope) == 1 + (slowest > 1e-3).sum() - (slowest[-1] > 1e-3)
    np.testing.assert_allclose(found.envelope, np.maximum(SLACK * slowest, 1e-3)[: len(found.envelope)], rtol=1e-5)


def test_the_patience_is_the_one_that_does_best_on_validation():
    solver, tasks = solver_and_tasks()
    config = solver.config
    found = calibrated(solver, tasks, **LIMITS, most=100)["safeguard"]
    scores = {}
    for patience in PATIENCES:
        solver.config = replace(config, safeguard=replace(found, patience=patience))
        scores[patience] = score(solved(solver, tasks).trace, (1e-3,), 60)
    assert scores[found.patience] == min(scores.values())
    assert (found.progress, found.memory) == (BY_PROGRESS.progress, BY_PROGRESS.memory)


@pytest.mark.parametrize(("rtol", "expected"), [(1e-3, None), (0.3, RESUMED), (1e-12, BY_PROGRESS.resumed_patience)])
def test_a_resumed_solve_may_cost_half_of_a_restart(rtol, expected):
    solver, tasks = solver_and_tasks()
    found = calibrated(solver, tasks, rtol=rtol, max_nfe=60, most=100)["safeguard"]
    plain = solved(solver.fallback()[0], tasks, rtol=rtol)
    half = np.ceil(np.quantile(np.where(plain.converged, plain.nfe, 60), 0.95) / 2)
    assert found.resumed_patience == (half if expected is None else expected)
    assert RESUMED <= found.resumed_patience <= BY_PROGRESS.resumed_patience


def test_what_validation_does_not_know_is_handed_over_within_a_few_evaluations():
    """Wrong weights: as many samples are solved as by the fallback alone, for a few evaluations more."""
    solver, tasks = solver_and_tasks()
    config = replace(solver.config, **calibrated(solver, tasks, **LIMITS, most=100))
    alone = solved(solver.fallback()[0], tasks)
    solver.config = replace(config, safeguard=replace(config.safeguard, patience=None, horizon=None))
    assert (solved(solver, tasks).trace.phase <= 0).all(), "none of those it knows is above the envelope"
    solver.config = config
    wrong = solved(perturbed(solver, 1.0), tasks)
    assert wrong.trace.phase.max() > 0
    assert wrong.converged.double().mean() >= alone.converged.double().mean()
    assert wrong.nfe.double().mean() <= alone.nfe.double().mean() + 5


def test_reach_is_found_where_solves_start_at_zero_and_only_there():
    solver, tasks = solver_and_tasks()
    low, high, far = calibrated(solver, tasks, **LIMITS, most=100)["reach"]
    assert 1e-3 / 2 <= low <= high <= 1
    z = solved(solver, tasks).z
    _, x = tasks.problems("validation")
    farthest = float(apart(solver.initializer(x).flatten(1), z.flatten(1)).max())
    assert farthest <= far <= 1.1 * farthest
    elsewhere, others = solver_and_tasks(z0=torch.ones_like)
    assert calibrated(elsewhere, others, **LIMITS, most=100)["reach"] is None
    plain, tasks = solver_and_tasks(initializer_width=0)
    assert calibrated(plain, tasks, **LIMITS, most=100)["reach"] is None


@pytest.mark.parametrize("safeguard", [None, mb.Safeguard(horizon=7)])
def test_a_safeguard_of_ones_own_stays(safeguard):
    solver, tasks = solver_and_tasks(safeguard=safeguard)
    assert calibrated(solver, tasks, **LIMITS, most=100)["safeguard"] == safeguard


def test_a_fit_uses_it_and_its_solver_keeps_it_through_a_file(tmp_path):
    solver = mb.fit_solver(ConvTanh(), contexts(30), steps=2, fallback=False, progress=False)
    assert solver.config.safeguard.envelope
    assert len(solver.config.reach) == 3
    mb.save_solver(solver, tmp_path / "solver.safetensors")
    again = mb.load_solver(tmp_path / "solver.safetensors")
    assert again.config == solver.config
    assert same_parameters(again, solver)
