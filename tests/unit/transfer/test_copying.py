"""Spans copied between two memories, and digested while they are."""

from dataclasses import replace

import numpy as np
import pytest
import xxhash

from pdserve.transfer.base import ReadPlan
from pdserve.transfer.copying import PIECE_BYTES, copy_spans
from pdserve.transfer.running_digest import RunningDigest

LENGTHS = (1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 7)


@pytest.mark.parametrize("digested", [False, True])
def test_spans_of_every_length_arrive_and_are_digested_as_they_arrive(digested: bool) -> None:
    lengths = np.array(LENGTHS, dtype=np.uint64)
    local = np.concatenate(([np.uint64(5)], lengths[:-1])).cumsum()
    remote = local[::-1] * np.uint64(2)
    source = np.random.default_rng(3).integers(0, 256, int(remote.max() + lengths.max()), dtype=np.uint8)
    target = np.zeros(int(lengths.sum()) + 10, dtype=np.uint8)
    plan = ReadPlan(local, remote, lengths, digest=RunningDigest(9) if digested else None)
    copy_spans(source, target, plan)
    expected = np.concatenate([source[r : r + n] for r, n in zip(remote.tolist(), LENGTHS, strict=True)])
    np.testing.assert_array_equal(target[5:-5], expected)
    assert not target[:5].any()
    assert not target[-5:].any()
    if plan.digest:
        assert plan.digest.num_bytes == plan.num_bytes
        assert plan.digest.value() == xxhash.xxh3_128_digest(expected.tobytes(), seed=9)


def test_the_digest_is_of_what_the_target_holds_not_of_what_the_source_held() -> None:
    """A target that a byte does not reach is noticed."""
    number = np.array([0], dtype=np.uint64)
    plan = ReadPlan(number, number, number + np.uint64(64), digest=RunningDigest(9))
    source, wrong = np.arange(64, dtype=np.uint8), np.zeros(64, dtype=np.uint8)

    class Deaf(np.ndarray[tuple[int], np.dtype[np.uint8]]):
        def __setitem__(self, *_: object) -> None:
            """Nothing arrives."""

    copy_spans(source, wrong.view(Deaf), replace(plan))
    assert plan.digest
    assert plan.digest.value() == xxhash.xxh3_128_digest(bytes(64), seed=9)
