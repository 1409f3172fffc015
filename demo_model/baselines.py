"""Unigram and trigram models of the training tokens: what the network has to beat to have learned anything."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from demo_model.recipe import VOCABULARY_SIZE

Keys = NDArray[np.int64]
Probabilities = NDArray[np.float64]


class _Level:
    """Counts of n-grams of one length, looked up by binary search in sorted integer keys."""

    def __init__(self, keys: Keys) -> None:
        """Count the n-grams and, per history, its occurrences and different continuations."""
        self._keys, self._counts = np.unique(keys, return_counts=True)
        # A history is its n-gram without the last token; the keys of one history are adjacent.
        self._histories, starts, self._kinds = np.unique(
            self._keys // VOCABULARY_SIZE, return_index=True, return_counts=True
        )
        self._totals = np.add.reduceat(self._counts, starts)

    @staticmethod
    def _find(known: Keys, counts: NDArray[np.int64], wanted: Keys) -> Probabilities:
        places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[places] == wanted, counts[places], 0).astype(np.float64)

    def refine(self, keys: Keys, lower: Probabilities) -> Probabilities:
        """Interpolate with the shorter history after Witten and Bell: the more varied a history, the less it counts."""
        seen = self._find(self._keys, self._counts, keys)
        totals = self._find(self._histories, self._totals, keys // VOCABULARY_SIZE)
        kinds = self._find(self._histories, self._kinds, keys // VOCABULARY_SIZE)
        mixed = (seen + kinds * lower) / np.maximum(totals + kinds, 1)
        return np.where(totals > 0, mixed, lower)


def _keys(tokens: Keys, length: int) -> Keys:
    """Number every n-gram of the stream."""
    result = np.zeros(len(tokens) - length + 1, dtype=np.int64)
    for offset in range(length):
        result = result * VOCABULARY_SIZE + tokens[offset : len(tokens) - length + 1 + offset]
    return result


class Baselines:
    """An add-one unigram model and a trigram model with Witten-Bell interpolation."""

    def __init__(self, streams: Sequence[NDArray[np.uint16]]) -> None:
        """Count the training streams."""
        tokens = np.concatenate(streams).astype(np.int64)
        counts = np.bincount(tokens, minlength=VOCABULARY_SIZE) + 1
        self._unigram = counts / counts.sum()
        self._bigrams = _Level(_keys(tokens, 2))
        self._trigrams = _Level(_keys(tokens, 3))

    def perplexities(self, held_out: NDArray[np.uint16]) -> tuple[float, float]:
        """Return the unigram's and the trigram's perplexity of a stream, from its third token on."""
        tokens = held_out.astype(np.int64)
        unigram = self._unigram[tokens[2:]]
        bigram = self._bigrams.refine(_keys(tokens, 2)[1:], unigram)
        trigram = self._trigrams.refine(_keys(tokens, 3), bigram)
        return float(np.exp(-np.log(unigram).mean())), float(np.exp(-np.log(trigram).mean()))
