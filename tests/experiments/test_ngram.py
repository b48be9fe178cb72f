"""The n-gram model: probabilities, smoothing, and what it makes of texts it should know."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from experiments.models.ngram import NGram, Recent


def text(count: int = 400, size: int = 4, seed: int = 0) -> np.ndarray:
    """Tokens with a memory of two: mostly the sum of the last two."""
    generator = np.random.default_rng(seed)
    tokens = [0, 1]
    for noise in generator.random(count - 2):
        tokens.append((tokens[-1] + tokens[-2] + (noise < 0.2)) % size)
    return np.array(tokens)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
def test_probabilities_sum_to_one_after_every_context(order):
    model = NGram.fit(text(), order, vocabulary_size=5)  # token 4 never occurs
    for length in range(min(order, 4) + 1):
        for context in product(range(5), repeat=length):
            found = model.distribution(context)
            assert found.sum() == pytest.approx(1, abs=1e-12)
            assert (found > 0).all()


def test_a_text_is_scored_by_the_distribution_after_each_of_its_beginnings():
    model, other = NGram.fit(text(), 3, vocabulary_size=5), np.append(text(60, seed=1), [4, 4, 0, 1])
    expected = [model.distribution(other[:place])[token] for place, token in enumerate(other)]
    np.testing.assert_allclose(model.probabilities(other), expected, rtol=1e-12)
    assert model.bits_per_token(torch.from_numpy(other)) == pytest.approx(-np.log2(expected).mean())


def test_a_context_never_seen_falls_back_on_a_shorter_one():
    model = NGram.fit(text(), 4, vocabulary_size=5)
    np.testing.assert_array_equal(model.distribution([4, 1, 2]), model.distribution([1, 2]))
    np.testing.assert_array_equal(model.distribution([4]), model.distribution([]))


def test_lower_orders_count_the_different_tokens_before_not_the_occurrences():
    # 1 occurs as often as 2 does, but always after 0: in a new place it is the less likely one
    model = NGram.fit([0, 1] * 6 + [0, 2, 3, 2, 4, 2, 5, 2, 6, 2, 7, 2], 2, vocabulary_size=9)
    unseen = model.distribution([8])
    assert unseen[2] > 2 * unseen[1]


def test_two_orders_agree_with_the_formula_worked_by_hand():
    # Bigrams of 0 0 1 0 0 1 1: 00 ×2, 01 ×2, 10 ×1, 11 ×1, so n₁ = n₂ = 2, Y = 1/3, D₁ = 1 − 2Y = 1/3; D₂ lacks n₃ and is Y.
    # Unigrams by what stands before them: 0 after 0 and 1, 1 after 0 and 1: twice each, n₁ = 0, so D = ½.
    model = NGram.fit([0, 0, 1, 0, 0, 1, 1], 2, vocabulary_size=2)
    np.testing.assert_allclose(model.distribution([]), [0.5, 0.5])
    third = 1 / 3
    after_zero = (2 - third) / 4 + (2 * third) / 4 * 0.5
    np.testing.assert_allclose(model.distribution([0]), [after_zero, after_zero])
    biased = NGram.fit([0, 0, 0, 1], 2, vocabulary_size=2)  # 00 ×2, 01 ×1: n₁ = n₂ = 1, Y = 1/3, D₁ = 1/3, D₂ = Y
    # unigrams: 0 after 0, 1 after 0: n₁ = 2, n₂ = 0, so D = ½, and both have one half
    np.testing.assert_allclose(biased.distribution([0]), [(2 - third) / 3 + third / 3, (1 - third) / 3 + third / 3])


def test_more_context_helps_where_the_text_has_a_memory_and_stays_above_its_entropy():
    train, held_out = text(20_000), text(5_000, seed=1)
    bits = [NGram.fit(train, order, 4).bits_per_token(held_out) for order in (1, 2, 3, 4)]
    entropy = -(0.8 * np.log2(0.8) + 0.2 * np.log2(0.2))
    assert bits[0] > 1.9
    assert bits[1] > 1.7
    assert entropy - 0.03 < bits[2] < entropy + 0.03
    assert bits[3] < entropy + 0.04  # a useless order does little harm


def test_what_cannot_be_fitted_or_scored_is_refused():
    with pytest.raises(ValueError, match="do not fit into 63 bits"):
        NGram.fit(text(), 6, vocabulary_size=50_000)
    with pytest.raises(ValueError, match=r"0…2, got 0…3"):
        NGram.fit(text(), 2, vocabulary_size=3)
    with pytest.raises(ValueError, match="at least 3 tokens, got 2"):
        NGram.fit([0, 1], 3, vocabulary_size=3)
    with pytest.raises(ValueError, match=r"float64"):
        NGram.fit(np.zeros(5), 2, vocabulary_size=3)
    with pytest.raises(ValueError, match="at least 1"):
        NGram.fit([0, 1], 0, vocabulary_size=3)
    with pytest.raises(ValueError, match="no tokens"):
        NGram.fit(text(), 2, vocabulary_size=4).bits_per_token([])


def test_bets_on_repeats_are_those_of_a_search_and_pay_where_a_text_repeats_itself():
    generator = np.random.default_rng(0)
    train, size = generator.integers(0, 6, 4000), 6
    song = np.concatenate([generator.integers(0, 6, 25)] * 8)
    model = NGram.fit(train, 3, size)
    told = Recent.fit(model, song[:150], recent=40, longest=4)
    plain, found = model.probabilities(song), told.probabilities(song)
    for t in range(len(song)):
        weight, hit = 0.0, 0.0
        for k in (1, 2, 3, 4):
            ends = [j for j in range(max(k, t - 40), t) if t >= k and (song[j - k : j] == song[t - k : t]).all()]
            if ends:
                weight, hit = told.weights[k - 1], float(song[ends[-1]] == song[t])
        assert found[t] == pytest.approx((1 - weight) * plain[t] + weight * hit)
    assert -np.log2(found[25:]).mean() < 0.5 * -np.log2(plain[25:]).mean()
    assert told.weights[3] > 0.9
    noise = Recent.fit(model, generator.integers(0, 6, 400), recent=40, longest=2)
    assert max(noise.weights) < 0.15, "where nothing repeats, bets are small"


def test_the_weights_of_bets_are_the_likeliest():
    generator = np.random.default_rng(1)
    model = NGram.fit(generator.integers(0, 4, 2000), 2, 4)
    text = np.concatenate([generator.integers(0, 4, 30)] * 3 + [generator.integers(0, 4, 200)])
    told = Recent.fit(model, text, recent=60, longest=3, rounds=2000)

    def likelihood(told: Recent) -> float:
        won = np.log(told.weights) + np.log1p(-np.array(told.weights))  # the bets beforehand
        return np.log(told.probabilities(text)).sum() + won.sum() / 2

    for k in range(3):
        for change in (-0.02, 0.02):
            weights = list(told.weights)
            weights[k] = min(max(weights[k] + change, 1e-9), 0.999)
            assert likelihood(replace(told, weights=tuple(weights))) <= likelihood(told) + 1e-6
    assert min(told.weights) > 0
    assert max(told.weights) < 1
