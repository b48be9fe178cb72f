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


def after(model: NGram, context) -> np.ndarray:
    """p of every token after a context."""
    return np.array([model.probabilities([*context, token])[-1] for token in range(model.size)])


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
def test_probabilities_sum_to_one_after_every_context(order):
    model = NGram.fit(text(), order, size=5)  # token 4 never occurs
    for length in range(min(order, 3) + 1):
        for context in product(range(5), repeat=length):
            found = after(model, context)
            assert found.sum() == pytest.approx(1, abs=1e-12)
            assert (found > 0).all()


def test_a_token_is_judged_by_those_before_it_alone():
    model, other = NGram.fit(text(), 3, size=5), np.append(text(60, seed=1), [4, 4, 0, 1])
    expected = [model.probabilities(other[: end + 1])[-1] for end in range(len(other))]
    np.testing.assert_allclose(model.probabilities(torch.from_numpy(other)), expected, rtol=1e-12)


def test_a_context_never_seen_falls_back_on_a_shorter_one():
    model = NGram.fit(text(), 4, size=5)
    np.testing.assert_array_equal(after(model, [4, 1, 2]), after(model, [1, 2]))
    np.testing.assert_array_equal(after(model, [4]), after(model, []))


def test_lower_orders_count_the_different_tokens_before_not_the_occurrences():
    # 1 occurs as often as 2 does, but always after 0: in a new place it is the less likely one
    model = NGram.fit([0, 1] * 6 + [0, 2, 3, 2, 4, 2, 5, 2, 6, 2, 7, 2], 2, size=9)
    unseen = after(model, [8])
    assert unseen[2] > 2 * unseen[1]


def test_two_orders_agree_with_the_formula_worked_by_hand():
    # Bigrams of 0 0 1 0 0 1 1: 00 ×2, 01 ×2, 10 ×1, 11 ×1, so n₁ = n₂ = 2, Y = 1/3, D₁ = 1 − 2Y = 1/3; D₂ lacks n₃ and is Y.
    # Unigrams by what stands before them: 0 after 0 and 1, 1 after 0 and 1: twice each, n₁ = 0, so D = ½.
    model = NGram.fit([0, 0, 1, 0, 0, 1, 1], 2, size=2)
    np.testing.assert_allclose(after(model, []), [0.5, 0.5])
    third = 1 / 3
    after_zero = (2 - third) / 4 + (2 * third) / 4 * 0.5
    np.testing.assert_allclose(after(model, [0]), [after_zero, after_zero])
    biased = NGram.fit([0, 0, 0, 1], 2, size=2)  # 00 ×2, 01 ×1: n₁ = n₂ = 1, Y = 1/3, D₁ = 1/3, D₂ = Y
    # unigrams: 0 after 0, 1 after 0: n₁ = 2, n₂ = 0, so D = ½, and both have one half
    np.testing.assert_allclose(after(biased, [0]), [(2 - third) / 3 + third / 3, (1 - third) / 3 + third / 3])


def test_more_context_helps_where_the_text_has_a_memory_and_stays_above_its_entropy():
    train, held_out = text(20_000), text(5_000, seed=1)
    bits = [-np.log2(NGram.fit(train, order, 4).probabilities(held_out)).mean() for order in (1, 2, 3, 4)]
    entropy = -(0.8 * np.log2(0.8) + 0.2 * np.log2(0.2))
    assert bits[0] > 1.9
    assert bits[1] > 1.7
    assert entropy - 0.03 < bits[2] < entropy + 0.03
    assert bits[3] < entropy + 0.04  # a useless order does little harm


@pytest.mark.parametrize(
    ("tokens", "order", "size", "words"),
    [
        (text(), 6, 50_000, "50000^order fit into 63 bits; got 6"),
        (text(), 2, 3, "integers in 0…2"),
        ([-1, 0], 1, 3, "integers in 0…2"),
        (np.zeros(5), 2, 3, "float64"),
        ([[0, 1]], 1, 3, r"\(1, 2\)"),
        ([0, 1], 3, 3, "from 1 to 2 tokens"),
        ([0, 1], 0, 3, "from 1 to 2 tokens"),
    ],
)
def test_what_cannot_be_fitted_is_refused(tokens, order, size, words):
    with pytest.raises(ValueError, match=words.replace("^", r"\^")):
        NGram.fit(tokens, order, size)


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
                weight, hit = told.weights[k], float(song[ends[-1]] == song[t])
        assert found[t] == pytest.approx((1 - weight) * plain[t] + weight * hit)
    assert -np.log2(found[25:]).mean() < 0.5 * -np.log2(plain[25:]).mean()
    assert told.weights[4] > 0.9
    noise = Recent.fit(model, generator.integers(0, 6, 400), recent=40, longest=2)
    assert max(noise.weights) < 0.15, "where nothing repeats, bets are small"


def test_the_weights_of_bets_are_the_likeliest():
    generator = np.random.default_rng(1)
    model = NGram.fit(generator.integers(0, 4, 2000), 2, 4)
    text = np.concatenate([generator.integers(0, 4, 30)] * 3 + [generator.integers(0, 4, 200)])
    told = Recent.fit(model, text, recent=60, longest=3, rounds=2000)

    def likelihood(told: Recent) -> float:
        won = np.log(told.weights[1:]) + np.log1p(-told.weights[1:])  # the bets beforehand
        return np.log(told.probabilities(text)).sum() + won.sum() / 2

    for k in (1, 2, 3):
        for change in (-0.02, 0.02):
            weights = told.weights.copy()
            weights[k] = min(max(weights[k] + change, 1e-9), 0.999)
            assert likelihood(replace(told, weights=weights)) <= likelihood(told) + 1e-6
    assert min(told.weights[1:]) > 0
    assert max(told.weights) < 1
