"""Backpropagation through solves is exact, whichever backend runs it, and unrolls drop, save or round what they say."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import metabroyden as mb
from metabroyden.meta import MetaConfig, TaskSet, estimators
from metabroyden.meta.estimators import differentiate, equilibria, seeded, training_batch, unroll_length
from metabroyden.meta.objectives import CountObjective, DistanceObjective, HyperObjective, ResidualObjective, anchored
from metabroyden.meta.unroll import Rollout, UnrolledProblem, unroll
from tests.conftest import tanh
from tests.helpers import DOUBLE, normal, perturbed, refused, vector

LEARNED = mb.list_solvers(learned=True, splitting=False, adjoint=False)
PROBLEM = tanh(batch=3, n=6, gain=1.1)
every_solver = pytest.mark.parametrize("name", LEARNED)
# what the universal solver sees and its γ, but for ridge and trust, are constants of the gradient
every_smooth_solver = pytest.mark.parametrize("name", sorted(set(LEARNED) - {"universal"}))
each_backend = pytest.mark.parametrize("backend", ["higher", "native"])


def trained_a_little(name: str, context: str = "initial_value"):
    return perturbed(vector(name, 6, conditioning=context, hidden=3, initializer_width=4), 0.2, seed=5)


def rollout_of(solver, backend: str = "native", steps: int = 5, problem=PROBLEM, **modes):
    return unroll(solver, problem.f, problem.z0, problem.x, steps=steps, backend=backend, **modes)


def loss_of(solver, *arguments, **modes):
    return ResidualObjective()(rollout_of(solver, *arguments, **modes).residuals)


def gradients(solver, loss, **options):
    return parameters_to_vector(torch.autograd.grad(loss, list(solver.parameters()), retain_graph=True, **options))


def difference(solver, loss, direction, eps: float) -> float:
    """The central difference of a loss along a direction of the solver's parameters."""
    start, values = parameters_to_vector(solver.parameters()).detach(), []
    for sign in (1, -1, 0):
        vector_to_parameters(start + sign * eps * direction, solver.parameters())
        with torch.no_grad():
            values.append(float(loss()))
    return (values[0] - values[1]) / (2 * eps)


def by_hand(solver, steps: int) -> torch.Tensor:
    """The loss of the recurrence written out, with no code of the library but the solver's own step."""
    f, z0 = (lambda z: PROBLEM.f(z, PROBLEM.x)), PROBLEM.z0

    class Bare:
        shape, context, keep_inverse = torch.Size([6]), PROBLEM.x, True
        origin = staticmethod(lambda: f(z0))
        residual = staticmethod(lambda z: f(z) - z)

    bare = Bare()
    z = solver.start(z0, bare)
    g = bare.residual(z)
    state, logs = solver.init(z, g, bare), []
    for k in range(steps + 1):
        logs.append((g.norm(dim=1) / (z + g).norm(dim=1)).log10().mean())
        if k < steps:
            z, state, _ = solver.step(z, g, state, bare)
            g = bare.residual(z)
    weights = torch.arange(1, steps + 2, dtype=DOUBLE)
    return (weights / weights.sum()) @ torch.stack(logs)


@every_solver
@pytest.mark.parametrize("context", ["initial_value", "input"])
def test_higher_and_native_and_a_handwritten_unroll_agree(name, context):
    solver = trained_a_little(name, context)
    wanted = by_hand(solver, 5)
    reference = gradients(solver, wanted)
    assert reference.abs().max() > 1e-3
    for backend in ("higher", "native"):
        loss = loss_of(solver, backend)
        torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(gradients(solver, loss), reference, rtol=1e-10, atol=1e-13)


@every_smooth_solver
def test_backpropagation_through_time_agrees_with_finite_differences(name):
    solver = trained_a_little(name)
    analytic = gradients(solver, loss_of(solver, "higher"))
    direction = normal(*analytic.shape, seed=1, dtype=DOUBLE)
    numeric = difference(solver, lambda: loss_of(solver), direction, 1e-6)
    assert numeric == pytest.approx(float(analytic @ direction), rel=1e-6)


def test_the_graph_reaches_through_the_residual_not_only_through_the_state():
    """Dropping ∂r/∂z (a surrogate gradient) would give other numbers: the exact gradient must differ from that."""
    solver = trained_a_little("grouped")
    exact = gradients(solver, loss_of(solver, "higher"))
    f = lambda z, x: PROBLEM.f(z.detach(), x)  # noqa: E731
    cut = unroll(solver, f, PROBLEM.z0, PROBLEM.x, steps=5, backend="higher").residuals
    assert (exact - gradients(solver, ResidualObjective()(cut))).norm() > 1e-2 * exact.norm()


def test_unrolling_through_higher_leaks_no_tensors():
    solver = trained_a_little("grouped")

    def live(runs: int) -> int:
        for _ in range(runs):
            loss_of(solver, "higher").backward()
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    assert live(2) >= live(5) - 5


def test_an_exact_fixed_point_in_the_batch_does_no_harm_to_the_gradient():
    x = PROBLEM.x.clone()
    x[1] = 0  # z* = z0 = 0
    solver = vector("grouped", 6, conditioning="input")
    residuals = unroll(solver, PROBLEM.f, PROBLEM.z0, x, steps=3).residuals
    assert torch.isfinite(gradients(solver, ResidualObjective()(residuals))).all()


REFUSED = {
    "backend must be one of higher, native, got 'jax'": lambda: rollout_of(None, "jax"),
    "steps must be at least 1": lambda: rollout_of(None, steps=0),
    "objective kind": lambda: ResidualObjective(kind="square"),
    "objective weights": lambda: ResidualObjective(weights="quadratic"),
    "objective weights must": lambda: DistanceObjective(weights="late"),
    "tolerances must be numbers": lambda: CountObjective(tolerances=(2.0,)),
    "needs the equilibria": lambda: DistanceObjective().loss(rollout_of(trained_a_little("grouped")), None, 0.0),
    r"bfloat16 is for states of float32, got .*float64": lambda: rollout_of(trained_a_little("grouped"), half=True),
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_arguments_are_refused(words):
    refused(words, REFUSED[words])


@pytest.mark.parametrize(
    ("kind", "weights", "scale", "wanted"),
    [
        ("log", "uniform", 1, (0 - 1.5) / 2),
        ("log", "linear", 1, 2 / 3 * -1.5),
        ("log", "last", 1, -1.5),
        ("plain", "uniform", 1, (1 + 0.055) / 2),
        ("normalised", "last", 2, 0.055),
    ],
)
def test_objectives_of_residuals_are_what_they_say(kind, weights, scale, wanted):
    residuals = torch.tensor([[1.0, 1.0], [0.1, 0.01]])
    assert float(ResidualObjective(kind, weights)(scale * residuals)) == pytest.approx(wanted)


def test_objectives_of_rollouts_are_what_they_say():
    star = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    iterates = (torch.zeros(2, 2), star * torch.tensor([[0.9], [0.5]]))
    rollout = Rollout(torch.tensor([[1.0, 1.0], [0.1, 0.001]]), iterates, (torch.tensor([5.0, 1.0]),), None)
    last = DistanceObjective(weights="last").loss(rollout, star, 0.0)
    assert float(last) == pytest.approx((-1 + math.log10(0.5)) / 2)
    # distances 1 and (0.1 + 0.5)/2; remainders 5/5 and 1/2
    convergence, start, remainder = 1 / 3 * 1 + 2 / 3 * 0.3, 1.0, 0.75
    for done in (0.0, 0.5):
        loss = float(HyperObjective(2.0, 0.3, 0.4).loss(rollout, star, done))
        assert loss == pytest.approx(2 * convergence + 0.3 * start + 0.4 * (1 - done) * remainder)
    sharp = CountObjective(tolerances=(1e-2,), width=1e-3)
    assert float(sharp.loss(rollout, None, 0.0)) == pytest.approx((2 + 1) / 2), "evaluations above the tolerance"


def test_an_anchor_pulls_to_known_equilibria_and_is_flat_near_them():
    star = torch.tensor([[3.0, 4.0], [torch.nan, 2.0]])
    shares = torch.tensor([[0.9], [0.5]])
    rollout = Rollout(torch.ones(2, 2), (torch.zeros(2, 2), star.nan_to_num() * shares), (), None)
    # of the first sample alone: distances 1 and 0.1, with weights 1/3 and 2/3
    assert float(anchored(rollout, star)) == pytest.approx((math.log10(1.01) + 2 * math.log10(0.11)) / 3)
    assert float(anchored(rollout, star * torch.nan)) == 0
    near = rollout._replace(iterates=(star.nan_to_num(), star.nan_to_num()))
    assert float(anchored(near, star)) == pytest.approx(-2)


@each_backend
def test_later_segments_are_of_the_samples_that_are_not_solved_yet(backend, monkeypatch):
    """Their gradients are those of these samples by themselves; a limit that none is below, or none at all, leaves all."""
    solver, problem = trained_a_little("meta-broyden"), tanh(batch=6, n=6, gain=0.8)
    config = MetaConfig(unroll=3, segments=2, clip=1e9)

    def gradient(config, z0=problem.z0, x=problem.x):
        loss, _ = differentiate(solver, problem.f, z0, x, config, backend, steps=3)
        return loss, parameters_to_vector(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in solver.parameters()]
        )

    residual = rollout_of(solver, backend, 3, problem).residuals[-1].detach()
    monkeypatch.setattr(estimators, "HARDEST", 1.0)
    limit = float(residual.sort().values[3])
    hard = (residual >= limit).nonzero().squeeze(1)
    assert len(hard) == 3
    whole, tiny = gradient(config), gradient(replace(config, drop_below=1e-12))
    assert torch.equal(whole[1], tiny[1])
    once = gradient(replace(config, segments=1))[1]
    dropped = gradient(replace(config, drop_below=limit))[1] - once
    alone = gradient(config, problem.z0[hard], problem.x[hard])[1]
    alone = alone - gradient(replace(config, segments=1), problem.z0[hard], problem.x[hard])[1]
    torch.testing.assert_close(dropped, alone, rtol=1e-9, atol=1e-12)
    assert torch.isfinite(gradient(replace(config, drop_below=1e9))[1]).all(), "the worst one stays"
    monkeypatch.setattr(estimators, "HARDEST", 0.5)
    capped = gradient(replace(config, drop_below=1e-12))[1] - once
    torch.testing.assert_close(capped, alone, rtol=1e-9, atol=1e-12)


def test_equilibria_are_packed_fixed_points():
    problem = tanh(batch=3, n=6, gain=0.5)
    star = equilibria(problem.f, problem.z0, problem.x)
    assert (problem.f(star, problem.x) - star).norm(dim=1).max() < 1e-3 * star.norm(dim=1).min()


@each_backend
@every_solver
def test_truncated_backpropagation_follows_the_same_solve_and_is_cut_between_segments(name, backend):
    solver, problem = trained_a_little(name), tanh(batch=3, n=6, gain=0.8)
    whole, first = (rollout_of(solver, backend, steps, problem) for steps in (6, 3))
    begin = first.carry()
    second = rollout_of(solver, backend, 3, problem, begin=begin)
    torch.testing.assert_close(torch.cat([first.residuals, second.residuals[1:]]), whole.residuals)
    torch.testing.assert_close(second.residuals[0], first.residuals[-1])
    assert not begin[0].requires_grad
    config, objective = MetaConfig(unroll=3, segments=2, clip=1e9), ResidualObjective()
    losses = [objective(part.residuals) for part in (first, second)]
    of_each = [gradients(solver, loss, materialize_grads=True) for loss in losses]
    loss, norm = differentiate(solver, problem.f, problem.z0, problem.x, config, backend, steps=3)
    assert torch.isfinite(norm)
    assert float(loss) == pytest.approx(float(sum(losses).detach()) / 2)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in solver.parameters()]
    torch.testing.assert_close(parameters_to_vector(found), sum(of_each), rtol=1e-9, atol=1e-12)
    late = gradients(solver, objective(whole.residuals[3:]), materialize_grads=True)
    assert (late - of_each[1]).norm() > 1e-3, "the whole graph reaches further back"


# --- unrolls that drop, save or round something


@every_smooth_solver
def test_detached_features_give_the_gradient_of_updates_that_see_constants(name):
    """Against finite differences of a loss in which every step is handed the iterates of the unmoved solver."""
    solver = trained_a_little(name)
    found = gradients(solver, loss_of(solver, detach_features=True))
    through_higher = gradients(solver, loss_of(solver, "higher", detach_features=True))
    torch.testing.assert_close(through_higher, found, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(loss_of(solver, detach_features=True), loss_of(solver), rtol=0, atol=0)
    exact = gradients(solver, loss_of(solver))
    assert (found - exact).norm() > 1e-3 * exact.norm()
    constants = [z.detach() for z in rollout_of(solver).iterates]
    view = UnrolledProblem(PROBLEM.f, PROBLEM.z0, PROBLEM.x)

    def loss():
        z = solver.start(PROBLEM.z0, view)
        state = solver.init(constants[0], view.residual(constants[0]), view)
        residuals = [view.measure(z)[1]]
        for constant in constants[:-1]:
            step = solver.step(constant, view.residual(constant), state, view)
            z, state = z + step.z - constant, step.state
            residuals.append(view.measure(z)[1])
        return ResidualObjective()(torch.stack(residuals))

    direction = normal(*found.shape, seed=1, dtype=DOUBLE)
    assert difference(solver, loss, direction, 1e-6) == pytest.approx(float(found @ direction), rel=1e-5)


@each_backend
@every_solver
def test_checkpointed_steps_have_the_same_gradients(name, backend):
    solver = trained_a_little(name)
    for detached in (False, True):
        wanted = gradients(solver, loss_of(solver, detach_features=detached))
        found = gradients(solver, loss_of(solver, backend, checkpoint_steps=True, detach_features=detached))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@each_backend
def test_checkpointed_steps_keep_less_for_the_backward_pass(backend):
    solver = trained_a_little("grouped")

    def kept(steps: int, *, twice: bool) -> int:
        """Bytes saved by the graph outside what is computed again."""
        sizes = []
        with saved_tensors_hooks(lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor):
            loss_of(solver, backend, steps, checkpoint_steps=twice)
        return sum(sizes)

    plain, checkpointed = (kept(20, twice=twice) - kept(10, twice=twice) for twice in (False, True))
    assert checkpointed < 0.25 * plain


@every_solver
def test_f_in_bfloat16_leaves_iterates_and_residuals_in_float32(name):
    solver, seen = trained_a_little(name).float(), set()
    weight, problem = normal(6, 6, seed=2) / 4, tanh(batch=3, n=6, dtype=torch.float32)

    def f(z, x):
        product = z @ weight
        seen.add((z.dtype, product.dtype))
        return torch.tanh(product + x)

    runs = [
        unroll(solver, f, problem.z0, problem.x, steps=4, backend=backend, half=half)
        for backend, half in (("higher", True), ("native", True), ("native", False))
    ]
    assert seen == {(torch.float32, torch.bfloat16), (torch.float32, torch.float32)}
    assert {run.residuals.dtype for run in runs} == {run.z.dtype for run in runs} == {torch.float32}
    through_higher, native = (gradients(solver, ResidualObjective()(run.residuals)) for run in runs[:2])
    torch.testing.assert_close(through_higher, native, rtol=1e-5, atol=1e-6)
    assert 0 < (runs[1].z - runs[2].z).norm() < 0.05 * runs[2].z.norm(), "rounded, and no more than that"


def test_lengths_are_log_uniform_and_a_function_of_seed_and_step():
    lengths = [unroll_length((4, 32), 0, step) for step in range(3000)]
    assert {min(lengths), max(lengths)} == {4, 32}
    below = sum(length < 12 for length in lengths) / len(lengths)
    assert below == pytest.approx(math.log(12 / 4) / math.log(33 / 4), abs=0.03)
    assert lengths[7] == unroll_length((4, 32), 0, 7) != unroll_length((4, 32), 1, 7)
    assert unroll_length(14, 0, 7) == 14


def test_random_starts_are_as_large_as_told_and_of_a_place_in_the_batch():
    tasks = TaskSet(PROBLEM.f, normal(50, 6, dtype=DOUBLE), normal(5, 6, seed=1, dtype=DOUBLE))
    config = MetaConfig(batch=2000, start_noise=0.3)
    z0, x = training_batch(tasks, config, 5)
    plain, same = training_batch(tasks, MetaConfig(batch=2000), 5)
    assert torch.equal(x, same)
    assert torch.equal(plain, torch.zeros_like(plain))
    size = PROBLEM.f(plain, x).square().mean(dim=1, keepdim=True).sqrt()
    assert float((z0 / size).std()) == pytest.approx(0.3, rel=0.05)
    parts = [training_batch(tasks, config, 5, slice(begin, begin + 500)) for begin in range(0, 2000, 500)]
    for whole, pieces in zip((z0, x), zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(training_batch(tasks, config, 6)[0], z0)
    assert seeded(0, 1, "a").initial_seed() != seeded(0, 1, "b").initial_seed()
