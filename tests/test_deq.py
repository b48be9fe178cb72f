"""The DEQ layer and its gradients."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.learned.fingerprint import fingerprint
from metabroyden.learned.layout import Layout
from metabroyden.meta.fit import make_learned
from metabroyden.zoo.models import ConvCell, ConvClassifier, ConvClassifierConfig
from tests.helpers import DOUBLE, refused


class TanhCell(nn.Module):
    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.w = nn.Parameter(0.6 * torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE)).Q)

    def forward(self, z, x):
        return torch.tanh(z @ self.w + x)


class PairCell(nn.Module):
    """Two coupled tensors as one state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TanhCell(5)

    def initial_state(self, x):
        return torch.zeros_like(x[:, :2]), torch.zeros_like(x[:, 2:])

    def forward(self, z, x):
        whole = self.inner(torch.cat(z, dim=1), x)
        return whole[:, :2], whole[:, 2:]


def tight(cell, **options):
    backward = mb.Implicit(solver=mb.Broyden(memory=60), rtol=1e-12, max_nfe=100)
    return mb.DEQ(cell, solver=mb.Broyden(memory=60), backward=backward, rtol=1e-12, max_nfe=100, **options)


def rows(batch: int = 2, **options) -> torch.Tensor:
    return torch.randn(batch, 4, **{"dtype": DOUBLE} | options)


# --- what it says


def said(deq, *arguments) -> str:
    """All warnings of a call, and of its backward pass where gradients are wanted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        z = deq(*arguments)
        if torch.is_grad_enabled():
            z.sum().backward()
    return " ".join(str(warning.message) for warning in caught)


def test_failed_samples_and_a_failed_adjoint_are_said_once():
    backward = mb.Implicit(rtol=1e-12, max_nfe=2)
    for deq, words in (
        (mb.DEQ(TanhCell(), rtol=1e-12, max_nfe=2), "DEQ: 2 of 2 samples did not converge: 2 × max_nfe"),
        (mb.DEQ(TanhCell(), backward=backward), "DEQ, backward: 2 of 2 samples did not converge"),
    ):
        with torch.set_grad_enabled("backward" in words):
            assert words in said(deq, rows())
            assert said(deq, rows()) == ""


@torch.no_grad()
def test_a_failure_is_said_again_for_another_reason_or_twice_the_share():
    f = lambda z, x: torch.where(x.abs() > 1, torch.where(x > 0, 1.9 * z + x, torch.nan), 0.1 * z)  # noqa: E731
    deq = mb.DEQ(f, solver=mb.Picard(), rtol=1e-6, max_nfe=20)
    for given, words in (
        ((2, 0, 0, 0), "1 of 4"),
        ((0, 2, 0, 0), ""),
        ((0, 0, 0, 0), ""),
        ((2, 2, 0, 0), "2 of 4"),
        ((2, 2, 2, 0), ""),
        ((-2, 2, 2, 0), "non_finite"),
        ((-2, 2, 2, 2), ""),
    ):
        told = said(deq, torch.tensor(given, dtype=torch.float32)[:, None])
        assert words in told if words else told == ""


@torch.no_grad()
@pytest.mark.parametrize(("roundings", "silent"), [(4, True), (40, False)])
def test_a_residual_at_rounding_is_no_failure(roundings, silent):
    size = 1 + roundings * torch.finfo(torch.float32).eps
    deq = mb.DEQ(lambda z, x: size * z + 0 * x, solver=mb.Picard(), rtol=0.0, max_nfe=3)
    assert (said(deq, torch.ones(2, 3), torch.ones(2, 3)) == "") == silent
    assert not deq.last_solution.converged.any()


@torch.no_grad()
def test_it_says_so_once_when_the_weights_have_moved_since_the_fit_and_again_of_a_new_solver():
    cell, x, words = ConvCell(4, 4, 2), torch.randn(2, 4, 3, 3), "was fitted to other weights of f"
    solver = make_learned("meta-broyden", Layout("image", (4, 3, 3)))
    solver.fingerprint = fingerprint(cell)
    deq = mb.DEQ(cell, solver=solver, warn=False)
    assert said(deq, x) == ""
    cell.norm3.weight.mul_(1.01)
    other = make_learned("grouped", Layout("image", (4, 3, 3)))
    other.fingerprint = "0123456789abcdef"
    for deq.solver in (solver, other):
        assert f"{type(deq.solver).__name__} {words}" in said(deq, x)
        assert said(deq, x) == ""


# --- what it is


def test_a_tensor_of_the_state_that_the_cell_does_not_use_has_no_part_in_the_gradient():
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TanhCell()

        def initial_state(self, x):
            return torch.zeros_like(x), torch.zeros_like(x)

        def forward(self, z, x):
            return self.inner(z[0], x), torch.tanh(z[0])

    deq, x = tight(Ends()), rows()
    first, second = deq(x)
    ours = torch.autograd.grad((first + second).sum(), deq.cell.inner.w)
    z = tight(deq.cell.inner)(x)
    assert_close(ours, torch.autograd.grad((z + torch.tanh(z)).sum(), deq.cell.inner.w), rtol=1e-8, atol=1e-10)


def test_a_layer_may_be_used_twice_before_backward():
    deq, x = tight(TanhCell()), rows()
    (both,) = torch.autograd.grad((deq(x) + 2 * deq(2 * x)).sum(), deq.cell.w)
    (one,) = torch.autograd.grad(deq(x).sum(), deq.cell.w)
    (two,) = torch.autograd.grad(deq(2 * x).sum(), deq.cell.w)
    assert_close(both, one + 2 * two)


def test_a_learned_solver_is_no_part_of_the_model():
    cell, solver = ConvCell(4, 4, 2), mb.load_solver("conv-digits")
    assigned = mb.DEQ(cell)
    assigned.solver = solver
    for deq in (mb.DEQ(cell, solver=solver), assigned):
        assert deq.solver is solver
        assert list(deq.children()) == [cell]
        assert copy.deepcopy(deq).solver is not solver
        assert {id(p) for p in deq.parameters()} == {id(p) for p in cell.parameters()}
        assert all(key.startswith("cell.") for key in deq.state_dict())


class Caller:
    """No module, but callable, and with a method that is a map too."""

    def __init__(self, cell):
        self.cell = cell

    def __call__(self, z, x):
        return self.cell(z, x)

    def step(self, z, x):
        return self.cell(z, x)


CALLABLES = {
    "a lambda": lambda cell: lambda z, x: cell(z, x),
    "a partial": lambda cell: functools.partial(lambda f, z, x: f(z, x), cell),
    "a partial with a keyword": lambda cell: functools.partial(lambda z, x, f: f(z, x), f=cell),
    "a partial of a module": functools.partial,
    "a method": lambda cell: Caller(cell).step,
    "a module's method": lambda cell: cell.forward,
    "a callable object": Caller,
    "a compiled function": lambda cell: torch.compile(lambda z, x: cell(z, x), backend="eager"),
    "a compiled module": lambda cell: torch.compile(cell, backend="eager"),
}


@pytest.mark.parametrize("form", CALLABLES)
def test_a_layer_of_any_callable_is_that_of_its_map_and_its_solver_can_be_fitted(form, quick_fits):
    cell, x = TanhCell(), rows(6, requires_grad=True)
    deq, layer = tight(CALLABLES[form](cell), warn=False), tight(cell)
    assert_close(deq(x), layer(x))
    gradients = lambda f: torch.autograd.grad(f(x).square().sum(), (x, cell.w))  # noqa: E731
    assert_close(gradients(deq), gradients(layer))
    assert_close(copy.deepcopy(deq)(x), layer(x))
    deq.solver = mb.fit_solver(deq, rows(20), steps=1, fallback=False, progress=False)
    assert_close(deq(x), layer(x))
    assert form in ("a compiled module",) or not list(deq.parameters())


def test_any_callable_makes_a_layer():
    """A function's tensors are its own: gradients reach them, the layer has no parameters."""
    cell, x = TanhCell(), rows(requires_grad=True)
    deq = tight(lambda z, x: torch.tanh(z @ cell.w + x))
    assert not list(deq.parameters()) + list(deq.children())
    assert list(mb.DEQ(cell).children()) == [cell]
    gradients = lambda f: torch.autograd.grad(f(x).square().sum(), (x, cell.w))  # noqa: E731
    for f in (deq, tight(cell.forward)):
        assert_close(gradients(f), gradients(tight(cell)))
    (first,) = torch.autograd.grad(tight(lambda z, x: torch.tanh(0.5 * z + x))(x).sum(), x, create_graph=True)
    torch.autograd.grad(first.square().sum(), x)
    single = mb.DEQ(lambda z: torch.cos(0.5 * z), backward=mb.JacobianFree())
    assert single.bfloat16()(None, torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert_close(mb.DEQ(torch.tanh, backward=mb.Unroll(3))(None, x), x.tanh().tanh().tanh())


def test_hooks_see_each_equilibrium_that_gets_gradients():
    deq, x, seen = mb.DEQ(TanhCell()), rows(), []
    deq.hooks.append(lambda f, context, z: seen.append((f, context, z)))
    z = deq(x)
    with torch.no_grad():
        deq(x)
    ((f, context, known),) = seen
    assert (f is deq.cell, context is x, known is z) == (True, True, True)
    assert copy.deepcopy(deq).hooks == []
    deq.hooks.clear()
    deq(x)
    assert len(seen) == 1


def test_a_state_that_cannot_be_guessed_is_asked_for():
    deq = mb.DEQ(TanhCell())
    words = r"context of type dict: give z0, or give the cell a method initial_state"
    refused(words, lambda: deq({"x": torch.ones(2, 4)}))
    refused("wanted 2 rows", lambda: deq(rows(3), 0 * rows(2)))


def test_a_classifier_learns_through_it():
    model = ConvClassifier(ConvClassifierConfig(channels=4, inner=4, groups=2, side=4, classes=2), warn=False)
    images, losses = torch.randn(32, 1, 4, 4), []
    labels = (images.mean(dim=(1, 2, 3)) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("options", [{"rtol": 0.0, "atol": 0.3}, {"rtol": 1e-2}, {"rtol": 1e-9}])
def test_the_layers_tolerances_are_those_of_its_solve(options):
    cell, x = TanhCell(), rows(5)
    deq = mb.DEQ(cell, **options, warn=False)
    with torch.no_grad():
        deq(x)
    assert torch.equal(deq.last_solution.nfe, mb.solve(cell, 0 * x, x, solver=mb.Broyden(), **options).nfe)


def test_what_is_found_without_gradients_has_none():
    def energy(z, x):
        with torch.enable_grad():
            z = z.requires_grad_()
            (g,) = torch.autograd.grad((z * z).sum() / 8 + (z * x).sum() / 2, z, create_graph=True)
        return g

    deq = mb.DEQ(energy)
    with torch.no_grad():
        assert not deq(torch.randn(3, 4)).requires_grad
    assert not deq.last_solution.z.requires_grad
    deq, x = mb.DEQ(TanhCell()), rows()
    wanted = deq(x).detach()
    with torch.inference_mode(), torch.enable_grad():  # gradients enabled within inference mode are not looked for
        z = deq(x)
    assert not z.requires_grad
    assert torch.equal(z, wanted)


# --- half precision, and moving


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map, self.seen = nn.Linear(16, 16), set()
        nn.init.orthogonal_(self.map.weight, gain=0.7)

    def forward(self, z, x):
        self.seen.add(z.dtype)
        return torch.tanh(self.map(z) + x)


@pytest.mark.parametrize("backward", [mb.Implicit(), mb.Phantom(), mb.JacobianFree(), mb.Unroll()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_half_precision_solves_in_single(dtype, backward):
    single = mb.DEQ(Linear(), rtol=1e-5, backward=mb.Implicit(rtol=1e-5) if backward == mb.Implicit() else backward)
    half = mb.DEQ(copy.deepcopy(single.cell), backward=backward).to(dtype)  # a warning is an error here
    x = torch.randn(8, 16)
    wanted = torch.autograd.grad(single(x).square().sum(), single.cell.map.weight)[0]
    given = x.to(dtype).requires_grad_()
    z = half(given)
    assert z.dtype == dtype
    assert half.last_solution.z.dtype == torch.float32
    assert half.last_solution.converged.all() or isinstance(backward, mb.Unroll)
    assert half.cell.seen == {dtype}
    weight, towards = torch.autograd.grad(z.float().square().sum(), (half.cell.map.weight, given))
    assert (weight.dtype, towards.dtype) == (dtype, dtype)
    assert torch.nn.functional.cosine_similarity(weight.float().flatten(), wanted.flatten(), dim=0) > 0.98
    with torch.no_grad():
        assert half(given).dtype == dtype


def test_a_half_precision_state_of_several_tensors_and_its_snapshots():
    deq = mb.DEQ(PairCell()).bfloat16()
    states = deq.states(torch.randn(3, 5, dtype=torch.bfloat16), after=(2,))
    assert {part.dtype for state in states for part in state} == {torch.bfloat16}
    states[-1][0].float().sum().backward()
    assert deq.cell.inner.w.grad is not None


@torch.no_grad()
def test_a_jacobian_product_of_a_half_precision_cell_is_not_taken_over_too_small_a_distance():
    quantised = lambda z, x: torch.from_numpy((0.5 * torch.tanh(z) + x).float().numpy()).bfloat16()  # noqa: E731
    deq = mb.DEQ(quantised, solver=mb.Newton(), max_nfe=100)  # without forward AD
    deq(torch.randn(4, 6).bfloat16())
    assert deq.last_solution.converged.all()


def dtypes(*modules) -> set[torch.dtype]:
    return {tensor.dtype for module in modules for tensor in (*module.parameters(), *module.buffers())}


@pytest.mark.filterwarnings("ignore::UserWarning")  # untrained
def test_learned_solvers_go_where_the_model_goes():
    forward, backward = (make_learned(kind, Layout("vector", (4,))) for kind in ("grouped", "adjoint"))
    model = nn.Sequential(nn.Linear(4, 4), mb.DEQ(TanhCell(), solver=forward, backward=mb.Implicit(solver=backward)))
    before, names = copy.deepcopy(forward.state_dict()), list(model.state_dict())
    unchanged = lambda: all(torch.equal(value, before[name]) for name, value in forward.state_dict().items())  # noqa: E731
    model.double()
    assert dtypes(forward, backward) == {DOUBLE}
    model(rows()).sum().backward()
    model.bfloat16()
    assert dtypes(model) == {torch.bfloat16}
    assert dtypes(forward, backward) == {torch.float32}
    assert unchanged()
    model.to_empty(device="cpu")  # forgets the model's values, not the solvers'
    assert unchanged()
    assert list(model.state_dict()) == names
    model.to("meta")
    assert {p.device.type for p in (*forward.parameters(), *backward.parameters())} == {"meta"}


class Pair(NamedTuple):
    slow: torch.Tensor
    fast: torch.Tensor


class Coupled(torch.nn.Module):
    """A cell whose state has names."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def initial_state(self, x):
        return Pair(torch.zeros_like(x), torch.zeros_like(x))

    def forward(self, z, x):
        return Pair(torch.tanh(0.4 * self.linear(z.fast) + x), torch.tanh(0.3 * z.slow))


MODES = [mb.Implicit(), mb.Implicit(precondition=True), mb.Phantom(), mb.JacobianFree(), mb.Unroll(20)]


@pytest.mark.parametrize("backward", MODES, ids=str)
def test_a_state_with_names_keeps_them_through_a_layer(backward):
    deq, x = mb.DEQ(Coupled(), backward=backward, rtol=1e-5), torch.randn(5, 4, requires_grad=True)
    z = deq(x)
    assert type(z) is Pair
    z.slow.square().sum().backward()
    assert x.grad.abs().sum() > 0
    found = deq.last_solution.z
    assert mb.spectral_radius(deq.cell, found, x.detach()).max() < 1
    assert mb.jacobian_penalty(deq.cell, found, x.detach()) > 0
    with torch.no_grad():
        assert type(deq.bfloat16()(x.bfloat16())) is Pair


TAKES_A_MAP = {
    "solve": lambda f, x: mb.solve(f, 0 * x, x, solver=mb.Picard()),
    "fixed": lambda f, x: mb.FixedBudget(f, mb.Picard(), max_nfe=3, compiled=False)(0 * x, x),
    "layer": lambda f, x: mb.DEQ(f)(x),
    "radius": lambda f, x: mb.spectral_radius(f, 0 * x, x),
    "penalty": lambda f, x: mb.jacobian_penalty(f, 0 * x, x),
}


@pytest.mark.parametrize("name", TAKES_A_MAP)
def test_a_layer_is_not_taken_for_the_map_that_it_solves(name):
    words = r"got a DEQ that stands for its own fixed point, .*: pass its cell"
    refused(words, lambda: TAKES_A_MAP[name](mb.DEQ(TanhCell()), torch.randn(3, 4)), TypeError)


class Wide(torch.nn.Module):
    """A cell whose state is wider than its context."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(6, 6), torch.nn.Linear(4, 6)

    def forward(self, z, x):
        return torch.tanh(0.3 * self.inner(z) + self.outer(x))


@pytest.mark.parametrize("backward", [mb.Implicit(), mb.Unroll(3)])
def test_a_state_of_another_shape_without_a_start_is_explained(backward):
    deq, x = mb.DEQ(Wide(), backward=backward), torch.ones(3, 4)
    words = (
        r"zeros like x of shape \(3, 4\) \(RuntimeError: mat1 and mat2 shapes .*\): if the state has another shape call "
        r"deq\(x, z0\), or give f a method initial_state\(x\)"
    )
    with pytest.raises(ValueError, match=words):
        deq(x)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        deq(x, torch.zeros(3, 5))
    assert deq(x, torch.zeros(3, 6)).shape == (3, 6)


def test_an_error_that_f_raises_later_goes_through():
    calls = []

    def late(z, x):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("late")
        return torch.tanh(z + x)

    with pytest.raises(RuntimeError, match=r"^late$"):
        mb.DEQ(late)(torch.ones(3, 4))


def test_a_layer_says_once_that_its_solver_was_fitted_to_a_far_larger_tolerance():
    solver, x = mb.load_solver("universal"), torch.ones(3, 4)
    solver.summary["held_out"] = {"rtol": 1e-2}
    cell = lambda z, x: torch.tanh(0.5 * z + x)  # noqa: E731
    words = "DEQ: Universal was fitted to a tolerance of 0.01, and this DEQ asks for 1e-05: .* fit it with rtol=1e-05"
    deq = mb.DEQ(cell, solver=solver, rtol=1e-5)
    with pytest.warns(UserWarning, match=words) as said:
        deq(x)
    assert said[0].filename == __file__, "the line that calls the layer"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deq(x)
        mb.DEQ(cell, solver=solver, rtol=1e-5, warn=False)(x)
        mb.DEQ(cell, solver=solver, rtol=1e-3)(x)
        mb.DEQ(cell, solver=mb.Broyden(), rtol=1e-5)(x)
        mb.solve(cell, 0 * x, x, solver=solver, rtol=1e-5)
    deq.solver = mb.load_solver("universal")
    deq.solver.summary["held_out"] = {"rtol": 1e-2}
    with pytest.warns(UserWarning, match=words):
        deq(x)
