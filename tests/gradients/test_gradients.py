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
from tests.helpers import DOUBLE, normal, refused, vector
from tests.test_deq import PairCell, TanhCell, tight

grad = torch.autograd.grad
close = torch.testing.assert_close


def random(*shape: int, **options) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE, **options)


class TwoLayers(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 3, bias=False).double()
        self.drop = mb.VariationalDropout(p, (4,))

    def forward(self, z, x):
        return 0.6 * torch.tanh(self.second(self.drop(torch.tanh(self.first(z)))) + x)


def converted() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2))
    return mb.to_deq(network.double()).cell


CELLS = {
    "tanh": (lambda: TanhCell(3), (2, 3)),
    "two tensors": (PairCell, (1, 5)),
    "small conv": (lambda: ConvCell(2, 2, 1).double(), (2, 2, 2, 2)),
    "normalised": (lambda: mb.normalise(TwoLayers(), max_norm=0.6), (2, 3)),
    "dropout": (lambda: TwoLayers(0.5), (2, 3)),
    "converted network": (converted, (2, 3)),
    **{  # every cell of the registry, on one sample but where its norms want two
        name: (
            lambda name=name: make_cell(name, dtype=DOUBLE)[0],
            lambda name=name: make_cell(name, batch=1 + (name == "multiscale"))[1],
        )
        for name in MODELS
    },
}
every_cell = pytest.mark.parametrize("name", CELLS)


def seeded(name: str, **options):
    """(a function of the context and of all parameters in a vector, its arguments), which draws the same masks each time."""
    build, shape = CELLS[name]
    deq = mb.DEQ(build(), rtol=1e-13, max_nfe=150, warn=False, **options)
    own = dict(deq.named_parameters())
    like = shape() if callable(shape) else torch.empty(shape)
    context = [torch.randn_like(x, dtype=DOUBLE).requires_grad_() for x in parts_of(like)]

    def run(*values):
        torch.manual_seed(1)
        x = values[0] if isinstance(like, torch.Tensor) else values[:-1]
        pieces = values[-1].split([p.numel() for p in own.values()])
        weights = {key: piece.view_as(p) for (key, p), piece in zip(own.items(), pieces, strict=True)}
        with nn.utils.parametrize.cached():
            return torch.func.functional_call(deq, weights, (x,))

    for layer in deq.modules():  # a spectral norm learns at every call: for a function it must stand still
        if isinstance(layer, nn.utils.parametrize.ParametrizationList):
            layer.eval()
    return run, (*context, torch.cat([p.detach().flatten() for p in own.values()]).requires_grad_())


BROYDEN = mb.Broyden(memory=60)
EXACT = {
    "implicit": mb.Implicit(solver=BROYDEN, rtol=1e-13, max_nfe=150),
    "implicit, preconditioned": mb.Implicit(solver=BROYDEN, rtol=1e-13, max_nfe=150, precondition=True),
    "unroll": mb.Unroll(steps=120),
}


@pytest.mark.parametrize("mode", EXACT)
@every_cell
def test_exact_modes_pass_gradcheck(name, mode):
    """Cells with few numbers entry by entry, others along random directions; an unroll after fewer steps already."""
    few = mode == "unroll" and name != "multiscale"  # whose first steps, from zero, are too steep for differences
    run, arguments = seeded(name, backward=mb.Unroll(20) if few else EXACT[mode])
    fast = mode != "implicit" or name not in ("tanh", "two tensors", "normalised", "dropout")
    assert torch.autograd.gradcheck(run, arguments, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=fast)


@every_cell
def test_implicit_and_unrolled_gradients_agree_to_second_order(name):
    found = []
    for mode in EXACT.values():
        torch.manual_seed(0)
        run, arguments = seeded(name, backward=mode)
        loss = sum(part.pow(3).sum() for part in parts_of(run(*arguments)))
        first = grad(loss, arguments, create_graph=True)
        found.append((*first, *grad(sum(part.square().sum() for part in first), arguments)))
    for implicit in found[:-1]:
        for ours, wanted in zip(implicit, found[-1], strict=True):
            close(ours, wanted, rtol=1e-7, atol=1e-9)


@every_cell
def test_second_derivatives_pass_gradgradcheck(name):
    run, arguments = seeded(name, backward=EXACT["implicit"])
    assert torch.autograd.gradgradcheck(run, arguments, atol=1e-5, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("power", [1, 2])
def test_third_derivatives_are_right_too(power):
    """Of a loss that is linear in the state as well."""
    deq, x, thirds = tight(TanhCell(2)), random(1, 2, requires_grad=True), []
    for f in (mb.DEQ(deq.cell, backward=mb.Unroll(100)), deq):
        value = f(x).pow(power).sum()
        for _ in range(2):
            value = sum(one.square().sum() for one in grad(value, (x, deq.cell.w), create_graph=True))
        thirds.append(grad(value, (x, deq.cell.w)))
    for ours, wanted in zip(*reversed(thirds), strict=True):
        close(ours, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", [mb.Phantom(), mb.JacobianFree()])
def test_biased_modes_refuse_a_second_derivative(mode):
    deq, x = mb.DEQ(TanhCell(), backward=mode), random(2, 4, requires_grad=True)
    for loss in (torch.sum, lambda z: z.square().sum()):
        for leaf in (x, deq.cell.w):
            (first,) = grad(loss(deq(x)), leaf, create_graph=True)
            words = f"{type(mode).__name__} gradients are of first order"
            refused(words, lambda: grad(first.sum(), leaf), RuntimeError)  # noqa: B023


def test_a_second_derivative_towards_hidden_tensors_is_refused():
    w, x, hidden = (0.5 * torch.eye(3, dtype=DOUBLE)).requires_grad_(), random(2, 3), mb.Implicit(rtol=1e-10)
    f = lambda z, x: torch.tanh(z @ w + x)  # noqa: E731
    found = mb.solve(f, torch.zeros_like(x), x, solver=mb.Broyden(), rtol=1e-10)
    (first,) = grad(hidden.attach(f, found, x).sum(), w)
    assert first.abs().sum() > 0, "the first order finds them in the graph"
    loss, words = hidden.attach(f, found, x).sum(), "neither its parameters nor in its context"
    refused(words, lambda: grad(loss, w, create_graph=True), RuntimeError)


@dataclass(frozen=True)
class Asking(mb.Picard):
    """Picard's iteration that looks at a quarter of the samples before each step, as a line search may."""

    min_nfe = 2

    def step(self, z, g, state, problem):
        some = problem.alive & (np.arange(len(z)) % 4 == 1)
        if some.any():
            problem.residual(z, among=some)
        return super().step(z, g, state, problem)


SOLVERS = [mb.Picard(), mb.Anderson(), mb.Broyden(), mb.Broyden(kind="bad"), mb.Newton(), Asking()]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_adjoint_takes_any_solver_and_reports_its_cost(solver):
    """One that asks for some rows and then for others gets the right products too."""
    cell, x, v = TanhCell(), random(8, 4), random(8, 4)
    deq = mb.DEQ(cell, rtol=1e-11, backward=mb.Implicit(solver=solver, rtol=1e-10, max_nfe=400), max_nfe=200)
    (ours,), (wanted,) = (grad((f(x) * v).sum(), cell.w) for f in (deq, tight(cell)))
    close(ours, wanted, rtol=1e-7, atol=1e-9)
    assert deq.last_backward_solution.nfe.min() > 1
    assert deq.last_backward_solution.converged.all()


# --- linear cells, whose gradients are those of linear algebra

N = 6


class Scaled(nn.Module):
    """z ↦ s·Wz + Ux + b, with a number s for each sample: z* = (I − sW)⁻¹(Ux + b)."""

    def __init__(self, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        w, u = normal(2, N, N, seed=5, dtype=DOUBLE)
        self.w = nn.Parameter((w / torch.linalg.matrix_norm(w, 2)).to(dtype))
        self.u, self.b = nn.Parameter(u.to(dtype)), nn.Parameter(torch.ones(N, dtype=dtype))
        self.seen: list[int] = []

    def forward(self, z, x):
        self.seen.append(len(z))
        return x[1] * (z @ self.w.T) + x[0] @ self.u.T + self.b


def inputs(dtype: torch.dtype = DOUBLE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, s, v) of eight samples, of which the last wants the most products by far."""
    x, v = normal(2, 8, N, seed=6, dtype=DOUBLE).to(dtype)
    return x, torch.tensor([0, 0, 0.01, 0.01, 0.1, 0.1, 0.3, 0.95], dtype=dtype)[:, None], v


def adjoint(cell: Scaled, v: torch.Tensor) -> torch.Tensor:
    """u = (I − sWᵀ)⁻¹v of every sample."""
    return torch.linalg.solve(
        torch.eye(N, dtype=DOUBLE) - inputs()[1][:, :, None] * cell.w.detach().double().T, v.double()
    )


def backward(mode, v: torch.Tensor, dtype: torch.dtype = DOUBLE, **options):
    """(layer, z, gradients towards x, W and b) for cotangents v."""
    cell, (x, s, _) = Scaled(dtype), inputs(dtype)
    deq = mb.DEQ(cell, backward=mode, **{"rtol": 1e-12, "max_nfe": 90, "solver": BROYDEN} | options)
    z = deq((x.requires_grad_(), s), z0=torch.zeros_like(x))
    return deq, z, grad(z, [x, cell.w, cell.b], v, retain_graph=True)


TIGHT = {"rtol": 1e-12, "max_nfe": 90}
MODES = {
    "broyden": mb.Implicit(solver=BROYDEN, **TIGHT),
    "anderson": mb.Implicit(solver=mb.Anderson(memory=20), **TIGHT),
    "preconditioned": mb.Implicit(precondition=True, **TIGHT),
}


@pytest.mark.parametrize("mode", MODES)
def test_implicit_gradients_are_those_of_the_linear_system(mode):
    _, s, v = inputs()
    deq, z, (to_x, to_w, to_b) = backward(MODES[mode], v)
    u = adjoint(deq.cell, v)
    close(to_x, u @ deq.cell.u.detach(), rtol=1e-8, atol=1e-9)
    close(to_w, (s * u).T @ z.detach(), rtol=1e-8, atol=1e-9)
    close(to_b, u.sum(0), rtol=1e-8, atol=1e-9)
    spent = deq.last_backward_solution
    assert spent.converged.all()
    assert (spent.residual <= 1e-12).all()
    assert spent.nfe[7] > 3
    assert (spent.nfe <= 90).all()


@pytest.mark.parametrize("power", [-90, -30, 1, 30, 90])
def test_a_cotangent_of_any_size_has_the_same_gradient_times_its_size(power):
    _, _, v = inputs()
    plain, scaled = (backward(MODES["broyden"], size * v)[2] for size in (1.0, 2.0**power))
    for ours, theirs in zip(scaled, plain, strict=True):
        assert torch.equal(ours, 2.0**power * theirs)


def test_cotangents_of_different_sizes_stand_side_by_side():
    _, _, v = inputs()
    sizes = 2.0 ** torch.tensor([-80, 60, 0, -20, 40, 10, -60, 80], dtype=DOUBLE)[:, None]
    deq, _, (to_x, _, _) = backward(MODES["broyden"], sizes * v)
    close(to_x / sizes, adjoint(deq.cell, v) @ deq.cell.u.detach(), rtol=1e-8, atol=1e-9)
    assert deq.last_backward_solution.converged.all()
    v, sizes = v.float(), torch.logspace(-30, 12, 8)[:, None]
    mode, options = mb.Implicit(solver=BROYDEN, rtol=1e-5, max_nfe=90), {"dtype": torch.float32, "rtol": 1e-5}
    plain, scaled = (backward(mode, size * v, **options)[2][0] for size in (1, sizes))
    close(scaled / sizes, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_cotangent_that_is_not_finite_stays_where_it_is(value):
    _, _, v = inputs()
    v[3, 2] = value
    deq, _, (to_x, to_w, to_b) = backward(MODES["broyden"], v)
    others = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    expected = adjoint(deq.cell, v.nan_to_num(0, 0, 0)) @ deq.cell.u.detach()
    close(to_x[others], expected[others], rtol=1e-8, atol=1e-9)
    assert not to_x[3].isfinite().any()
    assert not to_b[2].isfinite()
    assert to_b[[0, 1, 3, 4, 5]].isfinite().all()
    assert not to_w[2].isfinite().any()
    assert deq.last_backward_solution.converged.all()


def test_a_cotangent_of_zero_costs_one_product_and_gives_zero():
    _, _, v = inputs()
    v[7] = 0
    deq, _, (to_x, _, _) = backward(MODES["broyden"], v)
    assert (to_x[7] == 0).all()
    assert deq.last_backward_solution.nfe[7] == 1


def test_few_samples_that_are_left_go_on_by_themselves():
    """Once few of them are left, the graph is made anew for those: the cell then sees their rows only."""
    v = inputs()[2]
    deq, z, (to_x, _, _) = backward(MODES["broyden"], v)
    close(to_x, adjoint(deq.cell, v) @ deq.cell.u.detach(), rtol=1e-8, atol=1e-9)
    del deq.cell.seen[:]
    grad(z, deq.cell.w, v)
    made = deq.cell.seen
    assert made
    assert made == sorted(made, reverse=True)
    assert all(rows <= 4 for rows in made)
    # two of eight samples are harder by far: one graph for these two
    cell, x, v, sizes = TanhCell(6), random(8, 6), random(8, 6), []
    cell.w.data.mul_(1.6)
    x[:6] += 4 * torch.sign(x[:6])  # saturated: almost no Jacobian
    deq = mb.DEQ(cell, rtol=1e-10, max_nfe=90, backward=mb.Implicit(solver=mb.Anderson(8), rtol=1e-9, max_nfe=90))
    z = deq(x)
    hook = cell.register_forward_hook(lambda module, arguments, _: sizes.append(len(arguments[0])))
    (ours,) = grad((z * v).sum(), cell.w)
    hook.remove()
    spent = deq.last_backward_solution.nfe
    assert spent[:6].max() < spent[6:].min()
    assert sizes[0] == 2, "a graph for the two that were left"
    close(ours, grad((tight(cell)(x) * v).sum(), cell.w)[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (1, 0.3), (3, 0.5), (6, 1.0)])
def test_phantom_gradients_are_their_partial_sums(steps, damping):
    _, s, v = inputs()
    mode = mb.Phantom(steps, damping) if (steps, damping) != (1, 1.0) else mb.JacobianFree()
    deq, z, (to_x, to_w, to_b) = backward(mode, v)
    w, u, term = deq.cell.w.detach(), torch.zeros_like(v), damping * v
    for _ in range(steps):
        u, term = u + term, (1 - damping) * term + damping * s * (term @ w)
    close(to_x, u @ deq.cell.u.detach(), rtol=1e-10, atol=1e-12)
    close(to_b, u.sum(0), rtol=1e-10, atol=1e-12)
    close(to_w, (s * u).T @ z.detach(), rtol=1e-9, atol=1e-9)
    assert deq.last_backward_solution is None


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (4, 0.6)])
def test_an_unroll_is_the_network_of_that_depth(steps, damping):
    x, s, v = inputs()
    deq, z, found = backward(mb.Unroll(steps, damping), v)
    cell, deep = Scaled(), torch.zeros_like(x.requires_grad_())
    for _ in range(steps):
        deep = deep + damping * (cell(deep, (x, s)) - deep)
    close(z, deep, rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(found, grad(deep, [x, cell.w, cell.b], v), strict=True):
        close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert deq.last_solution.nfe.tolist() == [steps + 1] * 8
    assert deq.last_solution.steps.tolist() == [steps] * 8
    close(deq.last_solution.residual, mb.relative_residual(z, cell(z, (x, s))).detach())
    diverging, far = mb.DEQ(cell, backward=mb.Unroll(40)), (x, 1e30 * s + 1e30)
    refused("not finite after 40 steps: it diverges", lambda: diverging(far, torch.ones_like(x)), RuntimeError)


def test_the_layer_gives_the_solution_to_the_last_bit_whatever_the_gradient():
    x, s, v = inputs()
    for mode in (MODES["broyden"], mb.Phantom(), mb.JacobianFree()):
        deq, z, _ = backward(mode, v)
        assert torch.equal(z.detach(), deq.last_solution.z)
        with torch.no_grad():
            again = deq((x, s), z0=torch.zeros_like(x))
        assert torch.equal(again, z)
        assert not again.requires_grad


def test_under_autocast_the_adjoint_asks_for_no_more_than_four_roundings():
    x, s, v = inputs(torch.float32)
    cell = Scaled(torch.float32)
    deq = mb.DEQ(cell, backward=mb.Implicit(rtol=1e-6, max_nfe=60), rtol=3e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = deq((x.requires_grad_(), s), z0=torch.zeros_like(x))
    (to_x,) = grad(z, x, v)
    spent = deq.last_backward_solution
    assert spent.converged.all()
    assert (spent.residual <= 4 * torch.finfo(torch.bfloat16).eps).all()
    assert spent.residual.max() > 1e-6
    close(to_x, (adjoint(cell, v) @ cell.u.detach().double()).float(), rtol=0.2, atol=0.2)


# --- the forward solve's inverse Jacobian, reused


@pytest.mark.parametrize("kind", ["good", "bad"])
@pytest.mark.parametrize("memory", [2, 40])
def test_the_inverse_a_solve_leaves_is_that_of_a_dense_broyden(kind, memory):
    """And keeps the secant equation, (Bᵀw)·y = w·s, for the newest pair that the solver has made an update of."""
    problem, points = dense(3, 6, 0.9, seed=3, dtype=DOUBLE), []
    f = lambda z, x: points.append(z.clone()) or problem.f(z, x)  # noqa: E731
    solver, options = mb.Broyden(memory=memory, kind=kind), {"rtol": 0.0, "max_nfe": 9, "throw": False}
    inverse = mb.solve(f, problem.z0, problem.context, solver=solver, keep_inverse=True, **options).inverse
    assert inverse.known == 3
    z = torch.stack(points)
    g = torch.stack([problem.f(point, problem.context) - point for point in points])
    s, y, w = z.diff(dim=0), g.diff(dim=0), random(3, 6)
    close((inverse.rmatvec(w) * y[-2]).sum(1), (w * s[-2]).sum(1), rtol=1e-9, atol=1e-12)
    some = torch.tensor([2, 0])
    close(inverse.rmatvec(w[some], some), inverse.rmatvec(w)[some])
    eye = torch.eye(6, dtype=DOUBLE)
    for sample in range(3 if memory == 40 else 0):
        b = -eye
        for step, change in zip(s[:-1, sample], y[:-1, sample], strict=True):  # the last pair a further step would use
            row = step @ b / (step @ b @ change) if kind == "good" else change / (change @ change)
            b = b + torch.outer(step - b @ change, row)
        transposed = torch.stack([inverse.rmatvec(row.expand(3, 6))[sample] for row in eye])  # rows: Bᵀeᵢ
        close(transposed, b, rtol=1e-7, atol=1e-9)


def test_preconditioning_saves_products():
    torch.manual_seed(0)
    cell, x, spent = TanhCell(40), random(16, 40), []
    cell.w.data.mul_(1.5)
    for reuse in (False, True):
        deq = mb.DEQ(cell, rtol=1e-6, max_nfe=80, backward=mb.Implicit(rtol=1e-4, max_nfe=80, precondition=reuse))
        deq(x).square().sum().backward()
        spent.append(deq.last_backward_solution.nfe.double().mean())
    assert spent[1] < 0.8 * spent[0]


def test_the_inverse_of_a_learned_solve_serves_too():
    """Samples that end in the LSTM phase leave −(I + P), those handed over leave Broyden's on top of it."""
    cell, options = ConvCell(4, 4, 2), {"rtol": 1e-4, "max_nfe": 60, "warn": False}
    solver = make_learned("meta-broyden", Layout("image", (4, 4, 4)))
    nn.init.normal_(solver.preconditioner.outward.map.weight, std=0.02)
    deq = mb.DEQ(cell, solver=solver, backward=mb.Implicit(rtol=1e-4, precondition=True), **options)
    reference = mb.DEQ(cell, rtol=1e-6, max_nfe=100, backward=mb.Implicit(rtol=1e-6, max_nfe=100))
    x, v = torch.randn(2, 6, 4, 4, 4)
    ours, wanted = (grad((layer(x) * v).sum(), cell.conv1.weight)[0] for layer in (deq, reference))
    close(ours, wanted, rtol=2e-2, atol=2e-3 * float(wanted.abs().max()))


SHAPES = {"vector": (5,), "nct": (3, 6), "ntc": (6, 3), "tokens": (6, 3), "set": (6, 3), "image": (3, 4, 5)}
SHAPES |= {"pyramid": ((2, 4, 6), (3, 2, 3))}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_mixer_and_a_preconditioner_have_their_transposes(kind):
    layout = Layout(kind, SHAPES[kind])
    part = Preconditioner(layout, layout.channels, 7).double()
    for mixer in (part.inward, part.outward):
        assert isinstance(mixer, Mixer)
        nn.init.normal_(mixer.map.weight)
    n = layout.channels * torch.Size(layout.extents(layout.shape)).numel()
    r, w, z = (layout.canonical(random(2, n), layout.shape) for _ in range(3))
    gates = part.gates(z, z)
    close((part(r, gates) * w).sum(), (r * part.transpose(w, gates)).sum())


# --- an adjoint that fails


class Linear(nn.Module):
    """f(z, x) = zA + x, A a rotation times a gain."""

    def __init__(self, n: int, gain: float) -> None:
        super().__init__()
        self.a = nn.Parameter(gain * torch.linalg.qr(random(n, n)).Q)

    def forward(self, z, x):
        return z @ self.a + x


def failing(gain: float, n: int = 40, **options):
    """(a linear layer whose adjoint iteration diverges, its contexts, its matrix)."""
    cell = Linear(n, gain)
    deq = mb.DEQ(cell, solver=mb.Newton(krylov=n), max_nfe=400, rtol=1e-6, backward=mb.Implicit(**options), warn=False)
    return deq, random(6, n, requires_grad=True), cell.a.detach()


FAILING = {
    "picard": {"solver": mb.Picard(), "max_nfe": 12},
    "broyden": {"max_nfe": 6},
    "anderson": {"solver": mb.Anderson(), "max_nfe": 8},
    "newton": {"solver": mb.Newton(), "max_nfe": 8},
    "learned": {"solver": vector("adjoint", 40), "max_nfe": 7},
}


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("gain", [0.97, 1.05, 3.0, 1e4])
@pytest.mark.parametrize("name", FAILING)
def test_a_failed_adjoint_is_no_worse_than_either_guess_that_costs_nothing(name, gain, size):
    deq, x, a = failing(gain, **FAILING[name])
    v = torch.randn_like(x) * size
    (u,) = grad(deq(x), x, v)
    left, none, jacobian_free = (((w - w @ a.T - v) / size).norm(dim=1) for w in (u, torch.zeros_like(u), v))
    solution = deq.last_backward_solution
    assert not solution.converged.any()
    assert (left <= none * (1 + 1e-9)).all()
    assert (left <= jacobian_free * (1 + 1e-9)).all()
    w = v - v @ a.T
    least = v - (w * v).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
    assert (left <= least.norm(dim=1) / size * (1 + 1e-6)).all(), "nor than any multiple of the cotangent"
    close(solution.residual, left / ((u @ a.T + v) / size).norm(dim=1), rtol=1e-6, atol=1e-12)
    assert solution.nfe.max() <= FAILING[name]["max_nfe"] + 2


def test_a_failed_adjoint_that_began_elsewhere_is_no_worse_than_the_cotangent():
    """With `precondition` the solve begins at the forward solver's guess and never looks at u = v."""
    cell, x, v = Linear(30, 0.42), random(5, 30, requires_grad=True), random(5, 30)
    backward = mb.Implicit(rtol=1e-12, max_nfe=1, precondition=True)
    deq = mb.DEQ(cell, solver=mb.Broyden(memory=2), rtol=1e-2, backward=backward, warn=False)
    (u,), a = grad(deq(x), x, v), cell.a.detach()
    assert ((u - u @ a.T - v).norm(dim=1) <= (v @ a.T).norm(dim=1) * (1 + 1e-9)).all()
    assert deq.last_backward_solution.nfe.tolist() == [3] * 5


@pytest.mark.parametrize("rtol", [0.9999, 0.999, 0.9])
def test_an_adjoint_that_meets_its_tolerance_by_growing_has_not_converged(rtol):
    """f(u) = 1.0001·u + v blows up at a relative residual of 1e-4: ‖g‖ grows beyond ‖v‖."""
    cell, x, v = Linear(2, 1.0), random(3, 2, requires_grad=True), random(3, 2)
    cell.a.data = torch.tensor([[1e3, 3.0], [-5.0, 1.0 + 1e-9]], dtype=DOUBLE)
    deq = mb.DEQ(cell, solver=mb.Newton(), backward=mb.Implicit(mb.Picard(), rtol=rtol, max_nfe=9), warn=False)
    (u,) = grad(deq(x), x, v)
    assert ((u - u @ cell.a.detach().T - v).norm(dim=1) <= v.norm(dim=1) * (1 + 1e-9)).all()
    solution = deq.last_backward_solution
    assert torch.equal(solution.converged, solution.status == mb.Status.CONVERGED)


def test_a_failure_of_a_second_derivative_is_reported_too():
    deq, x, _ = failing(1.05, max_nfe=6)
    (first,) = grad(deq(x).pow(3).sum(), x, create_graph=True)
    deq.last_backward_solution = None
    grad(first.square().sum(), x)
    assert not deq.last_backward_solution.converged.any()


# --- autograd's machinery round a layer


def tanh_layer(batch: int = 2):
    """(deq, x), x a leaf."""
    return tight(TanhCell()), random(batch, 4, requires_grad=True)


def test_tensor_and_module_hooks_see_what_they_would_in_a_network():
    (deq, x), seen, calls = tanh_layer(), {}, []
    deq.register_full_backward_hook(lambda module, towards, given: seen.update(towards=towards[0], given=given[0]))
    z = deq(x)
    z.register_hook(lambda grad: seen.update(z=grad))
    z.retain_grad()
    (2 * z).sum().backward()
    assert torch.equal(seen["z"], torch.full_like(z, 2.0))
    assert torch.equal(z.grad, seen["given"])
    close(seen["towards"], x.grad)
    scaled = tight(deq.cell)(x)
    scaled.register_hook(lambda grad: 3 * grad)
    close(grad((2 * scaled).sum(), x)[0], 3 * x.grad)
    # hooks on the cell do not break the backward
    plain = tight(deq.cell)
    (wanted,) = grad(plain(x).sum(), plain.cell.w)
    plain.cell.register_full_backward_hook(lambda *_: calls.append(1))
    close(grad(plain(x).sum(), plain.cell.w)[0], wanted)
    assert calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    deq, x = tanh_layer()
    wanted = grad(deq(2 * x).square().sum(), (x, deq.cell.w))
    checkpoint(lambda x: deq(2 * x), x, use_reentrant=reentrant).square().sum().backward()
    for ours, true in zip((x.grad, deq.cell.w.grad), wanted, strict=True):
        close(ours, true)


def test_it_trains_under_autocast_with_a_gradient_scaler():
    torch.manual_seed(0)
    cell, (x, v) = ConvCell(4, 8, 2), torch.randn(2, 8, 4, 5, 5)
    reference = mb.DEQ(cell, rtol=1e-5, max_nfe=60, backward=mb.Implicit(rtol=1e-5, max_nfe=60), warn=False)
    wanted = grad((reference(x) * v).sum(), list(cell.parameters()))
    deq = mb.DEQ(cell, rtol=1e-2)  # a warning is an error here: the adjoint is not asked for what bfloat16 cannot give
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = deq(x)
    assert z.dtype == torch.float32
    scaler.scale((z * v).sum()).backward()
    for parameter, true in zip(cell.parameters(), wanted, strict=True):
        ours = parameter.grad / 1024
        assert torch.nn.functional.cosine_similarity(ours.flatten(), true.flatten(), dim=0) > 0.97
    before = cell.conv1.weight.detach().clone()
    scaler.step(torch.optim.SGD(cell.parameters(), lr=1e-3))
    assert not torch.equal(before, cell.conv1.weight)


def test_an_infinite_scaled_loss_is_seen_by_the_scaler():
    cell, scaler = TanhCell().float(), torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = cell.w.detach().clone()
    scaler.scale(1e20 * mb.DEQ(cell, warn=False)(torch.randn(2, 4)).sum()).backward()
    scaler.step(torch.optim.SGD(cell.parameters(), lr=1.0))
    assert torch.equal(before, cell.w), "the step must be skipped"


def test_layers_are_saved_copied_and_loaded():
    (deq, x), memory = tanh_layer(), io.BytesIO()
    deq(x).sum().backward()
    torch.save(deq, memory)
    memory.seek(0)
    loaded, again = torch.load(memory, weights_only=False), tight(TanhCell())
    again.load_state_dict(deq.state_dict())
    for other in (loaded, copy.deepcopy(deq), again):
        assert torch.equal(other(x), deq(x))
        assert other.cell.w is not deq.cell.w
    assert loaded.last_backward_solution is None


@pytest.mark.parametrize("mode", [mb.Implicit(rtol=1e-12, max_nfe=100), mb.JacobianFree(), mb.Phantom(), mb.Unroll()])
def test_functional_call_gives_gradients_to_the_weights_it_was_given(mode):
    deq, x = tanh_layer()
    deq.backward_mode = mode
    other = (0.5 * torch.linalg.qr(random(4, 4)).Q).requires_grad_()
    (ours,) = grad(torch.func.functional_call(deq, {"cell.w": other}, (x,)).square().sum(), other)
    deq.cell.w.data.copy_(other)
    close(ours, grad(deq(x).square().sum(), deq.cell.w)[0])


def test_weights_changed_between_forward_and_backward_are_an_error():
    deq, x = tanh_layer()
    z = deq(x)
    with torch.no_grad():
        deq.cell.w.mul_(0.5)
    refused("modified by an inplace operation", z.sum().backward, RuntimeError)


def test_states_on_the_way_have_gradients_for_a_correction():
    deq, x = tanh_layer(3)
    states = deq.states(x, after=(2, 4))
    assert len(states) == 3
    away = [float((state - states[-1]).detach().norm()) for state in states]
    assert away[0] > away[1] > away[2] == 0
    loss = mb.fixed_point_correction(lambda z: z.square().sum(), states, gamma=0.5)
    (wanted,) = grad(deq(x).square().sum(), deq.cell.w)
    for factor, state in zip((0.25, 0.5), states, strict=False):
        step = deq.cell(state.detach(), x)
        wanted = wanted + factor * grad((step * 2 * state.detach()).sum(), deq.cell.w)[0]
    close(grad(loss, deq.cell.w)[0], wanted)
    refused("rising integers", lambda: deq.states(x, after=(4, 2)))


# --- what a reviewer broke once


class Tied(nn.Module):
    """One submodule under two names, and a weight tied to another's."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(3, 3).double()
        self.g, self.tied = self.f, nn.Linear(3, 3, bias=False).double()
        self.tied.weight = self.f.weight

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.tied(self.g(self.f(z))) + x)


def test_shared_submodules_and_tied_weights_come_out_of_a_double_backward_as_they_were():
    deq, x, found = tight(Tied()), random(2, 3, requires_grad=True), []
    before = dict(deq.named_parameters())
    for layer in (deq, mb.DEQ(deq.cell, backward=mb.Unroll(90))):
        (first,) = grad(layer(x).square().sum(), x, create_graph=True)
        (second,) = grad(first.square().sum(), deq.cell.f.weight, create_graph=True)
        found.append((second, *grad(second.square().sum(), x)))
    assert all(value is before[name] and value.is_leaf for name, value in deq.named_parameters())
    for ours, wanted in zip(*found, strict=True):
        close(ours, wanted)


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(8, 8).double()
        self.w.weight.data.mul_(1.2)
        self.register_buffer("shift", torch.zeros(8, dtype=DOUBLE))

    def forward(self, z, x):
        return torch.tanh(self.w(z) + x + self.shift)


@pytest.mark.parametrize("change", ["the context", "a buffer"])
def test_what_is_overwritten_after_the_forward_pass_does_not_enter_its_gradient(change):
    """Samples of different difficulty, so that the graph would be made anew for those that are left."""
    spread = torch.linspace(0.1, 4, 64, dtype=DOUBLE)[:, None]
    deq = mb.DEQ(Buffered(), rtol=1e-10, max_nfe=90, backward=mb.Implicit(rtol=1e-10, max_nfe=90))

    def overwritten(x):
        """A loss, of which what it was made with has changed since."""
        loss = deq(x).square().sum()
        x.copy_(torch.randn_like(x)) if change == "the context" else deq.cell.shift.add_(1)
        return loss

    x, weight = random(64, 8) * spread, deq.cell.w.weight
    (wanted,) = grad(deq(x.clone()).square().sum(), weight)
    close(grad(overwritten(x), weight)[0], wanted, rtol=1e-7, atol=1e-9)
    loss = overwritten(random(64, 8) * spread)
    refused("modified by an inplace operation", lambda: grad(loss, weight, create_graph=True), RuntimeError)


def test_a_mode_switched_before_backward_does_not_enter_the_gradient():
    deq = mb.DEQ(TwoLayers(0.5), rtol=1e-12, max_nfe=90, backward=EXACT["implicit"])
    x, found = random(6, 3) * torch.linspace(0.1, 5, 6, dtype=DOUBLE)[:, None], []
    for switch in (False, True):
        torch.manual_seed(5)
        z = deq.train()(x)
        deq.train(not switch)
        found.append(grad(z.square().sum(), deq.cell.first.weight)[0])
    close(*found)
    loss = deq.train()(x).square().sum()
    deq.eval()
    words = "changed between training and evaluation mode"
    refused(words, lambda: grad(loss, deq.cell.first.weight, create_graph=True), RuntimeError)


class Nested(nn.Module):
    """A cell with a DEQ in it, and one part of its state constant."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tight(TanhCell(3))
        self.w = nn.Parameter(0.3 * torch.eye(3, dtype=DOUBLE))

    def initial_state(self, x):
        return torch.zeros_like(x), torch.zeros_like(x)

    def forward(self, z, x):
        return torch.tanh(z[0] @ self.w + 0.5 * self.inner(x + 0.1 * z[0])), torch.ones_like(z[1])


def test_a_deq_within_a_cell_and_a_constant_part_of_a_state():
    x, cell, found = random(2, 3, requires_grad=True), Nested(), []
    for mode in (EXACT["implicit"], mb.Unroll(25)):
        z, _ = mb.DEQ(cell, rtol=1e-10, max_nfe=90, backward=mode)(x)
        (first,) = grad(z.pow(3).sum(), x, create_graph=True)
        found.append((first, *grad(first.square().sum(), (cell.w, cell.inner.cell.w))))
    for ours, wanted in zip(*found, strict=True):
        close(ours, wanted, rtol=1e-6, atol=1e-8)


def test_a_frozen_layer_builds_no_graph():
    cell, x = TanhCell().requires_grad_(False), random(2, 4)
    for mode in (mb.Implicit(), mb.JacobianFree(), mb.Phantom(), mb.Unroll()):
        assert not mb.DEQ(cell, backward=mode, warn=False)(x).requires_grad
    assert mb.DEQ(cell)(x.requires_grad_()).requires_grad


def test_calls_leave_no_reference_cycles():
    deq, seen = mb.DEQ(TanhCell()), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            x = random(2, 4) * 1.0
            deq(x).sum().backward()
            seen.append(weakref.ref(x))
            del x
        assert not any(reference() is not None for reference in seen)
    finally:
        gc.enable()


UNLEARNED = "MetaBroyden is no solver of adjoint systems, .* fit_adjoint makes one"
STEPS = "steps must be an integer"
REFUSED = [
    ("rtol must be a finite number of at least 0, got -1.0", ValueError, lambda: mb.Implicit(rtol=-1.0)),
    ("max_nfe must be an integer of at least 1, got 0", ValueError, lambda: mb.Implicit(max_nfe=0)),
    ("an instance with start, init and step", TypeError, lambda: mb.Implicit(solver="broyden")),
    (UNLEARNED, ValueError, lambda: mb.Implicit(solver=mb.load_solver("conv-digits"))),
    ("a plain Broyden .*got solver=Anderson", ValueError, lambda: mb.Implicit(solver=mb.Anderson(), precondition=True)),
    ("rtol must be", ValueError, lambda: mb.DEQ(TanhCell(), rtol=-1.0)),
    ("be a gradient mode such as Implicit", TypeError, lambda: mb.DEQ(TanhCell(), backward=mb.Implicit)),
    ("be a gradient mode such as Implicit", TypeError, lambda: mb.DEQ(TanhCell(), backward="implicit")),
    ("f must be callable, got int", TypeError, lambda: mb.DEQ(3)),
    ("one undamped step: for others there is Phantom", ValueError, lambda: mb.JacobianFree(steps=2)),
    *(
        (STEPS, ValueError, lambda mode=mode, n=n: mode(steps=n))
        for mode in (mb.Phantom, mb.Unroll)
        for n in (0, 2.5, True, None)
    ),
    (
        r"needs a forward solver with an inverse Jacobian, .* got Anderson",
        ValueError,
        lambda: mb.DEQ(TanhCell(), solver=mb.Anderson(), backward=mb.Implicit(precondition=True))(random(2, 4)),
    ),
]


@pytest.mark.parametrize(("words", "error", "build"), REFUSED)
def test_bad_settings_are_refused_at_once(words, error, build):
    refused(words, build, error)
