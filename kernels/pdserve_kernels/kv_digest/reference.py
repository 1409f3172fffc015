"""The keyed sum in NumPy: what the kernel must equal, and what a host without a GPU computes."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

STEP = 0x9E3779B97F4A7C15
FIRST_FACTOR = 0xBF58476D1CE4E5B9
SECOND_FACTOR = 0x94D049BB133111EB
WORD_BYTES = 8
_CHUNK_WORDS = 1 << 15
"""Words mixed at a time: the temporaries then stay in the cache of one core."""

Words = NDArray[np.uint64]


def keys_of(seed: int) -> Words:
    """Shape [2], one key per lane, from a seed of 64 bits."""
    with np.errstate(over="ignore"):
        return mixed(np.uint64(seed) + np.arange(1, 3, dtype=np.uint64) * np.uint64(STEP))


def finished(sums: Words, num_bytes: int) -> bytes:
    """The 16 bytes of a digest, from the two lanes' sums over num_bytes bytes."""
    return mixed(sums ^ np.uint64(num_bytes)).astype("<u8").tobytes()


def keyed_sum(chunks: Iterable[NDArray[np.uint8]], seed: int) -> bytes:
    """The digest of contiguous byte arrays, one after another. Raises ValueError when one is not whole words."""
    keys, sums, place = keys_of(seed), np.zeros(2, dtype=np.uint64), 0
    for chunk in chunks:
        check_whole_words(chunk.nbytes)
        words = chunk.view("<u8")
        for first in range(0, len(words), _CHUNK_WORDS):
            part = words[first : first + _CHUNK_WORDS]
            sums += _lane_sums(part, keys, place)
            place += len(part)
    return finished(sums, place * WORD_BYTES)


def check_whole_words(num_bytes: int) -> None:
    if num_bytes % WORD_BYTES:
        raise ValueError(f"a span of {num_bytes} bytes is not a multiple of the {WORD_BYTES} the keyed sum works in")


def mixed(x: Words) -> Words:
    """SplitMix64's finalizer, elementwise."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(FIRST_FACTOR)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(SECOND_FACTOR)
    return x ^ (x >> np.uint64(31))


def _lane_sums(words: Words, keys: Words, place: int) -> Words:
    steps = (np.uint64(place) + np.arange(len(words), dtype=np.uint64)) * np.uint64(STEP)
    return np.array([mixed(words ^ (steps + key)).sum(dtype=np.uint64) for key in keys], dtype=np.uint64)
