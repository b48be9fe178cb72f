"""Counting as a language model: what a learned one has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NGram:
    """An interpolated n-gram model with modified Kneser–Ney smoothing, over tokens 0 … size − 1.

    p_k(w | h) = max(c(hw) − D(c(hw)), 0) / C(h) + rest(h) · p_{k−1}(w | h′), h′ being h without its oldest token, p_0
    uniform. c counts occurrences for the highest order and the different tokens seen before hw for those below (Kneser &
    Ney, ICASSP 1995); D has three values an order, for counts of 1, 2 and more, estimated from counts of counts (modified
    smoothing: Chen & Goodman, Computer Speech & Language 13, 1999). A context never seen leaves everything to the order
    below. An n-gram is one integer of 64 bits, its tokens the digits: fitting is sorting.

    Attributes:
        size: of the vocabulary.
        levels: by order (codes of the n-grams seen, (c − D)/C of each; codes of the contexts seen, rest of each).

    >>> model = NGram.fit([0, 1, 0, 1, 0, 1, 2], order=2, size=3)
    >>> model.probabilities([0, 1, 0, 1]).round(2).tolist()
    [0.33, 0.93, 0.48, 0.93]
    """

    size: int
    levels: tuple[tuple[NDArray, NDArray, NDArray, NDArray], ...]

    @classmethod
    def fit(cls, tokens: Any, order: int, size: int) -> NGram:
        """The model of a text (N,); ValueError where `probabilities` refuses it, or it or 63 bits hold no such order."""
        text = _checked(tokens, size)
        if not 1 <= order <= len(text) or size**order >= 2**63:
            raise ValueError(
                f"order must be from 1 to {len(text)} tokens, and {size}^order fit into 63 bits; got {order}"
            )
        grams, counts = np.unique(_codes(text, order, size), return_counts=True)
        levels = []
        for length in range(order, 0, -1):
            discounts = _discounts(counts)[np.minimum(counts, 3) - 1]
            contexts, first = np.unique(grams // size, return_index=True)  # sorted: a context's n-grams are neighbours
            total = np.add.reduceat(counts, first)
            share = (counts - discounts) / np.repeat(total, np.diff(np.append(first, len(grams))))
            levels.append((grams, share, contexts, np.add.reduceat(discounts, first) / total))
            # every n-gram seen once more, without its oldest token: in how many ways was the rest continued from
            grams, counts = np.unique(grams % size ** (length - 1), return_counts=True)
        return cls(size, tuple(reversed(levels)))

    def probabilities(self, tokens: Any) -> NDArray:
        """(N,) p of each token given those before it in `tokens`; ValueError unless integers (N,) of the vocabulary."""
        text = _checked(tokens, self.size)
        found = np.full(len(text), 1 / self.size)
        for length, (grams, share, contexts, rest) in enumerate(self.levels[: len(text)], 1):
            codes = _codes(text, length, self.size)
            below = _look_up(contexts, rest, codes // self.size, missing=1.0) * found[length - 1 :]
            found[length - 1 :] = _look_up(grams, share, codes, missing=0.0) + below
        return found


@dataclass(frozen=True)
class Recent:
    """An n-gram model that bets on repeats: p(w | h) = (1 − λ_k) p_n(w | h) + λ_k [w followed the last time].

    "The last time" is the last place, within `recent` tokens, where the k tokens before w stood too, for the largest such k
    there are weights of; λ_k is the weight under which a held-out text is likeliest (expectation–maximisation, with half a
    bet won and half a one lost beforehand). Without a repeat (k = 0) p is p_n. A cache in the sense of Kuhn & De Mori (IEEE
    PAMI 12, 1990), for contexts of any length: what a model that is told of repeats has to beat.
    """

    model: NGram
    recent: int
    weights: NDArray

    @classmethod
    def fit(cls, model: NGram, held_out: Any, recent: int, longest: int = 8, rounds: int = 50) -> Recent:
        """λ_k by a text (N,) that the n-gram model has not seen."""
        longest = min(longest, int(63 / np.log2(model.size + 1)))
        weights, p = np.full(longest + 1, 0.5), model.probabilities(held_out)
        order, hit = _repeats(_checked(held_out, model.size), longest, model.size, recent)
        count = np.bincount(order, minlength=longest + 1)
        for _ in range(rounds):
            sure = weights[order] * hit / (weights[order] * hit + (1 - weights[order]) * p)
            weights = (np.bincount(order, sure, minlength=longest + 1) + 0.5) / (count + 1)  # never 0 nor 1
        return cls(model, recent, weights * (count > 0) * (np.arange(longest + 1) > 0))

    def probabilities(self, tokens: Any) -> NDArray:
        """(N,) p of each token given those before it in `tokens`."""
        text = _checked(tokens, self.model.size)
        order, hit = _repeats(text, len(self.weights) - 1, self.model.size, self.recent)
        return (1 - self.weights[order]) * self.model.probabilities(text) + self.weights[order] * hit


def _repeats(text: NDArray, longest: int, size: int, recent: int) -> tuple[NDArray, NDArray]:
    """(N,) the length of the longest context of each token that stood before within `recent` tokens, 0 where there was none,
    and whether the same token followed it."""
    order, hit = np.zeros(len(text), dtype=np.int64), np.zeros(len(text), dtype=bool)
    for length in range(1, min(longest, len(text) - 1) + 1):
        codes = _codes(text[:-1], length, size)  # the context of token i + length is code i
        place = codes.argsort(kind="stable")
        now, before = place[1:] + length, place[:-1] + length
        near = (codes[place[1:]] == codes[place[:-1]]) & (now - before <= recent)
        order[now[near]], hit[now[near]] = length, text[before[near]] == text[now[near]]
    return order, hit


def _discounts(counts: NDArray) -> NDArray:
    """D₁, D₂, D₃₊ = i − (i + 1)·Y·n_{i+1}/n_i, Y = n₁/(n₁ + 2n₂), n_i the number of n-grams counted i times.

    Where a small or odd text lacks one of them or the estimate is out of range, that D is Y (plain Kneser–Ney), or else ½.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)
    plain = n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] else 0.5
    i = np.arange(1, 4)
    found = i - (i + 1) * plain * n[i + 1] / np.maximum(n[i], 1)
    sound = (n[1] > 0) & (n[2] > 0) & (n[i] > 0) & (n[i + 1] > 0) & (found > 0) & (found < i)
    return np.where(sound, found, plain)


def _look_up(keys: NDArray, values: NDArray, wanted: NDArray, missing: float) -> NDArray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], missing)


def _codes(text: NDArray, length: int, size: int) -> NDArray:
    """(N − length + 1,): the n-grams of a text as numbers to the base `size`, the oldest token first."""
    windows = np.lib.stride_tricks.sliding_window_view(text, length)
    return windows @ size ** np.arange(length - 1, -1, -1)


def _checked(tokens: Any, size: int) -> NDArray:
    text = np.asarray(tokens)
    sound = len(text) == 0 or (
        text.ndim == 1 and np.issubdtype(text.dtype, np.integer) and 0 <= text.min() <= text.max()
    )
    if not sound or (len(text) and text.max() >= size):
        raise ValueError(f"tokens must be (N,) of integers in 0…{size - 1}, got {text.shape} of {text.dtype}")
    return text.astype(np.int64)
