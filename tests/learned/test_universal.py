"""Solvers that are bound to no shape: the coordinatewise LSTM and the universal solver."""

from __future__ import annotations

import pytest
import torch

import metabroyden as mb
from metabroyden.learned import CoordinatewiseConfig, Universal, UniversalConfig
from metabroyden.learned.coordinatewise import log_sign
from metabroyden.learned.layout import Layout
from metabroyden.learned.universal import specialised
from metabroyden.meta import unroll
from metabroyden.meta.fit import make_learned
from metabroyden.zoo.models.cells import CELLS, make_cell
from metabroyden.zoo.random_cells import KINDS, random_problem
from tests.helpers import DOUBLE, normal, perturbed, refused, vector


def unrolled(solver, f, x, steps, z0=None):
    return unroll(solver, f, x * 0 if z0 is None else z0, x, steps=steps, backend="native")


@pytest.mark.parametrize("name", ["coordinatewise", "universal"])
@pytest.mark.parametrize("cell", CELLS)
def test_one_solver_runs_on_every_cell_of_any_width_and_layout(name, cell):
    f, x = make_cell(cell, batch=3)
    options = {"initializer_width": 0} if name == "coordinatewise" else {}
    solver = perturbed(make_learned(name, Layout("image", (4, 5, 5)), **options), 0.02)
    assert solver.dimension_free
    z0 = mb.deq.initial_state(f, x)
    with torch.no_grad():
        found = mb.solve(f, z0, x, solver=solver, rtol=1e-3, max_nfe=150, throw=False)
    shapes = lambda z: [part.shape for part in (z if isinstance(z, tuple) else (z,))]  # noqa: E731
    assert shapes(found.z) == shapes(z0)
    assert found.converged.all()


def test_with_an_initializer_it_belongs_to_its_channels():
    solver, z = vector("coordinatewise", 6), torch.ones(2, 7, dtype=DOUBLE)
    assert not solver.dimension_free
    words = r"6 channels\); got per-sample shape \(7,\)"
    refused(words, lambda: mb.solve(lambda z, x: 0.5 * z + x, z, z, solver=solver))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_coordinatewise_step_does_not_know_which_coordinate_is_which(layers):
    """Coordinates changed about give an iterate changed about."""
    x, w = normal(3, 12, dtype=DOUBLE), normal(12, 12, seed=1, dtype=DOUBLE) / 5
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    solver = perturbed(vector("coordinatewise", 12, initializer_width=0, layers=layers))
    with torch.no_grad():
        here = unrolled(solver, lambda z, x: torch.tanh(z @ w + x), x, 5).z
        there = unrolled(solver, lambda z, x: torch.tanh(z @ w[order][:, order] + x), x[:, order], 5).z
    torch.testing.assert_close(here[:, order], there)


def test_log_sign_is_continuous_and_keeps_small_numbers_apart():
    edge = torch.exp(torch.tensor(-10.0, dtype=torch.float64))
    torch.testing.assert_close(log_sign(edge * (1 - 1e-9)), log_sign(edge * (1 + 1e-9)), rtol=0, atol=1e-6)
    tiny = log_sign(torch.tensor([1e-7, 2e-7]))
    assert tiny[0, 0] == tiny[1, 0] == -1
    assert tiny[1, 1] > 1.9 * tiny[0, 1]


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (CoordinatewiseConfig, {"layers": 3}, "layers must be one of 1, 2, got 3"),
        (CoordinatewiseConfig, {"preprocessing": "log"}, "preprocessing must be one of log-sign, scaled, got 'log'"),
        (UniversalConfig, {"memory": 0}, "memory must be an integer of at least 1, got 0"),
        (UniversalConfig, {"ridge": 0.0}, r"ridge must be in \(0, 1\], got 0.0"),
        (UniversalConfig, {"rank": -1}, "rank must be an integer of at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused(config, options, words):
    refused(words, lambda: config(**{"layout": "vector", "shape": (3,), **options}))


def test_the_universal_solver_does_not_see_units():
    """f in other units, its path in other units."""
    solver, x = perturbed(Universal(UniversalConfig()).double()), normal(4, 12, seed=3, dtype=DOUBLE)
    w = 0.9 * torch.linalg.qr(normal(12, 12, dtype=DOUBLE)).Q
    f = lambda z, x: torch.tanh(z @ w + x)  # noqa: E731
    with torch.no_grad():
        one = unrolled(solver, f, x, 8, z0=x).z
        other = unrolled(solver, lambda z, x: 1000 * f(z / 1000, x), x, 8, z0=1000 * x).z
    torch.testing.assert_close(1000 * one, other, rtol=1e-6, atol=1e-6)


def test_gradients_of_the_universal_solver_reach_its_weights_and_agree_with_differences():
    """Where f is linear in nothing but scale, what is held constant (γ but for its ridge) does not matter at two steps."""
    solver, x, values = perturbed(Universal(UniversalConfig(hidden=4)).double(), 0.3), normal(3, 6, dtype=DOUBLE), []
    f, offset = (lambda z, x: torch.tanh(1.5 * z.roll(1, 1) + x)), solver.lstm.offset
    (grad,) = torch.autograd.grad(unrolled(solver, f, x, 1).z.sum(), [offset])
    for by in (1e-6, -2e-6):
        offset.data[0] += by
        values.append(unrolled(solver, f, x, 1).z.sum().detach())
    torch.testing.assert_close(grad[0, 0], (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-8)
    (grad,) = torch.autograd.grad(unrolled(solver, f, x, 5).residuals.log().sum(), [offset])
    assert (grad != 0).all(), "every output matters"


def test_specialised_it_begins_where_it_was():
    x, solver = normal(4, 3, 6, 6), perturbed(Universal(UniversalConfig()))
    options = {"conditioning": "input", "context_channels": 3, "rank": 4, "initializer_width": 5}
    own = specialised(solver, Layout("image", (3, 6, 6)), **options)
    assert not own.dimension_free
    f = lambda z, x: torch.tanh(0.9 * z.roll(1, 1) + x)  # noqa: E731
    ours, theirs = (mb.solve(f, x * 0, x, solver=one, rtol=1e-4, max_nfe=80) for one in (own, solver))
    torch.testing.assert_close(ours.z, theirs.z)
    assert torch.equal(ours.nfe, theirs.nfe)


@pytest.mark.parametrize("seed", [3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_random_cells_follow_from_the_generator_and_take_batches_apart(kind, seed):
    f, z0, x = random_problem(torch.Generator().manual_seed(seed), 5, kind)
    again, _, x_again = random_problem(torch.Generator().manual_seed(seed), 5, kind)
    assert torch.equal(x, x_again)
    z = normal(*z0.shape)
    assert torch.equal(f(z, x), again(z, x))
    torch.testing.assert_close(f(z, x)[2:3], f(z[2:3], x[2:3]), rtol=1e-4, atol=1e-5)
    refused("unknown kind of random cell 'denser'", lambda: random_problem(torch.Generator(), 2, "denser"))
