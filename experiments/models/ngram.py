"""Counting as a language model: what a learned one has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class _Level:
    """One order: what an n-gram keeps of its count, and what its context hands down, by sorted codes.

    Attributes:
        grams, share: (G,) codes of the n-grams seen, and (c − D)/C of each.
        contexts, rest: (C,) codes of the contexts seen, and the probability each leaves to the order below.
    """

    grams: NDArray
    share: NDArray
    contexts: NDArray
    rest: NDArray


@dataclass(frozen=True)
class NGram:
    """An interpolated n-gram model with modified Kneser–Ney smoothing, over tokens 0 … vocabulary_size − 1.

    p_k(w | h) = max(c(hw) − D(c(hw)), 0) / C(h) + rest(h) · p_{k−1}(w | h′), h′ being h without its oldest token, p_0
    uniform. c counts occurrences for the highest order and the different tokens seen before hw for those below (Kneser &
    Ney, ICASSP 1995); D has three values an order, for counts of 1, 2 and more, estimated from counts of counts (modified
    smoothing: Chen & Goodman, Computer Speech & Language 13, 1999). A context never seen leaves everything to the order
    below. An n-gram is one integer of 64 bits, its tokens the digits: fitting is sorting.

    >>> model = NGram.fit([0, 1, 0, 1, 0, 1, 2], order=2, vocabulary_size=3)
    >>> model.distribution([0]).round(2).tolist()
    [0.04, 0.93, 0.04]
    """

    order: int
    vocabulary_size: int
    levels: tuple[_Level, ...]

    @classmethod
    def fit(cls, tokens: Any, order: int, vocabulary_size: int) -> NGram:
        """The model of a text: tokens (N,) of integers, an array or a tensor on the CPU.

        Raises ValueError: tokens that are no integers or outside the vocabulary, fewer than `order` of them, or n-grams
        that 63 bits cannot hold.
        """
        if order < 1 or vocabulary_size < 1:
            raise ValueError(f"order and vocabulary_size must be at least 1, got {order} and {vocabulary_size}")
        if vocabulary_size**order >= 2**63:
            raise ValueError(f"{order} tokens of {vocabulary_size} do not fit into 63 bits; choose a lower order")
        text = _tokens(tokens, vocabulary_size)
        if len(text) < order:
            raise ValueError(f"order {order} needs at least {order} tokens, got {len(text)}")
        levels = []
        grams, counts = np.unique(_codes(text, order, vocabulary_size), return_counts=True)
        for length in range(order, 0, -1):
            levels.append(_level(grams, counts, vocabulary_size))
            # every n-gram seen once more, without its oldest token: in how many ways was the rest continued from
            grams, counts = np.unique(grams % vocabulary_size ** (length - 1), return_counts=True)
        return cls(order, vocabulary_size, tuple(reversed(levels)))

    def probabilities(self, tokens: Any) -> NDArray:
        """(N,) p of each token given those before it in `tokens`; the first have as much context as there is."""
        text = _tokens(tokens, self.vocabulary_size)
        found = np.full(len(text), 1 / self.vocabulary_size)
        for length, level in enumerate(self.levels[: len(text)], 1):
            codes = _codes(text, length, self.vocabulary_size)
            found[length - 1 :] = self._refine(level, codes, found[length - 1 :])
        return found

    def bits_per_token(self, tokens: Any) -> float:
        """Mean of −log₂ p over all tokens (N,) of a text; perplexity is 2 to this power."""
        if not len(tokens):
            raise ValueError("bits per token of no tokens are not defined")
        return float(-np.log2(self.probabilities(tokens)).mean())

    def distribution(self, context: Any) -> NDArray:
        """(vocabulary_size,) p of every token after a context (any length; the last order − 1 tokens count)."""
        context = _tokens(context, self.vocabulary_size)
        found = np.full(self.vocabulary_size, 1 / self.vocabulary_size)
        for length, level in enumerate(self.levels[: len(context) + 1], 1):
            code = 0
            for token in context[len(context) - length + 1 :]:
                code = code * self.vocabulary_size + int(token)
            found = self._refine(level, code * self.vocabulary_size + np.arange(self.vocabulary_size), found)
        return found

    def _refine(self, level: _Level, codes: NDArray, below: NDArray) -> NDArray:
        """p of n-grams by their codes, given p of the order below."""
        rest = _look_up(level.contexts, level.rest, codes // self.vocabulary_size, missing=1.0)
        return _look_up(level.grams, level.share, codes, missing=0.0) + rest * below


@dataclass(frozen=True)
class Recent:
    """An n-gram model that bets on repeats: p(w | h) = (1 − λ_k) p_n(w | h) + λ_k [w followed the last time].

    "The last time" is the last place, within so many tokens, where the k tokens before w stood too, for the largest such k
    up to `longest`; λ_k is the weight under which a held-out text is likeliest (expectation–maximisation, with half a bet
    won and half a one lost beforehand). Without a repeat p is p_n. A cache in the sense of Kuhn & De Mori (IEEE PAMI 12,
    1990), for contexts of any length: what a model that is told of repeats has to beat.
    """

    model: NGram
    longest: int
    recent: int
    weights: tuple[float, ...]

    @classmethod
    def fit(cls, model: NGram, held_out: Any, recent: int, longest: int = 8, rounds: int = 50) -> Recent:
        """λ_k by a text (N,) that the n-gram model has not seen."""
        size = model.vocabulary_size
        while size**longest >= 2**63:
            longest -= 1
        text = _tokens(held_out, size)
        order, follower = _repeats(text, longest, size, recent)
        plain, weights = model.probabilities(text), []
        for k in range(1, longest + 1):
            here = order == k
            hit, p, weight = (follower == text)[here], plain[here], 0.5
            for _ in range(rounds if here.any() else 0):
                sure = weight * hit / (weight * hit + (1 - weight) * p)
                weight = float((sure.sum() + 0.5) / (len(p) + 1))  # never 0 nor 1
            weights.append(weight if here.any() else 0.0)
        return cls(model, longest, recent, tuple(weights))

    def probabilities(self, tokens: Any) -> NDArray:
        """(N,) p of each token given those before it in `tokens`."""
        text = _tokens(tokens, self.model.vocabulary_size)
        order, follower = _repeats(text, self.longest, self.model.vocabulary_size, self.recent)
        weight = np.array([0.0, *self.weights])[order]
        return (1 - weight) * self.model.probabilities(text) + weight * (follower == text)


def _repeats(text: NDArray, longest: int, size: int, recent: int) -> tuple[NDArray, NDArray]:
    """(N,) the length of the longest context of each token that stood before within `recent` tokens, and what followed it.

    0 and −1 where there was none.
    """
    order, follower = np.zeros(len(text), dtype=np.int64), np.full(len(text), -1)
    for length in range(1, min(longest, len(text) - 1) + 1):
        codes = _codes(text[:-1], length, size)  # the context of token i + length is code i
        place = codes.argsort(kind="stable")
        again = codes[place[1:]] == codes[place[:-1]]
        now, before = place[1:][again] + length, place[:-1][again] + length
        near = now - before <= recent
        order[now[near]], follower[now[near]] = length, text[before[near]]
    return order, follower


def _level(grams: NDArray, counts: NDArray, size: int) -> _Level:
    discounts = _discounts(counts)[np.minimum(counts, 3) - 1]
    # the codes are sorted: a context's n-grams are neighbours
    contexts, first = np.unique(grams // size, return_index=True)
    total = np.add.reduceat(counts, first)
    spread = np.diff(np.append(first, len(grams)))
    share = (counts - discounts) / np.repeat(total, spread)
    return _Level(grams, share, contexts, np.add.reduceat(discounts, first) / total)


def _discounts(counts: NDArray) -> NDArray:
    """D₁, D₂, D₃₊ = i − (i + 1)·Y·n_{i+1}/n_i, Y = n₁/(n₁ + 2n₂), n_i the number of n-grams counted i times.

    Where a small or odd text lacks one of them or the estimate is out of range, that D is Y (plain Kneser–Ney), or else ½.
    """
    ones, twos, threes, fours = (np.bincount(np.minimum(counts, 5), minlength=6)[1:5]).tolist()
    plain = ones / (ones + 2 * twos) if ones and twos else 0.5
    found = [plain] * 3
    for i, (now, following) in enumerate([(ones, twos), (twos, threes), (threes, fours)]):
        if ones and twos and now and following:
            estimate = (i + 1) - (i + 2) * plain * following / now
            found[i] = estimate if 0 < estimate < i + 1 else plain
    return np.array(found)


def _look_up(keys: NDArray, values: NDArray, wanted: NDArray, missing: float) -> NDArray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], missing)


def _codes(text: NDArray, length: int, size: int) -> NDArray:
    """(N − length + 1,): the n-grams of a text as numbers to the base `size`, the oldest token first."""
    count = len(text) - length + 1
    codes = np.zeros(count, dtype=np.int64)
    for place in range(length):
        codes = codes * size + text[place : place + count]
    return codes


def _tokens(tokens: Any, size: int) -> NDArray:
    text = np.asarray(tokens)
    if text.size == 0:
        return np.zeros(0, dtype=np.int64)
    if text.ndim != 1 or not np.issubdtype(text.dtype, np.integer):
        raise ValueError(f"tokens must be (N,) of integers, got {text.shape} of {text.dtype}")
    if text.min() < 0 or text.max() >= size:
        raise ValueError(f"tokens must lie in 0…{size - 1}, got {text.min()}…{text.max()}")
    return text.astype(np.int64)
