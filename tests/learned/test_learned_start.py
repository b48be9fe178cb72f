"""A learned start for any classical solver, and initializers of other depths and widths."""

from __future__ import annotations

import pytest
import torch

import metabroyden as mb
from metabroyden.learned.initializer import Initializer
from metabroyden.learned.layout import Layout
from metabroyden.learned.mixer import Mixer
from metabroyden.meta import MetaConfig, MetaTrainer, TaskSet
from metabroyden.meta.trainer import mean_evaluations
from metabroyden.meta.unroll import unroll
from tests.conftest import tanh
from tests.helpers import perturbed, refused, vector

CLASSICAL = [mb.Picard(0.9), mb.Anderson(memory=3), mb.Broyden(memory=4), mb.Broyden(kind="bad"), mb.Newton()]
every_classical = pytest.mark.parametrize("classical", CLASSICAL, ids=str)


def started(classical, **options):
    options = {"conditioning": "input", "initializer_width": 8, "safeguard": None, **options}
    return vector("started", 12, classical=classical, **options)


def moved(solver):
    return perturbed(solver).eval().requires_grad_(False)


def solved(problem, solver, z0=None, rtol: float = 1e-8):
    z0 = problem.z0 if z0 is None else z0
    return mb.solve(problem.f, z0, problem.x, solver=solver, rtol=rtol, max_nfe=90, throw=False)


@every_classical
def test_untrained_it_is_the_classical_solver_and_then_that_begun_elsewhere_to_the_last_bit(classical, nonlinear):
    ours, theirs = (solved(nonlinear, solver) for solver in (started(classical), classical))
    assert torch.equal(ours.z, theirs.z)
    assert torch.equal(ours.trace.nfe, theirs.trace.nfe)
    solver = moved(started(classical))
    start = solver.initializer(nonlinear.x)
    ours, theirs = solved(nonlinear, solver), solved(nonlinear, classical, start)
    assert torch.equal(ours.z, theirs.z)
    residual = mb.relative_residual(start, nonlinear.f(start, nonlinear.x))
    assert (ours.trace.residual[0] - residual).abs().max() < 1e-12


@every_classical
def test_it_comes_back_from_a_file_as_it_was(classical, nonlinear, tmp_path):
    safeguard = mb.Safeguard(horizon=None, patience=15, progress=0.5)
    solver = moved(started(classical, safeguard=safeguard, initializer_kernels=(5, 3, 1)))
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "solver.safetensors"))
    assert loaded.config == solver.config
    assert loaded.config.classical == classical
    assert torch.equal(*(solved(nonlinear, one, rtol=1e-6).z for one in (solver, loaded)))


def test_the_start_is_learned_and_saves_evaluations():
    problem = tanh(batch=120, n=12, gain=1.0)
    tasks = TaskSet(problem.f, problem.x[:80], problem.x[80:100], problem.x[100:])
    solver = started(mb.Broyden(), initializer_width=32)
    before = mean_evaluations(mb.Broyden(), tasks, split="test")
    assert mean_evaluations(solver, tasks, split="test") == before
    config = MetaConfig(steps=120, unroll=3, batch=32, learning_rate=1e-2, validate_every=40, backend="native")
    MetaTrainer(solver, tasks, config).run()
    assert mean_evaluations(solver, tasks, split="test") < before - 0.5


def test_where_gradients_are_recorded_its_steps_are_picards(nonlinear):
    solver = moved(started(mb.Broyden())).requires_grad_(True)
    z = nonlinear.z0 + solver.initializer(nonlinear.x)
    for found in unroll(solver, nonlinear.f, nonlinear.z0, nonlinear.x, steps=3, backend="native").iterates:
        torch.testing.assert_close(found, z)
        z = nonlinear.f(z, nonlinear.x)


def test_the_start_of_another_solver_can_be_borrowed(nonlinear):
    other = moved(vector("grouped", 12, conditioning="input", initializer_width=8))
    solver = mb.LearnedStart.of(other, mb.Anderson())
    assert len(solver.phases()) == 1
    theirs = solved(nonlinear, mb.Anderson(), other.initializer(nonlinear.x))
    assert torch.equal(solved(nonlinear, solver).z, theirs.z)
    assert all(a is not b for a, b in zip(solver.parameters(), other.initializer.parameters(), strict=True))


UNFIT = (3, "broyden", vector("grouped", 3), mb.Broyden(initial=object()))
KERNELS = r"initializer_kernels must be at least two odd numbers, as \(3, 3\), got"


@pytest.mark.parametrize(
    ("words", "options"),
    [
        *(("classical must be a plain classical solver", {"classical": one}) for one in UNFIT),
        ("initializer_width must be an integer of at least 1", {"initializer_width": 0}),
        *((KERNELS, {"initializer_kernels": kernels}) for kernels in ((3,), (3, 4), (0, 1), 3)),
    ],
)
def test_what_cannot_be_started_is_refused(words, options):
    refused(words, lambda: vector("started", 3, **options))
    assert started(mb.Broyden(), initializer_width=1).config.initializer_width == 1


LAYOUTS = {"vector": (5,), "nct": (5, 9), "ntc": (9, 5), "tokens": (9, 5), "image": (5, 7, 7)}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("kernels", [(5, 1), (3, 3, 3), (1, 1)])
def test_an_initializer_sees_as_far_as_its_kernels_say(kind, kernels):
    layout = Layout(kind, LAYOUTS[kind])
    initializer, canonical = Initializer(layout, 5, 6, kernels), torch.zeros(1, 5, *layout.extents(layout.shape))
    assert torch.equal(initializer(canonical), canonical), "untrained, the base is the start"
    torch.nn.init.normal_(initializer.outward.map.weight)
    if kind == "vector":
        return
    middle, changed = [size // 2 for size in canonical.shape[2:]], canonical.clone()
    changed[(0, slice(None), *middle)] = 1
    places = ((initializer(changed) - initializer(canonical)).abs().amax(1)[0] > 0).nonzero() - torch.tensor(middle)
    reach = sum(kernels) - len(kernels) if layout.causal else sum(kernel // 2 for kernel in kernels)
    assert places.max() == min(reach, canonical.shape[2] - 1 - middle[0])
    assert places.min() == (0 if layout.causal else -min(reach, middle[0])), "no look ahead in time"


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 5])
def test_a_mixer_of_any_kernel_has_its_transpose(kind, kernel):
    layout = Layout(kind, LAYOUTS[kind])
    mixer = Mixer(layout, 5, 4, kernel=kernel, bias=False)
    extents = layout.extents(layout.shape)
    v, w = torch.randn(2, 5, *extents), torch.randn(2, 4, *extents)
    torch.testing.assert_close((mixer(v) * w).sum(), (v * mixer.transpose(w)).sum(), rtol=1e-4, atol=1e-4)
