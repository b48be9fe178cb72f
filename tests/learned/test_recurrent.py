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
from tests.learned.test_learned import SCALES, SHAPES, problem_of, several_scales

WAYS = {
    "delta": ("neural-fixed-point", {}),
    "secant": ("neural-fixed-point", {"form": "secant", "memory": 3}),
    "gates": ("meta-learner", {}),
}
every_way = pytest.mark.parametrize("way", WAYS)


def make(way: str, layout: Layout, **options):
    name, own = WAYS[way]
    return make_learned(name, layout, **own, **options)


def perturb(solver, size: float = 0.1):
    for parameter in solver.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).to(parameter)
    return solver


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
    losses = []
    for trained in (False, True):
        if trained:
            MetaTrainer(solver, tasks, config).run()
            solver.requires_grad_(True)
        rollout = unroll(solver, problem.f, problem.z0[75:], problem.x[75:], steps=5, backend="native")
        losses.append(float(ResidualObjective()(rollout.residuals).detach()))
    assert losses[1] < losses[0] - 0.1, "decades of the weighted mean residual, on contexts never seen"
    _, norm = differentiate(solver, problem.f, problem.z0[:8], problem.x[:8], config, "native", steps=config.unroll)
    assert torch.isfinite(norm)
    for name, parameter in solver.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


@every_way
@pytest.mark.parametrize("kind", ["nct", "ntc"])
def test_later_tokens_change_nothing_at_earlier_ones(way, kind):
    layout, f, z0, x = problem_of(kind, dtype=torch.float64)
    solver = perturb(make(way, layout, initializer_kernels=(5, 3, 1))).double()
    changed, time = x.clone(), 2 if kind == "nct" else 1
    changed.narrow(time, 4, 2).add_(1)
    with torch.no_grad():
        one, other = (unroll(solver, f, z0, at, steps=6, backend="native").z.view_as(x) for at in (x, changed))
    torch.testing.assert_close(one.narrow(time, 0, 4), other.narrow(time, 0, 4), rtol=1e-10, atol=1e-12)
    assert (one - other).narrow(time, 4, 2).abs().min() > 0


@every_way
def test_it_comes_back_from_a_file_as_it_was(way, tmp_path):
    layout, f, z0, x = problem_of("image")
    solver = perturb(make(way, layout, hidden=5, safeguard=None)).eval()
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "solver.safetensors"))
    assert loaded.config == solver.config
    one, other = (mb.solve(f, z0, x, solver=s, rtol=1e-4, throw=False) for s in (solver, loaded))
    assert torch.equal(one.z, other.z)


def test_the_gated_form_runs_on_several_scales_and_lies_between_picard_and_the_secant_step():
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    z0 = torch.zeros(4, 2, 4, 4), torch.zeros(4, 3, 2, 2)
    solver = perturb(make("secant", SCALES), 0.05)
    found = mb.solve(several_scales, z0, x, solver=solver, rtol=1e-5, max_nfe=100)
    assert found.converged.all()
    ends = []
    for offset in (-50.0, 0.0, 50.0):  # w = −1, 0, 1
        solver = make("secant", Layout("vector", (12,)), initializer_width=0, safeguard=Safeguard(None, None)).double()
        solver.lstm.offset.data.fill_(offset)
        problem = tanh(gain=0.9)
        with torch.no_grad():
            rollout = unroll(solver, problem.f, problem.z0, problem.x, steps=2, backend="native")
        ends.append(rollout.iterates)
    for k in (0, 1):
        assert torch.equal(ends[0][k], ends[1][k]), "without a pair both steps are Picard's"
        assert torch.equal(ends[2][k], ends[1][k])
    torch.testing.assert_close(ends[0][2] + ends[2][2], 2 * ends[1][2])
    (_, start, first), f = ends[2], lambda z: problem.f(z, problem.x)
    z0, z1 = ends[2][0], ends[2][1]
    g0, g1 = f(z0) - z0, f(z1) - z1
    gamma = ((g1 - g0) * g1).sum(1, keepdim=True) / (g1 - g0).square().sum(1, keepdim=True)
    torch.testing.assert_close(first, z1 + g1 - gamma * (z1 - z0 + g1 - g0), rtol=1e-6, atol=1e-8)
    assert torch.equal(start, z1)


def test_forgetting_puts_no_floor_under_the_residual():
    """With the gates stuck half a unit off, the error still goes to nothing with the residual."""
    solver = make_learned("meta-learner", Layout("vector", (12,)), initializer_width=0, safeguard=None).double()
    solver.lstm.offset.data.copy_(torch.tensor([[0.5], [-0.2]]))
    problem = tanh(gain=0.4)
    found = mb.solve(problem.f, problem.z0, problem.x, solver=solver, rtol=1e-10, max_nfe=200, throw=False)
    assert (found.residual < 1e-8).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "gru"}, "form must be one of delta, secant, got 'gru'"),
        ({"memory": 0}, "memory"),
        ({"ridge": 0}, "ridge"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_learned("neural-fixed-point", Layout("vector", (3,)), **options)
