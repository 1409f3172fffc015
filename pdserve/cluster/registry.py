"""RegistryService: the supervisor tells gateways which engines exist, and gateways pass on what operators want of
them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from enum import StrEnum

import grpc

from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import MalformedMessage, PdserveError, Unavailable, from_wire
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

_ORDER_TIMEOUT = 5.0
"""Seconds a gateway waits for the supervisor to obey."""


class EngineOrder(StrEnum):
    """What an operator may want of one engine: that it drains and ends, to start again (RESTART) or to stay away
    (LEAVE) until it is to RETURN."""

    RESTART = "restart"
    LEAVE = "leave"
    RETURN = "return"


Obey = Callable[[str, EngineOrder], None]
"""Begins to carry an order out for an engine id. Raises PdserveError to refuse."""

_ORDERS: dict[EngineOrder, pb.EngineOrder.Kind] = {
    EngineOrder.RESTART: pb.EngineOrder.KIND_RESTART,
    EngineOrder.LEAVE: pb.EngineOrder.KIND_LEAVE,
    EngineOrder.RETURN: pb.EngineOrder.KIND_RETURN,
}
_FROM_ORDERS = {number: order for order, number in _ORDERS.items()}

_OrderContext = grpc.aio.ServicerContext[pb.EngineOrder, Awaitable[pb.EngineOrderResponse]]
_WatchContext = grpc.aio.ServicerContext[pb.WatchEndpointsRequest, AsyncIterator[pb.EndpointSet]]


class Registry(RegistryServiceServicer):
    """Serves the latest endpoint set on a loopback port. A slow watcher skips sets, never the latest."""

    def __init__(self, port: int = 0) -> None:
        self.obey: Obey = _refuse
        self._set = pb.EndpointSet(number=0)
        self._changed = asyncio.Event()
        self._server = new_server()
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"

    def add(self, register: Callable[[grpc.aio.Server], None]) -> None:
        """Have another service answer at the same address. Before start."""
        register(self._server)

    async def start(self) -> None:
        add_RegistryServiceServicer_to_server(self, self._server)
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

    async def OrderEngine(self, request: pb.EngineOrder, context: _OrderContext) -> pb.EngineOrderResponse:
        try:
            order = _FROM_ORDERS.get(request.kind)
            if order is None:
                raise MalformedMessage(f"an order of kind {request.kind} is not known to this version")
            self.obey(request.engine_id, order)
        except PdserveError as error:
            return pb.EngineOrderResponse(error_code=error.code, error_message=str(error))
        return pb.EngineOrderResponse()


def _refuse(engine_id: str, order: EngineOrder) -> None:
    raise Unavailable("nobody carries out orders here")


async def order_engine(address: str, engine_id: str, order: EngineOrder) -> None:
    """Have the supervisor behind a registry obey. Raises what it refuses with, Unavailable when it does not answer."""
    channel = open_channel(address)
    try:
        message = pb.EngineOrder(engine_id=engine_id, kind=_ORDERS[order])
        answer = await RegistryServiceStub(channel).OrderEngine(message, timeout=_ORDER_TIMEOUT)
    except grpc.aio.AioRpcError:
        raise Unavailable("the supervisor does not answer; try again in a few seconds") from None
    finally:
        await channel.close()
    if answer.error_code:
        raise from_wire(answer.error_code, answer.error_message)


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
