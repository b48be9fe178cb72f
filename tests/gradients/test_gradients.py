"""Gradients through a fixed point: right where they claim to be, else as biased as their formula, never silently wrong."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import metabroyden as mb
from metabroyden.gradients.base import parts_of
from metabroyden.learned.layout import Layout
from metabroyden.learned.mixer import Mixer
from metabroyden.learned.preconditioner import Preconditioner
from metabroyden.meta.fit import make_learned
from metabroyden.zoo.models import CELLS as MODELS
from metabroyden.zoo.models import ConvCell, make_cell
from metabroyden.zoo.testbed.cells import dense
from tests.test_deq import PairCell, TanhCell, tight


def _normalised() -> nn.Module:
    return mb.normalise(TwoLayers(), max_norm=0.6)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 3, bias=False).double()
        self.drop = mb.VariationalDropout(0.0, (4,))

    def forward(self, z, x):
        return 0.6 * torch.tanh(self.second(self.drop(torch.tanh(self.first(z)))) + x)


def _dropping() -> nn.Module:
    cell = TwoLayers()
    cell.drop = mb.VariationalDropout(0.5, (4,))
    return cell


def _converted() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2))
    return mb.to_deq(network.double()).cell


CELLS = {
    "tanh": (lambda: TanhCell(3), (2, 3)),
    "two tensors": (PairCell, (1, 5)),
    "small conv": (lambda: ConvCell(2, 2, 1).double(), (2, 2, 2, 2)),
    "normalised": (_normalised, (2, 3)),
    "dropout": (_dropping, (2, 3)),
    "converted network": (_converted, (2, 3)),
    **{  # every cell of the registry
        name: (lambda name=name: make_cell(name, dtype=torch.float64)[0], lambda name=name: make_cell(name)[1])
        for name in MODELS
    },
}
FAST = {*MODELS, "small conv", "converted network"}  # gradcheck of these along random directions


def seeded(name: str, **options):
    """(a function of the context and of all parameters, its arguments) for one layer, drawing the same masks each time."""
    build, shape = CELLS[name]
    deq = mb.DEQ(build(), rtol=1e-13, max_nfe=150, warn=False, **options)
    names = [key for key, _ in deq.named_parameters()]
    like = shape() if callable(shape) else torch.empty(shape)
    context = [torch.randn_like(x, dtype=torch.float64).requires_grad_() for x in parts_of(like)]

    def run(*values):
        torch.manual_seed(1)
        x = values[0] if isinstance(like, torch.Tensor) else values[: len(context)]
        with nn.utils.parametrize.cached():
            weights = dict(zip(names, values[len(context) :], strict=True))
            return torch.func.functional_call(deq, weights, (x,))

    for layer in deq.modules():  # a spectral norm learns at every call: for a function it must stand still
        if isinstance(layer, nn.utils.parametrize.ParametrizationList):
            layer.eval()
    return run, (*context, *deq.parameters())


EXACT = {
    "implicit": mb.Implicit(solver=mb.Broyden(memory=60), rtol=1e-13, max_nfe=150),
    "implicit, preconditioned": mb.Implicit(solver=mb.Broyden(memory=60), rtol=1e-13, max_nfe=150, precondition=True),
    "unroll": mb.Unroll(steps=120),
}


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("name", CELLS)
def test_exact_modes_pass_gradcheck(name, mode):
    run, arguments = seeded(name, backward=EXACT[mode])
    fast = mode == "unroll" or name in FAST
    assert torch.autograd.gradcheck(run, arguments, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=fast)


@pytest.mark.parametrize("name", CELLS)
def test_implicit_and_unrolled_gradients_agree_to_second_order(name):
    found = []
    for mode in EXACT.values():
        torch.manual_seed(0)
        run, arguments = seeded(name, backward=mode)
        value = run(*arguments)
        loss = sum(part.pow(3).sum() for part in (value if isinstance(value, tuple) else (value,)))
        first = torch.autograd.grad(loss, arguments, create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), arguments)
        found.append((*first, *second))
    for implicit in found[:-1]:
        for ours, wanted in zip(implicit, found[-1], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CELLS)
def test_second_derivatives_pass_gradgradcheck(name):
    run, arguments = seeded(name, backward=EXACT["implicit"])
    assert torch.autograd.gradgradcheck(run, arguments, atol=1e-5, rtol=1e-3, fast_mode=True)


class Linear(nn.Module):
    """f(z, x) = zA + xC: every gradient has a closed form."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.a = nn.Parameter(0.7 * torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q)
        self.c = nn.Parameter(torch.randn(n, n, dtype=torch.float64))

    def forward(self, z, x):
        return z @ self.a + x @ self.c


@pytest.mark.parametrize("power", [1, 2])
def test_third_derivatives_are_right_too(power):
    """Of a loss that is linear in the state as well."""
    deq, x, thirds = tight(TanhCell(2)), torch.randn(1, 2, dtype=torch.float64, requires_grad=True), []
    for f in (mb.DEQ(deq.cell, backward=mb.Unroll(100)), deq):
        value = f(x).pow(power).sum()
        for _ in range(2):
            gradients = torch.autograd.grad(value, (x, deq.cell.w), create_graph=True)
            value = sum(gradient.square().sum() for gradient in gradients)
        thirds.append(torch.autograd.grad(value, (x, deq.cell.w)))
    for ours, wanted in zip(*reversed(thirds), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", [mb.Phantom(), mb.JacobianFree()])
def test_biased_modes_refuse_a_second_derivative(mode):
    deq = mb.DEQ(TanhCell(), backward=mode)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    for loss in (torch.sum, lambda z: z.square().sum()):
        for leaf in (x, deq.cell.w):
            (first,) = torch.autograd.grad(loss(deq(x)), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match=f"{type(mode).__name__} gradients are of first order"):
                torch.autograd.grad(first.sum(), leaf)


def test_a_second_derivative_towards_hidden_tensors_is_refused():
    w = (0.5 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    hidden = mb.Implicit(rtol=1e-10)
    x = torch.randn(2, 3, dtype=torch.float64)

    def f(z, x):
        return torch.tanh(z @ w + x)

    found = mb.solve(f, torch.zeros_like(x), x, solver=mb.Broyden(), rtol=1e-10)
    (first,) = torch.autograd.grad(hidden.attach(f, found, x).sum(), w)
    assert first.abs().sum() > 0, "the first order finds them in the graph"
    with pytest.raises(RuntimeError, match="neither its parameters nor in its context"):
        torch.autograd.grad(hidden.attach(f, found, x).sum(), w, create_graph=True)


@pytest.mark.parametrize("solver", [mb.Picard(), mb.Anderson(), mb.Broyden(), mb.Broyden(kind="bad"), mb.Newton()])
def test_the_adjoint_takes_any_solver_and_reports_its_cost(solver):
    cell, x = TanhCell(), torch.randn(3, 4, dtype=torch.float64)
    deq = mb.DEQ(cell, rtol=1e-10, backward=mb.Implicit(solver=solver, rtol=1e-9, max_nfe=200), max_nfe=100)
    calls = []
    cell.w.register_hook(calls.append)
    (ours,) = torch.autograd.grad(deq(x).square().sum(), cell.w)
    (wanted,) = torch.autograd.grad(tight(cell)(x).square().sum(), cell.w)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-8)
    assert deq.last_backward_solution.nfe.min() > 1
    assert deq.last_backward_solution.converged.all()


@dataclass(frozen=True)
class Asking(mb.Picard):
    """Picard's iteration that looks at a quarter of the samples before each step, as a line search may."""

    min_nfe = 2

    def step(self, z, g, state, problem):
        some = problem.alive & (np.arange(len(z)) % 4 == 1)
        if some.any():
            problem.residual(z, among=some)
        return super().step(z, g, state, problem)


def test_a_solver_that_asks_for_some_rows_and_then_for_others_gets_the_right_products():
    cell, x = TanhCell(6), torch.randn(8, 6, dtype=torch.float64)
    v = torch.randn_like(x)
    deq = mb.DEQ(cell, rtol=1e-11, max_nfe=200, backward=mb.Implicit(solver=Asking(), rtol=1e-10, max_nfe=400))
    (ours,) = torch.autograd.grad((deq(x) * v).sum(), cell.w)
    (wanted,) = torch.autograd.grad((tight(cell)(x) * v).sum(), cell.w)
    torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-9)


# The forward solve's inverse Jacobian, reused.


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_the_inverse_a_solve_leaves_is_that_of_a_dense_broyden(kind):
    problem = dense(3, 6, 0.9, seed=3, dtype=torch.float64)
    points = []

    def f(z, x):
        points.append(z.clone())
        return problem.f(z, x)

    solver = mb.Broyden(memory=40, kind=kind)
    found = mb.solve(f, problem.z0, problem.context, solver=solver, rtol=0.0, max_nfe=9, throw=False, keep_inverse=True)
    assert found.inverse.known == 3
    eye = torch.eye(6, dtype=torch.float64)
    g = [problem.f(z, problem.context) - z for z in points]
    for sample in range(3):
        b = -eye
        for k in range(7):  # the last step's pair would be used by a further one
            s, y = points[k + 1][sample] - points[k][sample], g[k + 1][sample] - g[k][sample]
            row = s @ b / (s @ b @ y) if kind == "good" else y / (y @ y)
            b = b + torch.outer(s - b @ y, row)
        transposed = torch.stack([found.inverse.rmatvec(row.expand(3, 6))[sample] for row in eye])  # rows: Bᵀeᵢ
        torch.testing.assert_close(transposed, b, rtol=1e-7, atol=1e-9)
    some, w = torch.tensor([2, 0]), torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(found.inverse.rmatvec(w[some], some), found.inverse.rmatvec(w)[some])


@pytest.mark.parametrize("kind", ["good", "bad"])
@pytest.mark.parametrize("memory", [2, 40])
def test_the_inverse_keeps_the_secant_equation(kind, memory):
    """(Bᵀw)·y = w·s for the newest pair that the solver has made an update of."""
    problem = dense(3, 6, 0.9, seed=1, dtype=torch.float64)
    solver = mb.Broyden(memory=memory, kind=kind)
    points = []

    def f(z, x):
        points.append(z.clone())
        return problem.f(z, x)

    found = mb.solve(f, problem.z0, problem.context, solver=solver, rtol=0.0, max_nfe=7, throw=False, keep_inverse=True)
    g = [problem.f(z, problem.context) - z for z in points]
    s, y = points[-2] - points[-3], g[-2] - g[-3]
    w = torch.randn_like(s)
    torch.testing.assert_close((found.inverse.rmatvec(w) * y).sum(1), (w * s).sum(1), rtol=1e-9, atol=1e-12)


def test_preconditioning_saves_products():
    torch.manual_seed(0)
    cell = TanhCell(40)
    with torch.no_grad():
        cell.w.mul_(1.5)
    x = torch.randn(16, 40, dtype=torch.float64)
    spent = {}
    for reuse in (False, True):
        deq = mb.DEQ(cell, rtol=1e-6, max_nfe=80, backward=mb.Implicit(rtol=1e-4, max_nfe=80, precondition=reuse))
        deq(x).square().sum().backward()
        spent[reuse] = deq.last_backward_solution.nfe.double().mean()
    assert spent[True] < 0.8 * spent[False]


def test_preconditioning_asks_for_solvers_that_can():
    with pytest.raises(ValueError, match=r"starts a plain Broyden from the forward inverse, got solver=Anderson"):
        mb.Implicit(solver=mb.Anderson(), precondition=True)
    deq = mb.DEQ(TanhCell(), solver=mb.Anderson(), backward=mb.Implicit(precondition=True))
    with pytest.raises(ValueError, match=r"needs a forward solver with an inverse Jacobian, .* got Anderson"):
        deq(torch.randn(2, 4, dtype=torch.float64))


def test_the_inverse_of_a_learned_solve_serves_too():
    """Samples that end in the LSTM phase leave −(I + P), those handed over leave Broyden's on top of it."""
    cell = ConvCell(4, 4, 2)
    solver = make_learned("meta-broyden", Layout("image", (4, 4, 4)))
    nn.init.normal_(solver.preconditioner.outward.map.weight, std=0.02)
    deq = mb.DEQ(
        cell, solver=solver, rtol=1e-4, max_nfe=60, backward=mb.Implicit(rtol=1e-4, precondition=True), warn=False
    )
    x = torch.randn(6, 4, 4, 4)
    reference = mb.DEQ(cell, rtol=1e-6, max_nfe=100, backward=mb.Implicit(rtol=1e-6, max_nfe=100))
    v = torch.randn(6, 4, 4, 4)
    grads = [torch.autograd.grad((layer(x) * v).sum(), cell.conv1.weight)[0] for layer in (deq, reference)]
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-3 * float(grads[1].abs().max()))


@pytest.mark.parametrize("kind", ["vector", "nct", "ntc", "image", "pyramid"])
def test_a_mixer_and_a_preconditioner_have_their_transposes(kind):
    shape = {"vector": (5,), "nct": (3, 6), "ntc": (6, 3), "image": (3, 4, 5), "pyramid": ((2, 4, 6), (3, 2, 3))}[kind]
    layout = Layout(kind, shape)
    part = Preconditioner(layout, layout.channels, 7).double()
    for mixer in (part.inward, part.outward):
        assert isinstance(mixer, Mixer)
        nn.init.normal_(mixer.map.weight)
    r, w, z = (layout.canonical(torch.randn(2, layout.channels * r_n, dtype=torch.float64), shape) for r_n in [
        torch.Size(layout.extents(shape)).numel()] * 3)  # fmt: skip
    gates = part.gates(z, z)
    torch.testing.assert_close((part(r, gates) * w).sum(), (r * part.transpose(w, gates)).sum())


# An adjoint that fails.


def failing(gain: float, n: int = 40, *, batch: int = 6, **options) -> tuple[mb.DEQ, torch.Tensor, torch.Tensor]:
    """(a linear layer, its contexts, its matrix) whose adjoint iteration diverges."""
    cell = Linear(n)
    with torch.no_grad():
        cell.a.mul_(gain / 0.7)
        cell.c.copy_(torch.eye(n, dtype=torch.float64))
    deq = mb.DEQ(cell, solver=mb.Newton(krylov=n), max_nfe=400, rtol=1e-6, backward=mb.Implicit(**options), warn=False)
    return deq, torch.randn(batch, n, dtype=torch.float64, requires_grad=True), cell.a.detach()


FAILING = {
    "picard": {"solver": mb.Picard(), "max_nfe": 12},
    "broyden": {"max_nfe": 6},
    "anderson": {"solver": mb.Anderson(), "max_nfe": 8},
    "newton": {"solver": mb.Newton(), "max_nfe": 8},
    "learned": {"solver": make_learned("adjoint", Layout("vector", (40,))).double(), "max_nfe": 7},
}


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("gain", [0.97, 1.05, 3.0, 1e4])
@pytest.mark.parametrize("name", FAILING)
def test_a_failed_adjoint_is_no_worse_than_either_guess_that_costs_nothing(name, gain, size):
    deq, x, a = failing(gain, **FAILING[name])
    v = torch.randn_like(x) * size
    (u,) = torch.autograd.grad(deq(x), x, v)
    left, none, jacobian_free = (((w - w @ a.T - v) / size).norm(dim=1) for w in (u, torch.zeros_like(u), v))
    solution = deq.last_backward_solution
    assert not solution.converged.any()
    assert (left <= none * (1 + 1e-9)).all()
    assert (left <= jacobian_free * (1 + 1e-9)).all()
    image = ((u @ a.T + v) / size).norm(dim=1)
    torch.testing.assert_close(solution.residual, left / image, rtol=1e-6, atol=1e-12)
    assert solution.nfe.max() <= FAILING[name]["max_nfe"] + 2


def test_a_failed_adjoint_that_began_elsewhere_is_no_worse_than_the_cotangent():
    """With `precondition` the solve begins at the forward solver's guess and never looks at u = v."""
    cell = Linear(30)
    with torch.no_grad():
        cell.a.mul_(0.6)
    x = torch.randn(5, 30, dtype=torch.float64, requires_grad=True)
    deq = mb.DEQ(cell, rtol=1e-2, backward=mb.Implicit(rtol=1e-12, max_nfe=1, precondition=True), warn=False)
    deq.solver = mb.Broyden(memory=2)
    v = torch.randn_like(x)
    (towards,) = torch.autograd.grad(deq(x), x, v)
    u = towards @ torch.linalg.inv(cell.c.detach().T)
    a = cell.a.detach()
    assert ((u - u @ a.T - v).norm(dim=1) <= (v @ a.T).norm(dim=1) * (1 + 1e-9)).all()
    assert deq.last_backward_solution.nfe.tolist() == [3] * 5


def test_an_adjoint_that_meets_its_tolerance_by_growing_has_not_converged():
    """f(u) = 1.0001·u + v blows up at a relative residual of 1e-4: ‖g‖ grows beyond ‖v‖."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([[1e3, 3.0], [-5.0, 1.0 + 1e-9]], dtype=torch.float64))

        def forward(self, z, x):
            return z @ self.gain + x

    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    cell = Growing()
    v = torch.randn_like(x)
    for rtol in (0.9999, 0.999, 0.9):
        deq = mb.DEQ(cell, solver=mb.Newton(), backward=mb.Implicit(mb.Picard(), rtol=rtol, max_nfe=9), warn=False)
        (u,) = torch.autograd.grad(deq(x), x, v)
        assert ((u - u @ cell.gain.detach().T - v).norm(dim=1) <= v.norm(dim=1) * (1 + 1e-9)).all()
        solution = deq.last_backward_solution
        assert torch.equal(solution.converged, solution.status == mb.Status.CONVERGED)


def test_a_failure_of_a_second_derivative_is_reported_too():
    deq, x, _ = failing(1.05, max_nfe=6)
    (first,) = torch.autograd.grad(deq(x).pow(3).sum(), x, create_graph=True)
    deq.last_backward_solution = None
    torch.autograd.grad(first.square().sum(), x)
    assert not deq.last_backward_solution.converged.any()


# Autograd's machinery round a layer.


def test_tensor_and_module_hooks_see_what_they_would_in_a_network():
    deq, x = tight(TanhCell()), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    seen = {}
    deq.register_full_backward_hook(lambda module, towards, given: seen.update(towards=towards[0], given=given[0]))
    z = deq(x)
    z.register_hook(lambda grad: seen.update(z=grad))
    z.retain_grad()
    (2 * z).sum().backward()
    assert torch.equal(seen["z"], torch.full_like(z, 2.0))
    assert torch.equal(z.grad, seen["given"])
    torch.testing.assert_close(seen["towards"], x.grad)
    scaled = tight(deq.cell)(x)
    scaled.register_hook(lambda grad: 3 * grad)
    (tripled,) = torch.autograd.grad((2 * scaled).sum(), x)
    torch.testing.assert_close(tripled, 3 * x.grad)


def test_hooks_on_the_cell_do_not_break_the_backward():
    deq, x = tight(TanhCell()), torch.randn(2, 4, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(deq(x).sum(), deq.cell.w)
    calls = []
    deq.cell.register_full_backward_hook(lambda *_: calls.append(1))
    (ours,) = torch.autograd.grad(deq(x).sum(), deq.cell.w)
    torch.testing.assert_close(ours, wanted)
    assert calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    deq = tight(TanhCell())
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(deq(2 * x).square().sum(), (x, deq.cell.w))
    z = checkpoint(lambda x: deq(2 * x), x, use_reentrant=reentrant)
    z.square().sum().backward()
    for ours, true in zip((x.grad, deq.cell.w.grad), wanted, strict=True):
        torch.testing.assert_close(ours, true)


def test_it_trains_under_autocast_with_a_gradient_scaler():
    torch.manual_seed(0)
    cell = ConvCell(4, 8, 2)
    x = torch.randn(8, 4, 5, 5)
    reference = mb.DEQ(cell, rtol=1e-5, max_nfe=60, backward=mb.Implicit(rtol=1e-5, max_nfe=60), warn=False)
    v = torch.randn(8, 4, 5, 5)
    wanted = torch.autograd.grad((reference(x) * v).sum(), list(cell.parameters()))
    deq = mb.DEQ(cell, rtol=1e-2)  # a warning is an error here: the adjoint is not asked for what bfloat16 cannot give
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = deq(x)
    assert z.dtype == torch.float32
    scaler.scale((z * v).sum()).backward()
    for parameter, true in zip(cell.parameters(), wanted, strict=True):
        ours = parameter.grad / 1024
        assert torch.nn.functional.cosine_similarity(ours.flatten(), true.flatten(), dim=0) > 0.97
    optimizer = torch.optim.SGD(cell.parameters(), lr=1e-3)
    before = cell.conv1.weight.detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(before, cell.conv1.weight)


def test_an_infinite_scaled_loss_is_seen_by_the_scaler():
    cell = TanhCell().float()
    deq = mb.DEQ(cell, warn=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    optimizer = torch.optim.SGD(cell.parameters(), lr=1.0)
    before = cell.w.detach().clone()
    scaler.scale(1e20 * deq(torch.randn(2, 4)).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(before, cell.w), "the step must be skipped"


def test_layers_are_saved_copied_and_loaded():
    deq = tight(TanhCell())
    x = torch.randn(2, 4, dtype=torch.float64)
    deq(x).sum().backward()
    memory = io.BytesIO()
    torch.save(deq, memory)
    memory.seek(0)
    loaded = torch.load(memory, weights_only=False)
    copied = copy.deepcopy(deq)
    again = tight(TanhCell())
    again.load_state_dict(deq.state_dict())
    for other in (loaded, copied, again):
        assert torch.equal(other(x), deq(x))
        assert other.cell.w is not deq.cell.w
    assert loaded.last_backward_solution is None


@pytest.mark.parametrize("mode", [mb.Implicit(rtol=1e-12, max_nfe=100), mb.JacobianFree(), mb.Phantom(), mb.Unroll()])
def test_functional_call_gives_gradients_to_the_weights_it_was_given(mode):
    deq, x = tight(TanhCell()), torch.randn(2, 4, dtype=torch.float64)
    deq.backward_mode = mode
    other = (0.5 * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q).requires_grad_()
    (ours,) = torch.autograd.grad(torch.func.functional_call(deq, {"cell.w": other}, (x,)).square().sum(), other)
    with torch.no_grad():
        deq.cell.w.copy_(other)
    (wanted,) = torch.autograd.grad(deq(x).square().sum(), deq.cell.w)
    torch.testing.assert_close(ours, wanted)


def test_weights_changed_between_forward_and_backward_are_an_error():
    deq = tight(TanhCell())
    z = deq(torch.randn(2, 4, dtype=torch.float64))
    with torch.no_grad():
        deq.cell.w.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_states_on_the_way_have_gradients_for_a_correction():
    deq = tight(TanhCell())
    x = torch.randn(3, 4, dtype=torch.float64)
    states = deq.states(x, after=(2, 4))
    assert len(states) == 3
    away = [float((state - states[-1]).detach().norm()) for state in states]
    assert away[0] > away[1] > away[2] == 0
    loss = mb.fixed_point_correction(lambda z: z.square().sum(), states, gamma=0.5)
    (ours,) = torch.autograd.grad(loss, deq.cell.w)
    wanted = torch.autograd.grad(deq(x).square().sum(), deq.cell.w)[0]
    for factor, state in zip((0.25, 0.5), states, strict=False):
        step = deq.cell(state.detach(), x)
        wanted = wanted + factor * torch.autograd.grad((step * 2 * state.detach()).sum(), deq.cell.w)[0]
    torch.testing.assert_close(ours, wanted)
    with pytest.raises(ValueError, match="rising integers"):
        deq.states(x, after=(4, 2))


# What a reviewer broke once.


class Shared(nn.Module):
    """One submodule under two names, and a weight tied to another's."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(3, 3).double()
        self.g = self.f
        self.tied = nn.Linear(3, 3, bias=False).double()
        self.tied.weight = self.f.weight

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.tied(self.g(self.f(z))) + x)


def test_shared_submodules_and_tied_weights_come_out_of_a_double_backward_as_they_were():
    deq, x = tight(Shared()), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    before = dict(deq.named_parameters())
    (first,) = torch.autograd.grad(deq(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), deq.cell.f.weight, create_graph=True)
    third = torch.autograd.grad(second.square().sum(), x)[0]
    assert all(value is before[name] and value.is_leaf for name, value in deq.named_parameters())

    def unrolled(x):
        z = torch.zeros_like(x)
        for _ in range(90):
            z = deq.cell(z, x)
        return z

    (first,) = torch.autograd.grad(unrolled(x).square().sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad(first.square().sum(), deq.cell.f.weight, create_graph=True)
    torch.testing.assert_close(second, wanted)
    torch.testing.assert_close(third, torch.autograd.grad(wanted.square().sum(), x)[0])


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(8, 8).double()
        self.register_buffer("shift", torch.zeros(8, dtype=torch.float64))
        with torch.no_grad():
            self.w.weight.mul_(1.2)

    def forward(self, z, x):
        return torch.tanh(self.w(z) + x + self.shift)


CHANGES = {
    "the context": lambda deq, x: x.copy_(torch.randn_like(x)),
    "a bias": lambda deq, x: deq.cell.w.bias.data.add_(1),
    "a buffer": lambda deq, x: deq.cell.shift.add_(1),
}


@pytest.mark.parametrize("change", ["the context", "a buffer"])
def test_what_is_overwritten_after_the_forward_pass_does_not_enter_its_gradient(change):
    """Samples of different difficulty, so that the graph would be made anew for those that are left."""
    spread = torch.linspace(0.1, 4, 64, dtype=torch.float64)[:, None]
    x = torch.randn(64, 8, dtype=torch.float64) * spread
    deq = mb.DEQ(Buffered(), rtol=1e-10, max_nfe=90, backward=mb.Implicit(rtol=1e-10, max_nfe=90))
    (wanted,) = torch.autograd.grad(deq(x.clone()).square().sum(), deq.cell.w.weight)
    z = deq(x)
    with torch.no_grad():
        CHANGES[change](deq, x)
    (ours,) = torch.autograd.grad(z.square().sum(), deq.cell.w.weight)
    torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-9)
    x = torch.randn(64, 8, dtype=torch.float64) * spread
    z = deq(x)
    with torch.no_grad():
        CHANGES[change](deq, x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(z.square().sum(), deq.cell.w.weight, create_graph=True)


def test_a_mode_switched_before_backward_does_not_enter_the_gradient():
    deq = mb.DEQ(_dropping(), rtol=1e-12, max_nfe=90, backward=EXACT["implicit"])
    x = torch.randn(6, 3, dtype=torch.float64) * torch.linspace(0.1, 5, 6, dtype=torch.float64)[:, None]
    found = []
    for switch in (False, True):
        torch.manual_seed(5)
        z = deq.train()(x)
        if switch:
            deq.eval()
        found.append(torch.autograd.grad(z.square().sum(), deq.cell.first.weight)[0])
    torch.testing.assert_close(*found)
    z = deq.train()(x)
    deq.eval()
    with pytest.raises(RuntimeError, match="changed between training and evaluation mode"):
        torch.autograd.grad(z.square().sum(), deq.cell.first.weight, create_graph=True)


class Nested(nn.Module):
    """A cell with a DEQ in it, and one part of its state constant."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tight(TanhCell(3))
        self.w = nn.Parameter(0.3 * torch.eye(3, dtype=torch.float64))

    def initial_state(self, x):
        return torch.zeros_like(x), torch.zeros_like(x)

    def forward(self, z, x):
        return torch.tanh(z[0] @ self.w + 0.5 * self.inner(x + 0.1 * z[0])), torch.ones_like(z[1])


def test_a_deq_within_a_cell_and_a_constant_part_of_a_state():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    cell = Nested()
    found = []
    for mode in (EXACT["implicit"], mb.Unroll(25)):
        outer = mb.DEQ(cell, rtol=1e-10, max_nfe=90, backward=mode)
        z, _ = outer(x)
        (first,) = torch.autograd.grad(z.pow(3).sum(), x, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), (cell.w, cell.inner.cell.w))))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-8)


def test_a_frozen_layer_builds_no_graph():
    cell = TanhCell().requires_grad_(False)
    x = torch.randn(2, 4, dtype=torch.float64)
    for mode in (mb.Implicit(), mb.JacobianFree(), mb.Phantom(), mb.Unroll()):
        z = mb.DEQ(cell, backward=mode, warn=False)(x)
        assert not z.requires_grad
    assert mb.DEQ(cell)(x.requires_grad_()).requires_grad


def test_calls_leave_no_reference_cycles():
    deq = mb.DEQ(TanhCell())
    gc.collect()
    gc.disable()
    try:
        seen = []
        for _ in range(5):
            x = torch.randn(2, 4, dtype=torch.float64) * 1.0
            deq(x).sum().backward()
            seen.append(weakref.ref(x))
            del x
        assert not any(reference() is not None for reference in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: mb.Implicit(rtol=-1.0), "rtol must be a finite number of at least 0, got -1.0"),
        (lambda: mb.Implicit(max_nfe=0), "max_nfe must be an integer of at least 1, got 0"),
        (lambda: mb.Implicit(solver="broyden"), "solver must be an instance with start, init and step"),
        (
            lambda: mb.Implicit(solver=mb.load_solver(mb.list_pretrained()[0])),
            "GroupedLSTM is no solver of adjoint systems, .* fit_adjoint makes one",
        ),
        (lambda: mb.DEQ(TanhCell(), rtol=-1.0), "rtol must be"),
        (lambda: mb.DEQ(TanhCell(), backward=mb.Implicit), "backward must be a gradient mode such as Implicit"),
        (lambda: mb.DEQ(TanhCell(), backward="implicit"), "backward must be a gradient mode such as Implicit"),
        (lambda: mb.DEQ(3), "f must be callable, got int"),
        (lambda: mb.Unroll(steps=0), "steps must be an integer"),
        (lambda: mb.JacobianFree(steps=2), "one undamped step: for others there is Phantom"),
    ],
)
def test_bad_settings_are_refused_at_once(build, words):
    with pytest.raises((ValueError, TypeError), match=words):
        build()
