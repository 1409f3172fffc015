"""RegistryService: the supervisor tells gateways which engines exist."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

import grpc

from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import MalformedMessage
from pdserve.rpc import convert
from pdserve.rpc.channel import new_server, open_channel
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.engine_pb2_grpc import (
    RegistryServiceServicer,
    RegistryServiceStub,
    add_RegistryServiceServicer_to_server,
)

_RECONNECT = 0.2
"""Seconds between attempts to reach a registry."""

_WatchContext = grpc.aio.ServicerContext[pb.WatchEndpointsRequest, AsyncIterator[pb.EndpointSet]]


class Registry(RegistryServiceServicer):
    """Serves the latest endpoint set on a loopback port. A slow watcher skips sets, never the latest."""

    def __init__(self, port: int = 0) -> None:
        self._port = port
        self._set = pb.EndpointSet(number=0)
        self._changed = asyncio.Event()
        self._server = new_server()
        self.address = ""

    async def start(self) -> None:
        add_RegistryServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{self._port}')}"
        await self._server.start()

    async def stop(self) -> None:
        """End all watches."""
        await self._server.stop(None)

    def publish(self, endpoints: tuple[Endpoint, ...]) -> None:
        """Replace the endpoint set and tell every watcher."""
        messages = [convert.endpoint_to_proto(endpoint) for endpoint in endpoints]
        self._set = pb.EndpointSet(number=self._set.number + 1, endpoints=messages)
        self._changed.set()
        self._changed = asyncio.Event()

    async def WatchEndpoints(
        self, request: pb.WatchEndpointsRequest, context: _WatchContext
    ) -> AsyncIterator[pb.EndpointSet]:
        while True:
            changed = self._changed
            yield self._set
            await changed.wait()


async def watch_endpoints(address: str) -> AsyncGenerator[tuple[Endpoint, ...], None]:
    """The endpoint set at once and after every change, for as long as the caller listens; a registry
    that cannot be reached, or speaks another protocol, is tried again, and meanwhile the last set stands."""
    channel = open_channel(address)
    try:
        while True:
            with suppress(grpc.aio.AioRpcError, MalformedMessage):
                async for message in RegistryServiceStub(channel).WatchEndpoints(pb.WatchEndpointsRequest()):
                    yield tuple(convert.endpoint_from_proto(endpoint) for endpoint in message.endpoints)
            await asyncio.sleep(_RECONNECT)
    finally:
        await channel.close()
