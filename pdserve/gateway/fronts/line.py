"""One end of the line between a front and its gateway."""

import asyncio
import struct
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import msgspec
import structlog

from pdserve.core.errors import MalformedMessage
from pdserve.core.msgpack import unpack

_log = structlog.get_logger(__name__)

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 28
MAX_UNREAD_BYTES = 1 << 28
"""Said but not read: requests have limits of their own, so only an end that has stopped lets so much gather."""

Said = TypeVar("Said")
Heard = TypeVar("Heard")


class Line(asyncio.Protocol, Generic[Said, Heard]):
    """Frames of msgpack, each after its length: the messages that were said in one turn of the event loop, in order.

    hear gets every frame; lost is called once, when the other end is gone, says nonsense or has stopped reading.
    """

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[list[Heard]],
        hear: Callable[[list[Heard]], None],
        lost: Callable[[], None],
    ) -> None:
        self._decoder = decoder
        self._hear = hear
        self._lost = lost
        self._encoder = msgspec.msgpack.Encoder()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._said: list[msgspec.Raw] = []
        self._unread = bytearray()
        self.closed: asyncio.Future[None] = self._loop.create_future()

    def say(self, message: Said) -> None:
        """A message as it is at this moment; goes out in this turn of the event loop, or into the void when the line is
        lost. Raises what msgspec raises for one that cannot be encoded."""
        encoded = msgspec.Raw(self._encoder.encode(message))
        if self.closed.done():
            return
        if not self._said:
            self._loop.call_soon(self._flush)
        self._said.append(encoded)

    def close(self) -> None:
        """Hang up, when all that was said has gone out."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._unread += data
        try:
            while (frame := self._next_frame()) is not None:
                self._hear(unpack(frame, self._decoder))
        except MalformedMessage as error:
            _log.error("nonsense between a front and its gateway", error=str(error))
            self._cut()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if not self.closed.done():
            self.closed.set_result(None)
        self._lost()

    def _next_frame(self) -> bytes | None:
        if len(self._unread) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._unread)
        if length > MAX_FRAME_BYTES:
            raise MalformedMessage(f"a frame of {length} bytes cannot be right")
        end = _LENGTH.size + length
        if len(self._unread) < end:
            return None
        frame = bytes(memoryview(self._unread)[_LENGTH.size : end])
        del self._unread[:end]
        return frame

    def _flush(self) -> None:
        if self._transport is None or not self._said:
            return  # what was said before there is a connection waits for it
        said, self._said = self._said, []
        data = self._encoder.encode(said)
        self._transport.write(_LENGTH.pack(len(data)) + data)
        if self._transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            _log.error("the other end of the line between a front and its gateway does not read")
            self._cut()

    def _cut(self) -> None:
        if self._transport is not None:
            self._transport.abort()
