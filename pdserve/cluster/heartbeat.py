"""Signs of life: of an engine, read from an EngineService session without requests; of a gateway, its answers."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

import grpc

from pdserve.core.endpoint import LoadSnapshot
from pdserve.core.errors import StaleEpoch
from pdserve.rpc import convert
from pdserve.rpc.channel import open_channel
from pdserve.rpc.generated.pdserve.v1.engine_pb2_grpc import EngineServiceStub

SignsOfLife = Callable[[str, int], AsyncGenerator[object, None]]
"""(address, epoch of the incarnation) → something per sign; it may end, to be called again."""

_ANSWER_TIMEOUT = 2.0


async def answers(address: str, epoch: int, *, every: float) -> AsyncGenerator[int, None]:
    """Status codes of GET /live, asked for again so many seconds after the last. Any is a sign of life: whose, is known
    by nobody else having the port."""
    while True:
        if (status := await http_status(address, "/live")) is not None:
            yield status
        await asyncio.sleep(every)


async def http_status(address: str, path: str) -> int | None:
    """Status code of one GET; None when there is no answer in time."""
    host, _, port = address.rpartition(":")
    with suppress(OSError, TimeoutError, ValueError, IndexError):
        async with asyncio.timeout(_ANSWER_TIMEOUT):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
                return int((await reader.readline()).split()[1])
            finally:
                writer.close()
    return None


async def heartbeats(address: str, epoch: int) -> AsyncGenerator[LoadSnapshot, None]:
    """Load snapshots as they arrive; ends when the session does, for the caller to open another.

    Raises StaleEpoch when another incarnation answers at the address, MalformedMessage when something else
    does. Silence is for the caller to
    notice: a frozen engine keeps its session open.
    """
    channel = open_channel(address)
    try:
        with suppress(grpc.aio.AioRpcError):
            async for message in EngineServiceStub(channel).Session():
                for event in message.events:
                    if event.HasField("description") and event.description.epoch != epoch:
                        raise StaleEpoch(f"{address} is served by another incarnation of {event.description.engine_id}")
                    if event.HasField("load"):
                        yield convert.load_from_proto(event.load)
    finally:
        await channel.close()
