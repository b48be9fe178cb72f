"""Contexts and cells of unusual make: conjugated tensors, TorchScript, modules kept in dicts, weights swapped late."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.nn.jacobian import jacobian_penalty
from tests.helpers import refused

EXACT = mb.Implicit(rtol=1e-10, max_nfe=200)


def test_the_penalty_of_an_empty_batch_is_zero():
    assert jacobian_penalty(lambda z: 2 * z, torch.zeros(0, 4)) == 0


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))

    def forward(self, z, x):
        return 0.5 * self.layer(z) + x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("whole", [False, True])
def test_a_cell_may_be_torchscript_but_is_not_differentiated_twice(whole):
    cell, x = Scripted().double(), torch.randn(5, 4, dtype=torch.float64)
    parameters, expected = list(cell.parameters()), x
    cell = torch.jit.script(cell) if whole else cell
    z = mb.DEQ(cell, rtol=1e-10, max_nfe=200, backward=EXACT)(x)
    for _ in range(100):
        expected = cell(expected, x)
    if not whole:
        again = lambda: torch.autograd.grad(z.sum(), parameters, create_graph=True)  # noqa: E731
        refused("differentiate twice", again, RuntimeError)
    given, wanted = (torch.autograd.grad(value.square().sum(), list(cell.parameters())) for value in (z, expected))
    assert_close(given, wanted, rtol=1e-6, atol=1e-8)


class Keeping(nn.Module):
    """x₂·tanh(layer z) + x₁, the layer reached by a way of its own; most samples have a small x₂ and are done soon."""

    def __init__(self, way):
        super().__init__()
        self.layer = nn.Linear(4, 4).double()
        self.layers, self.call, self.way = {"a": self.layer}, lambda z: self.layer(z), way
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        if way == "hook":
            self.layer.register_forward_hook(self.scaled)

    def __getattr__(self, name):
        return super().__getattr__("layer" if name == "alias" else name)

    def scaled(self, module, given, made):
        return made * self.scale

    def forward(self, z, x):
        ways = {"dict": lambda: self.layers["a"], "closure": lambda: self.call, "alias": lambda: self.alias}
        return x[:, 4:] * torch.tanh(ways.get(self.way, lambda: self.layer)()(z)) + x[:, :4]


def uneven(way):
    """A layer of a cell that keeps its modules that way, a context and a start."""
    x = torch.randn(20, 8, dtype=torch.float64)
    x[:, 4:] = 0.001
    x[:3, 4:] = 0.9
    return mb.DEQ(Keeping(way), rtol=1e-10, max_nfe=200, backward=EXACT), x, torch.zeros_like(x[:, :4])


def unrolled(x, w, b):
    z = torch.zeros(len(x), 4, dtype=x.dtype)
    for _ in range(300):
        z = x[:, 4:] * torch.tanh(z @ w.T + b) + x[:, :4]
    return z


def copies_of(weights):
    return [weight.detach().clone().requires_grad_() for weight in weights]


@pytest.mark.parametrize("way", ["plain", "dict", "closure", "alias", "hook"])
@pytest.mark.parametrize("swap", ["functional_call", "data"])
def test_the_adjoint_sees_the_weights_of_the_forward_pass_wherever_a_cell_keeps_its_modules(way, swap):
    deq, x, z0 = uneven(way)
    layer = deq.cell.layer
    if swap == "functional_call":
        other = {f"cell.layer.{n}": (1.5 * p.detach()).requires_grad_() for n, p in layer.named_parameters()}
        z, weights = torch.func.functional_call(deq, other, (x, z0)), list(other.values())
    else:
        z, weights = deq(x, z0), list(layer.parameters())
    copies = copies_of(weights)
    if swap == "data":
        layer.weight.data = 0.1 * layer.weight.data
    given = torch.autograd.grad(z.pow(3).sum(), weights)
    wanted = torch.autograd.grad(unrolled(x, *copies).pow(3).sum(), copies)
    assert_close(given, wanted, rtol=1e-6, atol=1e-8)


def test_twice_through_weights_whose_data_was_swapped_is_refused():
    deq, *given = uneven("plain")
    z, weight = deq(*given), deq.cell.layer.weight
    weight.data = 0.1 * weight.data
    refused("inplace", lambda: torch.autograd.grad(z.sum(), [weight], create_graph=True), RuntimeError)


@pytest.mark.parametrize("way", ["dict", "alias", "hook"])
def test_second_derivatives_see_modules_in_dicts_hooks_and_behind_getattr(way):
    deq, x, z0 = uneven(way)
    weights, seconds = list(deq.cell.layer.parameters()), []
    copies = copies_of(weights)
    for value, towards in ((deq(x, z0), weights), (unrolled(x, *copies), copies)):
        first = torch.autograd.grad(value.pow(3).sum(), towards, create_graph=True)
        seconds.append(torch.autograd.grad(sum(part.square().sum() for part in first), towards))
    assert_close(*seconds, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "solver", [mb.Anderson(), mb.Anderson(2, 1.5), mb.Broyden(), mb.Broyden(kind="bad"), mb.Picard()]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_does_not_make_a_gradient_of_a_singular_adjoint(solver, dtype):
    x, reports = torch.zeros(8, 3, dtype=dtype, requires_grad=True), []
    f = lambda z, x: z + x  # noqa: E731
    found = mb.solve(f, torch.zeros(8, 3, dtype=dtype), x.detach(), solver=mb.Picard(), throw=False)
    z = mb.Implicit(solver=solver, max_nfe=6).attach(f, found, x, reports.append)
    v = torch.randn(8, 3, dtype=dtype)
    (u,) = torch.autograd.grad(z, x, v)
    assert (u.norm(dim=1) <= 1e3 * v.norm(dim=1)).all()
    assert not reports[0].converged.any()


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_newton_solves_an_adjoint_of_which_few_samples_are_left(seed):
    torch.manual_seed(seed)
    a = 3 * torch.randn(9, 2, 2) / 2**0.5
    x, reports = torch.zeros(9, 2, requires_grad=True), []
    f = lambda z, c: torch.einsum("bij,bj->bi", c[1], z) + c[0]  # noqa: E731
    found = mb.solve(f, torch.zeros(9, 2), (x.detach(), a), solver=mb.Broyden(), throw=False)
    z = mb.Implicit(solver=mb.Newton(), max_nfe=30, rtol=1e-6).attach(f, found, (x, a), reports.append)
    (u,) = torch.autograd.grad(z.sum(), x)
    exact = torch.linalg.solve((torch.eye(2) - a).mT, torch.ones(9, 2))
    solved = reports[0].converged
    assert solved.sum() >= 6
    assert_close(u[solved], exact[solved], rtol=1e-3, atol=1e-3)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.layer(z)) + x


@pytest.mark.parametrize("whole", ["cell", "part", "in place"])
def test_a_compiled_cell_has_gradients_of_first_and_second_order_and_a_penalty(whole):
    cell, x = Plain(), torch.randn(6, 4)
    wanted = twice(cell, x)
    weight = cell.layer.weight
    if whole == "part":
        cell.layer = torch.compile(cell.layer, backend="aot_eager")
    elif whole == "in place":
        cell.compile(backend="aot_eager")
    else:
        cell = torch.compile(cell, backend="aot_eager")
    assert_close(twice(cell, x, weight), wanted, rtol=1e-3, atol=1e-4)
    if whole == "cell":
        jacobian_penalty(cell, torch.zeros(6, 4), x).backward()


def twice(cell, x, weight=None):
    weight = cell.layer.weight if weight is None else weight
    z = mb.DEQ(cell, rtol=1e-6, backward=mb.Implicit(rtol=1e-6))(x)
    (first,) = torch.autograd.grad(z.square().sum(), weight, retain_graph=True)
    (again,) = torch.autograd.grad(z.square().sum(), weight, create_graph=True)
    return first, torch.autograd.grad(again.square().sum(), weight)[0]
