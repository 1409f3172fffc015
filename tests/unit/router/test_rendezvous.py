"""Turns: the same one by one and all at once, and even."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pdserve.router.rendezvous import engine_bits, name_bits, turn, turns

ENGINES = [f"prefill-{number}" for number in range(16)]
BITS = np.array([engine_bits(engine) for engine in ENGINES], np.uint64)


@given(st.binary())
def test_many_turns_at_once_are_those_one_by_one(name: bytes) -> None:
    assert turns(name_bits(name), BITS).tolist() == [turn(name_bits(name), engine) for engine in ENGINES]


def test_names_spread_evenly_and_stay_when_another_engine_leaves() -> None:
    names = [name_bits(str(number).encode()) for number in range(4000)]
    chosen = [min(ENGINES, key=lambda engine: turn(name, engine)) for name in names]
    assert min(Counter(chosen).values()) > 0.75 * 4000 / 16
    without = [min(ENGINES[1:], key=lambda engine: turn(name, engine)) for name in names]
    assert all(now == before for now, before in zip(without, chosen, strict=True) if before != ENGINES[0])
