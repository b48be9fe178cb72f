"""Cells, data and the classifier's training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import metabroyden as mb
from metabroyden.data.digits import ImageData, load_digits, shift
from metabroyden.models import ClassifierTraining, ConvCell, ConvClassifier, ConvClassifierConfig, train_classifier


def small_digits() -> ImageData:
    data = load_digits()

    def cut(split, n):
        return replace(split, images=split.images[:n], labels=split.labels[:n], indices=split.indices[:n])

    return ImageData(cut(data.train, 128), cut(data.validation, 64), cut(data.test, 64))


def build() -> ConvClassifier:
    return ConvClassifier(
        ConvClassifierConfig(channels=4, inner=4, groups=2), solver=mb.Anderson(), max_nfe=15, warn=False
    )


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
    torch.testing.assert_close(cell(z, x), wanted)
    alone = cell(z[:1], x[:1])
    torch.testing.assert_close(cell(z, x)[:1], alone)


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path):
    data, config = small_digits(), ClassifierTraining(epochs=3, batch=32)
    whole = train_classifier(build, data, config)
    path = tmp_path / "training.safetensors"

    class Interrupt(Exception):
        pass

    def stop(epoch: int, words: str) -> None:
        assert "validation accuracy" in words
        if epoch == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        train_classifier(build, data, config, path=path, progress=stop)
    again = train_classifier(build, data, config, path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(mb.CheckpointError, match="written by another training"):
        train_classifier(build, data, replace(config, seed=1), path=path)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="a batch of 1000 is more than the 128 training images"):
        train_classifier(build, small_digits(), ClassifierTraining(batch=1000))
