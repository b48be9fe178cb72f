"""The DEQ layer and its gradients."""

from __future__ import annotations

import copy
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


class TanhCell(nn.Module):
    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.w = nn.Parameter(0.6 * torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q)

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


def test_a_tensor_of_the_state_that_the_cell_does_not_use_has_no_part_in_the_gradient():
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TanhCell()

        def initial_state(self, x):
            return torch.zeros_like(x), torch.zeros_like(x)

        def forward(self, z, x):
            return self.inner(z[0], x), torch.tanh(z[0])

    deq, x = tight(Ends()), torch.randn(2, 4, dtype=torch.float64)
    first, second = deq(x)
    (ours,) = torch.autograd.grad((first + second).sum(), deq.cell.inner.w)
    z = tight(deq.cell.inner)(x)
    (wanted,) = torch.autograd.grad((z + torch.tanh(z)).sum(), deq.cell.inner.w)
    assert_close(ours, wanted, rtol=1e-8, atol=1e-10)


def test_a_failed_adjoint_is_said_once():
    deq = mb.DEQ(TanhCell(), backward=mb.Implicit(rtol=1e-12, max_nfe=2))
    x = torch.randn(2, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="DEQ, backward: 2 of 2 samples did not converge"):
        deq(x).sum().backward()
    deq(x).sum().backward()


def test_a_failure_is_said_again_for_another_reason_or_twice_the_share():
    class Fickle(nn.Module):
        def forward(self, z, x):
            return torch.where(x.abs() > 1, torch.where(x > 0, 1.9 * z + x, torch.nan), 0.1 * z)

    deq = mb.DEQ(Fickle(), solver=mb.Picard(), rtol=1e-6, max_nfe=20)

    def said(*x: float) -> str:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            deq(torch.tensor(x, dtype=torch.float32)[:, None])
        return " ".join(str(warning.message) for warning in caught)

    assert "1 of 4" in said(2, 0, 0, 0)
    assert said(0, 2, 0, 0) == ""
    assert said(0, 0, 0, 0) == ""
    assert "2 of 4" in said(2, 2, 0, 0)
    assert said(2, 2, 2, 0) == ""
    assert "non_finite" in said(-2, 2, 2, 0)
    assert said(-2, 2, 2, 2) == ""


def test_a_residual_at_rounding_is_no_failure():
    class Rounded(nn.Module):
        def __init__(self, roundings: float) -> None:
            super().__init__()
            self.size = 1 + roundings * torch.finfo(torch.float32).eps

        def forward(self, z, x):
            return self.size * z + 0 * x

    x = torch.ones(2, 3)
    for roundings, silent in ((4, True), (40, False)):
        deq = mb.DEQ(Rounded(roundings), solver=mb.Picard(), rtol=0.0, max_nfe=3)
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            deq(x, torch.ones(2, 3))
        assert not deq.last_solution.converged.any()
        assert (not caught) == silent


def test_a_layer_may_be_used_twice_before_backward():
    deq = tight(TanhCell())
    x = torch.randn(2, 4, dtype=torch.float64)
    (both,) = torch.autograd.grad((deq(x) + 2 * deq(2 * x)).sum(), deq.cell.w)
    (one,) = torch.autograd.grad(deq(x).sum(), deq.cell.w)
    (two,) = torch.autograd.grad(deq(2 * x).sum(), deq.cell.w)
    assert_close(both, one + 2 * two)


def test_it_warns_once_when_samples_fail():
    deq = mb.DEQ(TanhCell(), rtol=1e-12, max_nfe=2)
    x = torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="DEQ: 2 of 2 samples did not converge: 2 × max_nfe"):
            deq(x)
        deq(x)


def test_it_says_so_when_the_weights_have_moved_since_the_fit():
    cell = ConvCell(4, 4, 2)
    x = torch.randn(30, 4, 3, 3)
    solver = make_learned("meta-broyden", Layout("image", (4, 3, 3)))
    solver.fingerprint = fingerprint(cell)
    deq = mb.DEQ(cell, solver=solver, warn=False)
    with torch.no_grad():
        deq(x[:2])  # silent: a warning is an error here
        cell.norm3.weight.mul_(1.01)
        with pytest.warns(UserWarning, match="MetaBroyden was fitted to other weights of f"):
            deq(x[:2])
        deq(x[:2])


def test_a_learned_solver_is_no_part_of_the_model():
    cell, solver = ConvCell(4, 4, 2), mb.load_solver(mb.list_pretrained()[0])
    assigned = mb.DEQ(cell)
    assigned.solver = solver
    for deq in (mb.DEQ(cell, solver=solver), assigned):
        assert deq.solver is solver
        assert list(deq.children()) == [cell]
        assert copy.deepcopy(deq).solver is not solver
        assert {id(p) for p in deq.parameters()} == {id(p) for p in cell.parameters()}
        assert all(key.startswith("cell.") for key in deq.state_dict())


def test_any_callable_makes_a_layer():
    """A function's tensors are its own: gradients reach them, the layer has no parameters."""
    cell, x = TanhCell(), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    deq = tight(lambda z, x: torch.tanh(z @ cell.w + x))
    assert not list(deq.parameters()) + list(deq.children())
    assert list(mb.DEQ(cell).children()) == [cell]
    wanted = torch.autograd.grad(tight(cell)(x).square().sum(), (x, cell.w))
    for f in (deq, tight(cell.forward)):
        assert_close(torch.autograd.grad(f(x).square().sum(), (x, cell.w)), wanted)
    (first,) = torch.autograd.grad(tight(lambda z, x: torch.tanh(0.5 * z + x))(x).sum(), x, create_graph=True)
    torch.autograd.grad(first.square().sum(), x)
    single = mb.DEQ(lambda z: torch.cos(0.5 * z), backward=mb.JacobianFree())
    assert single.bfloat16()(None, torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    unrolled = mb.DEQ(torch.tanh, backward=mb.Unroll(3))
    assert_close(unrolled(None, x), x.tanh().tanh().tanh())


def test_hooks_see_each_equilibrium_that_gets_gradients():
    deq, x, seen = mb.DEQ(TanhCell()), torch.randn(2, 4, dtype=torch.float64), []
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
    with pytest.raises(ValueError, match=r"context of type dict: give z0, or give the cell a method initial_state"):
        deq({"x": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="wanted 2 rows"):
        deq(torch.ones(3, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64))


def test_a_classifier_learns_through_it():
    model = ConvClassifier(ConvClassifierConfig(channels=4, inner=4, groups=2, side=4, classes=2), warn=False)
    images = torch.randn(32, 1, 4, 4)
    labels = (images.mean(dim=(1, 2, 3)) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    with warnings.catch_warnings():
        for _ in range(15):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_layers_tolerances_are_those_of_its_solve():
    cell, x = TanhCell(), torch.randn(5, 4, dtype=torch.float64)
    for options in ({"rtol": 0.0, "atol": 0.3}, {"rtol": 1e-2}, {"rtol": 1e-9}):
        deq = mb.DEQ(cell, **options, warn=False)
        with torch.no_grad():
            deq(x)
        wanted = mb.solve(cell, torch.zeros_like(x), x, solver=mb.Broyden(), throw=False, **options)
        assert torch.equal(deq.last_solution.nfe, wanted.nfe)
        assert wanted.converged.all()


def test_a_new_solver_is_told_again_that_it_was_fitted_to_other_weights():
    deq, x = mb.DEQ(TanhCell().float(), warn=False), torch.randn(2, 4)
    for _ in range(2):
        solver = mb.GroupedLSTM(mb.learned.GroupedConfig(layout="vector", shape=(4,)))
        solver.fingerprint = "0123456789abcdef"
        deq.solver = solver
        with torch.no_grad():
            with pytest.warns(UserWarning, match="fitted to other weights of f"):
                deq(x)
            deq(x)


def test_what_is_found_without_gradients_has_none():
    class Energy(nn.Module):
        def forward(self, z, x):
            with torch.enable_grad():
                z = z.requires_grad_()
                (g,) = torch.autograd.grad((z * z).sum() / 8 + (z * x).sum() / 2, z, create_graph=True)
            return g

    deq = mb.DEQ(Energy())
    with torch.no_grad():
        z = deq(torch.randn(3, 4))
    assert not z.requires_grad
    assert not deq.last_solution.z.requires_grad


def test_gradients_enabled_within_inference_mode_are_not_looked_for():
    deq, x = mb.DEQ(TanhCell()), torch.randn(2, 4, dtype=torch.float64)
    wanted = deq(x).detach()
    with torch.inference_mode(), torch.enable_grad():
        z = deq(x)
    assert not z.requires_grad
    assert torch.equal(z, wanted)


# Half precision, and moving.


@pytest.mark.parametrize("backward", [mb.Implicit(), mb.Phantom(), mb.JacobianFree(), mb.Unroll()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_half_precision_solves_in_single(dtype, backward):
    seen = set()

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(16, 16)
            nn.init.orthogonal_(self.map.weight, gain=0.7)

        def forward(self, z, x):
            seen.add(z.dtype)
            return torch.tanh(self.map(z) + x)

    single = mb.DEQ(Cell(), rtol=1e-5, backward=mb.Implicit(rtol=1e-5) if backward == mb.Implicit() else backward)
    half = mb.DEQ(copy.deepcopy(single.cell), backward=backward).to(dtype)  # a warning is an error here
    x = torch.randn(8, 16)
    wanted = torch.autograd.grad(single(x).square().sum(), single.cell.map.weight)[0]
    seen.clear()
    given = x.to(dtype).requires_grad_()
    z = half(given)
    assert z.dtype == dtype
    assert half.last_solution.z.dtype == torch.float32
    assert half.last_solution.converged.all() or isinstance(backward, mb.Unroll)
    assert seen == {dtype}
    weight, towards = torch.autograd.grad(z.float().square().sum(), (half.cell.map.weight, given))
    assert (weight.dtype, towards.dtype) == (dtype, dtype)
    assert torch.nn.functional.cosine_similarity(weight.float().flatten(), wanted.flatten(), dim=0) > 0.98
    with torch.no_grad():
        assert half(given).dtype == dtype


def test_a_half_precision_state_of_several_tensors_and_its_snapshots():
    deq = mb.DEQ(PairCell()).bfloat16()
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    states = deq.states(x, after=(2,))
    assert {part.dtype for state in states for part in state} == {torch.bfloat16}
    states[-1][0].float().sum().backward()
    assert deq.cell.inner.w.grad is not None


def test_a_jacobian_product_of_a_half_precision_cell_is_not_taken_over_too_small_a_distance():
    class Quantised(nn.Module):
        """Without forward AD."""

        def forward(self, z, x):
            return torch.from_numpy((0.5 * torch.tanh(z) + x).float().numpy()).bfloat16()

    deq = mb.DEQ(Quantised(), solver=mb.Newton(), max_nfe=100)
    with torch.no_grad():
        deq(torch.randn(4, 6).bfloat16())
    assert deq.last_solution.converged.all()


def dtypes(module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in (*module.parameters(), *module.buffers())}


def test_learned_solvers_go_where_the_model_goes():
    forward, backward = (make_learned(kind, Layout("vector", (4,))) for kind in ("grouped", "adjoint"))
    model = nn.Sequential(nn.Linear(4, 4), mb.DEQ(TanhCell(), solver=forward, backward=mb.Implicit(solver=backward)))
    before = {name: value.clone() for name, value in forward.state_dict().items()}
    names = list(model.state_dict())
    model.double()
    assert dtypes(forward) == dtypes(backward) == {torch.float64}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # untrained
        model(torch.randn(2, 4, dtype=torch.float64)).sum().backward()
    model.bfloat16()
    assert dtypes(model) == {torch.bfloat16}
    assert dtypes(forward) == dtypes(backward) == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in forward.state_dict().items())
    model.to_empty(device="cpu")  # forgets the model's values, not the solvers'
    assert all(torch.equal(value, before[name]) for name, value in forward.state_dict().items())
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
    with pytest.raises(TypeError, match=r"got a DEQ that stands for its own fixed point, .*: pass its cell"):
        TAKES_A_MAP[name](mb.DEQ(TanhCell()), torch.randn(3, 4))
