"""Monotone cells and the splitting solvers for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.deq import initial_state
from metabroyden.gradients.base import parts_of
from metabroyden.solvers.registry import register, solver_types
from metabroyden.state import Packing
from metabroyden.zoo import models as zoo
from metabroyden.zoo.models.circular import convolve, convolve_transposed
from tests.helpers import refused

M = 0.3
STRUCTURES = {
    "dense": (lambda m: zoo.MonotoneDense(12, m), (12,)),
    "conv": (lambda m: zoo.MonotoneConv(3, 4, m), (3, 4, 4)),
    "conv, odd side": (lambda m: zoo.MonotoneConv(2, 5, m), (2, 5, 5)),
    "two tiers": (lambda m: zoo.MonotoneMultiTier((2, 3), 4, m), ((2, 4, 4), (3, 2, 2))),
    "three tiers": (lambda m: zoo.MonotoneMultiTier((1, 2, 3), 8, m), ((1, 8, 8), (2, 4, 4), (3, 2, 2))),
}
every_structure = pytest.mark.parametrize("name", STRUCTURES)
every_split = pytest.mark.parametrize("solver", [mb.ForwardBackward(0.2), mb.PeacemanRachford(0.7)], ids=["fb", "pr"])


def problem(name: str, *, gain: float = 1.0, m: float = M, batch: int = 7, seed: int = 0):
    """(cell, x) with random weights of so many times the initial size, in float64."""
    build, shapes = STRUCTURES[name]
    torch.manual_seed(seed)
    cell = build(m).double()
    for parameter in cell.parameters():
        parameter.data *= gain
    if isinstance(shapes[0], int):
        return cell, torch.randn(batch, *shapes).double()
    return cell, tuple(torch.randn(batch, *shape).double() for shape in shapes)


def zeros(x):
    return torch.zeros_like(x) if isinstance(x, Tensor) else tuple(map(torch.zeros_like, x))


def matrix(cell, x) -> Tensor:
    """W, by what it makes of unit vectors."""
    packing = Packing.of(x)
    unit = torch.eye(packing.pack(x).shape[1]).double()
    with torch.no_grad():
        return packing.pack(cell.linear(packing.unpack(unit), packing.unpack(torch.zeros_like(unit)))).T


def flat(z) -> Tensor:
    return Packing.of(z, "z").pack(z).detach()


def recomputed(cell, solution, x) -> Tensor:
    return mb.relative_residual(flat(solution.z), flat(cell(solution.z, x)))


class Counted(nn.Module):
    """A cell whose uses are counted a sample and noted by name. x carries the samples' numbers in front."""

    def __init__(self, cell, used: list[str] | None = None) -> None:
        super().__init__()
        self.cell, self.used = cell, [] if used is None else used
        self.seen: list[Tensor] = []
        self.resolvents = 0

    def note(self, name: str, x) -> None:
        self.used.append(name)
        self.seen.append(x[0])

    def forward(self, z, x):
        self.note("f", x)
        return self.cell(z, x[1])

    def linear(self, z, x):
        self.note("linear", x)
        return self.cell.linear(z, x[1])

    def prox(self, v):
        return self.cell.prox(v)

    def resolvent(self, alpha):
        self.resolvents += 1
        solve = self.cell.resolvent(alpha)
        return lambda v, x: self.note("resolvent", x) or solve(v, x[1])


@every_structure
@pytest.mark.parametrize("m", [0.05, 1.0, 2.5])
def test_whatever_the_weights_the_map_is_strongly_monotone_with_constant_m(name, m):
    for seed in range(6):
        cell, x = problem(name, gain=1.0 + 5.0 * (seed % 2), m=m, seed=seed // 2)
        w = matrix(cell, x)
        monotone = torch.eye(len(w)) - (w + w.T) / 2
        assert float(torch.linalg.eigvalsh(monotone).min()) >= m - 1e-10
        assert float((w - w.T).abs().max()) > 0.01


def test_weights_are_what_their_docstrings_say():
    cell, x = problem("dense")
    a, b = cell.parametrizations.weight.original
    z = torch.randn_like(x)
    wanted = (1 - M) * z - z @ a.T @ a + z @ b.T - z @ b + x
    assert_close(cell.linear(z, x), wanted)
    assert_close(cell(z, x), torch.relu(wanted))
    for name in ("conv", "conv, odd side"):
        cell, x = problem(name)
        a, b = cell.parametrizations.weight.original
        z = torch.randn_like(x)
        ata = convolve_transposed(convolve(z, a), a)
        assert_close(cell.linear(z, x), (1 - M) * z - ata + convolve(z, b) - convolve_transposed(z, b) + x)
    # A is block lower bidiagonal: the energy of Az and the skew part of W say so of the tiers
    cell, x = problem("three tiers")
    z = tuple(map(torch.randn_like, x))
    az = [convolve(z[0], cell.a[0])]
    az += [convolve(z[i], cell.a[i]) + convolve(z[i - 1], cell.d[i - 1], 2) for i in (1, 2)]
    inner = float((flat(z) * flat(cell.linear(z, zeros(x)))).sum())
    energy = sum(float(part.detach().square().sum()) for part in az)
    assert inner == pytest.approx((1 - M) * float(flat(z).square().sum()) - energy)
    w = matrix(cell, x)
    skew = ((w - w.T) / 2).split([64, 32, 12])
    assert float(skew[0][:, 64:].abs().max()) < 1e-12 < float(skew[0][:, :64].abs().max())


@pytest.mark.parametrize("stride", [1, 2])
def test_the_transposed_convolution_is_the_adjoint(stride):
    kernel, z = torch.randn(3, 2, 3, 3).double(), torch.randn(4, 2, 6, 6).double()
    a = torch.randn(4, 3, 6 // stride, 6 // stride).double()
    assert_close((convolve(z, kernel, stride) * a).sum(), (z * convolve_transposed(a, kernel, stride)).sum())


@every_structure
@pytest.mark.parametrize("alpha", [0.05, 1.0, 20.0])
def test_the_resolvent_solves_its_equation(name, alpha):
    cell, x = problem(name, gain=4.0)
    v = Packing.of(x).unpack(torch.randn_like(flat(x)))
    z = flat(cell.resolvent(alpha)(v, x))
    left = (1 + alpha) * z - alpha * z @ matrix(cell, x).T
    assert_close(left, flat(v) + alpha * flat(x), rtol=0, atol=1e-10)


@every_structure
@pytest.mark.parametrize("seed", [0, 1])
def test_splitting_converges_where_it_must_and_finds_what_broyden_finds_while_picard_diverges(name, seed):
    m = 0.5
    cell, x = problem(name, gain=2.6, m=m, batch=3, seed=seed)
    run = lambda solver, budget: mb.solve(cell, zeros(x), x, solver=solver, rtol=1e-8, max_nfe=budget, throw=False)  # noqa: E731
    w = matrix(cell, x)
    bound = 2 * m / float(torch.linalg.matrix_norm(torch.eye(len(w)) - w, 2)) ** 2
    plain = run(mb.Picard(), 300)
    assert not plain.converged.all()
    assert float(plain.trace.absolute[-1].nan_to_num(0).max()) > 1
    wanted = run(mb.Broyden(memory=100), 1000)
    assert wanted.converged.all()
    for solver in (mb.ForwardBackward(0.95 * bound), mb.PeacemanRachford(0.3), mb.PeacemanRachford(3.0)):
        found = run(solver, 4000)
        assert found.converged.all(), (solver, found.failures())
        assert_close(flat(found.z), flat(wanted.z), rtol=0, atol=3e-6)
        assert_close(recomputed(cell, found, x), found.residual, rtol=1e-6, atol=1e-14)


@every_split
@every_structure
def test_evaluations_are_the_uses_of_a_sample_and_the_residual_is_true(name, solver):
    cell, x = problem(name, gain=1.6)
    sizes = torch.tensor([1e-3, 1.0, 10.0, 0.1, 1.0, 100.0, 0.01]).double()
    x = Packing.of(x).unpack(flat(x) * sizes[:, None] + (sizes > 0.5)[:, None] * 3)
    counted, start = Counted(cell), Packing.of(x).unpack(torch.randn_like(flat(x)))
    solution = mb.solve(counted, start, (torch.arange(7), x), solver=solver, rtol=1e-6, max_nfe=400)
    np.testing.assert_array_equal(solution.nfe.numpy(), np.bincount(torch.cat(counted.seen).numpy(), minlength=7))
    assert len(solution.nfe.unique()) > 1
    assert torch.equal(solution.nfe, solution.steps + 1)  # f(z0) or a first step, then one use a step
    assert counted.resolvents == isinstance(solver, mb.PeacemanRachford)
    assert_close(recomputed(cell, solution, x), solution.residual, rtol=1e-6, atol=1e-14)
    assert (solution.trace.residual.isfinite().sum(dim=0) == solution.nfe).all()


@every_split
def test_neither_other_samples_nor_late_looks_nor_inference_mode_change_the_way_within_the_budget(solver):
    cell, x = problem("dense", gain=2.0)
    x = x * torch.logspace(-2, 2, 7)[:, None]

    def run(rows=slice(None), **options):
        options = {"rtol": 1e-8, "max_nfe": 400, "throw": False} | options
        return mb.solve(cell, zeros(x[rows]), x[rows], solver=solver, **options)

    together = run()
    assert together.converged.all()
    for i in (0, 3, 6):
        alone = run([i])
        assert abs(int(alone.nfe[0]) - int(together.nfe[i])) <= 1
        assert_close(alone.z[0], together.z[i], rtol=1e-6, atol=1e-8)
    for budget in (1, 2, 3, 9):
        solution, seldom = (run(rtol=0.0, max_nfe=budget, check_every=every) for every in (1, 3))
        assert (solution.nfe == budget).all()
        assert torch.equal(seldom.z, solution.z)
    with torch.inference_mode():
        assert torch.equal(run().z, together.z)


@pytest.mark.parametrize("name", ["dense", "conv"])
@pytest.mark.parametrize("kind", [mb.ForwardBackward, mb.PeacemanRachford])
def test_tuning_finds_a_length_that_is_no_worse(name, kind):
    cell, x = problem(name, gain=2.0, batch=3)
    tuned = kind.tuned(cell, zeros(x), x, tolerances=(1e-4,), max_nfe=100)
    nfe = [
        mb.solve(cell, zeros(x), x, solver=solver, rtol=1e-4, max_nfe=100, throw=False).nfe.double().log().mean()
        for solver in (tuned, kind(), kind(0.125))
    ]
    assert nfe[0] <= min(nfe[1:]) + 1e-9


@every_split
@pytest.mark.parametrize("name", ["dense", "conv", "two tiers"])
def test_a_deq_trains_with_a_splitting_solver_and_has_the_gradients_of_broyden(name, solver):
    gradients, backward = [], mb.Implicit(solver=mb.Broyden(memory=100), rtol=1e-12, max_nfe=300)
    for forward in (solver, mb.Broyden(memory=100)):
        cell, x = problem(name, gain=2.0)
        deq = mb.DEQ(cell, solver=forward, backward=backward, rtol=1e-12, max_nfe=3000)
        given = [part.requires_grad_() for part in parts_of(x)]
        loss = sum(part.pow(3).sum() for part in parts_of(deq(x)))
        assert deq.last_solution.converged.all()
        gradients.append(torch.autograd.grad(loss, [*given, *cell.parameters()]))
    assert all(float(wanted.abs().max()) > 1e-3 for wanted in gradients[1])
    assert_close(*gradients, rtol=1e-7, atol=1e-8)


class Dropping(zoo.MonotoneDense):
    def __init__(self) -> None:
        super().__init__(6, 0.5)
        self.drop = mb.VariationalDropout(0.5, (6,))

    def linear(self, z, x):
        assert type(x) is Tensor
        return super().linear(z, self.drop(x))

    def resolvent(self, alpha):
        solve = super().resolvent(alpha)
        return lambda v, x: solve(v, self.drop(x))


@every_split
def test_weights_are_computed_once_a_call_and_pinned_masks_reach_every_part(solver):
    cell, computed, seen = Dropping().double(), [], []
    cell.parametrizations.weight[0].register_forward_hook(lambda *_: computed.append(1))
    x = torch.rand(5, 6).double() + 0.5
    deq = mb.DEQ(cell, solver=solver, rtol=1e-10, max_nfe=300)
    deq.hooks.append(lambda f, context, z: seen.append(mb.relative_residual(z, f(z, context))))
    z = deq(x)
    assert len(computed) == 1
    assert deq.last_solution.converged.all()
    assert_close(seen[0].detach(), deq.last_solution.residual, rtol=1e-3, atol=1e-12)
    assert not torch.allclose(z, deq(x))  # other masks


@every_split
def test_what_does_not_fit_is_refused_with_clear_words(solver):
    name, cell, x = type(solver).__name__, zoo.MonotoneDense(12), torch.randn(2, 12)
    words = f"{name} needs a cell with the methods linear, prox.*such as MonotoneDense; "
    refused(words + "DenseCell has no prox", lambda: mb.solve(zoo.DenseCell(12), x, x, solver=solver), TypeError)
    refused(words, lambda: mb.DEQ(zoo.DenseCell(12), solver=solver), TypeError)
    refused(words + "function has no", lambda: mb.Implicit(solver=solver), TypeError)
    words, half = f"{name} uses parts of f, in its own precision: no f_dtype", {"f_dtype": torch.bfloat16}
    refused(words, lambda: mb.solve(cell, x, x, solver=solver, **half))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refused("needs f in its own precision: no autocast", lambda: mb.solve(cell, x, x, solver=solver))
    refused("FixedBudget evaluates f as a whole", lambda: mb.FixedBudget(cell, solver, max_nfe=10))
    for wrong in (0, -1.0, float("nan"), True):
        refused(f"{name}: alpha must be a number in", lambda wrong=wrong: type(solver)(wrong))


def test_splitting_solvers_are_known_by_name_apart_from_those_of_any_f():
    found = solver_types(learned=False, splitting=True)
    assert found == {"forward-backward": mb.ForwardBackward, "peaceman-rachford": mb.PeacemanRachford}
    refused("is registered already", lambda: register("forward-backward")(mb.Picard))
    words = r"for cells that offer their parts: forward-backward, .*peaceman-rachford"
    refused(words, lambda: mb.get_solver("douglas-rachford"))


@pytest.mark.parametrize("structure", ["dense", "conv", "multi-tier"])
def test_a_classifier_learns(structure):
    config = zoo.MonotoneClassifierConfig(structure, 6, m=0.5)
    model = zoo.MonotoneClassifier(config, solver=mb.PeacemanRachford(), rtol=1e-5, max_nfe=100)
    images, labels = torch.rand(10, 1, 8, 8), torch.arange(10)
    before = cross_entropy(model(images), labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(6):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
        optimizer.step()
    assert cross_entropy(model(images), labels) < 0.95 * before
    assert model.deq.last_solution.converged.all()
    assert model.deq.last_backward_solution.converged.all()
    z0 = initial_state(model.cell, model.inject(images))
    assert [part.shape for part in parts_of(z0)] == [part.shape for part in parts_of(model.inject(images))]


def test_a_classifier_has_the_sizes_that_its_config_says():
    assert zoo.MonotoneClassifier().cell.n == 87
    config = zoo.MonotoneClassifierConfig("multi-tier", 4, side=10, tiers=3)
    assert zoo.MonotoneClassifier(config).cell.shapes == [(4, 12, 12), (8, 6, 6), (16, 3, 3)]
    conv = zoo.MonotoneClassifier(zoo.MonotoneClassifierConfig("conv", 5, image_channels=3, margin=2))
    assert conv.inject(torch.rand(2, 3, 8, 8)).shape == (2, 5, 12, 12)
