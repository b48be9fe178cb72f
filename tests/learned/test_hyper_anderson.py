"""HyperAnderson: what its ring buffers hold, and how it begins."""

from __future__ import annotations

import pytest
import torch

import metabroyden as mb
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from metabroyden.meta.unroll import unroll
from tests.conftest import tanh


@pytest.mark.parametrize("gram", [False, True])
def test_past_its_memory_it_weighs_the_last_iterates_in_the_order_of_time(gram):
    """Each step, with buffers that have wrapped, is that of a solver that was only ever shown the last m + 1 iterates."""
    solver = make_learned("hyper-anderson", Layout("vector", (12,)), memory=3, gram=gram, initializer_width=0).double()
    for parameter in solver.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double()
    problem = tanh(gain=0.9)

    class Bare:
        shape = (12,)

    with torch.no_grad():
        iterates = unroll(solver, problem.f, problem.z0, problem.x, steps=9, backend="native").iterates
        for last in range(3, 9):
            state = solver.init(problem.z0, problem.z0, Bare())
            for k in range(last - 3, last + 1):
                step = solver.step(iterates[k], problem.f(iterates[k], problem.x) - iterates[k], state, Bare())
                state = step.state
            torch.testing.assert_close(step.z, iterates[last + 1], rtol=1e-10, atol=1e-12)


def test_with_and_without_gradients_it_takes_the_same_steps():
    solver = make_learned(
        "hyper-anderson", Layout("vector", (12,)), memory=3, zero_output=False, conditioning="input"
    ).double()
    problem = tanh(gain=0.9)
    with_graph = unroll(solver, problem.f, problem.z0, problem.x, steps=8, backend="native")
    with torch.no_grad():
        without = unroll(solver, problem.f, problem.z0, problem.x, steps=8, backend="native")
    assert with_graph.residuals.requires_grad
    assert torch.equal(with_graph.residuals.detach(), without.residuals)


def test_it_begins_as_picard_or_as_published():
    problem = tanh(gain=0.9)
    options = {"rtol": 1e-3, "max_nfe": 40, "throw": False}
    picard = mb.solve(problem.f, problem.z0, problem.x, solver=mb.Picard(), **options)
    for zero, same in ((True, True), (False, False)):
        solver = make_learned(
            "hyper-anderson", Layout("vector", (12,)), zero_output=zero, conditioning="input"
        ).double()
        found = mb.solve(problem.f, problem.z0, problem.x, solver=solver, **options)
        first = min(len(found.trace.residual), len(picard.trace.residual), 5)
        close = torch.allclose(found.trace.residual[:first], picard.trace.residual[:first], rtol=1e-6, equal_nan=True)
        assert close == same
    with pytest.raises(ValueError, match="memory must be an integer of at least 1, got 0"):
        make_learned("hyper-anderson", Layout("vector", (12,)), memory=0)
