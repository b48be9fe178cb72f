"""Cells, their training, and what holds of every model and its twins: files, widths, and what is refused."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch.nn.functional import conv2d, group_norm, layer_norm
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.deq import initial_state
from metabroyden.gradients.base import parts_of
from metabroyden.state import gather
from metabroyden.zoo import models as zoo
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.data.images import ImageData, shift
from metabroyden.zoo.models.base import MODELS, LanguageConfig, ModelConfig
from metabroyden.zoo.models.circular import resolvent
from metabroyden.zoo.models.stem import STEMS, TokenStem
from tests.helpers import normal, refused, same_parameters


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return normal(*shape, seed=seed, dtype=torch.float64)


def random_state(cell, x):
    """A random state for a context, a tensor or a tuple as the cell has it."""
    z0 = initial_state(cell, x)
    return torch.randn_like(z0) if isinstance(z0, torch.Tensor) else tuple(map(torch.randn_like, z0))


# --- every cell


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", zoo.CELLS)
def test_the_example_of_a_cell_is_small_keeps_shape_and_dtype_and_follows_from_its_seed(name, dtype):
    cell, x = zoo.make_cell(name, dtype=dtype, batch=3, seed=1)
    z = random_state(cell, x)
    assert sum(part[0].numel() for part in parts_of(z)) <= 60
    assert [(y.shape, y.dtype) for y in parts_of(cell(z, x))] == [(part.shape, dtype) for part in parts_of(z)]
    again, x_again = zoo.make_cell(name, dtype=dtype, batch=3, seed=1)
    assert_close(again(z, x_again), cell(z, x), rtol=0, atol=0)
    _, other = zoo.make_cell(name, dtype=dtype, batch=3, seed=2)
    assert not torch.equal(parts_of(x)[0], parts_of(other)[0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", zoo.CELLS)
def test_a_cell_has_a_fixed_point_at_its_initial_weights(name, seed):
    cell, x = zoo.make_cell(name, dtype=torch.float64, batch=4, seed=seed)
    solution = mb.solve(cell, initial_state(cell, x), x, solver=mb.Broyden(memory=150), rtol=1e-6, max_nfe=150)
    assert_close(cell(solution.z, x), solution.z, rtol=0, atol=1e-4)
    assert all(float(part.std()) > 0.05 for part in parts_of(solution.z))
    assert int(solution.nfe.min()) > 5


@pytest.mark.parametrize("name", zoo.CELLS)
def test_a_cell_treats_samples_apart_and_depends_on_all_that_it_is_given(name):
    cell, x = zoo.make_cell(name, dtype=torch.float64, batch=3)
    z, one = random_state(cell, x), torch.tensor([1])
    given = [*parts_of(z), *parts_of(x)]
    for part in given:
        part.requires_grad_()
    assert_close(gather(cell(z, x), one), cell(gather(z, one), gather(x, one)))
    value = sum((part * torch.randn_like(part)).sum() for part in parts_of(cell(z, x)))
    for gradient in torch.autograd.grad(value, [*given, *cell.parameters()]):
        assert float(gradient.abs().max()) > 1e-4


def test_solvers_agree_on_a_state_of_several_tensors():
    cell, x = zoo.make_cell("multiscale", dtype=torch.float64, batch=4)
    z0, options = initial_state(cell, x), {"rtol": 1e-9, "max_nfe": 400}
    wanted, other = (mb.solve(cell, z0, x, solver=solver, **options) for solver in (mb.Broyden(), mb.Anderson()))
    assert_close(wanted.z, cell(wanted.z, x), rtol=0, atol=1e-6)
    assert_close(wanted.z, other.z, rtol=0, atol=1e-5)


# --- single cells


def test_the_conv_the_causal_and_the_dense_cell_are_what_their_docstrings_say():
    cell, z, x = zoo.ConvCell(4, 6, 2).double(), double(2, 4, 5, 5), double(2, 4, 5, 5, seed=1)
    y = group_norm(torch.relu(conv2d(z, cell.conv1.weight, padding=1)), 2)
    inner = group_norm(x + conv2d(y, cell.conv2.weight, padding=1), 2)
    assert_close(cell(z, x), group_norm(torch.relu(z + inner), 2))
    cell, x = zoo.make_cell("causal", dtype=torch.float64)
    z = torch.randn_like(x)
    norm = lambda v: layer_norm(v.transpose(1, 2), (6,)).transpose(1, 2)  # noqa: E731
    before = torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, :-1]], dim=2)
    w, u, v = cell.conv.weight, cell.inject.weight[:, :, 0], cell.out.weight[:, :, 0]
    both = w[:, :, 0] @ before + w[:, :, 1] @ z + u @ x + cell.inject.bias[:, None]
    h = torch.tanh(both[:, :5]) * torch.sigmoid(both[:, 5:])
    assert_close(cell(z, x), norm(z + norm(x + v @ h)))
    cell, x = zoo.make_cell("dense", dtype=torch.float64)
    z = torch.randn_like(x)
    assert_close(cell(z, x), torch.tanh(layer_norm(z @ cell.linear.weight.T + x, (12,))))
    assert float(torch.linalg.matrix_norm(cell.linear.weight.detach(), 2)) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(("width", "dilation"), [(2, 1), (3, 2)])
def test_the_causal_cell_looks_back_as_far_as_its_taps_reach_and_never_ahead(width, dilation):
    cell, z, x = zoo.CausalCell(6, 5, width, dilation).double(), double(3, 6, 12), double(3, 6, 12, seed=1)
    before = cell(z, x)
    for position in range(12):
        later = z.clone(), x.clone()
        for part in later:
            part[:, :, position:].normal_()
        after = cell(*later)
        assert_close(after[:, :, :position], before[:, :, :position], rtol=0, atol=1e-12)
        assert not torch.allclose(after[:, :, position], before[:, :, position])
    z[:, :, 3] += 1
    changed = (cell(z, x) - before).abs().amax(dim=(0, 1)) > 1e-9
    assert changed.nonzero().flatten().tolist() == [3 + dilation * tap for tap in range(width)]


@pytest.mark.parametrize("side", [7, 8, 14, 28])
def test_each_scale_has_half_the_side_of_the_one_before_rounded_up_and_a_classifier_trains_all(side):
    x, sides = torch.randn(2, 2, side, side), {7: (7, 4, 2), 8: (8, 4, 2), 14: (14, 7, 4), 28: (28, 14, 7)}[side]
    for scales in (2, 3):
        cell = zoo.MultiscaleCell((2, 4, 8)[:scales], 2)
        z, wanted = cell.initial_state(x), [(2, 2 * 2**i, s, s) for i, s in enumerate(sides[:scales])]
        assert [part.shape for part in z] == [part.shape for part in cell(z, x)] == wanted
        assert not any(part.any() for part in z)
    config = zoo.MultiscaleClassifierConfig(4, 3, groups=2, side=side, stride=2 if side > 8 else 1, image_channels=3)
    model = model_of(config, backward=mb.Unroll(steps=3)).train()
    logits = model(torch.rand(2, 3, side, side))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in model.parameters())


def test_the_multiscale_cell_is_what_its_docstring_says():
    cell, x = zoo.MultiscaleCell((2, 4, 6), 2).double(), double(2, 2, 5, 6)
    z = random_state(cell, x)
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter)
    norm = lambda module, v: group_norm(v, 2, module.weight, module.bias)  # noqa: E731
    h = [
        norm(module, torch.relu(conv2d(part, conv.weight, padding=1)))
        for module, conv, part in zip(cell.norms1, cell.convs, z, strict=True)
    ]

    def down(j, i, stride):
        return conv2d(h[j], cell.fusion[i][j].weight, stride=stride, padding=max(1, stride // 2))

    def up(j, i):
        small = conv2d(h[j], cell.fusion[i][j].weight)
        rows = torch.arange(z[i].shape[2]) * small.shape[2] // z[i].shape[2]
        columns = torch.arange(z[i].shape[3]) * small.shape[3] // z[i].shape[3]
        return small[:, :, rows][:, :, :, columns]

    sums = (
        x + down(0, 0, 1) + up(1, 0) + up(2, 0),
        down(0, 1, 2) + down(1, 1, 1) + up(2, 1),
        down(0, 2, 4) + down(1, 2, 2) + down(2, 2, 1),
    )
    assert cell.fusion[2][0].weight.shape == (6, 2, 5, 5)
    for i, found in enumerate(cell(z, x)):
        assert_close(found, norm(cell.norms3[i], torch.relu(z[i] + norm(cell.norms2[i], sums[i]))))


def test_scales_tell_one_another_and_only_the_finest_is_told_of_the_injection():
    cell, x = zoo.MultiscaleCell((2, 4, 8), 2).double(), double(1, 2, 8, 8)
    z = random_state(cell, x)
    blocks = torch.autograd.functional.jacobian(lambda *parts: cell(parts, x), z)
    assert all(float(block.abs().max()) > 1e-5 for row in blocks for block in row)
    same = list(map(torch.equal, cell(z, x), cell(z, torch.randn_like(x))))
    assert same == [False, True, True]


# --- training


def small_digits() -> ImageData:
    data = load_digits()
    return ImageData(data.train.first(128), data.validation.first(64), data.test.first(64))


def build() -> zoo.ConvClassifier:
    config = zoo.ConvClassifierConfig(channels=4, inner=4, groups=2)
    return zoo.ConvClassifier(config, solver=mb.Anderson(), max_nfe=15, warn=False)


def test_the_splits_cover_the_data_and_do_not_overlap():
    data = load_digits()
    parts = [set(split.indices.tolist()) for split in (data.train, data.validation, data.test)]
    assert sum(len(part) for part in parts) == 1797 == len(set.union(*parts))
    assert [len(part) for part in parts] == [1200, 297, 300]
    assert data.train.images.shape == (1200, 1, 8, 8)
    assert (float(data.train.images.min()), float(data.train.images.max())) == (0, 1)


def test_shifting_moves_images_by_a_pixel_at_most_and_moves_zeros_in():
    images = torch.zeros(200, 1, 5, 5)
    images[:, :, 2, 2] = 1
    after = shift(images, torch.Generator().manual_seed(0))
    assert torch.equal(after.sum(dim=(1, 2, 3)), torch.ones(200))
    assert torch.equal(after[:, :, 1:4, 1:4].sum(dim=(1, 2, 3)), torch.ones(200))
    assert len(torch.unique(after.flatten(1).argmax(dim=1))) == 9


def test_an_interrupted_training_goes_on_bit_for_bit_and_another_training_is_refused(tmp_path):
    data, config = zoo.Images(small_digits()), zoo.Training(epochs=3, batch=32, pretrain=1, depth=3, jacobian=0.1)
    whole, path = zoo.train(build, data, config), tmp_path / "training.safetensors"

    def stop(now, model) -> None:
        assert now.score == zoo.accuracy(model, data.data.validation)
        if now.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.train(build, data, config, path=path, report=stop)
    words = r"another training, with \{'seed': 0\} instead of \{'seed': 1\}: remove"
    refused(words, lambda: zoo.train(build, data, replace(config, seed=1), path=path), mb.CheckpointError)
    twin = lambda: zoo.train(lambda: zoo.unrolled_twin(build(), 3), data, replace(config, jacobian=0.0), path=path)  # noqa: E731
    refused("remove it to start anew", twin, mb.CheckpointError)
    assert same_parameters(whole, zoo.train(build, data, config, path=path))
    twin = lambda: zoo.train(lambda: zoo.unrolled_twin(build(), 3), data, config)  # noqa: E731
    refused("a Jacobian penalty needs", twin)


def test_a_penalised_training_may_go_on_from_the_unpenalised_ones_first_epochs(tmp_path):
    data, config = zoo.Images(small_digits()), zoo.Training(epochs=2, batch=32, pretrain=1, depth=4, least=2, half=True)
    path, early = tmp_path / "training.safetensors", tmp_path / "early.safetensors"

    def keep(now, model) -> None:
        if now.epoch == 2:
            early.write_bytes(path.read_bytes())

    zoo.train(build, data, config, path=path, report=keep)
    penalised = replace(config, jacobian=0.5)
    assert same_parameters(zoo.train(build, data, penalised), zoo.train(build, data, penalised, path=early))
    words = "written by another training"
    refused(words, lambda: zoo.train(build, data, penalised, path=path), mb.CheckpointError)


def test_the_depth_of_pretraining_is_drawn_and_its_precision_is_half():
    depths, dtypes = [], []

    class Watching(zoo.Images):
        def losses(self, model, batch, generator):
            model.cell.register_forward_hook(lambda cell, given, out: dtypes.append(cell.conv1(given[0]).dtype))
            before = 0
            for loss in super().losses(model, batch, generator):
                depths.append(len(dtypes) - before)
                before = len(dtypes)
                yield loss

    config = zoo.Training(epochs=2, batch=16, pretrain=1, depth=4, least=2, half=True)
    zoo.train(build, Watching(small_digits()), config)
    assert set(depths[:8]) == {2, 3, 4}
    assert set(dtypes[: sum(depths[:8])]) == {torch.bfloat16}
    assert torch.float32 in dtypes


def test_an_epoch_may_be_a_part_of_the_images_and_validation_too():
    data, model = small_digits(), build()
    part = zoo.Images(data, batches=3, limit=10)
    assert (part.steps(32), zoo.Images(data, batches=9).steps(32)) == (3, 4)
    assert len(list(part.losses(model, 32, torch.Generator()))) == 3
    assert part.score(model, "validation") == zoo.accuracy(model, data.validation.first(10))
    assert part.score(model, "test") == zoo.accuracy(model, data.test)


# --- every model


WORDS = {"vocabulary": (TOKENS := 11), "embedding": 5, "recent": 20}
CONFIGS: list[ModelConfig] = [
    zoo.DenseClassifierConfig(n=12, side=5, image_channels=3, classes=4),
    zoo.MLPClassifierConfig(hidden=9, depth=3),
    zoo.ConvClassifierConfig(channels=8, inner=8, side=7, stride=2),
    zoo.MultiscaleClassifierConfig(width=8, scales=3),
    *(zoo.MonotoneClassifierConfig(structure, 6, m=0.5) for structure in ("dense", "conv", "multi-tier")),
    *(zoo.TrellisNetConfig(channels=6, stem=stem, **WORDS) for stem in STEMS),
    *(zoo.DEQTransformerConfig(width=8, heads=2, inner=10, memory=5, stem=stem, **WORDS) for stem in STEMS),
]
OPTIONS = {"solver": mb.Anderson(), "rtol": 1e-4, "max_nfe": 30, "warn": False}


def model_of(config: ModelConfig, **options):
    (model_class,) = (cls for cls in MODELS.values() if cls.config_type is type(config))
    return model_class(config, **options).eval()


def inputs_of(config) -> torch.Tensor:
    if isinstance(config, LanguageConfig):
        return torch.randint(TOKENS, (3, 9))
    return torch.rand(3, config.image_channels, config.side, config.side)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_model_and_its_twins_come_back_from_their_files(config, tmp_path):
    model, inputs, path = model_of(config, **OPTIONS), inputs_of(config), tmp_path / "model.safetensors"
    again = zoo.load_model(zoo.save_model(model, path, {"epochs": 1}), **OPTIONS)
    assert (type(again), again.config) == (type(model), config)
    assert (again.deq.rtol, again.deq.max_nfe) == (1e-4, 30)
    assert torch.equal(again(inputs), model(inputs))
    refused("rtoll", lambda: zoo.load_model(path, rtoll=1e-3), TypeError)
    refused("rtol", lambda: zoo.load_model(path, rtol=-1.0))  # wrong options are not the file's fault
    if isinstance(config, zoo.MLPClassifierConfig):
        return
    twins = (
        zoo.unrolled_twin(model, 3),
        zoo.flow_twin(model, 0.5, 2),
        zoo.explicit_twin(type(model), config, 3, tolerance=0.3),
    )
    for twin in twins:
        again = zoo.load_model(zoo.save_model(twin, path))
        assert (type(again), again.config) == (type(twin), twin.config)
        assert torch.equal(again(inputs), twin.eval()(inputs))
        assert type(again.deq) is type(twin.deq)
        assert again.deq.describe() == twin.deq.describe()
        refused(r"holds a twin .*'max_nfe'", lambda: zoo.load_model(path, max_nfe=5), TypeError)


@pytest.mark.parametrize(
    ("config", "width", "other"),
    [
        (zoo.ConvClassifierConfig(16, 32), 10, {"channels": 10, "inner": 20, "groups": 2}),
        (zoo.MonotoneClassifierConfig("multi-tier", 4, side=10, tiers=3), 2, {"width": 2}),
        (CONFIGS[-6], 4, {"channels": 4}),
        (CONFIGS[-1], 4, {"width": 4, "inner": 5}),
        (
            zoo.DEQTransformerConfig(width=96, heads=6, inner=192),
            50,
            {"width": 54, "inner": 108},
        ),  # even, and whole heads
        (zoo.DEQTransformerConfig(width=96, heads=6, inner=192), 96, {}),
    ],
)
def test_a_narrowed_model_has_another_state_and_all_else_the_same(config, width, other):
    narrow = config.narrowed(width)
    assert asdict(narrow) == asdict(config) | other
    if config in CONFIGS:
        assert model_of(narrow, warn=False)(inputs_of(narrow)).shape == (3, 9, TOKENS)


def stem(**wrong):
    return lambda: TokenStem(TOKENS, 5, 6, 7, "hashed", **wrong)


NONSENSE = [
    ("unknown cell 'dens': known are dense, conv, causal", lambda: zoo.make_cell("dens")),
    ("unknown family 'conv': known are dense-digits", lambda: zoo.get_family("conv")),
    ("width must be at least 2 and dilation at least 1", lambda: zoo.CausalCell(6, width=1)),
    ("width must be at least 2 and dilation at least 1", lambda: zoo.CausalCell(6, dilation=0)),
    (r"at least two widths, got \(4,\)", lambda: zoo.MultiscaleCell((4,))),
    ("must be at least 1, got 4 and 0", lambda: zoo.TrellisCell(4, 0)),
    ("even and divided by heads, got 9 and 3", lambda: zoo.TransformerCell(9, 3)),
    ("even and divided by heads, got 8 and 3", lambda: zoo.TransformerCell(8, 3)),
    ("got 'convolution'", lambda: zoo.TrellisNet(zoo.TrellisNetConfig(stem="convolution"))),
    *(("of a hashed stem cannot be", stem(**wrong)) for wrong in ({"reach": 1}, {"rows": 0}, {"recent": -1})),
    ("m must be positive, got 0", lambda: zoo.MonotoneDense(4, 0)),
    ("side must be at least 2, got 1", lambda: zoo.MonotoneConv(4, 1)),
    ("side must be .*, got side 8 and 0 tiers", lambda: zoo.MonotoneMultiTier((), 8)),
    ("side must be .*, got side 5 and 2 tiers", lambda: zoo.MonotoneMultiTier((2, 2), 5)),
    ("side must be .*, got side 4 and 3 tiers", lambda: zoo.MonotoneMultiTier((2, 2, 2), 4)),
    (r"of the last, got \[5, 2\]", lambda: resolvent(lambda z: z, [(1, 5, 5), (1, 2, 2)], 1.0, torch.zeros(1))),
    ("structure must be one of .*, got 'convolution'", lambda: zoo.MonotoneClassifierConfig(structure="convolution")),
    ("got -1, 2 and 87", lambda: zoo.MonotoneClassifierConfig(margin=-1)),
    ("depth must be an integer", lambda: zoo.explicit_twin(zoo.DenseClassifier, zoo.DenseClassifierConfig(), 0)),
    ("depth must be an integer", lambda: zoo.explicit_twin(zoo.DenseClassifier, zoo.DenseClassifierConfig(), 2.5)),
    ("depth must be an integer", lambda: zoo.Unrolled(zoo.DenseCell(4), 0)),
    ("depth must be an integer", lambda: zoo.Unrolled(zoo.DenseCell(4), 2.5)),
    ("at least one cell", lambda: zoo.Stack([])),
    ("must be at", lambda: zoo.Training(epochs=0)),
    ("must be at", lambda: zoo.Training(batch=0)),
    ("must be at", lambda: zoo.Training(pretrain=-1)),
    ("must be at", lambda: zoo.Training(epochs=3, pretrain=4)),
    ("least must be from 1 to the depth 8, got 9", lambda: zoo.Training(least=9)),
    ("a batch of 1300 is more than the 1200 training images", lambda: zoo.Images(load_digits()).steps(1300)),
    ("count must be from 1 to the 3 epochs, got 4", lambda: zoo.Episodes(3, 4)),
    ("must be positive and leave some of 1797", lambda: load_digits(test=5000)),
]


@pytest.mark.parametrize(("words", "make"), NONSENSE)
def test_what_makes_no_sense_is_refused_with_clear_words(words, make):
    refused(words, make)
