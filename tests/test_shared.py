"""Tensors in a context that all samples share: marked they reach f as they are, unmarked they are warned of."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import metabroyden as mb
from metabroyden.function import FunctionWrapper, owner_of
from metabroyden.meta.unroll import unroll
from metabroyden.shared import WATCH
from metabroyden.state import concatenate, gather
from tests.helpers import fixed, refused


class Cell(nn.Module):
    """f(z, (x, w)) = tanh(z w + x), with w of the context; and a parameter w of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.3 * torch.randn(5, 5) / 5**0.5)
        self.seen: list[torch.Tensor] = []

    def forward(self, z, c):
        x, w = c
        self.seen.append(w)
        return torch.tanh((z.unsqueeze(2) * w).sum(1) + x)

    def initial_state(self, c):
        return torch.zeros_like(c[0])


WAYS = {
    "solve": lambda f, z0, c: mb.solve(f, z0, c, solver=mb.Picard(), rtol=1e-5),
    "fixed": lambda f, z0, c: fixed(f, z0, c, solver=mb.Picard(), max_nfe=30),
    "unroll": lambda f, z0, c: unroll(mb.Picard(), f.requires_grad_(False), z0, c, steps=3, backend="native"),
}


@pytest.mark.parametrize("batch", [3, 5])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("error")
def test_f_receives_the_very_tensor_whatever_the_batch(batch, way):
    cell, w, x = Cell(), 0.1 * torch.randn(5, 5), torch.linspace(0.01, 2, batch)[:, None] * torch.ones(batch, 5)
    found = WAYS[way](cell, 0 * x, (x, mb.Shared(w)))
    assert way == "unroll" or found.converged.all()
    assert len(cell.seen) > 3
    assert all(seen is w for seen in cell.seen)


def iterated(x, w, times=300):
    z = torch.zeros_like(x)
    for _ in range(times):
        z = torch.tanh(z @ w + x)
    return z


MODES = {"implicit": mb.Implicit(rtol=1e-6), "unroll": mb.Unroll(30), "phantom": mb.Phantom(30, 1.0)}


@pytest.mark.parametrize("mode", MODES)
def test_gradients_flow_to_a_shared_tensor_through_a_layer(mode):
    cell, x, w = Cell().requires_grad_(False), torch.randn(4, 5), (0.2 * torch.randn(5, 5)).requires_grad_()
    deq = mb.DEQ(cell, backward=MODES[mode], rtol=1e-6, max_nfe=80)
    ours, theirs = (torch.autograd.grad(z.square().sum(), w) for z in (deq((x, mb.Shared(w))), iterated(x, w)))
    assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_an_adjoint_that_goes_on_with_some_samples_keeps_it_whole():
    x = torch.cat([1e3 * torch.ones(6, 5), 0.1 * torch.randn(3, 5)])  # flat there: their adjoint is done at once
    w = (0.9 * torch.linalg.qr(torch.randn(5, 5))[0]).requires_grad_()
    deq = mb.DEQ(Cell().requires_grad_(False), backward=mb.Implicit(rtol=1e-5, max_nfe=60), rtol=1e-6, max_nfe=90)
    ours, theirs = (torch.autograd.grad(z.sum(), w) for z in (deq((x, mb.Shared(w))), iterated(x, w)))
    assert deq.last_backward_solution.nfe.unique().numel() > 1
    assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_a_solver_that_sees_x_sees_it_without_marks():
    seen = []

    class Curious(mb.Picard):
        def init(self, z, g, problem):
            seen.append(problem.context)
            return ()

    x, w = torch.randn(3, 5).bfloat16(), torch.randn(5, 5).bfloat16()
    given = (lambda z, c: 0.5 * z + c[0]), torch.zeros(3, 5), (x, mb.Shared(w))
    mb.solve(*given, solver=Curious(), throw=False, f_dtype=torch.bfloat16)
    fixed(*given, solver=Curious(), max_nfe=3, f_dtype=torch.bfloat16)
    assert len(seen) == 2
    for context in seen:
        assert all(map(torch.equal, context, (x.float(), w.float())))


def test_rows_are_taken_of_all_but_shared_tensors():
    w = torch.randn(2)
    tree = {"x": torch.arange(4), "w": mb.Shared(w), "s": 3}
    some = gather(tree, torch.tensor([2, 0]))
    both = concatenate([tree, some])
    assert some["x"].tolist() == [2, 0]
    assert both["x"].tolist() == [0, 1, 2, 3, 2, 0]
    assert some["w"].tensor is both["w"].tensor is w
    assert pytree.tree_leaves(tree["w"])[0] is w  # whoever flattens a context meets the tensor
    refused("Shared marks a tensor, got list", lambda: mb.Shared([1.0]), TypeError)


def run(f, x, w):
    """One evaluation: nothing is gathered yet."""
    return mb.solve(f, 0 * x, (x, w), solver=mb.Picard(), max_nfe=1, throw=False)


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.detach(), lambda w: w.T], ids=["itself", "detached", "view"])
def test_a_parameter_of_f_that_would_be_gathered_is_warned_of(view):
    cell = Cell()
    with pytest.warns(UserWarning, match=r"shape \(5, 5\) is the parameter 'w' of f.*mb.Shared") as told:
        run(cell, torch.randn(5, 5), view(cell.w))
    assert len(told) == 1
    assert told[0].filename == __file__


@pytest.mark.parametrize("earlier", ["refused", "marked"])
@pytest.mark.filterwarnings("error")
def test_a_tensor_that_went_with_another_batch_before_is_warned_of(earlier):
    f, w, x = lambda z, c: 0.5 * z + c[0], torch.randn(5, 5), torch.randn(5, 5)
    if earlier == "marked":
        run(f, x[:3], mb.Shared(w))
    else:
        refused(r"if all samples share it, pass mb\.Shared", lambda: run(f, x[:3], w))
    with pytest.warns(UserWarning, match=r"passed to this f before, beside a batch of another size.*mb\.Shared"):
        run(f, x, w)
    run(f, x, torch.randn(5, 5))  # another tensor
    run(lambda z, c: 0.5 * z, x, w)  # another f
    run(f, x, mb.Shared(w))


def test_the_owner_of_a_wrapped_map_is_its_cell():
    class Inside(FunctionWrapper):
        def __init__(self, inner):
            self.inner = inner

    cell = Cell()
    assert owner_of(Inside(Inside(cell.forward))) is cell
    with pytest.warns(UserWarning, match="is the parameter 'w' of f"):
        WATCH.check(owner_of(Inside(cell)), [cell.w], stacklevel=1)
