"""What a two-sided backend's target does when its source goes away unnoticed by the library between them."""

import errno
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from pdserve.transfer.base import ReadPlan, Transfer, TransferState
from pdserve.transfer.communicator import STALL, Communicator
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.pair_control import ControlLine
from pdserve.transfer.two_sided import TwoSidedBackend

NUM_BYTES = 1 << 16
SOON = STALL.total_seconds() / 2
PROBES = {socket.TCP_KEEPIDLE: 1, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 3, socket.TCP_USER_TIMEOUT: 4000}


@contextmanager
def opened(epoch: int) -> Iterator[TwoSidedBackend]:
    memory, backend = HostMemory(NUM_BYTES), TwoSidedBackend("gloo", "127.0.0.1", epoch)
    backend.register(memory)
    yield backend
    backend.close()
    memory.close()


def post(target: TwoSidedBackend) -> Transfer:
    zero, whole = np.zeros(1, dtype=np.uint64), np.array([NUM_BYTES], dtype=np.uint64)
    return target.post("source", ReadPlan(zero, zero, whole))


def ended(read: Transfer) -> TransferState:
    """How it has ended, soon."""
    deadline, pause = time.monotonic() + SOON, threading.Event()
    while (state := read.poll()) is TransferState.IN_PROGRESS and time.monotonic() < deadline:
        pause.wait(0.005)
    return state


def test_reads_of_a_source_that_has_gone_end_at_once_though_the_library_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, gone = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        waits.set()
        assert gone.wait(60)
        raise RuntimeError("timed out")

    with opened(1) as source, opened(2) as target:
        target.connect("source", source.metadata()).result(30)
        monkeypatch.setattr(Communicator, "wait", wait)
        reads = [post(target), post(target)]
        assert waits.wait(30)
        source.close()
        assert [ended(read) for read in reads] == [TransferState.ERROR] * 2
        assert ended(post(target)) is TransferState.ERROR, "it does not wait behind the first"
        gone.set()


def test_both_ends_of_a_line_watch_for_the_end_of_the_other_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
        ends = ControlLine.open("127.0.0.1", port, SOON), ControlLine(listener.accept()[0])
        for end in ends:
            line = end._socket
            assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            probes = (line.getsockopt(socket.IPPROTO_TCP, option) for option in PROBES)
            assert dict(zip(PROBES, probes, strict=True)) == PROBES
            end.close()


def test_a_source_that_could_not_take_a_target_on_takes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    accept, refusals = socket.socket.accept, [errno.ECONNABORTED, errno.EMFILE]

    def refuse_first(listener: socket.socket) -> tuple[socket.socket, object]:
        if refusals:
            raise OSError(refusals.pop(), "no connection")
        return accept(listener)

    with opened(1) as source, opened(2) as first, opened(3) as second:
        monkeypatch.setattr(socket.socket, "accept", refuse_first)
        first.connect("source", source.metadata()).result(30)
        second.connect("source", source.metadata()).result(30)
        assert not refusals
        assert ended(post(second)) is TransferState.DONE
