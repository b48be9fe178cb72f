"""Solvers that are bound to no shape: the coordinatewise LSTM and the universal solver."""

from __future__ import annotations

from pathlib import Path

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

RESULTS = Path(__file__).parents[2] / "results"


def rattled(solver, size=0.1):
    """The solver with weights that are not those it started with."""
    for parameter in solver.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return solver


def free(name):
    options = {"initializer_width": 0} if name == "coordinatewise" else {}
    return make_learned(name, Layout("image", (4, 5, 5)), **options)


@pytest.mark.parametrize("name", ["coordinatewise", "universal"])
@pytest.mark.parametrize("cell", CELLS)
def test_one_solver_runs_on_every_cell_of_any_width_and_layout(name, cell):
    f, x = make_cell(cell, batch=3)
    solver = rattled(free(name), 0.02)
    assert solver.dimension_free
    z0 = mb.deq.initial_state(f, x)
    with torch.no_grad():
        found = mb.solve(f, z0, x, solver=solver, rtol=1e-3, max_nfe=150, throw=False)
    one = (z0,) if isinstance(z0, torch.Tensor) else z0
    assert [part.shape for part in (found.z if isinstance(found.z, tuple) else (found.z,))] == [p.shape for p in one]
    assert found.converged.all()


def test_with_an_initializer_it_belongs_to_its_channels():
    solver = make_learned("coordinatewise", Layout("vector", (6,)))
    assert not solver.dimension_free
    with pytest.raises(ValueError, match=r"6 channels\); got per-sample shape \(7,\)"):
        mb.solve(lambda z, x: 0.5 * z + x, torch.zeros(2, 7), torch.ones(2, 7), solver=solver)


def test_a_coordinatewise_step_does_not_know_which_coordinate_is_which():
    """Coordinates changed about give an iterate changed about."""
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 5
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    for layers in (1, 2):
        solver = rattled(
            make_learned("coordinatewise", Layout("vector", (12,)), initializer_width=0, layers=layers).double()
        )
        with torch.no_grad():
            here = unroll(solver, lambda z, x: torch.tanh(z @ w + x), x * 0, x, steps=5, backend="native").z
            there = unroll(
                solver,
                lambda z, x: torch.tanh(z @ w[order][:, order] + x),
                x * 0,
                x[:, order],
                steps=5,
                backend="native",
            ).z
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
    with pytest.raises(ValueError, match=words):
        config(**{"layout": "vector", "shape": (3,), **options})


def test_the_universal_solver_does_not_see_units():
    """f in other units, its path in other units."""
    solver = rattled(Universal(UniversalConfig()).double())
    f, z0, x = random_problem(torch.Generator().manual_seed(3), 4, "dense")
    f, x = (lambda z, x: torch.tanh(z @ w + x)), x.double()
    w = (
        0.9
        * torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=torch.Generator().manual_seed(0))).Q.double()
    )
    with torch.no_grad():
        one = unroll(solver, f, z0.double(), x, steps=8, backend="native").iterates[-1]
        other = unroll(
            solver, lambda z, x: 1000 * f(z / 1000, x), 1000 * z0.double(), x, steps=8, backend="native"
        ).iterates[-1]
    torch.testing.assert_close(1000 * one, other, rtol=1e-6, atol=1e-6)


def test_gradients_of_the_universal_solver_reach_its_weights_and_agree_with_differences():
    """Where f is linear in nothing but scale, what is held constant (γ but for its ridge) does not matter at two steps."""
    solver = rattled(Universal(UniversalConfig(hidden=4)).double(), 0.3)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss():
        return unroll(
            solver, lambda z, x: torch.tanh(1.5 * z.roll(1, 1) + x), x * 0, x, steps=1, backend="native"
        ).z.sum()

    (grad,) = torch.autograd.grad(loss(), [solver.lstm.offset])
    with torch.no_grad():
        solver.lstm.offset[0] += 1e-6
        up = loss()
        solver.lstm.offset[0] -= 2e-6
        down = loss()
    torch.testing.assert_close(grad[0, 0], (up - down) / 2e-6, rtol=1e-5, atol=1e-8)
    rollout = unroll(solver, lambda z, x: torch.tanh(1.5 * z.roll(1, 1) + x), x * 0, x, steps=5, backend="native")
    (grad,) = torch.autograd.grad(rollout.residuals.log().sum(), [solver.lstm.offset])
    assert (grad != 0).all(), "every output matters"


def test_specialised_it_begins_where_it_was():
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    solver = rattled(Universal(UniversalConfig()))
    own = specialised(
        solver, Layout("image", (3, 6, 6)), conditioning="input", context_channels=3, rank=4, initializer_width=5
    )
    assert not own.dimension_free

    def f(z, x):
        return torch.tanh(0.9 * z.roll(1, 1) + x)

    ours, theirs = (mb.solve(f, x * 0, x, solver=one, rtol=1e-4, max_nfe=80) for one in (own, solver))
    torch.testing.assert_close(ours.z, theirs.z)
    assert torch.equal(ours.nfe, theirs.nfe)


@pytest.mark.parametrize("kind", KINDS)
def test_random_cells_follow_from_the_generator_and_take_batches_apart(kind):
    f, z0, x = random_problem(torch.Generator().manual_seed(7), 5, kind)
    again, _, x_again = random_problem(torch.Generator().manual_seed(7), 5, kind)
    assert torch.equal(x, x_again)
    z = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(f(z, x), again(z, x))
    torch.testing.assert_close(f(z, x)[2:3], f(z[2:3], x[2:3]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="unknown kind of random cell 'denser'"):
        random_problem(torch.Generator(), 2, "denser")
