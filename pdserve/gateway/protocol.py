"""HTTP connections that no client can hold, or fill with anything but bodies, for longer than it may."""

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pdserve.gateway.settings import Patience

if TYPE_CHECKING:
    from uvicorn.server import Protocols

MAX_HEADER_BYTES = 64 * 1024
TOO_LARGE = f"the headers are longer than {MAX_HEADER_BYTES} bytes"
_MAX_BYTES_BESIDE_BODIES = 2 * MAX_HEADER_BYTES
"""Headers above the limit whose end comes soon get their answer from the application, and the connection stays."""


def _too_large() -> bytes:
    error = {"message": TOO_LARGE, "type": "invalid_request_error", "param": None, "code": "too_large"}
    body = orjson.dumps({"error": error})
    head = "HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


_ANSWER = _too_large()


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection that brings no whole headers for receive_timeout seconds while none of its requests is worked
    on, or that brings too much besides bodies: headers, trailers, and what stands between chunks.

    The application bounds the bodies that it reads. What comes of a body after its answer is dropped, in that time.
    """

    receive_timeout = 60.0
    _bytes_beside_bodies = 0
    _in_message = False
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._await_message()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cease_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # The callbacks set it back: of the bytes that come with the beginning of a message none are counted, since
        # those before it may be the end of a body.
        self._bytes_beside_bodies += len(data)
        super().data_received(data)
        if self._bytes_beside_bodies > _MAX_BYTES_BESIDE_BODIES:
            self._refuse()
        elif self._answered and not self.transport.is_closing():
            self._keep_time()

    def on_message_begin(self) -> None:
        self._bytes_beside_bodies = 0
        self._in_message = True
        self._cease_waiting()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._bytes_beside_bodies = 0
        self._cease_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._bytes_beside_bodies = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        self._cease_waiting()
        super().on_message_complete()

    @property
    def _answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _keep_time(self) -> None:
        # The base class has ended the time of the idle connection, whatever the data was.
        if self._in_message:
            if self._due is None:
                self._await_message()
        elif self.cycle is not None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _await_message(self) -> None:
        self._due = self.loop.call_later(self.receive_timeout, self.transport.close)

    def _cease_waiting(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _refuse(self) -> None:
        if self._answered:
            self.transport.write(_ANSWER)
        self.transport.close()


def bounded_protocol(receive_timeout: float) -> type[BoundedProtocol]:
    """The connections of one server."""
    return type("Connection", (BoundedProtocol,), {"receive_timeout": receive_timeout})


async def abort_unread(connections: "Collection[Protocols]", patience: Patience) -> None:
    """Run for as long as the server: abort connections whose clients read nothing of what was written for them.

    Without, a transport that is closed stays until its client has read the rest, and an answer for which there is no
    room behind another waits as long."""
    seen: dict[Protocols, tuple[int, int]] = {}
    while True:
        await asyncio.sleep(patience.close)
        unread: dict[Protocols, tuple[int, int]] = {}
        for connection in connections:
            if size := connection.transport.get_write_buffer_size():
                before, times = seen.get(connection, (size, -1))
                unread[connection] = size, times + 1 if size == before else 0
        for connection, (_, times) in unread.items():
            allowed = patience.close if connection.transport.is_closing() else patience.send
            if times * patience.close >= allowed:
                connection.transport.abort()
        seen = unread
