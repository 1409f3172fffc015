"""Spans: what a source lets itself be asked for, and a stream of bytes cut and put together along them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.transfer.base import Offsets, ReadPlan, TransferState
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.spans import SpanCursor, read_pieces, spans_fit
from pdserve.transfer.staged import StagedRead

NBYTES = 64
SPANS = st.lists(
    st.integers(0, NBYTES).flatmap(lambda start: st.tuples(st.just(start), st.integers(0, NBYTES - start))), max_size=8
)


def u64(values: list[int]) -> Offsets:
    return np.array(values, dtype=np.uint64)


def columns(spans: list[tuple[int, int]]) -> tuple[Offsets, Offsets]:
    return u64([offset for offset, _ in spans]), u64([length for _, length in spans])


@given(spans=st.lists(st.tuples(*2 * [st.integers(0, 2**64 - 1) | st.integers(0, 2 * NBYTES)]), max_size=4))
def test_spans_fit_exactly_when_each_ends_inside(spans: list[tuple[int, int]]) -> None:
    assert spans_fit(NBYTES, *columns(spans)) == all(offset + length <= NBYTES for offset, length in spans)


def test_spans_that_do_not_pair_up_do_not_fit() -> None:
    assert not spans_fit(NBYTES, u64([0, 1]), u64([1]))
    assert not spans_fit(NBYTES, u64([0, 1]).reshape(1, 2), u64([1, 1]).reshape(1, 2))


@given(spans=SPANS, counts=st.lists(st.integers(0, 100)))
def test_a_cursor_visits_every_byte_once_in_order(spans: list[tuple[int, int]], counts: list[int]) -> None:
    expected = [offset + i for offset, length in spans for i in range(length)]
    cursor, visited = SpanCursor(*columns(spans)), list[int]()
    for count in [*counts, NBYTES * 8]:
        visited += [o + i for o, n in cursor.take(min(count, cursor.remaining)) for i in range(n)]
    assert (visited, cursor.remaining) == (expected, 0)
    with pytest.raises(ValueError, match="do not fit"):
        list(cursor.take(1))


@given(spans=SPANS, piece_bytes=st.integers(1, 40))
def test_pieces_are_the_spans_bytes_and_of_the_agreed_size(spans: list[tuple[int, int]], piece_bytes: int) -> None:
    memory = HostMemory(NBYTES)
    memory.array[:] = np.arange(NBYTES)
    pieces = list(read_pieces(memory, *columns(spans), piece_bytes))
    memory.close()
    assert list(b"".join(pieces)) == [offset + i for offset, length in spans for i in range(length)]
    assert all(len(piece) == piece_bytes for piece in pieces[:-1])
    assert all(0 < len(piece) <= piece_bytes for piece in pieces)


def staged(lengths: tuple[int, ...] = (4, 4)) -> "tuple[StagedRead[bytes], bytearray]":
    """A read into bytes 10.. and 0.. of a memory of 20."""
    memory = bytearray(20)

    def store(offset: int, piece: bytes) -> None:
        memory[offset : offset + len(piece)] = piece

    local = u64([10, 0])
    return StagedRead(ReadPlan(local=local, remote=local, lengths=u64(list(lengths))), store), memory


def test_a_staged_read_puts_pieces_of_any_size_into_place() -> None:
    read, memory = staged()
    assert read.take(b"ab")
    assert read.take(b"cdef")
    assert not read.take(b"gh")
    assert read.poll() is TransferState.IN_PROGRESS
    read.finish()
    assert (read.poll(), bytes(memory)) == (TransferState.DONE, b"efgh" + 6 * b"\0" + b"abcd" + 6 * b"\0")


def test_nothing_is_stored_after_a_cancel_and_whoever_feeds_the_read_is_told() -> None:
    read, memory = staged()
    told: list[str] = []
    read.on_cancel(lambda: told.append("now"))
    read.take(b"ab")
    read.cancel()
    before = bytes(memory)
    assert not read.take(b"cd")
    read.finish()
    assert (read.poll(), read.error, bytes(memory), told) == (TransferState.ERROR, "cancelled", before, ["now"])
    read.on_cancel(lambda: told.append("late"))
    assert told == ["now", "late"]


@pytest.mark.parametrize(("data", "reason"), [(b"abc", "5 bytes early"), (b"123456789", "more than it was asked for")])
def test_too_few_and_too_many_bytes_are_errors(data: bytes, reason: str) -> None:
    read, memory = staged()
    read.take(data)
    read.finish()
    assert read.poll() is TransferState.ERROR
    assert reason in read.error
    assert len(memory) == 20
