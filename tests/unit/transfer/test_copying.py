"""Spans copied between two memories, and digested while they are."""

from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.errors import TransferFailed
from pdserve.transfer.base import ArrivalDigest, ReadPlan
from pdserve.transfer.copying import copy_plan
from pdserve.transfer.host_spans import Bytes, copy_and_digest_spans, digest_spans

pytestmark = pytest.mark.parametrize("compiled", [True, False])


@pytest.fixture(autouse=True)
def with_or_without_numba(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled:
        pytest.importorskip("numba")
    monkeypatch.setattr("pdserve.transfer.host_spans._COMPILED", compiled)


ODD = (1, 1023, 64, 256 << 10, 0, (256 << 10) + 7)
WHOLE = (1024, 64 << 10, (64 << 10) + 1024, 256 << 10, 3 << 20)
SEEDS = st.integers(0, 2**64 - 1)


def scattered(lengths: tuple[int, ...]) -> tuple[ReadPlan, Bytes, Bytes]:
    """A plan, its source, and the bytes it brings."""
    sizes = np.array(lengths, dtype=np.uint64)
    local = np.concatenate(([np.uint64(5)], sizes[:-1])).cumsum()
    remote = local[::-1] * np.uint64(2)
    source = np.random.default_rng(3).integers(0, 256, int((remote + sizes).max()), dtype=np.uint8)
    brought = np.concatenate([source[r : r + n] for r, n in zip(remote.tolist(), lengths, strict=True)])
    return ReadPlan(local, remote, sizes), source, brought


@pytest.mark.parametrize("lengths", [ODD, WHOLE])
@pytest.mark.parametrize("digest", [None, ArrivalDigest(2**64 - 9)])
def test_spans_of_every_length_arrive_and_are_digested(lengths: tuple[int, ...], digest: ArrivalDigest | None) -> None:
    plan, source, brought = scattered(lengths)
    target = np.zeros(plan.num_bytes + 10, dtype=np.uint8)
    copy_plan(source, target, ReadPlan(plan.local, plan.remote, plan.lengths, digest=digest))
    np.testing.assert_array_equal(target[5:-5], brought)
    assert not target[:5].any()
    assert not target[-5:].any()
    if digest:
        assert digest.value == xxhash.xxh3_128_digest(brought.data, seed=2**64 - 9)
        assert digest.seconds > 0


@given(
    spans=st.lists(st.lists(st.integers(1, 70), min_size=3, max_size=3), min_size=1, max_size=4),
    seeds=st.tuples(SEEDS, SEEDS, SEEDS, SEEDS),
    unit=st.sampled_from([1024, 24]),
    skew=st.integers(0, 63),
)
def test_digests_are_those_of_xxhash(spans: list[list[int]], seeds: tuple[int, ...], unit: int, skew: int) -> None:
    """Each of three spans, in memory of any alignment; from where they lie and while they are copied."""
    lengths = np.array(spans, dtype=np.uint64).ravel() * np.uint64(unit)
    memory = np.random.default_rng(skew).integers(0, 256, int(lengths.sum()) + skew, dtype=np.uint8)
    offsets = lengths.cumsum() - lengths + np.uint64(skew)
    expected = list(digests_of(memory[skew:], [sum(share) * unit for share in spans], seeds))
    used = seeds[: len(spans)]
    assert digest_spans(memory, offsets, lengths, used) == expected
    target = np.zeros_like(memory)
    assert copy_and_digest_spans(memory, target, offsets, offsets, lengths, used)[0] == expected
    np.testing.assert_array_equal(target[skew:], memory[skew:])


def digests_of(memory: Bytes, lengths: list[int], seeds: tuple[int, ...]) -> Iterator[bytes]:
    begin = 0
    for length, seed in zip(lengths, seeds, strict=False):
        yield xxhash.xxh3_128_digest(memory[begin : begin + length].data, seed=seed)
        begin += length


@pytest.mark.parametrize("unit", [1024, 24])
def test_the_digest_is_of_what_the_target_holds_not_of_what_the_source_held(unit: int) -> None:
    """The first span is copied over what the second one is then copied from."""
    memory = np.arange(4 * unit, dtype=np.int64).astype(np.uint8)
    lengths = np.full(2, unit, dtype=np.uint64)
    remote, local = (np.array(places, dtype=np.uint64) * np.uint64(unit) for places in ((0, 1), (1, 2)))
    first = memory[:unit].copy()
    plan = ReadPlan(local, remote, lengths, digest=ArrivalDigest(9))
    copy_plan(memory, memory, plan)
    assert plan.digest
    assert plan.digest.value == xxhash.xxh3_128_digest(np.tile(first, 2).data, seed=9)


@pytest.mark.parametrize("digest", [None, ArrivalDigest(1)])
@pytest.mark.parametrize(("local", "remote", "length"), [(1, 0, 1024), (0, 1025, 1024), (0, 0, 2**64 - 1)])
def test_a_span_that_is_not_there_is_refused_before_anything_is_copied(
    local: int, remote: int, length: int, digest: ArrivalDigest | None
) -> None:
    source, target = np.ones(2048, dtype=np.uint8), np.zeros(1024, dtype=np.uint8)
    to, there, lengths = (np.array(both, dtype=np.uint64) for both in ((0, local), (0, remote), (1024, length)))
    plan = ReadPlan(to, there, lengths, digest=digest)
    with pytest.raises(TransferFailed, match="reaches beyond"):
        copy_plan(source, target, plan)
    assert not target.any()
