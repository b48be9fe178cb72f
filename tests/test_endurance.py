"""Nothing grows with use, and a safeguarded learned solver loses nothing that Broyden solves."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metabroyden as mb
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.tasks import TaskSet
from metabroyden.meta.trainer import MetaTrainer
from tests.helpers import FAMILIES, moved, random_map

SAFEGUARDED = ("grouped", "coordinatewise", "hyper-anderson", "meta-broyden", "neural-fixed-point", "universal")


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(SAFEGUARDED),
    family=st.sampled_from(FAMILIES),
    n=st.integers(1, 6),
    gain=st.floats(0.1, 3.0),
    rtol=st.sampled_from([1e-2, 1e-4, 1e-6]),
    seed=st.integers(0, 10**6),
)
def test_what_broyden_solves_a_safeguarded_solver_solves_given_what_it_had_spent_before(
    name, family, n, gain, rtol, seed
):
    f, dtype = random_map(family, n, gain, seed), torch.float64
    x = torch.randn(6, n, generator=torch.Generator().manual_seed(seed + 1), dtype=dtype)
    solver, budget, more = moved(name, n, dtype), 40, 500
    fallback = solver.config.safeguard.fallback()
    plain = mb.solve(f, torch.zeros_like(x), x, solver=fallback, rtol=rtol, max_nfe=budget, throw=False)
    ours = mb.solve(f, torch.zeros_like(x), x, solver=solver, rtol=rtol, max_nfe=budget + more, throw=False)
    spent = np.where(ours.trace.phase.numpy() < 2, ours.trace.nfe.numpy(), 0).max(axis=0)  # before Broyden begins anew
    assert (spent < more).all(), "a learned phase must come to an end"
    assert (ours.converged >= plain.converged).all()
    both = plain.converged.numpy()
    assert (ours.nfe.numpy()[both] <= (spent + plain.nfe.numpy())[both]).all()


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def _grown(once: Callable[[], object], times: int) -> int:
    """Tensors alive after so many calls more than after a few."""
    for _ in range(3):
        once()
    before = _tensors()
    for _ in range(times):
        once()
    return _tensors() - before


class Cell(torch.nn.Module):
    """tanh(Wz + x)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = mb.normalise(torch.nn.Linear(6, 6))
        self.dropout = mb.VariationalDropout(0.1, (6,))

    def forward(self, z, x):
        return torch.tanh(0.8 * self.linear(self.dropout(z)) + x)


@pytest.mark.parametrize("name", ["broyden", "meta-broyden"])
def test_solves_leave_nothing_behind(name):
    solver = mb.Broyden() if name == "broyden" else moved(name, 6, torch.float32)
    f, x = random_map("tanh", 6, 0.9, 0), torch.randn(8, 6)
    assert _grown(lambda: mb.solve(f, torch.zeros_like(x), x, solver=solver, throw=False), 100) <= 0


def test_training_steps_of_a_layer_leave_nothing_behind():
    deq = mb.DEQ(Cell(), warn=False)
    optimizer = torch.optim.Adam(deq.parameters())

    def once():
        optimizer.zero_grad()
        deq(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()

    assert _grown(once, 50) <= 0


@pytest.mark.parametrize("backend", ["higher", "native"])
def test_outer_steps_of_meta_training_leave_nothing_behind(backend):
    f, x = random_map("tanh", 6, 0.9, 0), torch.randn(40, 6)
    tasks = TaskSet(f, x[:20], x[20:30], x[30:])
    solver = moved("meta-broyden", 6, torch.float32)
    counts = []
    for steps in (4, 24):
        config = MetaConfig(steps=steps, unroll=4, batch=4, validate_every=4, backend=backend)
        trainer = MetaTrainer(solver.requires_grad_(True), tasks, config)
        trainer.run()
        del trainer
        counts.append(_tensors())
    solver.requires_grad_(False)
    assert counts[1] <= counts[0]
