"""A learned solver for the backward pass: homogeneous, safe, and worth its training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import metabroyden as mb
from metabroyden.learned import AdjointConfig, Safeguard
from metabroyden.learned.layout import Layout
from metabroyden.meta import AdjointMap, unroll
from metabroyden.meta.fit import make_learned
from metabroyden.zoo.models import ConvCell
from tests.helpers import DOUBLE, perturbed, refused, same_parameters

SHAPES = {"vector": (6,), "nct": (3, 6), "ntc": (6, 3), "image": (3, 4, 4)}
TIME = {"nct": 2, "ntc": 1}


class Mixing(nn.Module):
    """tanh of a channel-mixing map, for states of any layout; causal in time for sequences."""

    def __init__(self, kind: str, gain: float = 0.8) -> None:
        super().__init__()
        self.kind, c = kind, Layout(kind, SHAPES[kind]).channels
        self.w = nn.Parameter(gain * torch.linalg.qr(torch.randn(c, c)).Q)

    def forward(self, z, x):
        if self.kind in TIME:  # half of each token taken from the one before
            time = TIME[self.kind]
            earlier = z.narrow(time, 0, z.shape[time] - 1)
            z = 0.5 * z + 0.5 * torch.cat([torch.zeros_like(z.narrow(time, 0, 1)), earlier], dim=time)
        mixed = z @ self.w if self.kind in ("vector", "ntc") else torch.einsum("bc...,cd->bd...", z, self.w)
        return torch.tanh(mixed + x)


def problem_of(kind: str, batch: int = 5):
    """An adjoint system with its context; any weights of a solver for it."""
    torch.manual_seed(3)
    cell, x = Mixing(kind).double(), torch.randn(batch, *SHAPES[kind], dtype=DOUBLE)
    star = mb.solve(cell, torch.zeros_like(x), x, solver=mb.Broyden(), rtol=1e-12, max_nfe=90).z
    context = {"z": star.flatten(1), "x": x, "v": torch.randn_like(star).flatten(1)}
    return AdjointMap(cell, SHAPES[kind]), context


def solver_of(kind: str, noise: float = 0.3, **options):
    return perturbed(make_learned("adjoint", Layout(kind, SHAPES[kind]), hidden=4, rank=5, **options).double(), noise)


def iterate(solver, system, context, steps: int):
    return unroll(solver, system, context["v"], context, steps=steps, backend="native").z


def solved(solver, system, context, **options):
    return mb.solve(system, context["v"], context, solver=solver, **options)


@pytest.mark.parametrize("alpha", [-3.0, 1e-6, 1e6])
@pytest.mark.parametrize("kind", SHAPES)
def test_its_iterates_are_homogeneous_in_the_cotangent(kind, alpha):
    (system, context), solver = problem_of(kind), solver_of(kind)
    scaled = {**context, "v": alpha * context["v"]}
    for steps in (1, 4):
        one, other = (iterate(solver, system, c, steps) for c in (context, scaled))
        torch.testing.assert_close(other / alpha, one, rtol=1e-6, atol=1e-9)
    assert (one - context["v"]).norm() > 0.1, "it has moved"


def test_a_gradient_through_it_is_linear_in_the_loss():
    cell, solver = ConvCell(3, 3, 1), solver_of("image", noise=0.05).float()
    deq = mb.DEQ(cell, rtol=1e-5, max_nfe=80, backward=mb.Implicit(solver=solver, rtol=1e-2))
    x, v = torch.randn(2, 4, 3, 4, 4)
    grads = [torch.autograd.grad((factor * v * deq(x)).sum(), cell.conv1.weight)[0] / factor for factor in (1.0, -1e4)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_untrained_it_is_picards_iteration_and_with_any_weights_it_falls_back_to_a_classical_solver(kind):
    problem, untrained = problem_of(kind), solver_of(kind, noise=0, safeguard=Safeguard(horizon=None, patience=None))
    ours, picard = (solved(way, *problem, rtol=1e-4, max_nfe=90) for way in (untrained, mb.Picard()))
    torch.testing.assert_close(ours.trace.residual, picard.trace.residual, rtol=1e-6, atol=1e-12, equal_nan=True)
    found = solved(solver_of(kind, noise=1.0), *problem, rtol=1e-8, max_nfe=150)
    assert (found.trace.phase > 0).any()
    wanted = solved(mb.Broyden(memory=60), *problem, rtol=1e-10, max_nfe=150)
    torch.testing.assert_close(found.z, wanted.z, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", TIME)
def test_in_a_sequence_nothing_of_the_past_enters_the_future(kind):
    """Cotangents flow back in time: what is added to early ones changes nothing at later tokens."""
    system, context = problem_of(kind)
    solver = solver_of(kind, safeguard=Safeguard(horizon=50, patience=None))
    changed = context["v"].reshape(-1, *SHAPES[kind]).clone()
    changed.narrow(TIME[kind], 0, 2).add_(1)
    found = [iterate(solver, system, c, 3).view_as(changed) for c in (context, {**context, "v": changed.flatten(1)})]
    torch.testing.assert_close(*(u.narrow(TIME[kind], 2, 4) for u in found), rtol=1e-9, atol=1e-10)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_the_system_is_that_of_the_cell():
    system, context = problem_of("vector")
    u = torch.randn(5, 6, dtype=DOUBLE).requires_grad_()
    found = system(u, context)
    for row in range(5):
        f = lambda z, row=row: system.cell(z[None], context["x"][row : row + 1])[0]  # noqa: E731
        jacobian = torch.func.jacrev(f)(context["z"][row])
        torch.testing.assert_close(found[row], jacobian.T @ u[row] + context["v"][row])
    (towards,) = torch.autograd.grad(found[0].sum(), u)
    assert towards[0].abs().sum() > 0


@pytest.mark.parametrize(("kind", "steps", "unroll"), [("vector", 200, 6), ("ntc", 60, 5)])
def test_fit_adjoint_beats_broyden_on_cotangents_it_has_not_seen(kind, steps, unroll, tmp_path):
    torch.manual_seed(0)
    cell, x = Mixing(kind, gain=0.95), 0.3 * torch.randn(150, *SHAPES[kind])
    before, options = copy.deepcopy(cell), {"unroll": unroll, "hidden": 8, "rank": 16, "progress": False}
    solver = mb.fit_adjoint(cell, x, layout=kind, rtol=1e-3, steps=steps, **options)
    held = solver.summary["held_out"]
    assert held["mean_evaluations"] < held["mean_evaluations_broyden"]
    assert same_parameters(cell, before)
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "adjoint.safetensors"))
    v = torch.randn(6, *x.shape[1:])
    ours, again = (
        torch.autograd.grad((mb.DEQ(cell, backward=mb.Implicit(solver=s))(x[:6]) * v).sum(), cell.w)[0]
        for s in (solver, loaded)
    )
    assert torch.equal(ours, again)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.deq = nn.Linear(3, 6), mb.DEQ(Mixing("vector"))

    def forward(self, x):
        return self.deq(self.stem(x))


@pytest.mark.parametrize("given", ["deq", "model"])
def test_an_adjoint_is_fitted_for_a_deqs_cell_and_for_the_deq_in_a_model(given):
    model, raw = Model().train(), torch.randn(20, 3)
    x = model.stem(raw).detach()
    f, inputs = (model.deq, x) if given == "deq" else (model, raw)
    found, same = (mb.fit_adjoint(*one, steps=2, progress=False) for one in ((f, inputs), (model.deq.cell, x)))
    assert same_parameters(found, same)
    assert found.fingerprint == same.fingerprint
    assert model.training


def halves(z, x):
    return torch.tanh(0.5 * z + x)


def test_it_is_for_adjoints_only():
    x, solver = torch.randn(20, 6), make_learned("adjoint", Layout("vector", (6,)))
    words = "solves the adjoint systems of Implicit, whose context holds"
    refused(words, lambda: mb.solve(halves, torch.zeros_like(x), x, solver=solver))
    refused(r"fit_adjoint\(cell, x_train\) fits it", lambda: mb.fit_solver(halves, x, solver="adjoint"))
    assert AdjointConfig(layout="vector", shape=(6,)).initializer_width == 0


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("at least 10 samples", {"x_train": torch.ones(5, 4)}),
        (r"shaped like the states, \(12, 4\), got \(12, 5\)", {"cotangents": torch.ones(12, 5)}),
        ("finite and torch.float32 like the states, got torch.float64", {"cotangents": torch.ones(12, 4).double()}),
        ("cotangents must be finite", {"cotangents": torch.ones(12, 4) / 0}),
    ],
)
def test_fit_adjoint_refuses_bad_input(words, change):
    arguments = {"x_train": torch.randn(12, 4), "steps": 1, "progress": False} | change
    refused(words, lambda: mb.fit_adjoint(halves, **arguments))


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu")])
def test_an_adjoint_is_not_fitted_where_nothing_can_be_trained(mode):
    words = r"fit_adjoint trains: call it outside of torch.inference_mode"
    with mode():
        refused(words, lambda: mb.fit_adjoint(halves, torch.randn(20, 4), steps=1, progress=False), RuntimeError)
