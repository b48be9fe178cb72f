"""Transforms of torch that a solve cannot be taken through say so, and the ways out that they name are right."""

from __future__ import annotations

import higher
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import metabroyden as mb
from tests.helpers import refused


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 3)
        nn.init.orthogonal_(self.map.weight, gain=0.5)
        self.double()

    def forward(self, z, x):
        return torch.tanh(self.map(z) + x)


EXACT = {"rtol": 1e-12, "max_nfe": 100, "backward": mb.Implicit(rtol=1e-12, max_nfe=100)}
X = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
V = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.0, 1.0]], dtype=torch.float64)


def dual(deq, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(deq(forward_ad.make_dual(x, V))).tangent


def batched(deq, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(deq(x), x, torch.stack([V, V]), is_grads_batched=True)


def of_weights(deq, x):
    weights = {name: weight.detach() for name, weight in deq.named_parameters()}
    return torch.func.grad(lambda weights: torch.func.functional_call(deq, weights, (x,)).sum())(weights)


jacobian = torch.autograd.functional.jacobian
TRANSFORMS = {
    "grad": (lambda deq, x: torch.func.grad(lambda x: deq(x).sum())(x), "torch.func.grad.*torch.autograd.grad"),
    "grad of weights": (of_weights, "torch.func.grad.*functional_call"),
    "vjp": (lambda deq, x: torch.func.vjp(deq, x)[1](V), "torch.func.grad, vjp or jacrev"),
    "jacrev": (lambda deq, x: torch.func.jacrev(deq)(x), "torch.func.grad, vjp or jacrev"),
    "jvp": (lambda deq, x: torch.func.jvp(deq, (x,), (V,)), "torch.func.jvp.*torch.autograd.functional.jvp"),
    "forward AD": (dual, "forward-mode AD.*torch.autograd.functional.jvp"),
    "vmap": (lambda deq, x: torch.vmap(lambda row: deq(row[None])[0])(x), "torch.vmap: .* layer on a batch.*loop"),
    "vectorize": (lambda deq, x: jacobian(deq, x, vectorize=True), r"one cotangent at a time.*vectorize=False"),
    "is_grads_batched": (batched, "one cotangent at a time, not for is_grads_batched=True"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_that_a_solve_cannot_be_taken_through_names_the_way_out(name):
    transform, words = TRANSFORMS[name]
    refused(f"DEQ: .*{words}.*Unroll", lambda: transform(mb.DEQ(Cell()), X), RuntimeError)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_unrolled_layer_goes_through_every_transform(name):
    deq = mb.DEQ(Cell(), backward=mb.Unroll(60))
    deq(X)
    found = pytree.tree_leaves(TRANSFORMS[name][0](deq, X))
    assert found
    assert all(torch.isfinite(leaf).all() for leaf in found)


def test_the_ways_out_of_torch_func_give_the_same_derivatives():
    deq = mb.DEQ(Cell(), **EXACT)
    unrolled = mb.DEQ(deq.cell, backward=mb.Unroll(80))
    x = X.clone().requires_grad_()
    (ours,) = torch.autograd.grad(deq(x).sum(), x)
    torch.testing.assert_close(ours, torch.func.grad(lambda x: unrolled(x).sum())(X))
    _, ours = torch.autograd.functional.jvp(deq, X, V)
    torch.testing.assert_close(ours, torch.func.jvp(unrolled, (X,), (V,))[1])
    torch.testing.assert_close(jacobian(deq, X), torch.func.jacrev(unrolled)(X))


def steps(deq, weights, call):
    """The loss after two steps of gradient descent, differentiated towards the first weights."""
    first = weights
    for _ in range(2):
        gradients = torch.autograd.grad(call(weights).square().sum(), list(weights.values()), create_graph=True)
        weights = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
    return torch.autograd.grad(call(weights).square().sum(), list(first.values()))


def test_second_order_through_higher_says_what_to_use_instead():
    deq = mb.DEQ(Cell(), **EXACT)
    optimizer = torch.optim.SGD(deq.parameters(), lr=0.1)

    def through(layer):
        with higher.innerloop_ctx(layer, optimizer) as (inner, stepper):
            for _ in range(2):
                stepper.step(inner(X).square().sum())
            return torch.autograd.grad(inner(X).square().sum(), list(inner.parameters(time=0)))

    words = r"`higher` made functional, use mb\.Unroll\(\) or torch\.func\.functional_call"
    refused(words, lambda: through(deq), RuntimeError)
    found = steps(deq, dict(deq.named_parameters()), lambda weights: torch.func.functional_call(deq, weights, (X,)))
    deq.backward_mode = mb.Unroll(80)
    for ours, wanted in zip(found, through(deq), strict=True):
        torch.testing.assert_close(ours, wanted)
