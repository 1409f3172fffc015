"""Listening for HTTP."""

import asyncio
import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil

import uvicorn
from starlette.types import ASGIApp

from pdserve.core.errors import ConfigError
from pdserve.gateway.protocol import abort_unread, bounded_protocol
from pdserve.gateway.settings import Patience

_BACKLOG = 2048
_KEEP_ALIVE = 75.0
"""Longer than a load balancer keeps an idle connection (60 s), so that it is the one to close."""
_PATIENCE = Patience()


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket; port 0 takes a free one. shared: other processes listen there, too, and the kernel gives each
    connection to one of them. Raises ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Accepted connections inherit it. Without, a token written before the client has acknowledged the event before
        # it waits for that acknowledgement, which clients put off for up to 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is in use; stop its owner or choose another port") from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


async def serve_http(
    app: ASGIApp,
    listener: socket.socket,
    stop: asyncio.Event,
    grace: float,
    leaving: asyncio.Event | None = None,
    patience: Patience = _PATIENCE,
) -> None:
    """Serve until stop is set, then give running responses grace seconds. Once leaving is set, connections end with the
    answer they carry, and those that carry none end at once. Owns the listener."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=bounded_protocol(patience.receive),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=ceil(_KEEP_ALIVE),
        timeout_graceful_shutdown=ceil(grace),
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    parting = asyncio.create_task(_part(server, leaving or stop))
    aborting = asyncio.create_task(abort_unread(server.server_state.connections, patience))
    try:
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
    finally:
        for task in (stopping, parting, aborting, serving):
            task.cancel()
        await asyncio.gather(serving, stopping, parting, aborting, return_exceptions=True)
        listener.close()


async def _part(server: uvicorn.Server, leaving: asyncio.Event) -> None:
    await leaving.wait()
    for connection in list(server.server_state.connections):
        connection.shutdown()


class _Server(uvicorn.Server):
    """Leaves the process's signal handlers to the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
