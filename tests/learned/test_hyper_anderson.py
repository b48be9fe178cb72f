"""HyperAnderson: what its ring buffers hold, and how it begins."""

from __future__ import annotations

import pytest
import torch

import metabroyden as mb
from metabroyden.meta.unroll import unroll
from tests.conftest import tanh
from tests.helpers import perturbed, refused, vector

PROBLEM = tanh(gain=0.9)


def unrolled(solver, steps: int):
    return unroll(solver, PROBLEM.f, PROBLEM.z0, PROBLEM.x, steps=steps, backend="native")


@pytest.mark.parametrize("gram", [False, True])
def test_past_its_memory_it_weighs_the_last_iterates_in_the_order_of_time(gram):
    """Each step, with buffers that have wrapped, is that of a solver that was only ever shown the last m + 1 iterates."""
    solver = perturbed(vector("hyper-anderson", 12, memory=3, gram=gram, initializer_width=0))

    class Bare:
        shape = (12,)

    with torch.no_grad():
        iterates = unrolled(solver, 9).iterates
        for last in range(3, 9):
            state = solver.init(PROBLEM.z0, PROBLEM.z0, Bare())
            for z in iterates[last - 3 : last + 1]:
                found, state, _ = solver.step(z, PROBLEM.f(z, PROBLEM.x) - z, state, Bare())
            torch.testing.assert_close(found, iterates[last + 1], rtol=1e-10, atol=1e-12)


def test_with_and_without_gradients_it_takes_the_same_steps():
    solver = vector("hyper-anderson", 12, memory=3, zero_output=False, conditioning="input")
    with_graph = unrolled(solver, 8).residuals
    with torch.no_grad():
        without = unrolled(solver, 8).residuals
    assert with_graph.requires_grad
    assert torch.equal(with_graph.detach(), without)


def test_it_begins_as_picard_or_as_published():
    def residuals(solver):
        options = {"rtol": 1e-3, "max_nfe": 40, "throw": False}
        return mb.solve(PROBLEM.f, PROBLEM.z0, PROBLEM.x, solver=solver, **options).trace.residual[:5]

    picard = residuals(mb.Picard())
    for zero in (True, False):
        found = residuals(vector("hyper-anderson", 12, zero_output=zero, conditioning="input"))
        assert torch.allclose(found, picard[: len(found)], rtol=1e-6, equal_nan=True) == zero
    refused("memory must be an integer of at least 1, got 0", lambda: vector("hyper-anderson", 12, memory=0))
