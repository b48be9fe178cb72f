"""Episodes: a solver adapted on D_train and judged on D_test, its start and its inner step learned."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from metabroyden.meta.episodes import LIBRARY, EpisodeConfig, EpisodeSet, EpisodeTrainer
from metabroyden.meta.inner import UPDATES
from metabroyden.meta.tasks import TaskSet
from tests.helpers import DOUBLE, perturbed, refused, vector

N = 4


def deqs(count: int = 3) -> list[TaskSet]:
    """DEQs of one kind with other weights, and their contexts."""
    sets = []
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        w = 0.9 * torch.linalg.qr(torch.randn(N, N, generator=g, dtype=DOUBLE)).Q
        x = torch.randn(60, N, generator=g, dtype=DOUBLE)
        sets.append(TaskSet(lambda z, x, w=w: torch.tanh(z @ w + x), x[:40], x[40:50], x[50:]))
    return sets


def trainer_of(update: str = "gated", sets=None, **options) -> EpisodeTrainer:
    config = EpisodeConfig(**{"inner": 2, "shots": 4, "unroll": 3, "update": update, "steps": 5, **options})
    solver = perturbed(vector("grouped", N, hidden=3, rank=3, initializer_width=4), 0.05, seed=1)
    return EpisodeTrainer(solver, EpisodeSet(deqs() if sets is None else sets, config), config)


def test_d_train_and_d_test_never_overlap():
    sets = deqs()
    episodes = EpisodeSet(sets, EpisodeConfig(inner=4, shots=8))
    seen = set()
    for step in range(30):
        episode = episodes.draw(step)
        assert len(episode.train) == 4
        assert len(set(episode.numbers.flatten().tolist())) == 40, "no context twice in an episode"
        known = torch.cat([x for _, x in episode.train])
        assert (torch.cdist(known, episode.test[1]) > 0).all()
        raw = sets[episode.number].split("train")[episode.numbers[-1]]
        assert torch.equal(raw, episode.test[1])
        assert episode.f is sets[episode.number].f
        seen.add(episode.number)
    assert seen == {0, 1, 2}


def test_an_episode_follows_from_seed_and_step_and_leaves_the_generators_alone():
    episodes = EpisodeSet(deqs(), EpisodeConfig(inner=1, shots=4))
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    wanted = random.Random(3).random(), np.random.RandomState(3).rand()
    first, _, again = (episodes.draw(step) for step in (5, 2, 5))
    assert first.number == again.number
    assert torch.equal(first.numbers, again.numbers)
    assert (random.random(), np.random.rand()) == wanted  # noqa: NPY002


@pytest.mark.parametrize("update", [*UPDATES, *LIBRARY])
def test_first_order_and_exact_gradients_agree_in_sign(update):
    """Of the outer loss with regard to the first weights: the same descent direction for small inner steps."""
    flat = []
    for first_order in (True, False):
        trainer = trainer_of(update, first_order=first_order, inner_rate=2e-3)
        loss = trainer.loss(trainer.episodes.draw(0))
        grads = torch.autograd.grad(loss, list(trainer.solver.parameters()), allow_unused=True)
        flat.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
    one, other = flat
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.9
    assert not torch.equal(one, other), "the exact one looks through the inner gradients"
    large = one.abs() > 0.1 * one.abs().max()
    assert (one[large].sign() == other[large].sign()).all()


def test_the_exact_gradient_is_that_of_differences():
    trainer = trainer_of("gated", first_order=False, inner_rate=1e-2)
    episode, weight, values = trainer.episodes.draw(1), trainer.solver.lstm.readout, []
    (grad,) = torch.autograd.grad(trainer.loss(episode), [weight])
    for step in (1e-6, -2e-6):
        weight.data[0, 0] += step
        values.append(trainer.loss(episode).item())
    assert float(grad[0, 0]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("update", ["gated", "rates", "meta-sgd"])
def test_after_meta_training_the_loss_on_d_test_falls_with_inner_updates(update):
    sets = deqs(4)
    trainer = trainer_of(update, sets[:3], inner=4, shots=6, steps=20, inner_rate=0.05, learning_rate=2e-2)
    trainer.run()
    assert trainer.skipped == 0
    trainer.episodes = EpisodeSet(sets[3:], trainer.config)  # the trained parts on a DEQ that was never seen
    losses = [[trainer.loss(trainer.episodes.draw(step), inner=t).item() for t in (0, 1, 2, 4)] for step in range(4)]
    assert (np.diff(np.mean(losses, axis=0)) < 0).all(), losses
    episode = trainer.episodes.draw(0)
    alone = trainer.loss_of(trainer.adapted(episode.f, episode.train), episode.f, episode.test)
    assert float(alone) == pytest.approx(trainer.loss(episode).item()), "the copy has the adapted weights"


REFUSED = {
    "inner must be an integer of at least 1, got 0": lambda: EpisodeConfig(inner=0),
    "update must be one of gated, rates, maml, meta-sgd, got 'adam'": lambda: EpisodeConfig(update="adam"),
    "inner_rate must be a positive number, got -1.0": lambda: EpisodeConfig(inner_rate=-1.0),
    r"takes 48 contexts, \(inner \+ 1\)·shots; a train split has 40": lambda: trainer_of(inner=2, shots=16),
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_settings_are_refused(words):
    refused(words, REFUSED[words])
