"""Families: models, their tasks for the meta-learner, and their weights along training."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import metabroyden as mb
from metabroyden.checkpoint import LARGEST
from metabroyden.zoo import models as zoo
from metabroyden.zoo.data.text import split_works
from metabroyden.zoo.models.episodes import episodes_in
from metabroyden.zoo.models.families import Family
from metabroyden.zoo.tasks import family_tasks, second_half, text_windows
from tests.helpers import refused
from tests.zoo.test_models import small_digits

SPEECH = "to be or not that is the question and whether nobler in mind suffer slings arrows of fortune"


def play(seed: int) -> str:
    return " ".join(random.Random(seed).choices(SPEECH.split(), k=400))


PLAYS = {name: play(seed) for seed, name in enumerate(("first", "second", "third"))}


def text():
    return split_works(PLAYS, validation=("second",), test=("third",), unit="character")


def trellis(**options) -> zoo.TrellisNet:
    config = zoo.TrellisNetConfig(vocabulary=len(text().vocabulary), channels=6, dilation=4, embedding=4)
    return zoo.TrellisNet(config, solver=mb.Anderson(), max_nfe=30, warn=False, **options)


def tiny_dense() -> Family:
    return Family(
        zoo.DenseClassifier,
        zoo.DenseClassifierConfig(n=12),
        lambda: zoo.Images(small_digits()),
        zoo.Training(epochs=3, batch=32, pretrain=1, depth=3),
        (zoo.DenseClassifierConfig(n=16), zoo.Training(epochs=1)),
        depth=3,
        twins=("unrolled", "explicit", "flow"),
    )


def test_every_family_builds_a_model_of_its_config_and_a_larger_one():
    for name, family in zoo.FAMILIES.items():
        model = zoo.get_family(name).build()
        assert model.describe() == model.config.__class__(**model.describe()).__dict__
        size = sum(p.numel() for p in model.parameters())
        assert size * (4 if size * 4 <= LARGEST else 2) < 5_000_000, name
        if "explicit" in family.twins:
            zoo.explicit_twin(family.model, family.config, family.depth)  # a width of as many parameters exists
        larger = family.enlarged()
        assert sum(p.numel() for p in larger.build().parameters()) > sum(p.numel() for p in model.parameters())


def test_tasks_of_a_family_of_texts_carry_the_memory_of_the_segment_before():
    model = trellis(rtol=1e-6).requires_grad_(False)
    criterion = zoo.NextToken(text(), length=12)
    tasks = family_tasks(model, criterion)
    back, read = model.stem.back, text().test.tokens
    windows, targets = text_windows(text(), "test", 12, back)
    assert torch.equal(tasks.split("test"), windows)
    assert torch.equal(windows[:, back + 13 :], targets[:, :-1])
    assert torch.equal(windows[0], torch.nn.functional.pad(read[:24], (back, 0), value=-1))
    assert any(torch.equal(windows[1], part) for part in read.unfold(0, back + 24, 1)), "what was read before is there"
    z0, (injection, memory) = tasks.prepare(windows[:3])
    assert z0.shape == (3, 12, 12)
    before, first, _ = windows[:3].split([back, 12, 12], dim=1)
    first = model.deq(model.inject(first, model.beginning(3)._replace(tokens=before)))
    assert_close(memory, first[:, :, -4:])
    assert_close(second_half(model, windows[:3], 12)[0], injection)
    solved = mb.solve(tasks.f, z0, (injection, memory), solver=mb.Broyden(), rtol=1e-5)
    assert solved.converged.all()
    words = "criterion must be Images or NextToken, got Training"
    refused(words, lambda: family_tasks(model, zoo.Training()), TypeError)


def test_bits_per_token_are_those_of_the_model_read_in_segments():
    model = trellis(rtol=1e-6).requires_grad_(False)
    data, (batch, length), nats = text(), (2, 30), []
    segments = data.test.streams(batch, length)
    for row in range(batch):
        whole = torch.cat([tokens[row] for tokens, _ in segments])
        targets = torch.cat([wanted[row] for _, wanted in segments])
        logits, memory = [], None
        for part in whole.split(length):
            z = model.deq(model.inject(part[None], memory))
            memory = model.remember(z, part[None], memory)
            logits.append(model.classify(z)[0])
        nats.append(torch.nn.functional.cross_entropy(torch.cat(logits), targets))
    wanted = float(torch.stack(nats).mean()) / math.log(2)
    assert zoo.bits_per_token(model, data, "test", length, batch=batch) == pytest.approx(wanted, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_training_and_keeps_the_last_epoch(tmp_path):
    class Broken(zoo.Images):
        def losses(self, model, batch, generator):
            for number, loss in enumerate(super().losses(model, batch, generator)):
                yield loss * (math.nan if number == 1 and generator.initial_seed() == 3 else 1.0)

    build, path, training = tiny_dense().build, tmp_path / "t.safetensors", zoo.Training(epochs=2, batch=32, seed=3)
    broken = Broken(small_digits())
    refused(
        "the loss of epoch 1 is not finite", lambda: zoo.train(build, broken, training, path=path), FloatingPointError
    )
    assert not path.exists()


def test_the_learning_rate_rises_then_falls_to_nothing():
    training = zoo.Training(learning_rate=0.1, warmup=0.25)
    rates = np.array([training.rate(step, 40) for step in range(40)])
    assert np.argmax(rates) == 10
    assert rates[10] == pytest.approx(0.1)
    assert rates[0] < 0.011
    assert rates[-1] < 0.001


def test_episodes_lie_closer_in_the_beginning_and_keep_half_precision_where_they_are_large(tmp_path, monkeypatch):
    assert zoo.Episodes(40, 8).epochs == (1, 2, 6, 10, 16, 22, 31, 40)
    assert zoo.Episodes(8, 8).epochs == tuple(range(1, 9))
    episodes = zoo.Episodes(2, 2)
    model = tiny_dense().build()
    for epoch in (1, 2):
        episodes.note(epoch, model, tmp_path)
    exact = zoo.load_episodes(episodes.collect(tmp_path, tmp_path / "all.safetensors"))[2]
    monkeypatch.setattr("metabroyden.checkpoint.LARGEST", 100)
    rounded = zoo.load_episodes(episodes.collect(tmp_path, tmp_path / "half.safetensors"))[2]
    for wanted, a, b in zip(model.parameters(), exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a, wanted)
        assert_close(b, wanted, rtol=1e-3, atol=1e-6)
    refused("wanted a 'model'", lambda: zoo.load_model(tmp_path / "all.safetensors"), mb.CheckpointError)
    many = zoo.Episodes(9, 9)
    for epoch in many.epochs:
        many.note(epoch, model, tmp_path)
    monkeypatch.setattr("metabroyden.zoo.models.episodes.ENOUGH", 100)
    assert episodes_in(many.collect(tmp_path, tmp_path / "few.safetensors")) == [1, 5, 6, 7, 8, 9]
