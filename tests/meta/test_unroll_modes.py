"""Unrolls that drop, save or round something: what stays the same and what does not."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from metabroyden.meta import MetaConfig, TaskSet
from metabroyden.meta.estimators import seeded, training_batch, unroll_length
from metabroyden.meta.objectives import ResidualObjective
from metabroyden.meta.unroll import UnrolledProblem, unroll
from tests.conftest import tanh
from tests.meta.test_unroll import LEARNED, gradients, trained_a_little

PROBLEM = tanh(batch=3, n=6, gain=1.1)


def rollout_of(solver, backend="native", steps=5, problem=PROBLEM, **modes):
    return unroll(solver, problem.f, problem.z0, problem.x, steps=steps, backend=backend, **modes)


def loss_of(solver, *arguments, **modes):
    return ResidualObjective()(rollout_of(solver, *arguments, **modes).residuals)


# the universal solver's features and γ are constants of the gradient in any mode
@pytest.mark.parametrize("name", sorted(set(LEARNED) - {"universal"}))
def test_detached_features_give_the_gradient_of_updates_that_see_constants(name):
    """Against finite differences of a loss in which every step is handed the iterates of the unmoved solver."""
    solver = trained_a_little(name)
    found = gradients(solver, loss_of(solver, "native", detach_features=True))
    through_higher = gradients(solver, loss_of(solver, "higher", detach_features=True))
    torch.testing.assert_close(through_higher, found, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(loss_of(solver, detach_features=True), loss_of(solver), rtol=0, atol=0)
    exact = gradients(solver, loss_of(solver))
    assert (found - exact).norm() > 1e-3 * exact.norm()

    constants = [z.detach() for z in rollout_of(solver).iterates]
    view = UnrolledProblem(PROBLEM.f, PROBLEM.z0, PROBLEM.x)

    @torch.no_grad()
    def loss() -> float:
        z = solver.start(PROBLEM.z0, view)
        state = solver.init(constants[0], view.residual(constants[0]), view)
        residuals = [view.measure(z)[1]]
        for constant in constants[:-1]:
            step = solver.step(constant, view.residual(constant), state, view)
            z, state = z + step.z - constant, step.state
            residuals.append(view.measure(z)[1])
        return float(ResidualObjective()(torch.stack(residuals)))

    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = torch.nn.utils.parameters_to_vector(solver.parameters()).detach()
    values = []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(start + sign * 1e-6 * direction, solver.parameters())
        values.append(loss())
    torch.nn.utils.vector_to_parameters(start, solver.parameters())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(found @ direction), rel=1e-5)


@pytest.mark.parametrize("backend", ["higher", "native"])
@pytest.mark.parametrize("name", LEARNED)
def test_checkpointed_steps_have_the_same_gradients(name, backend):
    solver = trained_a_little(name)
    for detached in (False, True):
        wanted = gradients(solver, loss_of(solver, detach_features=detached))
        loss = loss_of(solver, backend, checkpoint_steps=True, detach_features=detached)
        torch.testing.assert_close(gradients(solver, loss), wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", ["higher", "native"])
def test_checkpointed_steps_keep_less_for_the_backward_pass(backend):
    solver = trained_a_little("grouped")

    def kept(steps: int, *, twice: bool) -> int:
        """Bytes saved by the graph outside what is computed again."""
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.nbytes
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            loss_of(solver, backend, steps, checkpoint_steps=twice)
        return total

    growth = [kept(20, twice=twice) - kept(10, twice=twice) for twice in (False, True)]
    assert growth[1] < 0.25 * growth[0]


@pytest.mark.parametrize("name", LEARNED)
def test_f_in_bfloat16_leaves_iterates_and_residuals_in_float32(name):
    solver, seen = trained_a_little(name).float(), set()
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(2)) / 4
    problem = tanh(batch=3, n=6, dtype=torch.float32)

    def f(z, x):
        product = z @ weight
        seen.add((z.dtype, product.dtype))
        return torch.tanh(product + x)

    runs = [
        unroll(solver, f, problem.z0, problem.x, steps=4, backend=backend, half=half)
        for backend, half in (("higher", True), ("native", True), ("native", False))
    ]
    assert seen == {(torch.float32, torch.bfloat16), (torch.float32, torch.float32)}
    grads = [gradients(solver, ResidualObjective()(run.residuals)) for run in runs]
    assert {run.residuals.dtype for run in runs} == {run.z.dtype for run in runs} == {torch.float32}
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
    assert 0 < (runs[1].z - runs[2].z).norm() < 0.05 * runs[2].z.norm(), "rounded, and no more than that"
    with pytest.raises(ValueError, match=r"bfloat16 is for states of float32, got .*float64"):
        rollout_of(trained_a_little(name), half=True)


def test_lengths_are_log_uniform_and_a_function_of_seed_and_step():
    lengths = [unroll_length((4, 32), 0, step) for step in range(3000)]
    assert {min(lengths), max(lengths)} == {4, 32}
    below = sum(length < 12 for length in lengths) / len(lengths)
    assert below == pytest.approx(math.log(12 / 4) / math.log(33 / 4), abs=0.03)
    assert lengths[7] == unroll_length((4, 32), 0, 7) != unroll_length((4, 32), 1, 7)
    assert unroll_length(14, 0, 7) == 14


def test_random_starts_are_as_large_as_told_and_of_a_place_in_the_batch():
    train, held = torch.randn(50, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    tasks = TaskSet(PROBLEM.f, train, held)
    config = MetaConfig(batch=2000, start_noise=0.3)
    z0, x = training_batch(tasks, config, 5)
    plain, same = training_batch(tasks, MetaConfig(batch=2000), 5)
    assert torch.equal(x, same)
    assert torch.equal(plain, torch.zeros_like(plain))
    size = PROBLEM.f(plain, x).square().mean(dim=1, keepdim=True).sqrt()
    assert float((z0 / size).std()) == pytest.approx(0.3, rel=0.05)
    parts = [training_batch(tasks, config, 5, slice(begin, begin + 500)) for begin in range(0, 2000, 500)]
    assert torch.equal(torch.cat([part[0] for part in parts]), z0)
    assert torch.equal(torch.cat([part[1] for part in parts]), x)
    assert not torch.equal(training_batch(tasks, config, 6)[0], z0)
    assert seeded(0, 1, "a").initial_seed() != seeded(0, 1, "b").initial_seed()
