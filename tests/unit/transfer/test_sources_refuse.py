"""What a source of the backends with a protocol of their own does not serve, and how they survive bad peers."""

import socket
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from pdserve.core.errors import MalformedMessage, TransferFailed
from pdserve.transfer.base import ReadPlan, Transfer, TransferBackend, TransferState
from pdserve.transfer.grpc_stream import GrpcStreamBackend
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.two_sided import TwoSidedBackend

NBYTES = 1024
SOON = 10.0


def make(name: str, epoch: int) -> TransferBackend:
    return GrpcStreamBackend("127.0.0.1", epoch) if name == "grpc" else TwoSidedBackend("gloo", "127.0.0.1", epoch)


@pytest.fixture(params=["grpc", "gloo"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[TransferBackend, TransferBackend]]:
    """A source whose bytes are all 7 and a target whose bytes are all 0."""
    backends = make(request.param, 1), make(request.param, 2)
    for backend, fill in zip(backends, (7, 0), strict=True):
        memory = HostMemory(NBYTES)
        memory.array[:] = fill
        backend.register(memory)
    yield backends
    for backend in reversed(backends):
        backend.close()


def plan(offset: int, length: int = 16) -> ReadPlan:
    zero = np.zeros(1, dtype=np.uint64)
    return ReadPlan(local=zero, remote=zero + np.uint64(offset), lengths=zero + np.uint64(length))


def end_of(transfer: Transfer) -> TransferState:
    until = time.monotonic() + SOON
    while (state := transfer.poll()) is TransferState.IN_PROGRESS:
        assert time.monotonic() < until
        time.sleep(0.002)
    return state


def altered(metadata: bytes, **changes: object) -> bytes:
    fields: dict[str, object] = msgspec.msgpack.decode(metadata)
    return msgspec.msgpack.encode(fields | changes)


def test_another_epoch_or_a_wrong_token_connects_nobody(ends: tuple[TransferBackend, TransferBackend]) -> None:
    source, target = ends
    for changes in ({"epoch": 3}, {"token": bytes(16)}, {"token": b""}):
        with pytest.raises(TransferFailed):
            target.connect("p", altered(source.metadata(), **changes)).result(SOON)
    with pytest.raises(MalformedMessage):
        target.connect("p", b"\xc1")
    with pytest.raises(TransferFailed, match="not connected"):
        target.post("p", plan(0))


def test_spans_outside_the_memory_are_refused_and_the_next_read_works(
    ends: tuple[TransferBackend, TransferBackend],
) -> None:
    source, target = ends
    target.connect("p", source.metadata()).result(SOON)
    for offset in (NBYTES, NBYTES - 15, 2**64 - 8):
        assert end_of(target.post("p", plan(offset))) is TransferState.ERROR
    assert end_of(target.post("p", plan(NBYTES - 16))) is TransferState.DONE


def test_no_bytes_are_no_problem(ends: tuple[TransferBackend, TransferBackend]) -> None:
    source, target = ends
    target.connect("p", source.metadata()).result(SOON)
    assert end_of(target.post("p", plan(0, length=0))) is TransferState.DONE


def hung_up(line: socket.socket) -> bool:
    """Whether the other side closes, or resets because it left bytes unread, within the socket's deadline."""
    try:
        line.shutdown(socket.SHUT_WR)
        return line.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_a_gloo_source_survives_whatever_connects_to_it() -> None:
    source, target = make("gloo", 1), make("gloo", 2)
    for backend in (source, target):
        backend.register(HostMemory(NBYTES))
    port = msgspec.msgpack.decode(source.metadata())["port"]
    for greeting in (b"", b"\xff\xff\xff\xff", b"\x02\x00\x00\x00\xc1\xc1", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), SOON) as line:
            line.sendall(greeting)
            assert hung_up(line), "the source hangs up"
    target.connect("p", source.metadata()).result(SOON)
    assert end_of(target.post("p", plan(0))) is TransferState.DONE
    target.close()
    source.close()
