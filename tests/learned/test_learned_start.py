"""A learned start for any classical solver, and initializers of other depths and widths."""

from __future__ import annotations

import pytest
import torch

import metabroyden as mb
from metabroyden.learned.initializer import Initializer
from metabroyden.learned.layout import Layout
from metabroyden.learned.mixer import Mixer
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet
from metabroyden.meta.fit import make_learned
from metabroyden.meta.trainer import mean_evaluations
from metabroyden.meta.unroll import unroll
from tests.conftest import tanh

CLASSICAL = [mb.Picard(0.9), mb.Anderson(memory=3), mb.Broyden(memory=4), mb.Broyden(kind="bad"), mb.Newton()]
every_classical = pytest.mark.parametrize("classical", CLASSICAL, ids=str)


def started(classical, n: int = 12, **options):
    options = {"conditioning": "input", "initializer_width": 8, "safeguard": None, **options}
    return make_learned("started", Layout("vector", (n,)), classical=classical, **options).double()


def moved(solver):
    for parameter in solver.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double()
    return solver.eval().requires_grad_(False)


@every_classical
def test_untrained_it_is_the_classical_solver_to_the_last_bit(classical, nonlinear):
    problem = nonlinear
    options = {"rtol": 1e-8, "max_nfe": 80, "throw": False}
    ours = mb.solve(problem.f, problem.z0, problem.x, solver=started(classical), **options)
    theirs = mb.solve(problem.f, problem.z0, problem.x, solver=classical, **options)
    assert torch.equal(ours.z, theirs.z)
    assert torch.equal(ours.trace.nfe, theirs.trace.nfe)


@every_classical
def test_from_its_start_on_it_is_the_classical_solver_begun_there(classical, nonlinear):
    problem, solver = nonlinear, moved(started(classical))
    start = solver.initializer(problem.x)
    options = {"rtol": 1e-8, "max_nfe": 80, "throw": False}
    ours = mb.solve(problem.f, problem.z0, problem.x, solver=solver, **options)
    theirs = mb.solve(problem.f, start, problem.x, solver=classical, **options)
    assert torch.equal(ours.z, theirs.z)
    assert (ours.trace.residual[0] - mb.relative_residual(start, problem.f(start, problem.x))).abs().max() < 1e-12


@every_classical
def test_it_comes_back_from_a_file_as_it_was(classical, nonlinear, tmp_path):
    safeguard = mb.Safeguard(horizon=None, patience=15, progress=0.5)
    solver = moved(started(classical, safeguard=safeguard, initializer_kernels=(5, 3, 1)))
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "solver.safetensors"))
    assert loaded.config == solver.config
    assert loaded.config.classical == classical
    one, other = (
        mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=s, rtol=1e-6, max_nfe=90) for s in (solver, loaded)
    )
    assert torch.equal(one.z, other.z)


def test_the_start_is_learned_and_saves_evaluations():
    problem = tanh(batch=120, n=12, gain=1.0)
    tasks = TaskSet(problem.f, problem.x[:80], problem.x[80:100], problem.x[100:])
    solver = started(mb.Broyden(), initializer_width=32)
    config = MetaConfig(steps=120, unroll=3, batch=32, learning_rate=1e-2, validate_every=40, backend="native")
    before = mean_evaluations(mb.Broyden(), tasks, split="test")
    assert mean_evaluations(solver, tasks, split="test") == before
    MetaTrainer(solver, tasks, config).run()
    assert mean_evaluations(solver, tasks, split="test") < before - 0.5


def test_where_gradients_are_recorded_its_steps_are_picards(nonlinear):
    solver = moved(started(mb.Broyden())).requires_grad_(True)
    iterates = unroll(solver, nonlinear.f, nonlinear.z0, nonlinear.x, steps=3, backend="native").iterates
    z = nonlinear.z0 + solver.initializer(nonlinear.x)
    for found in iterates:
        torch.testing.assert_close(found, z)
        z = nonlinear.f(z, nonlinear.x)


def test_the_start_of_another_solver_can_be_borrowed(nonlinear):
    other = moved(make_learned("grouped", Layout("vector", (12,)), conditioning="input", initializer_width=8).double())
    solver = mb.LearnedStart.of(other, mb.Anderson())
    assert len(solver.phases()) == 1
    ours = mb.solve(nonlinear.f, nonlinear.z0, nonlinear.x, solver=solver, rtol=1e-8, max_nfe=80)
    start = other.initializer(nonlinear.x)
    theirs = mb.solve(nonlinear.f, start, nonlinear.x, solver=mb.Anderson(), rtol=1e-8, max_nfe=80)
    assert torch.equal(ours.z, theirs.z)
    assert all(a is not b for a, b in zip(solver.parameters(), other.initializer.parameters(), strict=True))


def test_what_cannot_be_started_is_refused():
    layout = Layout("vector", (3,))
    for classical in (3, "broyden", make_learned("grouped", layout), mb.Broyden(initial=object())):
        with pytest.raises(ValueError, match="classical must be a plain classical solver"):
            make_learned("started", layout, classical=classical)
    with pytest.raises(ValueError, match="initializer_width must be an integer of at least 1"):
        make_learned("started", layout, initializer_width=0)
    for kernels in ((3,), (3, 4), (0, 1), 3):
        with pytest.raises(ValueError, match=r"initializer_kernels must be at least two odd numbers, as \(3, 3\), got"):
            make_learned("started", layout, initializer_kernels=kernels)


LAYOUTS = {"vector": (5,), "nct": (5, 9), "ntc": (9, 5), "image": (5, 7, 7)}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("kernels", [(5, 1), (3, 3, 3), (1, 1)])
def test_an_initializer_sees_as_far_as_its_kernels_say(kind, kernels):
    layout = Layout(kind, LAYOUTS[kind])
    initializer = Initializer(layout, 5, 6, kernels)
    canonical = torch.zeros(1, 5, *layout.extents(layout.shape))
    assert torch.equal(initializer(canonical), torch.zeros_like(canonical)), "untrained, the base is the start"
    torch.nn.init.normal_(initializer.outward.map.weight)
    if kind == "vector":
        return
    middle = (0, slice(None), *[size // 2 for size in canonical.shape[2:]])
    changed = canonical.clone()
    changed[middle] = 1
    moved = (initializer(changed) - initializer(canonical)).abs().amax(1)[0] > 0
    reach = sum(kernels) - len(kernels) if layout.causal else sum(kernel // 2 for kernel in kernels)
    places = moved.nonzero() - torch.tensor([size // 2 for size in canonical.shape[2:]])
    assert places.max() == min(reach, canonical.shape[2] - 1 - canonical.shape[2] // 2)
    assert places.min() == (0 if layout.causal else -min(reach, canonical.shape[2] // 2)), "no look ahead in time"


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 5])
def test_a_mixer_of_any_kernel_has_its_transpose(kind, kernel):
    layout = Layout(kind, LAYOUTS[kind])
    mixer = Mixer(layout, 5, 4, kernel=kernel, bias=False)
    extents = layout.extents(layout.shape)
    v, w = torch.randn(2, 5, *extents), torch.randn(2, 4, *extents)
    torch.testing.assert_close((mixer(v) * w).sum(), (v * mixer.transpose(w)).sum(), rtol=1e-4, atol=1e-4)


def test_the_narrowest_start_has_one_channel():
    assert started(mb.Broyden(), initializer_width=1).config.initializer_width == 1
