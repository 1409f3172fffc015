"""What the two ends of a two-sided pair say to each other besides the KV itself: msgpack frames over TCP.

The target speaks first and asks; a source that refuses closes the line, and so does either end that is gone::

    target → source  Hello(epoch, token)
    source → target  Welcome(port, piece size)  then both open the pair's communicator
    target → source  Ask(spans)
    source → target  Granted()                  then the source sends exactly their bytes on the communicator
"""

import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import msgspec
import numpy as np

from pdserve.core.errors import MalformedMessage
from pdserve.core.keepalive import keep_watch
from pdserve.core.msgpack import Natural, Port, unpack
from pdserve.transfer.base import Offsets

MAX_FRAME_BYTES = 1 << 24

_T = TypeVar("_T")
_LENGTH = struct.Struct("<I")
_WORDS = np.dtype("<u8")


class Hello(msgspec.Struct, frozen=True):
    epoch: Natural
    token: bytes


class Welcome(msgspec.Struct, frozen=True):
    """Where the communicator meets, and how many bytes each message on it carries (the last one fewer)."""

    store_port: Port
    piece_bytes: Natural


class Ask(msgspec.Struct, frozen=True):
    """Spans as little-endian 64-bit words."""

    offsets: bytes
    lengths: bytes

    @classmethod
    def of(cls, offsets: Offsets, lengths: Offsets) -> "Ask":
        return cls(offsets.astype(_WORDS).tobytes(), lengths.astype(_WORDS).tobytes())

    def spans(self) -> tuple[Offsets, Offsets]:
        """(offsets, lengths). Raises MalformedMessage when they are not whole words."""
        if len(self.offsets) % _WORDS.itemsize or len(self.lengths) % _WORDS.itemsize:
            raise MalformedMessage("spans are asked for in whole words")
        offsets, lengths = (np.frombuffer(data, dtype=_WORDS) for data in (self.offsets, self.lengths))
        return offsets.astype(np.uint64), lengths.astype(np.uint64)


class Granted(msgspec.Struct, frozen=True):
    """What was asked for is on its way: only now does the target wait on the communicator."""


class ControlLine:
    """One end of a pair's line; blocking. Used from one thread, except for close and when_ended."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        keep_watch(connection)

    @classmethod
    def open(cls, host: str, port: int, timeout: float) -> "ControlLine":
        """Raises OSError."""
        return cls(socket.create_connection((host, port), timeout))

    def set_timeout(self, seconds: float | None) -> None:
        """For what follows; None waits as long as the other end lives."""
        self._socket.settimeout(seconds)

    def send(self, frame: Hello | Welcome | Ask | Granted) -> None:
        """Raises OSError."""
        data = msgspec.msgpack.encode(frame)
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self, kind: type[_T]) -> _T:
        """The next frame. Raises OSError, EOFError at the line's end, MalformedMessage for anything but a kind."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise MalformedMessage(f"a control frame of {length} bytes cannot be right")
        return unpack(self._exactly(length), msgspec.msgpack.Decoder(kind))

    def when_ended(self, tell: Callable[[], object]) -> None:
        """Call tell, from a thread of its own, once either end has closed the line; a process that dies closes its
        own, and for a machine that dies the kernel does."""
        line = self._socket.dup()  # close may give the number of the first to another file
        threading.Thread(target=_await_end, args=(line, tell), name="kv-line-end", daemon=True).start()

    def close(self) -> None:
        """Also wakes a thread that waits in receive."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise EOFError("the other end closed the line")
            data += part
        return bytes(data)


def _await_end(line: socket.socket, tell: Callable[[], object]) -> None:
    ends = select.poll()
    ends.register(line, select.POLLRDHUP)
    ends.poll()
    line.close()
    tell()
