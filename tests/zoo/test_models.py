"""Cells, data and the classifier's training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.deq import initial_state
from metabroyden.gradients.base import parts_of
from metabroyden.state import Packing, gather
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.data.images import ImageData, shift
from metabroyden.zoo.models import (
    CELLS,
    CausalCell,
    ConvCell,
    ConvClassifier,
    ConvClassifierConfig,
    Images,
    Packed,
    Training,
    accuracy,
    load_model,
    make_cell,
    save_model,
    train,
    unrolled_twin,
)


def small_digits() -> ImageData:
    data = load_digits()
    return ImageData(data.train.first(128), data.validation.first(64), data.test.first(64))


def build() -> ConvClassifier:
    return ConvClassifier(
        ConvClassifierConfig(channels=4, inner=4, groups=2), solver=mb.Anderson(), max_nfe=15, warn=False
    )


def random_state(cell, x):
    """A random state for a context, a tensor or a tuple as the cell has it."""
    z0 = initial_state(cell, x)
    return torch.randn_like(z0) if isinstance(z0, torch.Tensor) else tuple(map(torch.randn_like, z0))


def test_the_splits_cover_the_data_and_do_not_overlap():
    data = load_digits()
    parts = [set(split.indices.tolist()) for split in (data.train, data.validation, data.test)]
    assert sum(len(part) for part in parts) == 1797 == len(set.union(*parts))
    assert [len(part) for part in parts] == [1200, 297, 300]
    assert data.train.images.shape == (1200, 1, 8, 8)
    assert (float(data.train.images.min()), float(data.train.images.max())) == (0, 1)
    with pytest.raises(ValueError, match="must be positive and leave some of 1797"):
        load_digits(test=5000)


def test_shifting_moves_images_by_a_pixel_at_most_and_moves_zeros_in():
    images = torch.zeros(200, 1, 5, 5)
    images[:, :, 2, 2] = 1
    moved = shift(images, torch.Generator().manual_seed(0))
    assert torch.equal(moved.sum(dim=(1, 2, 3)), torch.ones(200))
    assert torch.equal(moved[:, :, 1:4, 1:4].sum(dim=(1, 2, 3)), torch.ones(200))
    assert len(torch.unique(moved.flatten(1).argmax(dim=1))) == 9


def test_the_conv_cell_is_what_its_docstring_says():
    cell = ConvCell(4, 6, 2).double()
    z, x = torch.randn(2, 4, 5, 5).double(), torch.randn(2, 4, 5, 5).double()
    norm = lambda v: torch.nn.functional.group_norm(v, 2)  # noqa: E731
    conv = lambda v, w: torch.nn.functional.conv2d(v, w, padding=1)  # noqa: E731
    y = norm(torch.relu(conv(z, cell.conv1.weight)))
    wanted = norm(torch.relu(z + norm(x + conv(y, cell.conv2.weight))))
    assert_close(cell(z, x), wanted)
    alone = cell(z[:1], x[:1])
    assert_close(cell(z, x)[:1], alone)


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path):
    data, config = Images(small_digits()), Training(epochs=3, batch=32, pretrain=1, depth=3, jacobian=0.1)
    whole = train(build, data, config)
    path = tmp_path / "training.safetensors"

    class Interrupt(Exception):
        pass

    def stop(now, model) -> None:
        assert now.score == accuracy(model, data.data.validation)
        if now.epoch == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        train(build, data, config, path=path, report=stop)
    again = train(build, data, config, path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(
        mb.CheckpointError, match=r"another training, with \{'seed': 0\} instead of \{'seed': 1\}: remove"
    ):
        train(build, data, replace(config, seed=1), path=path)


def test_a_penalised_training_may_go_on_from_the_unpenalised_ones_first_epochs(tmp_path):
    data, config = Images(small_digits()), Training(epochs=2, batch=32, pretrain=1, depth=4, least=2, half=True)
    path, early = tmp_path / "training.safetensors", tmp_path / "early.safetensors"

    def keep(now, model) -> None:
        if now.epoch == 2:
            early.write_bytes(path.read_bytes())

    train(build, data, config, path=path, report=keep)
    penalised = replace(config, jacobian=0.5)
    found, wanted = train(build, data, penalised, path=early), train(build, data, penalised)
    for name, value in wanted.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
    with pytest.raises(mb.CheckpointError, match="written by another training"):
        train(build, data, penalised, path=path)


def test_the_depth_of_pretraining_is_drawn_and_its_precision_is_half():
    depths, dtypes = [], []

    class Watching(Images):
        def losses(self, model, batch, generator):
            model.cell.register_forward_hook(lambda cell, given, out: dtypes.append(cell.conv1(given[0]).dtype))
            before = 0
            for loss in super().losses(model, batch, generator):
                depths.append(len(dtypes) - before)
                before = len(dtypes)
                yield loss

    config = Training(epochs=2, batch=16, pretrain=1, depth=4, least=2, half=True)
    train(build, Watching(small_digits()), config)
    assert set(depths[:8]) == {2, 3, 4}
    assert set(dtypes[: sum(depths[:8])]) == {torch.bfloat16}
    assert torch.float32 in dtypes


def test_an_epoch_may_be_a_part_of_the_images_and_validation_too():
    data = small_digits()
    part = Images(data, batches=3, limit=10)
    assert (part.steps(32), Images(data, batches=9).steps(32)) == (3, 4)
    model = build()
    assert len(list(part.losses(model, 32, torch.Generator()))) == 3
    assert part.score(model, "validation") == accuracy(model, data.validation.first(10))
    assert part.score(model, "test") == accuracy(model, data.test)


def test_a_model_is_loaded_in_its_precision_and_wrong_options_are_not_the_files_fault(tmp_path):
    path = save_model(build().double(), tmp_path / "model.safetensors")
    assert next(load_model(path).parameters()).dtype == torch.float64
    with pytest.raises(TypeError, match="rtoll"):
        load_model(path, rtoll=1e-3)
    with pytest.raises(ValueError, match="rtol"):
        load_model(path, rtol=-1.0)


def test_impossible_trainings_are_refused(tmp_path):
    data, config = Images(small_digits(), batches=1), Training(epochs=1, batch=16, jacobian=1.0)
    with pytest.raises(ValueError, match="a Jacobian penalty needs"):
        train(lambda: unrolled_twin(build(), 3), data, config)
    path = tmp_path / "training.safetensors"
    plain = replace(config, jacobian=0.0)
    train(build, data, plain, path=path)
    with pytest.raises(mb.CheckpointError, match="remove it to start anew"):
        train(lambda: unrolled_twin(build(), 3), data, plain, path=path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CELLS)
def test_the_example_of_a_cell_is_small_keeps_shape_and_dtype_and_follows_from_its_seed(name, dtype):
    cell, x = make_cell(name, dtype=dtype, batch=3, seed=1)
    z = random_state(cell, x)
    assert sum(part[0].numel() for part in parts_of(z)) <= 60
    assert [(y.shape, y.dtype) for y in parts_of(cell(z, x))] == [(part.shape, dtype) for part in parts_of(z)]
    again, x_again = make_cell(name, dtype=dtype, batch=3, seed=1)
    assert_close(again(z, x_again), cell(z, x), rtol=0, atol=0)
    _, other = make_cell(name, dtype=dtype, batch=3, seed=2)
    assert not torch.equal(parts_of(x)[0], parts_of(other)[0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CELLS)
def test_a_cell_has_a_fixed_point_at_its_initial_weights(name, seed):
    cell, x = make_cell(name, dtype=torch.float64, batch=4, seed=seed)
    solution = mb.solve(cell, initial_state(cell, x), x, solver=mb.Broyden(memory=150), rtol=1e-6, max_nfe=150)
    assert_close(cell(solution.z, x), solution.z, rtol=0, atol=1e-4)
    assert all(float(part.std()) > 0.05 for part in parts_of(solution.z))
    assert int(solution.nfe.min()) > 5


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_treats_samples_apart_and_depends_on_all_that_it_is_given(name):
    cell, x = make_cell(name, dtype=torch.float64, batch=3)
    z = random_state(cell, x)
    given = [*parts_of(z), *parts_of(x)]
    for part in given:
        part.requires_grad_()
    one = torch.tensor([1])
    assert_close(gather(cell(z, x), one), cell(gather(z, one), gather(x, one)))
    value = sum((part * torch.randn_like(part)).sum() for part in parts_of(cell(z, x)))
    for gradient in torch.autograd.grad(value, [*given, *cell.parameters()]):
        assert float(gradient.abs().max()) > 1e-4


def test_a_packed_cell_has_the_same_fixed_points_by_the_same_evaluations():
    cell, x = make_cell("multiscale", dtype=torch.float64)
    z0 = initial_state(cell, x)
    packed = Packed(cell, Packing.of(z0))
    options = {"solver": mb.Broyden(), "rtol": 1e-8, "max_nfe": 200}
    wanted, found = mb.solve(cell, z0, x, **options), mb.solve(packed, packed.initial_state(x), x, **options)
    assert torch.equal(found.nfe, wanted.nfe)
    assert_close(found.z, packed.packing.pack(wanted.z))


@pytest.mark.parametrize(("width", "dilation"), [(2, 1), (3, 2)])
def test_the_causal_cell_carries_nothing_from_the_future_to_the_past(width, dilation):
    cell = CausalCell(6, 5, width, dilation).double()
    z, x = torch.randn(3, 6, 12).double(), torch.randn(3, 6, 12).double()
    for position in range(12):
        later_z, later_x = z.clone(), x.clone()
        later_z[:, :, position:] = torch.randn(3, 6, 12 - position).double()
        later_x[:, :, position:] = torch.randn(3, 6, 12 - position).double()
        before, after = cell(z, x), cell(later_z, later_x)
        assert_close(after[:, :, :position], before[:, :, :position], rtol=0, atol=1e-12)
        assert not torch.allclose(after[:, :, position], before[:, :, position])


def test_the_causal_cell_looks_back_as_far_as_its_taps_reach():
    cell = CausalCell(6, 5, width=3, dilation=2).double()
    z, x = torch.randn(1, 6, 12).double(), torch.randn(1, 6, 12).double()
    moved = z.clone()
    moved[:, :, 3] += 1
    changed = (cell(moved, x) - cell(z, x)).abs().amax(dim=(0, 1)) > 1e-9
    assert changed.nonzero().flatten().tolist() == [3, 5, 7]


def test_the_causal_and_the_dense_cell_are_what_their_docstrings_say():
    cell, x = make_cell("causal", dtype=torch.float64)
    z = torch.randn_like(x)
    norm = lambda v: torch.nn.functional.layer_norm(v.transpose(1, 2), (6,)).transpose(1, 2)  # noqa: E731
    before = torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, :-1]], dim=2)
    w, u, v = cell.conv.weight, cell.inject.weight[:, :, 0], cell.out.weight[:, :, 0]
    both = w[:, :, 0] @ before + w[:, :, 1] @ z + u @ x + cell.inject.bias[:, None]
    h = torch.tanh(both[:, :5]) * torch.sigmoid(both[:, 5:])
    assert_close(cell(z, x), norm(z + norm(x + v @ h)))
    cell, x = make_cell("dense", dtype=torch.float64)
    z = torch.randn_like(x)
    wanted = torch.tanh(torch.nn.functional.layer_norm(z @ cell.linear.weight.T + x, (12,)))
    assert_close(cell(z, x), wanted)
    assert float(torch.linalg.matrix_norm(cell.linear.weight.detach(), 2)) == pytest.approx(0.8, abs=1e-6)
