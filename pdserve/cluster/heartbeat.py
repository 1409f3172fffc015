"""Signs of life of one engine incarnation, read from an EngineService session without requests."""

from collections.abc import AsyncGenerator
from contextlib import suppress

import grpc

from pdserve.core.endpoint import LoadSnapshot
from pdserve.core.errors import StaleEpoch
from pdserve.rpc import convert
from pdserve.rpc.channel import open_channel
from pdserve.rpc.generated.pdserve.v1.engine_pb2_grpc import EngineServiceStub


async def heartbeats(address: str, epoch: int) -> AsyncGenerator[LoadSnapshot, None]:
    """Load snapshots as they arrive; ends when the session does, for the caller to open another.

    Raises StaleEpoch when another incarnation answers at the address, MalformedMessage when something else
    does. Silence is for the caller to
    notice: a frozen engine keeps its session open.
    """
    channel = open_channel(address)
    try:
        with suppress(grpc.aio.AioRpcError):
            async for event in EngineServiceStub(channel).Session():
                if event.HasField("description") and event.description.epoch != epoch:
                    raise StaleEpoch(f"{address} is served by another incarnation of {event.description.engine_id}")
                if event.HasField("load"):
                    yield convert.load_from_proto(event.load)
    finally:
        await channel.close()
