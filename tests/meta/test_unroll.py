"""Backpropagation through solves is exact, whichever backend runs it."""

from __future__ import annotations

import gc
import math

import pytest
import torch

import metabroyden as mb
from metabroyden.learned.layout import Layout
from metabroyden.meta.config import MetaConfig
from metabroyden.meta.estimators import differentiate, equilibria
from metabroyden.meta.fit import make_learned
from metabroyden.meta.objectives import CountObjective, DistanceObjective, HyperObjective, ResidualObjective
from metabroyden.meta.unroll import Rollout, unroll
from tests.conftest import tanh

LEARNED = mb.list_solvers(learned=True, splitting=False, adjoint=False)


def trained_a_little(name: str, context: str = "initial_value"):
    solver = make_learned(name, Layout("vector", (6,)), conditioning=context, hidden=3, initializer_width=4).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in solver.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return solver


def loss_of(solver, backend: str, steps: int = 5):
    problem = tanh(batch=3, n=6, gain=1.1)
    rollout = unroll(solver, problem.f, problem.z0, problem.x, steps=steps, backend=backend)
    return ResidualObjective()(rollout.residuals)


def plain_unroll(solver, problem, steps: int) -> torch.Tensor:
    """The recurrence written out by hand, with no code of the library but the solver's own step."""

    class Bare:
        shape = torch.Size([6])
        context = problem.x

        def origin(self):
            return problem.f(problem.z0, problem.x)

        def residual(self, z):
            return problem.f(z, problem.x) - z

    bare = Bare()
    z = solver.start(problem.z0, bare)
    g = bare.residual(z)
    state = solver.init(z, g, bare)
    logs = [(g.norm(dim=1) / (z + g).norm(dim=1)).log10().mean()]
    for _ in range(steps):
        step = solver.step(z, g, state, bare)
        z, state = step.z, step.state
        g = bare.residual(z)
        logs.append((g.norm(dim=1) / (z + g).norm(dim=1)).log10().mean())
    weights = torch.arange(1, steps + 2, dtype=torch.float64)
    return (weights / weights.sum()) @ torch.stack(logs)


def gradients(solver, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(solver.parameters()))])


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("context", ["initial_value", "input"])
def test_higher_and_native_and_a_handwritten_unroll_agree(name, context):
    solver = trained_a_little(name, context)
    by_hand = plain_unroll(solver, tanh(batch=3, n=6, gain=1.1), 5)
    reference = gradients(solver, by_hand)
    assert reference.abs().max() > 1e-3
    for backend in ("higher", "native"):
        loss = loss_of(solver, backend)
        torch.testing.assert_close(loss, by_hand, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(gradients(solver, loss), reference, rtol=1e-10, atol=1e-13)


# what the universal solver sees and its γ, but for ridge and trust, are constants of the gradient
@pytest.mark.parametrize("name", sorted(set(LEARNED) - {"universal"}))
def test_backpropagation_through_time_agrees_with_finite_differences(name):
    solver = trained_a_little(name)
    analytic = gradients(solver, loss_of(solver, "higher"))
    direction = torch.randn(analytic.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameters = list(solver.parameters())
    start = [p.detach().clone() for p in parameters]

    def moved(step: float) -> float:
        pieces = direction.split([p.numel() for p in parameters])
        with torch.no_grad():
            for p, origin, piece in zip(parameters, start, pieces, strict=True):
                p.copy_(origin + step * piece.reshape(p.shape))
        return float(loss_of(solver, "native").detach())

    eps = 1e-5
    numeric = (moved(eps) - moved(-eps)) / (2 * eps)
    assert numeric == pytest.approx(float(analytic @ direction), rel=1e-6)


def test_the_graph_reaches_through_the_residual_not_only_through_the_state():
    """Dropping ∂r/∂z (a surrogate gradient) would give other numbers: the exact gradient must differ from that."""
    solver = trained_a_little("grouped")
    problem = tanh(batch=3, n=6, gain=1.1)
    exact = gradients(solver, loss_of(solver, "higher"))
    cut = unroll(
        solver, lambda z, x: problem.f(z.detach(), x), problem.z0, problem.x, steps=5, backend="higher"
    ).residuals
    truncated = gradients(solver, ResidualObjective()(cut))
    assert (exact - truncated).norm() > 1e-2 * exact.norm()


def test_unrolling_through_higher_leaks_no_tensors():
    solver = trained_a_little("grouped")

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    for _ in range(2):
        loss_of(solver, "higher").backward()
    before = live()
    for _ in range(5):
        loss_of(solver, "higher").backward()
    assert live() <= before + 5


def test_an_exact_fixed_point_in_the_batch_does_no_harm_to_the_gradient():
    problem = tanh(batch=3, n=6, gain=1.1)
    x = problem.x.clone()
    x[1] = 0  # z* = z0 = 0
    solver = make_learned("grouped", Layout("vector", (6,)), conditioning="input").double()
    residuals = unroll(solver, problem.f, problem.z0, x, steps=3).residuals
    assert torch.isfinite(gradients(solver, ResidualObjective()(residuals))).all()


def test_bad_arguments_are_refused():
    problem = tanh()
    with pytest.raises(ValueError, match="backend must be one of higher, native, got 'jax'"):
        unroll(None, problem.f, problem.z0, problem.x, steps=1, backend="jax")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        unroll(None, problem.f, problem.z0, problem.x, steps=0)
    with pytest.raises(ValueError, match="objective kind"):
        ResidualObjective(kind="square")
    with pytest.raises(ValueError, match="objective weights"):
        ResidualObjective(weights="quadratic")


def test_objectives_are_what_they_say():
    residuals = torch.tensor([[1.0, 1.0], [0.1, 0.01]])
    assert float(ResidualObjective("log", "uniform")(residuals)) == pytest.approx((0 - 1.5) / 2)
    assert float(ResidualObjective("log", "linear")(residuals)) == pytest.approx(2 / 3 * -1.5)
    assert float(ResidualObjective("log", "last")(residuals)) == pytest.approx(-1.5)
    assert float(ResidualObjective("plain", "uniform")(residuals)) == pytest.approx((1 + 0.055) / 2)
    assert float(ResidualObjective("normalised", "last")(2 * residuals)) == pytest.approx(0.055)
    with pytest.raises(ValueError, match="tolerances must be numbers"):
        CountObjective(tolerances=(2.0,))
    with pytest.raises(ValueError, match="objective weights"):
        DistanceObjective(weights="late")


def test_objectives_of_rollouts_are_what_they_say():
    star = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    iterates = (torch.zeros(2, 2), star * torch.tensor([[0.9], [0.5]]))
    rollout = Rollout(torch.tensor([[1.0, 1.0], [0.1, 0.001]]), iterates, (torch.tensor([5.0, 1.0]),), None)
    assert float(DistanceObjective(weights="last").loss(rollout, star, 0.0)) == pytest.approx(
        (-1 + math.log10(0.5)) / 2
    )
    with pytest.raises(ValueError, match="needs the equilibria"):
        DistanceObjective().loss(rollout, None, 0.0)
    # distances 1 and (0.1 + 0.5)/2; remainders 5/5 and 1/2
    convergence, start, remainder = 1 / 3 * 1 + 2 / 3 * 0.3, 1.0, 0.75
    for done in (0.0, 0.5):
        loss = float(HyperObjective(2.0, 0.3, 0.4).loss(rollout, star, done))
        assert loss == pytest.approx(2 * convergence + 0.3 * start + 0.4 * (1 - done) * remainder)
    sharp = CountObjective(tolerances=(1e-2,), width=1e-3)
    assert float(sharp.loss(rollout, None, 0.0)) == pytest.approx((2 + 1) / 2), "evaluations above the tolerance"


def test_equilibria_are_packed_fixed_points():
    problem = tanh(batch=3, n=6, gain=0.5)
    star = equilibria(problem.f, problem.z0, problem.x)
    assert (problem.f(star, problem.x) - star).norm(dim=1).max() < 1e-3 * star.norm(dim=1).min()


@pytest.mark.parametrize("backend", ["higher", "native"])
@pytest.mark.parametrize("name", LEARNED)
def test_truncated_backpropagation_follows_the_same_solve_and_is_cut_between_segments(name, backend):
    solver = trained_a_little(name)
    problem = tanh(batch=3, n=6, gain=0.8)
    whole = unroll(solver, problem.f, problem.z0, problem.x, steps=6, backend=backend)
    first = unroll(solver, problem.f, problem.z0, problem.x, steps=3, backend=backend)
    begin = first.carry()
    second = unroll(solver, problem.f, problem.z0, problem.x, steps=3, backend=backend, begin=begin)
    torch.testing.assert_close(torch.cat([first.residuals, second.residuals[1:]]), whole.residuals)
    torch.testing.assert_close(second.residuals[0], first.residuals[-1])
    assert not begin[0].requires_grad
    config = MetaConfig(unroll=3, segments=2, clip=1e9)
    objective = ResidualObjective()
    wanted = [
        torch.autograd.grad(
            objective.loss(part, None, 0.0), list(solver.parameters()), allow_unused=True, retain_graph=True
        )
        for part in (first, second)
    ]
    loss, norm = differentiate(solver, problem.f, problem.z0, problem.x, config, backend, steps=3)
    assert torch.isfinite(norm)
    assert float(loss) == pytest.approx(float((objective(first.residuals) + objective(second.residuals)).detach()) / 2)
    for parameter, *grads in zip(solver.parameters(), *wanted, strict=True):
        total = sum((grad for grad in grads if grad is not None), torch.zeros_like(parameter))
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-12)
    late = gradients_or_zero(solver, objective(whole.residuals[3:])) - gradients_or_zero(
        solver, objective(second.residuals)
    )
    assert late.norm() > 1e-3, "the whole graph reaches further back"


def gradients_or_zero(solver, loss):
    found = torch.autograd.grad(loss, list(solver.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([
        (torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(solver.parameters(), found, strict=True)
    ])  # fmt: skip
