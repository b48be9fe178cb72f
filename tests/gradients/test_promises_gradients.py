"""Gradients of linear cells are those of linear algebra, whatever the size of the cotangent and the samples beside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import metabroyden as mb

N = 6


class Linear(nn.Module):
    """z ↦ s·Wz + Ux + b, with a number s for each sample: z* = (I − sW)⁻¹(Ux + b)."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        w, u = (torch.randn(N, N, generator=generator, dtype=torch.float64) for _ in range(2))
        self.w = nn.Parameter((w / torch.linalg.matrix_norm(w, 2)).to(dtype))
        self.u, self.b = nn.Parameter(u.to(dtype)), nn.Parameter(torch.ones(N, dtype=dtype))
        self.seen: list[int] = []

    def forward(self, z: Tensor, x: tuple[Tensor, Tensor]) -> Tensor:
        self.seen.append(len(z))
        return x[1] * (z @ self.w.T) + x[0] @ self.u.T + self.b


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(x, s, v) of eight samples, of which the last wants the most products by far."""
    generator = torch.Generator().manual_seed(6)
    x, v = (torch.randn(8, N, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, torch.tensor([0, 0, 0.01, 0.01, 0.1, 0.1, 0.3, 0.95], dtype=dtype)[:, None], v


def adjoint(cell: Linear, s: Tensor, v: Tensor) -> Tensor:
    """u = (I − sWᵀ)⁻¹v of every sample."""
    eye = torch.eye(N, dtype=torch.float64)
    return torch.stack(
        [
            torch.linalg.solve(eye - a * cell.w.detach().double().T, b)
            for a, b in zip(s.double(), v.double(), strict=True)
        ]
    )


def backward(mode, v: Tensor, dtype: torch.dtype = torch.float64, **options):
    """(layer, x, gradients towards x, W and b) for cotangents v."""
    cell, (x, s, _) = Linear(dtype), inputs(dtype)
    options = {"rtol": 1e-12, "max_nfe": 90, "solver": mb.Broyden(memory=60)} | options
    deq = mb.DEQ(cell, backward=mode, **options)
    x.requires_grad_()
    z = deq((x, s), z0=torch.zeros_like(x))
    return deq, z, torch.autograd.grad(z, [x, cell.w, cell.b], v)


EXACT = mb.Implicit(solver=mb.Broyden(memory=60), rtol=1e-12, max_nfe=90)
MODES = [EXACT, mb.Implicit(solver=mb.Anderson(memory=20), rtol=1e-12, max_nfe=90)]
MODES += [mb.Implicit(rtol=1e-12, max_nfe=90, precondition=True)]


@pytest.mark.parametrize("mode", MODES, ids=["broyden", "anderson", "preconditioned"])
def test_implicit_gradients_are_those_of_the_linear_system(mode):
    _, s, v = inputs()
    deq, z, (to_x, to_w, to_b) = backward(mode, v)
    u = adjoint(deq.cell, s, v)
    torch.testing.assert_close(to_x, u @ deq.cell.u.detach(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(to_w, (s * u).T @ z.detach(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(to_b, u.sum(0), rtol=1e-8, atol=1e-9)
    spent = deq.last_backward_solution
    assert spent.converged.all()
    assert (spent.residual <= 1e-12).all()
    assert spent.nfe[7] > 3
    assert (spent.nfe <= 90).all()


@pytest.mark.parametrize("power", [-90, -30, 1, 30, 90])
def test_a_cotangent_of_any_size_has_the_same_gradient_times_its_size(power):
    _, _, v = inputs()
    _, _, plain = backward(EXACT, v)
    _, _, scaled = backward(EXACT, 2.0**power * v)
    for ours, theirs in zip(scaled, plain, strict=True):
        assert torch.equal(ours, 2.0**power * theirs)


def test_cotangents_of_different_sizes_stand_side_by_side():
    _, s, v = inputs()
    sizes = 2.0 ** torch.tensor([-80, 60, 0, -20, 40, 10, -60, 80], dtype=torch.float64)[:, None]
    deq, _, (to_x, _, _) = backward(EXACT, sizes * v)
    torch.testing.assert_close(to_x / sizes, adjoint(deq.cell, s, v) @ deq.cell.u.detach(), rtol=1e-8, atol=1e-9)
    assert deq.last_backward_solution.converged.all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_cotangent_that_is_not_finite_stays_where_it_is(value):
    _, s, v = inputs()
    v[3, 2] = value
    deq, _, (to_x, to_w, to_b) = backward(EXACT, v)
    others = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    expected = adjoint(deq.cell, s, v.nan_to_num(0, 0, 0)) @ deq.cell.u.detach()
    torch.testing.assert_close(to_x[others], expected[others], rtol=1e-8, atol=1e-9)
    assert not to_x[3].isfinite().any()
    assert not to_b[2].isfinite()
    assert to_b[[0, 1, 3, 4, 5]].isfinite().all()
    assert not to_w[2].isfinite().any()
    assert deq.last_backward_solution.converged.all()


def test_a_cotangent_of_zero_costs_one_product_and_gives_zero():
    _, _, v = inputs()
    v[7] = 0
    deq, _, (to_x, _, _) = backward(EXACT, v)
    assert (to_x[7] == 0).all()
    assert deq.last_backward_solution.nfe[7] == 1


def test_few_samples_that_are_left_go_on_by_themselves():
    """Once one of eight is left, the graph is made anew for it: the cell then sees one row."""
    _, s, v = inputs()
    deq, _, (to_x, _, _) = backward(EXACT, v)
    torch.testing.assert_close(to_x, adjoint(deq.cell, s, v) @ deq.cell.u.detach(), rtol=1e-8, atol=1e-9)
    cell, (x, s, _) = deq.cell, inputs()
    del cell.seen[:]
    x.requires_grad_()
    z = deq((x, s), z0=torch.zeros_like(x))
    before = len(cell.seen)
    torch.autograd.grad(z, x, v)
    made = cell.seen[before:]
    assert made
    assert made == sorted(made, reverse=True)
    assert all(rows <= 4 for rows in made)


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (1, 0.3), (3, 0.5), (6, 1.0)])
def test_phantom_gradients_are_their_partial_sums(steps, damping):
    _, s, v = inputs()
    mode = mb.Phantom(steps, damping) if (steps, damping) != (1, 1.0) else mb.JacobianFree()
    deq, z, (to_x, to_w, to_b) = backward(mode, v)
    w, u, term = deq.cell.w.detach(), torch.zeros_like(v), damping * v
    for _ in range(steps):
        u, term = u + term, (1 - damping) * term + damping * s * (term @ w)
    torch.testing.assert_close(to_x, u @ deq.cell.u.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(to_b, u.sum(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(to_w, (s * u).T @ z.detach(), rtol=1e-9, atol=1e-9)
    assert deq.last_backward_solution is None


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (4, 0.6)])
def test_an_unroll_is_the_network_of_that_depth(steps, damping):
    x, s, v = inputs()
    deq, z, found = backward(mb.Unroll(steps, damping), v)
    cell = Linear()
    x.requires_grad_()
    deep = torch.zeros_like(x)
    for _ in range(steps):
        deep = deep + damping * (cell(deep, (x, s)) - deep)
    torch.testing.assert_close(z, deep, rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(found, torch.autograd.grad(deep, [x, cell.w, cell.b], v), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert deq.last_solution.nfe.tolist() == [steps + 1] * 8
    assert deq.last_solution.steps.tolist() == [steps] * 8
    torch.testing.assert_close(deq.last_solution.residual, mb.relative_residual(z, cell(z, (x, s))).detach())
    with pytest.raises(RuntimeError, match="not finite after 40 steps: it diverges"):
        mb.DEQ(cell, backward=mb.Unroll(40))((x, 1e30 * s + 1e30), torch.ones_like(x))


def test_the_layer_gives_the_solution_to_the_last_bit_whatever_the_gradient():
    for mode in (EXACT, mb.Phantom(), mb.JacobianFree()):
        deq, z, _ = backward(mode, inputs()[2])
        assert torch.equal(z.detach(), deq.last_solution.z)
        with torch.no_grad():
            x, s, _ = inputs()
            again = deq((x, s), z0=torch.zeros_like(x))
        assert torch.equal(again, z)
        assert not again.requires_grad


def test_under_autocast_the_adjoint_asks_for_no_more_than_four_roundings():
    _, s, v = inputs(torch.float32)
    x = inputs(torch.float32)[0].requires_grad_()
    cell = Linear(torch.float32)
    deq = mb.DEQ(cell, backward=mb.Implicit(rtol=1e-6, max_nfe=60), rtol=3e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = deq((x, s), z0=torch.zeros_like(x))
    (to_x,) = torch.autograd.grad(z, x, v)
    spent = deq.last_backward_solution
    floor = 4 * torch.finfo(torch.bfloat16).eps
    assert spent.converged.all()
    assert (spent.residual <= floor).all()
    assert spent.residual.max() > 1e-6
    expected = (adjoint(cell, s, v) @ cell.u.detach().double()).float()
    torch.testing.assert_close(to_x, expected, rtol=0.2, atol=0.2)


def test_each_samples_cotangent_has_a_size_of_its_own():
    _, _, v = inputs(torch.float32)
    sizes = torch.logspace(-30, 12, 8)[:, None]
    mode = mb.Implicit(solver=mb.Broyden(memory=60), rtol=1e-5, max_nfe=90)
    options = {"dtype": torch.float32, "rtol": 1e-5}
    plain = backward(mode, v, **options)[2][0]
    scaled = backward(mode, sizes * v, **options)[2][0]
    torch.testing.assert_close(scaled / sizes, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 2.5, True, None])
def test_a_depth_is_a_positive_whole_number(steps):
    for mode in (mb.Phantom, mb.Unroll):
        with pytest.raises(ValueError, match="steps must be an integer"):
            mode(steps=steps)
