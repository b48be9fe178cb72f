"""Weight-tied, explicit and continuous networks in the place of a model's DEQ; dense and converted classifiers."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchdiffeq import odeint

import metabroyden as mb
from metabroyden.deq import initial_state
from metabroyden.gradients.base import parts_of
from metabroyden.nn import VariationalDropout
from metabroyden.zoo import models as zoo
from tests.helpers import refused

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """A contraction of a state of two tensors of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(3, 5), nn.Linear(5, 3)

    def initial_state(self, x):
        return torch.zeros_like(x), x.new_zeros(len(x), 5)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.back(z[1]) + x), torch.tanh(0.5 * self.there(z[0]))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def followed(cell, x, time: float, **options):
    """The end of the differential equation ż = f(z, x) − z from the initial state, by torchdiffeq."""

    def velocity(t, state):
        image = cell(state, x)
        return tuple(a - b for a, b in zip(image, state, strict=True)) if isinstance(state, tuple) else image - state

    z0 = initial_state(cell, x)
    path = odeint(velocity, z0, torch.tensor([0.0, time]).to(parts_of(z0)[0]), **options)
    return tuple(part[-1] for part in path) if isinstance(path, tuple) else path[-1]


def test_the_weight_tied_network_of_great_depth_and_the_flow_for_long_lead_to_the_equilibrium():
    cell, x = zoo.make_cell("dense", dtype=torch.float64)
    z = mb.DEQ(cell, rtol=1e-12, max_nfe=200)(x)
    assert_close(zoo.Unrolled(cell, 300)(x), z, rtol=0, atol=1e-10)
    assert not torch.allclose(zoo.Unrolled(cell, 2)(x), z, rtol=0, atol=1e-3)
    assert_close(zoo.Flow(cell, time=60.0, steps=120)(x), z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 4])
def test_the_stack_of_one_cell_is_the_weight_tied_network_and_that_is_repeated_application(depth):
    cell, x = zoo.make_cell("conv", dtype=torch.float64)
    wanted = torch.zeros_like(x)
    for _ in range(depth):
        wanted = cell(wanted, x)
    assert torch.equal(zoo.Unrolled(cell, depth)(x), wanted)
    stack = zoo.Stack([cell] * depth)
    assert torch.equal(stack(x), wanted)
    assert stack.cell is cell


def test_the_stack_applies_its_cells_in_order():
    first, second, x = zoo.DenseCell(4), zoo.DenseCell(4), torch.randn(2, 4)
    assert_close(zoo.Stack([first, second])(x), second(first(torch.zeros(2, 4), x), x))


@pytest.mark.parametrize(
    ("model_class", "config", "depth", "width"),
    [
        *((zoo.ConvClassifier, zoo.ConvClassifierConfig(), depth, "channels") for depth in (2, 5)),
        *(
            (zoo.ConvClassifier, zoo.ConvClassifierConfig(24, 24, side=28, stride=2), depth, "channels")
            for depth in (2, 5)
        ),
        *((zoo.DenseClassifier, zoo.DenseClassifierConfig(n=87), depth, "n") for depth in (2, 5)),
        (zoo.MultiscaleClassifier, zoo.MultiscaleClassifierConfig(), 3, "width"),
    ],
)
def test_the_explicit_network_has_as_many_parameters_and_no_width_comes_nearer(model_class, config, depth, width):
    wanted, twin = count(model_class(config)), zoo.explicit_twin(model_class, config, depth)
    assert abs(count(twin) / wanted - 1) < 0.1
    assert len(twin.deq.cells) == depth
    assert count(zoo.unrolled_twin(model_class(config), depth)) == wanted
    weights = [next(cell.parameters()) for cell in twin.deq.cells]
    assert not torch.equal(weights[0], weights[1])
    assert twin(torch.rand(2, 1, config.side, config.side)).shape == (2, 10)
    for step in (-1, 1):
        model = model_class(config.narrowed(getattr(twin.config, width) + step))
        assert abs(count(model) + (depth - 1) * count(model.cell) - wanted) >= abs(count(twin) - wanted)


def test_no_width_for_so_many_layers_and_a_missing_package_are_said(monkeypatch):
    words = r"no width gives 100 layers the 236 parameters of the DEQ within 10%: the nearest"
    refused(words, lambda: zoo.explicit_twin(zoo.DenseClassifier, zoo.DenseClassifierConfig(n=3, classes=5), 100))
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    refused("pip install torchdiffeq", lambda: zoo.Flow(zoo.DenseCell(4)), ImportError)


@pytest.mark.parametrize("name", ["dense", "causal", "pair"])
def test_the_flow_and_its_gradients_are_those_of_the_differential_equation(name):
    cell, x = (
        zoo.make_cell(name, dtype=torch.float64) if name != "pair" else (Pair().double(), torch.randn(2, 3).double())
    )
    inject = nn.Linear(x.shape[-1], x.shape[-1]).double()
    towards = [*inject.parameters(), *cell.parameters()]

    def gradients(z):
        loss = sum((part**2 * torch.arange(part[0].numel()).view_as(part[0])).sum() for part in parts_of(z))
        return torch.autograd.grad(loss, towards)

    z, wanted = zoo.Flow(cell, time=1.5, steps=60)(inject(x)), followed(cell, inject(x), 1.5, rtol=1e-9, atol=1e-9)
    assert_close(z, wanted, rtol=0, atol=1e-7)
    wanted = gradients(wanted)
    assert all(float(part.abs().max()) > 1e-3 for part in wanted)
    assert_close(gradients(z), wanted, rtol=1e-5, atol=1e-6)


def test_a_step_of_the_flow_costs_four_evaluations_and_its_error_is_of_order_four():
    (cell, x), calls = zoo.make_cell("dense", dtype=torch.float64), []
    cell.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        exact = zoo.Flow(cell, steps=200)(x)
        calls.clear()
        errors = [float((zoo.Flow(cell, steps=steps)(x) - exact).norm()) for steps in (4, 8)]
    assert len(calls) == 4 * (4 + 8)
    assert 10 < errors[0] / errors[1] < 26


class Dropped(zoo.DenseCell):
    def __init__(self) -> None:
        super().__init__(6)
        self.drop = VariationalDropout(0.5, (6,))

    def forward(self, z, x):
        return self.drop(super().forward(z, x))


def test_pinned_weights_get_gradients_and_a_mask_is_one_through_a_call():
    dropped, cell, x = Dropped(), zoo.DenseCell(6), torch.randn(4, 6)
    for twin in (zoo.Unrolled(dropped, 200), zoo.Flow(dropped, time=2.0)):
        assert 0.2 < float((twin(x) == 0).float().mean()) < 0.8
    nn.utils.parametrizations.weight_norm(cell.linear)
    found, wanted = (
        torch.autograd.grad(z.sum(), list(cell.linear.parameters()))
        for z in (zoo.Flow(cell, steps=10)(x), followed(cell, x, 1.0, rtol=1e-5, atol=1e-6))
    )
    assert all(float(part.abs().max()) > 1e-3 for part in wanted)
    assert_close(found, wanted, rtol=1e-2, atol=1e-3)


def test_a_weight_that_is_also_behind_the_context_gets_its_gradient_once():
    cell, inputs = zoo.make_cell("dense", dtype=torch.float64)
    flow, x = zoo.Flow(cell, steps=40), inputs @ cell.linear.weight
    wanted = followed(cell, x, 1.0)
    with torch.no_grad():
        assert_close(flow(x), wanted)
    found, wanted = (torch.autograd.grad(z.sum(), cell.linear.weight, retain_graph=True) for z in (flow(x), wanted))
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_damaged_twin_is_refused(tmp_path):
    twin = zoo.unrolled_twin(zoo.DenseClassifier(), 3)
    for wrong in ({"kind": "unfolded"}, {"kind": "unrolled"}, {"kind": "unrolled", "depth": 0}, {"depth": 3}):
        twin.deq.describe = lambda wrong=wrong: wrong
        path = zoo.save_model(twin, tmp_path / "twin.safetensors")
        refused("its description is damaged", lambda path=path: zoo.load_model(path), mb.CheckpointError)


def test_twins_share_nothing_with_the_model_but_its_weights_values():
    model = zoo.DenseClassifier(zoo.DenseClassifierConfig(n=12), rtol=1e-6, max_nfe=200)
    before, twin = model(IMAGES), zoo.unrolled_twin(model, 200)
    assert_close(twin(IMAGES), before, rtol=0, atol=1e-4)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_close(model(IMAGES), before)
    assert isinstance(model.deq, mb.DEQ)


# --- classifiers


def test_the_dense_classifier_is_injection_equilibrium_and_head_and_a_strided_stem_halves_the_side():
    model = zoo.DenseClassifier(zoo.DenseClassifierConfig(n=12, image_channels=3, side=5, classes=4), rtol=1e-5)
    images = torch.rand(2, 3, 5, 5)
    x = torch.nn.functional.layer_norm(images.flatten(1) @ model.stem[0].weight.T + model.stem[0].bias, (12,))
    z = mb.solve(model.cell, torch.zeros(2, 12), x, solver=mb.Broyden(), rtol=1e-5).z
    assert_close(model(images), z @ model.head.weight.T + model.head.bias)
    model = zoo.ConvClassifier(zoo.ConvClassifierConfig(channels=4, inner=4, side=7, stride=2))
    assert model.inject(torch.rand(2, 1, 7, 7)).shape == (2, 4, 4, 4)


def test_the_converted_mlp_computes_and_differentiates_what_the_network_does():
    model, images = zoo.MLPClassifier(zoo.MLPClassifierConfig(hidden=20, depth=3)).double(), IMAGES.double()
    a, towards = images.flatten(1), list(model.parameters())
    for number, stage in enumerate(model.cell.stages):
        a = a @ stage[0].weight.T + stage[0].bias
        a = torch.tanh(a) if number < 3 else a
    training, solved = model.train()(images), model.eval()(images)
    for found in (training, solved):
        assert_close(found, a)
    assert [part.shape[1] for part in model.deq(model.inject(images))] == [20, 20, 20, 10]
    assert int(model.deq.last_solution.nfe.max()) == 5
    assert_close(*(torch.autograd.grad(found.square().sum(), towards) for found in (solved, training)))
