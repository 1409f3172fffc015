"""The keyed sum in NumPy against its definition in Python's own integers, and what it must notice."""

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve_kernels.kv_digest.reference import keyed_sum

MODULUS = 1 << 64
STEP = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """SplitMix64's finalizer as Steele, Lea and Flood give it."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % MODULUS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % MODULUS
    return x ^ (x >> 31)


def by_definition(data: bytes, seed: int) -> bytes:
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    digest = b""
    for lane in range(2):
        key = mix((seed + (lane + 1) * STEP) % MODULUS)
        total = sum(mix(word ^ ((key + place * STEP) % MODULUS)) for place, word in enumerate(words))
        digest += mix((total % MODULUS) ^ len(data)).to_bytes(8, "little")
    return digest


def cut(data: bytes, at: Sequence[int]) -> list[np.ndarray]:
    parts = (data[begin:end] for begin, end in pairwise((0, *at, len(data))))
    return [np.frombuffer(part, dtype=np.uint8) for part in parts]


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, MODULUS - 1), st.integers(0, 25))
def test_it_is_what_the_definition_says_however_the_bytes_are_cut(data: bytes, seed: int, place: int) -> None:
    data = data[: len(data) // 8 * 8]
    assert keyed_sum(cut(data, [8 * place]), seed) == by_definition(data, seed)


def test_it_is_what_the_definition_says_beyond_one_chunk() -> None:
    data = random.Random(1).randbytes(8 * 40_000)
    assert keyed_sum(cut(data, []), 7) == by_definition(data, 7)


def test_known_bytes_have_this_digest() -> None:
    assert keyed_sum([np.arange(64, dtype=np.uint8)], 2**63 + 5).hex() == "3c769d30884e60b380ca5f6cc49c3a61"


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=64, max_size=256), st.data())
def test_damage_of_every_kind_is_seen(data: bytes, draw: st.DataObject) -> None:
    data = data[: len(data) // 8 * 8]
    intact = keyed_sum(cut(data, []), 5)
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = (int.from_bytes(data, "little") ^ (1 << bit)).to_bytes(len(data), "little")
    end = 8 * draw.draw(st.integers(0, len(data) // 8 - 1))
    others = {"flipped": flipped, "cut short": data[:end], "longer": data + bytes(8)}
    if data[:8] != data[-8:]:
        others["swapped"] = data[-8:] + data[8:-8] + data[:8]
    for what, damaged in others.items():
        assert keyed_sum(cut(damaged, []), 5) != intact, what
    assert keyed_sum(cut(data, []), 6) != intact


def test_spans_that_are_not_whole_words_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the 8"):
        keyed_sum([np.zeros(12, dtype=np.uint8)], 0)
