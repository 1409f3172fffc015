"""Servers notice that a client is out of reach, although no packet tells them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from pdserve.rpc.channel import new_server, open_channel
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.engine_pb2_grpc import (
    EngineServiceServicer,
    EngineServiceStub,
    add_EngineServiceServicer_to_server,
)


class Talker(EngineServiceServicer):
    """Says one thing, and notes when its client is gone."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def Session(
        self, commands: AsyncIterator[pb.SessionCommand], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.SessionEvent]:
        try:
            yield pb.SessionEvent()
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.DrainResponse:
        raise AssertionError("nobody asks for it")


class Wire:
    """Carries bytes between a client and a server until it is cut, which neither end is told."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._whole = asyncio.Event()
        self._whole.set()
        self._carrying: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        self._whole.clear()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._carrying = {
            asyncio.create_task(self._carry(reader, far_writer)),
            asyncio.create_task(self._carry(far_reader, writer)),
        }

    async def close(self) -> None:
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._whole.wait()
                writer.write(data)
        finally:
            writer.close()


async def test_the_call_of_a_client_that_cannot_be_reached_any_more_ends() -> None:
    server, talker = new_server(keepalive=1.0, answer=1.0), Talker()
    add_EngineServiceServicer_to_server(talker, server)
    wire = Wire(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    proxy = await asyncio.start_server(wire.connect, "127.0.0.1", 0)
    channel = open_channel(f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
    try:
        call = EngineServiceStub(channel).Session()
        await call.read()
        wire.cut()
        async with asyncio.timeout(30):
            await talker.ended.wait()
    finally:
        await wire.close()
        await channel.close()
        proxy.close()
        await server.stop(None)
