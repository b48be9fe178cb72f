"""NeuralFixedPoint and MetaLearnerLSTM: Picard before training, better after, and causal where the state is a sequence."""

from __future__ import annotations

import pytest
import torch

import metabroyden as mb
from metabroyden.learned.layout import Layout
from metabroyden.learned.safeguard import Safeguard
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet
from metabroyden.meta.estimators import differentiate
from metabroyden.meta.fit import make_learned
from metabroyden.meta.objectives import ResidualObjective
from metabroyden.meta.unroll import unroll
from tests.conftest import tanh
from tests.helpers import perturbed, refused, vector
from tests.learned.test_learned import SHAPES, problem_of

WAYS = {
    "delta": ("neural-fixed-point", {}),
    "secant": ("neural-fixed-point", {"form": "secant", "memory": 3}),
    "gates": ("meta-learner", {}),
}
every_way = pytest.mark.parametrize("way", WAYS)


def make(way: str, layout: Layout, **options):
    name, own = WAYS[way]
    return make_learned(name, layout, **own, **options)


@every_way
@pytest.mark.parametrize("kind", SHAPES)
def test_untrained_it_is_picard_to_the_last_bit(way, kind):
    layout, f, z0, x = problem_of(kind)
    with torch.no_grad():
        iterates = unroll(make(way, layout, conditioning="input"), f, z0, x, steps=7, backend="native").iterates
        z = z0
        for found in iterates:
            assert torch.equal(found, z.flatten(1))
            z = z + (f(z, x) - z)


@every_way
def test_it_learns_with_every_one_of_its_parameters(way):
    problem = tanh(batch=90, n=6, gain=1.05)
    tasks = TaskSet(problem.f, problem.x[:60], problem.x[60:75], problem.x[75:])
    solver = make(way, Layout("vector", (6,)), conditioning="input", hidden=6, initializer_width=8).double()
    config = MetaConfig(steps=30, unroll=5, batch=16, learning_rate=2e-2, validate_every=30, backend="native")

    def loss() -> float:
        rollout = unroll(solver, problem.f, problem.z0[75:], problem.x[75:], steps=5, backend="native")
        return ResidualObjective()(rollout.residuals).item()

    before = loss()
    MetaTrainer(solver, tasks, config).run().requires_grad_(True)
    assert loss() < before - 0.1, "decades of the weighted mean residual, on contexts never seen"
    _, norm = differentiate(solver, problem.f, problem.z0[:8], problem.x[:8], config, "native", steps=config.unroll)
    assert torch.isfinite(norm)
    for name, parameter in solver.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


@every_way
def test_it_comes_back_from_a_file_as_it_was(way, tmp_path):
    layout, f, z0, x = problem_of("image")
    solver = perturbed(make(way, layout, hidden=5, safeguard=None, initializer_kernels=(5, 3, 1))).eval()
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "solver.safetensors"))
    assert loaded.config == solver.config
    one, other = (mb.solve(f, z0, x, solver=s, rtol=1e-4, throw=False) for s in (solver, loaded))
    assert torch.equal(one.z, other.z)


def test_the_gated_form_lies_between_picard_and_the_secant_step():
    problem, ends = tanh(gain=0.9), []
    for offset in (-50.0, 0.0, 50.0):  # w = −1, 0, 1
        solver = make("secant", Layout("vector", (12,)), initializer_width=0, safeguard=Safeguard(None, None)).double()
        solver.lstm.offset.data.fill_(offset)
        with torch.no_grad():
            ends.append(unroll(solver, problem.f, problem.z0, problem.x, steps=2, backend="native").iterates)
    picard, between, secant = ends
    for k in (0, 1):  # without a pair both steps are Picard's
        assert torch.equal(picard[k], between[k])
        assert torch.equal(secant[k], between[k])
    torch.testing.assert_close(picard[2] + secant[2], 2 * between[2])
    z0, z1, found = secant
    g0, g1 = (problem.f(z, problem.x) - z for z in (z0, z1))
    gamma = ((g1 - g0) * g1).sum(1, keepdim=True) / (g1 - g0).square().sum(1, keepdim=True)
    torch.testing.assert_close(found, z1 + g1 - gamma * (z1 - z0 + g1 - g0), rtol=1e-6, atol=1e-8)


def test_forgetting_puts_no_floor_under_the_residual():
    """With the gates stuck half a unit off, the error still goes to nothing with the residual."""
    solver, problem = vector("meta-learner", 12, initializer_width=0, safeguard=None), tanh(gain=0.4)
    solver.lstm.offset.data.copy_(torch.tensor([[0.5], [-0.2]]))
    found = mb.solve(problem.f, problem.z0, problem.x, solver=solver, rtol=1e-10, max_nfe=200, throw=False)
    assert (found.residual < 1e-8).all()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("form must be one of delta, secant, got 'gru'", {"form": "gru"}),
        ("memory", {"memory": 0}),
        ("ridge", {"ridge": 0}),
    ],
)
def test_bad_options_are_refused(words, option):
    refused(words, lambda: vector("neural-fixed-point", 3, **option))
