"""The backend's thread: order, abandonment, survival of a backend's bugs."""

import queue
import threading

import numpy as np
import pytest

from pdserve.core.errors import TransferFailed
from pdserve.transfer.base import ReadPlan, TransferBackend, TransferState
from pdserve.transfer.copying import Copied
from pdserve.transfer.loopback import LoopbackBackend
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.pump import Flight, TransferPump
from tests.transfer_faults import FaultyBackend

SOON = 2.0


def plan(length: int = 8) -> ReadPlan:
    zero = np.zeros(1, dtype=np.uint64)
    return ReadPlan(local=zero, remote=zero, lengths=zero + np.uint64(length))


def flight(ends: "queue.Queue[str]") -> Flight:
    return Flight("p", plan(), ends.put)


def connected_backend() -> FaultyBackend:
    backend, source = FaultyBackend(LoopbackBackend()), LoopbackBackend()
    backend.register(HostMemory(64))
    source.register(HostMemory(64))
    backend.connect("p", source.metadata())
    return backend


def test_a_read_abandoned_while_the_thread_is_busy_never_starts() -> None:
    backend, busy = connected_backend(), threading.Event()
    pump, ends = TransferPump(backend), queue.Queue[str]()
    pump.call(lambda _: busy.wait(SOON))
    read = flight(ends)
    pump.post(read)
    read.abandon()
    busy.set()
    assert "before it started" in ends.get(timeout=SOON)
    assert (backend.posted, read.started) == (0, False)
    pump.close()
    assert pump.join(SOON)


def test_closing_lets_reads_in_flight_end_and_refuses_new_ones() -> None:
    backend = connected_backend()
    backend.held = True
    pump, ends = TransferPump(backend), queue.Queue[str]()
    pump.post(flight(ends))
    pump.call(lambda _: None).result(SOON)
    pump.close()
    assert not pump.join(0.05)
    pump.post(flight(ends))
    assert "closed" in ends.get(timeout=SOON)
    with pytest.raises(RuntimeError, match="closed"):
        pump.call(lambda _: None).result(SOON)
    backend.held = False
    assert ends.get(timeout=SOON) == ""
    assert pump.join(SOON)
    assert backend.closed


class BrokenBackend(LoopbackBackend):
    def post(self, peer_id: str, plan: ReadPlan) -> Copied:
        raise KeyError("bug")


def test_a_bug_in_a_backend_ends_the_read_and_not_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    pump, ends = TransferPump(BrokenBackend()), queue.Queue[str]()
    for _ in range(2):
        pump.post(flight(ends))
        assert "bug" in ends.get(timeout=SOON)
    assert "failed to post" in caplog.text

    def broken(backend: TransferBackend) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        pump.call(broken).result(SOON)
    pump.close()
    assert pump.join(SOON)


class BrokenPoll(Copied):
    def poll(self) -> TransferState:
        raise KeyError("bug")


class UnpollableBackend(LoopbackBackend):
    def post(self, peer_id: str, plan: ReadPlan) -> Copied:
        return BrokenPoll()


def test_a_thread_that_fails_tells_its_owner_and_ends_no_read_that_may_still_write(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pump, busy = TransferPump(UnpollableBackend()), threading.Event()
    begun, waiting, late = queue.Queue[str](), queue.Queue[str](), queue.Queue[str]()
    pump.call(lambda _: busy.wait(SOON))
    pump.post(flight(begun))
    pump.post(flight(waiting))
    asked = pump.call(lambda _: None)
    busy.set()
    assert "loopback transfer backend failed (KeyError" in str(pump.failure.result(SOON))
    assert "has failed" in waiting.get(timeout=SOON)
    with pytest.raises(TransferFailed, match="has failed"):
        asked.result(SOON)
    assert pump.join(SOON)
    pump.post(flight(late))
    assert "closed" in late.get(timeout=SOON)
    assert begun.empty()
    assert "Traceback" in caplog.text


def test_a_pump_that_ends_in_order_has_not_failed() -> None:
    pump = TransferPump(connected_backend())
    pump.close()
    assert pump.join(SOON)
    assert not pump.failure.done()


def test_spans_beyond_a_memory_are_refused_before_a_byte_is_copied() -> None:
    backend = connected_backend()
    backend.inner.post("p", plan(64))
    with pytest.raises(TransferFailed, match="beyond the 64 bytes"):
        backend.inner.post("p", plan(65))


def test_a_read_that_ends_in_the_call_that_posts_it_is_told_before_the_next_one_is_posted() -> None:
    backend, busy = connected_backend(), threading.Event()
    pump, order = TransferPump(backend), list[tuple[int, int]]()
    pump.call(lambda _: busy.wait(SOON))
    for number in (1, 2, 3):
        pump.post(Flight("p", plan(), lambda _, number=number: order.append((number, backend.posted))))  # type: ignore[misc]
    busy.set()
    pump.call(lambda _: None).result(SOON)
    assert order == [(1, 1), (2, 2), (3, 3)]
    pump.close()
    assert pump.join(SOON)
