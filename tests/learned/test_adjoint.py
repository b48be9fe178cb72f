"""A learned solver for the backward pass: homogeneous, safe, and worth its training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import metabroyden as mb
from metabroyden.learned import AdjointConfig, Safeguard
from metabroyden.learned.layout import Layout
from metabroyden.meta import AdjointMap, unroll
from metabroyden.meta.fit import make_learned
from metabroyden.zoo.models import ConvCell

SHAPES = {"vector": (6,), "nct": (3, 6), "ntc": (6, 3), "image": (3, 4, 4)}


class Mixing(nn.Module):
    """tanh of a channel-mixing map, for states of any layout; causal in time for sequences."""

    def __init__(self, kind: str, gain: float = 0.8) -> None:
        super().__init__()
        self.kind, layout = kind, Layout(kind, SHAPES[kind])
        self.w = nn.Parameter(gain * torch.linalg.qr(torch.randn(layout.channels, layout.channels)).Q)

    def forward(self, z, x):
        if self.kind in ("vector", "ntc"):
            return torch.tanh((z if self.kind == "vector" else _late(z, 1)) @ self.w + x)
        return torch.tanh(torch.einsum("bc...,cd->bd...", _late(z, 2) if self.kind == "nct" else z, self.w) + x)


def _late(z, time):
    """z with half of each token taken from the one before."""
    before = torch.cat([torch.zeros_like(z.narrow(time, 0, 1)), z.narrow(time, 0, z.shape[time] - 1)], dim=time)
    return 0.5 * z + 0.5 * before


def problem_of(kind: str, batch: int = 5):
    """An adjoint system with its context; any weights of a solver for it."""
    torch.manual_seed(3)
    cell = Mixing(kind).double()
    x = torch.randn(batch, *SHAPES[kind], dtype=torch.float64)
    star = mb.solve(cell, torch.zeros_like(x), x, solver=mb.Broyden(), rtol=1e-12, max_nfe=90).z
    context = {"z": star.flatten(1), "x": x, "v": torch.randn_like(star).flatten(1)}
    return AdjointMap(cell, SHAPES[kind]), context


def solver_of(kind: str, noise: float = 0.3, **options):
    solver = make_learned("adjoint", Layout(kind, SHAPES[kind]), hidden=4, rank=5, **options).double()
    for parameter in solver.parameters():
        parameter.data += noise * torch.randn(parameter.shape, dtype=parameter.dtype)
    return solver


@pytest.mark.parametrize("alpha", [-3.0, 1e-6, 1e6])
@pytest.mark.parametrize("kind", SHAPES)
def test_its_iterates_are_homogeneous_in_the_cotangent(kind, alpha):
    system, context = problem_of(kind)
    solver = solver_of(kind)
    scaled = {**context, "v": alpha * context["v"]}
    for steps in (1, 4):
        one = unroll(solver, system, context["v"], context, steps=steps, backend="native").z
        other = unroll(solver, system, scaled["v"], scaled, steps=steps, backend="native").z
        torch.testing.assert_close(other / alpha, one, rtol=1e-6, atol=1e-9)
    assert (one - context["v"]).norm() > 0.1, "it has moved"


def test_a_gradient_through_it_is_linear_in_the_loss():
    cell = ConvCell(3, 3, 1)
    solver = solver_of("image", noise=0.05).float()
    deq = mb.DEQ(cell, rtol=1e-5, max_nfe=80, backward=mb.Implicit(solver=solver, rtol=1e-2))
    x, v = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4)
    grads = [torch.autograd.grad((factor * v * deq(x)).sum(), cell.conv1.weight)[0] / factor for factor in (1.0, -1e4)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_untrained_it_is_picards_iteration_on_the_adjoint(kind):
    system, context = problem_of(kind)
    solver = solver_of(kind, noise=0, safeguard=Safeguard(horizon=None, patience=None))
    ours, picard = (
        mb.solve(system, context["v"], context, solver=way, rtol=1e-4, max_nfe=90) for way in (solver, mb.Picard())
    )
    torch.testing.assert_close(ours.trace.residual, picard.trace.residual, rtol=1e-6, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("kind", SHAPES)
def test_with_any_weights_it_falls_back_to_a_classical_solver(kind):
    system, context = problem_of(kind)
    solution = mb.solve(system, context["v"], context, solver=solver_of(kind, noise=1.0), rtol=1e-8, max_nfe=150)
    assert (solution.trace.phase > 0).any()
    dense = mb.solve(system, context["v"], context, solver=mb.Broyden(memory=60), rtol=1e-10, max_nfe=150)
    torch.testing.assert_close(solution.z, dense.z, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["nct", "ntc"])
def test_in_a_sequence_nothing_of_the_past_enters_the_future(kind):
    """Cotangents flow back in time: what is added to early ones changes nothing at later tokens."""
    system, context = problem_of(kind)
    solver = solver_of(kind, safeguard=Safeguard(horizon=50, patience=None))
    time = 2 if kind == "nct" else 1
    changed = context["v"].reshape(-1, *SHAPES[kind]).clone()
    changed.narrow(time, 0, 2).add_(1)
    other = {**context, "v": changed.flatten(1)}
    found = [unroll(solver, system, c["v"], c, steps=3, backend="native").z for c in (context, other)]
    late = [u.reshape(-1, *SHAPES[kind]).narrow(time, 2, 4) for u in found]
    torch.testing.assert_close(*late, rtol=1e-9, atol=1e-10)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_it_is_for_adjoints_only():
    x = torch.randn(20, 6)
    solver = make_learned("adjoint", Layout("vector", (6,)))
    with pytest.raises(ValueError, match="solves the adjoint systems of Implicit, whose context holds"):
        mb.solve(lambda z, x: torch.tanh(z + x), torch.zeros_like(x), x, solver=solver)
    with pytest.raises(ValueError, match=r"fit_adjoint\(cell, x_train\) fits it"):
        mb.fit_solver(lambda z, x: torch.tanh(z + x), x, solver="adjoint")
    assert AdjointConfig(layout="vector", shape=(6,)).initializer_width == 0


def test_the_system_is_that_of_the_cell():
    system, context = problem_of("vector")
    u = torch.randn(5, 6, dtype=torch.float64)
    for row in range(5):
        jacobian = torch.func.jacrev(lambda z, row=row: system.cell(z[None], context["x"][row : row + 1])[0])(
            context["z"][row]
        )
        torch.testing.assert_close(system(u, context)[row], jacobian.T @ u[row] + context["v"][row])
    (towards,) = torch.autograd.grad(system(u.requires_grad_(), context)[0].sum(), u)
    assert towards[0].abs().sum() > 0


@pytest.mark.parametrize(("kind", "steps", "unroll"), [("vector", 200, 6), ("ntc", 80, 5)])
def test_fit_adjoint_beats_broyden_on_cotangents_it_has_not_seen(kind, steps, unroll, tmp_path):
    torch.manual_seed(0)
    cell = Mixing(kind, gain=0.95)
    x = 0.3 * torch.randn(150, *SHAPES[kind])
    before = {name: value.clone() for name, value in cell.state_dict().items()}
    solver = mb.fit_adjoint(
        cell, x, layout=kind, rtol=1e-3, steps=steps, unroll=unroll, hidden=8, rank=16, progress=False
    )
    held = solver.summary["held_out"]
    assert held["mean_evaluations"] < held["mean_evaluations_broyden"]
    assert all(torch.equal(value, before[name]) for name, value in cell.state_dict().items())
    loaded = mb.load_solver(mb.save_solver(solver, tmp_path / "adjoint.safetensors"))
    z = torch.randn(6, *x.shape[1:])
    grads = [
        torch.autograd.grad((mb.DEQ(cell, backward=mb.Implicit(solver=s))(x[:6]) * z).sum(), cell.parameters())
        for s in (solver, loaded)
    ]
    for ours, again in zip(*grads, strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": torch.randn(5, 4)}, "at least 10 samples"),
        ({"cotangents": torch.randn(12, 5)}, r"shaped like the states, \(12, 4\), got \(12, 5\)"),
    ],
)
def test_fit_adjoint_refuses_bad_input(change, words):
    cell = nn.Module()
    cell.forward = lambda z, x: torch.tanh(0.5 * z + x)
    with pytest.raises(ValueError, match=words):
        mb.fit_adjoint(cell, **{"x_train": torch.randn(12, 4), "steps": 1, "progress": False} | change)


@pytest.mark.parametrize("given", ["deq", "model"])
def test_an_adjoint_is_fitted_for_a_deqs_cell_and_for_the_deq_in_a_model(given):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.deq = nn.Linear(3, 6), mb.DEQ(Mixing("vector"))

        def forward(self, x):
            return self.deq(self.stem(x))

    model, raw = Model().train(), torch.randn(20, 3)
    with torch.no_grad():
        x = model.stem(raw)
    f, inputs = (model.deq, x) if given == "deq" else (model, raw)
    found = mb.fit_adjoint(f, inputs, steps=2, progress=False)
    same = mb.fit_adjoint(model.deq.cell, x, steps=2, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), same.parameters(), strict=True))
    assert found.fingerprint == same.fingerprint
    assert model.training


def test_keep_up_wants_the_layer_and_not_its_cell():
    with pytest.raises(TypeError, match="deq must be the DEQ that is trained, got Mixing"):
        mb.OnlineMetaTrainer(Mixing("vector"), backward=solver_of("vector"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.double(), "finite and torch.float32 like the states, got torch.float64"),
        (lambda v: v / 0, "cotangents must be finite"),
    ],
)
def test_cotangents_unlike_the_states_are_refused_by_name(change, words):
    f = lambda z, x: torch.tanh(0.3 * z + x)  # noqa: E731
    with pytest.raises(ValueError, match=words):
        mb.fit_adjoint(f, torch.randn(20, 4), cotangents=change(torch.ones(20, 4)), steps=1, progress=False)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu")])
def test_an_adjoint_is_not_fitted_where_nothing_can_be_trained(mode):
    with mode(), pytest.raises(RuntimeError, match=r"fit_adjoint trains: call it outside of torch.inference_mode"):
        mb.fit_adjoint(lambda z, x: 0.5 * z + x, torch.randn(20, 4), steps=1, progress=False)
