"""Feedforward networks as DEQs, and two DEQs as one."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.convert import layers
from metabroyden.convert.layers import MIXING, class_of
from metabroyden.zoo.models import ConvClassifier, ConvClassifierConfig
from tests.helpers import refused
from tests.test_deq import TanhCell, tight


def mlp():
    return nn.Sequential(
        nn.Linear(5, 16), nn.ReLU(inplace=True), nn.Linear(16, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3)
    )


def convnet():
    """Nested, and batch norm and dropout in eval mode."""
    features = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.SiLU(), nn.Dropout(0.3)),
        nn.AdaptiveAvgPool2d(2),
    )
    net = nn.Sequential(features, nn.Flatten(), nn.Linear(24, 10), nn.Tanh(), nn.Identity(), nn.Linear(10, 3)).eval()
    features[0][1].running_var.uniform_(0.5, 2)
    return net


def decoder():
    """From a vector to an image; a step in place comes first."""
    return nn.Sequential(
        nn.Hardtanh(-1.5, 1.5, inplace=True), nn.Linear(5, 18), nn.Unflatten(1, (2, 3, 3)),
        nn.InstanceNorm2d(2, affine=True), nn.ELU(inplace=True), nn.ConvTranspose2d(2, 3, 3, stride=2), nn.PReLU(3),
        nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 3, padding=1), nn.Sigmoid(),
    )  # fmt: skip


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 2))


NETWORKS = {
    "mlp": (mlp, (5,)),
    "conv": (convnet, (2, 8, 8)),
    "decoder": (decoder, (5,)),
    "weight norm": (weight_normed, (5,)),
}


def make(name, batch=4, dtype=torch.float64):
    build, shape = NETWORKS[name]
    return build().to(dtype), torch.randn(batch, *shape, dtype=dtype)


def depth(network):
    return sum(class_of(layer) in MIXING for layer in network.modules())


def random_like(state):
    return tuple(torch.randn_like(part) for part in state)


def iterate(cell, z, x, times):
    with torch.no_grad():
        for _ in range(times):
            z = cell(z, x)
    return z


def gradients(output, module, *more):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return torch.autograd.grad((output.square() * weights).sum(), [*module.parameters(), *more])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_as_many_iterations_as_stages_give_the_activations_bit_for_bit_from_any_start(name, dtype):
    network, x = make(name, dtype=dtype)
    converted, stages, seen = mb.to_deq(network), depth(network), []
    start = random_like(converted.cell.initial_state(x))
    assert len(start) == len(converted.cell.stages) == stages
    reached = iterate(converted.cell, start, x, stages)
    for stage in converted.cell.stages:
        stage[-1].register_forward_hook(lambda *call: seen.append(call[2].clone()))
    with torch.no_grad():
        wanted = network(x.clone())
        activations = seen[:]
        assert all(map(torch.equal, converted.cell(reached, x), reached))
        assert_close(converted.deq(x), activations)
    assert all(map(torch.equal, reached, activations))
    assert torch.equal(reached[-1], wanted)
    assert not torch.equal(iterate(converted.cell, start, x, stages - 1)[-1], wanted)


@pytest.mark.parametrize("solver", [None, mb.Picard(), mb.Anderson(), mb.Broyden()], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_output_and_gradients_are_those_of_the_network(name, solver):
    network, x = make(name)
    x.requires_grad_()
    converted = mb.to_deq(network) if solver is None else mb.to_deq(network, solver=solver, max_nfe=100)
    output, wanted = converted(x), network(x.clone())
    assert_close(output, wanted, rtol=1e-9, atol=1e-10)
    assert converted.deq.last_solution.converged.all()
    assert_close(gradients(output, network, x), gradients(wanted, network, x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_by_default_it_costs_one_evaluation_a_stage_and_few_more(name):
    network, x = make(name, dtype=torch.float32)
    converted = mb.to_deq(network)
    converted(x).sum().backward()
    for solution in (converted.deq.last_solution, converted.deq.last_backward_solution):
        assert solution.converged.all()
        assert solution.nfe.max() <= depth(network) + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_may_vary_in_size_and_images_too(dtype):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).to(
        dtype
    )
    converted = mb.to_deq(network)
    for shape in ((1, 1, 5, 5), (7, 1, 5, 5), (3, 1, 9, 6), (2, 1, 5, 5)):
        x = torch.randn(shape, dtype=dtype)
        output = converted(x)
        assert output.dtype == dtype
        assert_close(output, network(x))


def test_the_jacobian_in_z_is_strictly_block_lower_triangular():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 2)).double()
    cell, x = mb.to_deq(network).cell, torch.randn(1, 3, dtype=torch.float64)
    z = random_like(cell.initial_state(x))
    blocks = torch.func.jacrev(lambda z: cell(z, x))(z)
    for row, parts in enumerate(blocks):
        for column, block in enumerate(parts):
            assert bool(block.count_nonzero()) == (column == row - 1)
    whole = torch.cat([torch.cat([b.flatten(2).flatten(0, 1).squeeze(-1) for b in parts], 1) for parts in blocks])
    assert torch.linalg.matrix_power(whole, 2).count_nonzero()
    assert not torch.linalg.matrix_power(whole, 3).count_nonzero()


def test_parameters_are_shared_and_training_through_it_trains_the_network():
    network, x = make("mlp")
    converted = mb.to_deq(network)
    assert [id(p) for p in converted.parameters()] == [id(p) for p in network.parameters()]
    before = network(x)
    converted(x).sum().backward()
    torch.optim.SGD(converted.parameters(), lr=0.1).step()
    assert not torch.allclose(network(x), before)
    assert_close(converted(x), network(x))


def test_a_layer_used_twice_is_two_stages_with_one_weight():
    shared = nn.Linear(4, 4)
    network = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh()).double()
    converted, x = mb.to_deq(network), torch.randn(3, 4, dtype=torch.float64)
    assert len(converted.cell.stages) == 2
    assert_close(gradients(converted(x), shared), gradients(network(x), shared), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "first",
    [[], [nn.Identity()], [nn.Flatten()], [nn.Unflatten(1, (1, 4)), nn.Flatten()]],
    ids=lambda layers: str(len(layers)),
)
@pytest.mark.parametrize("rest", [[], [nn.Linear(4, 4), nn.ReLU(inplace=True)]], ids=["alone", "before a linear layer"])
def test_layers_in_place_write_neither_into_x_nor_into_the_state(first, rest):
    network = nn.Sequential(*first, nn.ReLU(inplace=True), *rest)
    x = torch.randn(3, 4)
    converted, kept = mb.to_deq(network), x.clone()
    z = random_like(converted.cell.initial_state(x))
    kept_z = tuple(part.clone() for part in z)
    converted.cell(z, x)
    output = converted(x)
    assert torch.equal(x, kept)
    assert all(map(torch.equal, z, kept_z))
    assert_close(output, network(x.clone()))
    converted(kept.requires_grad_()).sum().backward()  # a leaf, which must not be written to
    assert kept.grad is not None


SINGLE = [
    (nn.Linear(6, 3), (6,)), (nn.Linear(6, 3), (2, 6)), (nn.Conv1d(2, 3, 3), (2, 5)), (nn.Conv2d(2, 3, 3), (2, 5, 5)),
    (nn.Conv3d(1, 2, 2), (1, 3, 3, 3)), (nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 5)),
    (nn.ConvTranspose2d(2, 4, 3, groups=2), (2, 3, 3)), (nn.ConvTranspose3d(1, 2, 2), (1, 2, 2, 2)),
    *[(kind(), (2, 6)) for kind in (
        nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
        nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
        nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Identity, nn.Flatten,
    )],
    (nn.Threshold(0.1, 0.5), (6,)), (nn.RReLU().eval(), (6,)), (nn.Dropout(0.0), (6,)), (nn.AlphaDropout(0.5).eval(), (6,)),
    (nn.Dropout2d(0.5).eval(), (2, 3, 3)), (nn.Softmax(1), (6,)), (nn.Softmax(-1), (2, 6)), (nn.LogSoftmax(1), (6,)),
    (nn.Softmin(2), (2, 6)), (nn.Softmax2d(), (2, 3, 3)), (nn.LayerNorm([2, 6]), (2, 6)), (nn.RMSNorm(6), (6,)),
    (nn.GroupNorm(2, 4), (4, 3)), (nn.LocalResponseNorm(2), (4, 3)), (nn.InstanceNorm1d(2), (2, 5)),
    (nn.InstanceNorm2d(2, affine=True), (2, 3, 3)), (nn.InstanceNorm3d(1, track_running_stats=True).eval(), (1, 2, 2, 2)),
    (nn.BatchNorm1d(6).eval(), (6,)), (nn.BatchNorm2d(2).eval(), (2, 3, 3)), (nn.BatchNorm3d(2).eval(), (2, 2, 2, 2)),
    *[(kind(2), (2, 4)) for kind in (nn.AvgPool1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)],
    *[(kind(2), (2, 4, 4)) for kind in (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)],
    *[(kind(2), (2, 4, 4, 4)) for kind in (nn.AvgPool3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)],
    (nn.LPPool1d(2, 2), (2, 4)), (nn.LPPool2d(2, 2), (2, 4, 4)), (nn.LPPool3d(2, 2), (2, 4, 4, 4)),
    *[(kind(1), (2, 4)) for kind in (nn.ZeroPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d, nn.CircularPad1d)],
    *[(kind(1), (2, 4, 4)) for kind in (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)],
    *[(kind(1), (2, 4, 4, 4)) for kind in (nn.ZeroPad3d, nn.ReflectionPad3d, nn.ReplicationPad3d, nn.CircularPad3d)],
    (nn.ConstantPad1d(1, 2.0), (4,)), (nn.ConstantPad2d(1, 2.0), (2, 4, 4)), (nn.ConstantPad3d(1, 2.0), (1, 2, 2, 2)),
    (nn.PixelShuffle(2), (4, 2, 2)), (nn.PixelUnshuffle(2), (1, 4, 4)), (nn.Unflatten(1, (2, 3)), (6,)),
    (nn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 3)), (nn.Upsample(size=5), (2, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "shape"), SINGLE, ids=str)
def test_every_supported_layer_keeps_its_output_and_samples_stay_apart(layer, shape):
    network = nn.Sequential(layer)
    x = torch.randn(3, *shape)
    converted = mb.to_deq(network)
    with torch.no_grad():
        (wanted,) = (part.shape for part in converted.cell.initial_state(x))
        output = converted(x)
        assert output.shape == wanted
        assert_close(output, network(x))
        assert_close(output[1:2], network(x[1:2]))


def test_every_supported_class_of_layer_is_tried_above():
    left = layers._SUPPORTED - {type(layer) for layer, _ in SINGLE}
    assert left == {nn.Dropout1d, nn.Dropout3d, nn.FeatureAlphaDropout}


def test_the_initial_state_calls_no_layer_and_finds_shapes_once_for_each_shape_of_input(monkeypatch):
    network, x = make("conv", dtype=torch.float32)
    calls, traced, original = [], [], layers.output_shape
    monkeypatch.setattr(layers, "output_shape", lambda *args: traced.append(args[0]) or original(*args))
    for layer in network.modules():
        layer.register_forward_hook(lambda *call: calls.append(type(call[0]).__name__))
    cell = mb.to_deq(network).cell
    state, found = cell.initial_state(x), len(traced)
    cell.initial_state(x[:2])
    assert calls == []
    assert found == len(traced) > 0
    assert [tuple(part.shape) for part in state] == [(4, 4, 4, 4), (4, 24), (4, 10), (4, 3)]
    assert all(part.dtype == torch.float32 and not part.any() for part in state)
    cell(state, x)
    assert calls.count("Conv2d") == 2
    assert calls.count("Sequential") == 0  # the network itself is never called


def test_the_state_takes_dtype_of_the_parameters_or_of_x():
    network, x = make("mlp")
    assert {part.dtype for part in mb.to_deq(network).cell.initial_state(x.float())} == {torch.float64}
    plain = mb.to_deq(nn.Sequential(nn.Tanh(), nn.Flatten()))
    assert plain.cell.initial_state(x)[0].dtype == torch.float64
    assert_close(plain(x), torch.tanh(x))


class OwnForward(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnLinear(nn.Linear):
    pass


def lin(*more):
    return nn.Sequential(nn.Linear(4, 4), *more)


REFUSED = {
    "no Sequential": (nn.Linear(4, 4), TypeError, r"must be an nn.Sequential with nn.Sequential's own forward, got Linear"),
    "own forward": (OwnForward(nn.Linear(4, 4)), TypeError, r"nn.Sequential's own forward, got OwnForward$"),
    "own forward inside": (lin(OwnForward(nn.Tanh())), TypeError, r"got OwnForward at 1"),
    "empty": (nn.Sequential(nn.Sequential()), ValueError, r"at least one layer, got an empty Sequential"),
    "batch norm": (lin(nn.BatchNorm1d(4)), ValueError, r"layer 1 \(BatchNorm1d\) .* ties samples together.*\.eval\(\)"),
    "batch norm without statistics": (
        lin(nn.BatchNorm1d(4, track_running_stats=False)).eval(), ValueError, r"BatchNorm1d.*track statistics"
    ),
    "dropout": (lin(nn.Sequential(nn.ReLU(), nn.Dropout(0.1))), ValueError, r"layer 1\.1 \(Dropout\) .* draws anew"),
    "rrelu": (lin(nn.RReLU()), ValueError, r"layer 1 \(RReLU\) .* slope anew"),
    "instance norm": (lin(nn.InstanceNorm1d(4, track_running_stats=True)), ValueError, r"InstanceNorm1d.* running"),
    "recurrent": (lin(nn.LSTM(4, 4)), TypeError, r"layer 1 \(LSTM\) .* recurrent layer has a state of its own"),
    "attention": (lin(nn.MultiheadAttention(4, 2)), TypeError, r"layer 1 \(MultiheadAttention\) .* several inputs"),
    "transformer": (
        lin(nn.TransformerEncoderLayer(4, 2, batch_first=True)), TypeError, r"TransformerEncoderLayer.* several inputs"
    ),
    "custom": (lin(ConvClassifier()), TypeError, r"layer 1 \(ConvClassifier\) .* cannot be known to treat samples apart"),
    "custom subclass": (nn.Sequential(OwnLinear(4, 4)), TypeError, r"layer 0 \(OwnLinear\) .* cannot be known"),
    "bilinear": (lin(nn.Bilinear(4, 4, 4)), TypeError, r"Bilinear.* one tensor in and one out"),
    "lazy": (nn.Sequential(nn.LazyLinear(4)), TypeError, r"layer 0 \(LazyLinear\) .* run the network once"),
    "half": (lin().half(), ValueError, r"layer 0 \(Linear\) .* torch.float16.* float32 or float64"),
    "bfloat16": (lin().bfloat16(), ValueError, r"torch.bfloat16"),
    "indices": (lin(nn.MaxPool1d(2, return_indices=True)), ValueError, r"layer 1 \(MaxPool1d\) .* returns a pair"),
    "softmax over samples": (lin(nn.Softmax(0)), ValueError, r"layer 1 \(Softmax\) .* along the first axis"),
    "softmax over a guess": (lin(nn.Softmax()), ValueError, r"layer 1 \(Softmax\) .* dim is not given"),
    "flatten samples": (lin(nn.Flatten(0)), ValueError, r"layer 1 \(Flatten\) .* along the first axis"),
    "spectral norm": (
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))), ValueError, r"layer 0 .* spectral"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name_and_reason(name):
    network, error, message = REFUSED[name]
    refused(message, lambda: mb.to_deq(network), error)


REFUSED_INPUTS = {
    "convolution without batch": ([nn.Conv2d(4, 2, 1)], (4, 3, 3), r"layer 0 \(Conv2d\) .* wants 4 axes, the samples first"),
    "linear over samples": ([nn.Linear(4, 2)], (4,), r"layer 0 \(Linear\) .* along the first axis"),
    "norm over samples": ([nn.LayerNorm([4, 3])], (4, 3), r"layer 0 \(LayerNorm\) .* normalises along the first axis"),
    "softmax from the end": ([nn.Linear(3, 3), nn.Softmax(-2)], (4, 3), r"layer 1 \(Softmax\) .* along the first axis"),
    "padding of the batch": ([nn.ConstantPad2d(1, 0.0)], (4, 3), r"ConstantPad2d.* it pads the first axis, the samples"),
    "wrong width": ([nn.Linear(3, 3), nn.ReLU(), nn.Linear(5, 2)], (4, 3), r"layer 2 \(Linear\) cannot take .* \(4, 3\)"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", REFUSED_INPUTS)
def test_an_input_that_does_not_suit_is_refused_naming_the_layer(name):
    given, shape, message = REFUSED_INPUTS[name]
    refused(message, lambda: mb.to_deq(nn.Sequential(*given))(torch.randn(shape)))
    empty = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2))
    refused(r"activation after layer 0 \(Linear\) has no coordinate", lambda: mb.to_deq(empty)(torch.randn(2, 3)))


def test_a_mode_switched_later_is_refused_at_the_call_and_a_copy_judges_its_own():
    network, x = make("conv")
    converted = mb.to_deq(network)
    converted(x)
    twin = copy.deepcopy(converted)
    network.train()
    words = r"layer 0\.0\.1 \(BatchNorm2d\)"
    refused(words, lambda: converted(x))
    refused(words, lambda: converted.cell(tuple(torch.zeros(0) for _ in converted.cell.stages), x))
    twin(x)
    converted.eval()  # the layers are shared, in this direction too
    assert_close(converted(x), network(x))
    network.half()
    refused(r"torch\.float16", lambda: converted(x.half()))


def test_a_budget_that_cannot_reach_the_output_and_other_arguments_are_refused():
    words = r"more than the 3 stages of the network, got 3: 3 evaluations reach .* verifies"
    refused(words, lambda: mb.to_deq(mlp(), max_nfe=3))
    refused("max_iter", lambda: mb.to_deq(mlp(), max_iter=3), TypeError)
    refused("one tensor, batch first, got tuple", lambda: mb.to_deq(mlp())((torch.randn(2, 5),)), TypeError)
    converted = mb.to_deq(mlp(), max_nfe=4, rtol=1e-5)
    converted(torch.randn(2, 5))
    assert converted.deq.last_solution.converged.all()
    assert mb.to_deq(nn.Sequential(*[nn.Linear(2, 2) for _ in range(60)])).deq.max_nfe > 60


def test_functional_call_and_deepcopy_and_state_dict_work():
    network, x = make("mlp")
    converted = mb.to_deq(network)
    output = converted(x)
    other = {name: (0.5 * p.detach()).requires_grad_() for name, p in converted.named_parameters()}
    called = torch.func.functional_call(converted, other, (x,))
    halved = copy.deepcopy(network)
    with torch.no_grad():
        for p in halved.parameters():
            p.mul_(0.5)
    assert_close(called, halved(x))
    ours = torch.autograd.grad(called.square().sum(), list(other.values()))
    wanted = torch.autograd.grad(halved(x).square().sum(), list(halved.parameters()))
    assert_close(ours, wanted, rtol=1e-8, atol=1e-10)
    twin = copy.deepcopy(converted)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in network.parameters()}
    twin.load_state_dict({name: torch.zeros_like(value) for name, value in converted.state_dict().items()})
    assert not twin(x).any()
    assert_close(converted(x), output)
    twin.load_state_dict(converted.state_dict())
    assert_close(twin(x), output)


# --- compose ---


class HalvesCell(nn.Module):
    """A state of two tensors; takes a tensor or a pair of them for its context."""

    def __init__(self):
        super().__init__()
        self.inner = TanhCell(4)

    def initial_state(self, x):
        whole = x if isinstance(x, torch.Tensor) else torch.cat(x, 1)
        return torch.zeros_like(whole[:, :1]), torch.zeros_like(whole[:, 1:])

    def forward(self, z, x):
        whole = self.inner(torch.cat(z, 1), x if isinstance(x, torch.Tensor) else torch.cat(x, 1))
        return whole[:, :1], whole[:, 1:]


def network(*sizes):
    return nn.Sequential(*[m for pair in itertools.pairwise(sizes) for m in (nn.Linear(*pair), nn.Tanh())]).double()


def same_deq():
    deq = tight(TanhCell())
    return deq, deq


PAIRS = {
    "two cells": lambda: (tight(TanhCell()), tight(TanhCell())),
    "one cell twice": same_deq,
    "tuple first": lambda: (tight(HalvesCell()), tight(HalvesCell())),
    "tuple second": lambda: (tight(TanhCell()), tight(HalvesCell())),
    "converted first": lambda: (mb.to_deq(network(4, 6, 4)), tight(TanhCell())),
    "converted second": lambda: (tight(TanhCell()), mb.to_deq(network(4, 6, 3))),
    "converted both": lambda: (mb.to_deq(network(4, 6, 4)), mb.to_deq(network(4, 5, 2))),
    "all activations": lambda: (mb.to_deq(network(4, 1, 3)).deq, tight(HalvesCell())),
    "three": lambda: (mb.compose(tight(TanhCell()), mb.to_deq(network(4, 3, 4))), tight(TanhCell())),
    "three, from the right": lambda: (tight(TanhCell()), mb.compose(tight(HalvesCell()), tight(HalvesCell()))),
}  # fmt: skip


def flat(output):
    return output if isinstance(output, torch.Tensor) else torch.cat([part.flatten(1) for part in output], 1)


@pytest.mark.parametrize("name", PAIRS)
def test_a_composition_has_the_output_and_the_gradients_of_one_after_the_other(name):
    first, second = PAIRS[name]()
    both = mb.compose(first, second)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    ours, wanted = both(x), second(first(x))
    assert type(ours) is type(wanted)
    assert both.deq.last_solution.converged.all()
    assert_close(ours, wanted, rtol=1e-10, atol=1e-11)
    assert {id(p) for p in both.parameters()} == {id(p) for part in (first, second) for p in part.parameters()}
    assert_close(gradients(flat(ours), both, x), gradients(flat(wanted), both, x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS)
def test_its_cell_is_the_two_cells_side_by_side(name):
    first, second = PAIRS[name]()
    cell, x = mb.compose(first, second).cell, torch.randn(2, 4, dtype=torch.float64)
    start = cell.initial_state(x)
    assert isinstance(start, tuple)
    z = random_like(start)
    image = copy.deepcopy(cell)(z, x)
    fresh = mb.compose(first, second).cell
    assert all(map(torch.equal, image, fresh(z, x)))  # nobody asked it for an initial state
    assert [part.shape for part in image] == [part.shape for part in start]
    moved = cell(z, x + 1)
    parts = 1 if isinstance(cell.states(z)[0], torch.Tensor) else len(cell.states(z)[0])
    assert not any(map(torch.equal, image[:1], moved[:1]))
    assert all(map(torch.equal, image[parts:], moved[parts:]))  # the second sees x through z₁ alone


def test_a_map_between_them_is_applied_and_trained():
    first, second = tight(TanhCell(4)), tight(TanhCell(3))
    between = nn.Linear(4, 3).double()
    both, x = mb.compose(first, second, between=between), torch.randn(3, 4, dtype=torch.float64)
    ours, wanted = both(x), second(between(first(x)))
    assert_close(ours, wanted, rtol=1e-10, atol=1e-11)
    assert {id(p) for p in between.parameters()} < {id(p) for p in both.parameters()}
    assert_close(gradients(ours, both), gradients(wanted, both), rtol=1e-8, atol=1e-10)
    plain = mb.compose(first, second, between=lambda z: z[:, :3])
    assert_close(plain(x), second(first(x)[:, :3]), rtol=1e-10, atol=1e-11)


def test_options_come_from_the_two_where_they_agree():
    backward = mb.Implicit(solver=mb.Picard(), rtol=1e-4, max_nfe=20)
    first = mb.DEQ(TanhCell(), solver=mb.Anderson(), rtol=1e-4, atol=1e-5, max_nfe=30, backward=backward)
    second = mb.DEQ(TanhCell(), solver=mb.Anderson(), rtol=1e-5, atol=1e-4, max_nfe=12, backward=backward)
    deq = mb.compose(first, second).deq
    assert (deq.solver, deq.rtol, deq.atol, deq.max_nfe) == (mb.Anderson(), 1e-5, 1e-5, 42)
    assert deq.backward_mode == mb.Implicit(solver=mb.Picard(), rtol=1e-4, max_nfe=40)
    second.solver = mb.Anderson(memory=2)
    assert mb.compose(first, second).deq.solver == mb.Broyden()
    learned = mb.load_solver("conv-digits")
    first.solver = second.solver = learned
    assert mb.compose(first, second).deq.solver == mb.Broyden()
    given = mb.compose(first, second, solver=mb.Picard(), rtol=1e-2, max_nfe=7, backward=mb.Implicit()).deq
    assert (given.solver, given.rtol, given.max_nfe, given.backward_mode) == (mb.Picard(), 1e-2, 7, mb.Implicit())


def test_other_arguments_are_refused():
    deq = tight(TanhCell())
    words = "second must be a DEQ, .* got"
    for call, found in (
        (lambda: mb.compose(deq.cell, deq), "first must be a DEQ, or what to_deq or compose made, got TanhCell"),
        (lambda: mb.compose(deq, network(4, 4)), f"{words} Sequential"),
        (lambda: mb.compose(deq, ConvClassifier(ConvClassifierConfig())), f"{words} ConvClassifier"),
        (lambda: mb.compose(deq, deq, between=3), "between must be callable or None, got int"),
        (lambda: mb.compose(deq, deq, unknown=1), "unknown"),
    ):
        refused(found, call, TypeError)
    pairs = mb.compose(deq, deq, between=lambda z: (z, z))
    words = "cannot guess the shape of the state from a context of type tuple"
    refused(words, lambda: pairs(torch.randn(2, 4, dtype=torch.float64)))


def test_a_composition_can_be_copied_and_called_with_other_weights():
    both = mb.compose(tight(HalvesCell()), mb.to_deq(network(4, 3)), between=lambda z: torch.cat(z, 1))
    x = torch.randn(2, 4, dtype=torch.float64)
    output = both(x)
    twin = copy.deepcopy(both)
    twin.load_state_dict(both.state_dict())
    assert_close(twin(x), output)
    other = {name: torch.zeros_like(p) for name, p in both.named_parameters()}
    assert not torch.func.functional_call(both, other, (x,)).any()
    assert_close(both(x), output)
