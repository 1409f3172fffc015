"""An engine's outside without an engine inside, or a gateway's: a session that heartbeats or answers to GET, under the
supervisor's tests."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Mapping
from pathlib import Path
from typing import Any

import grpc

from pdserve.core.errors import CheckpointError
from pdserve.launch.child import Parent, run_child
from pdserve.rpc.channel import new_server
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from pdserve.rpc.generated.pdserve.v1 import engine_pb2_grpc as pb_grpc
from pdserve.rpc.generated.pdserve.v1 import scaler_pb2, scaler_pb2_grpc

_SessionContext = grpc.aio.ServicerContext[AsyncIterator[pb.SessionCommands], AsyncIterator[pb.SessionEvents]]

_DrainContext = grpc.aio.ServicerContext[pb.DrainRequest, Awaitable[pb.DrainResponse]]

_RoleContext = grpc.aio.ServicerContext[scaler_pb2.SetRoleRequest, Awaitable[scaler_pb2.SetRoleResponse]]


class Heartbeats(pb_grpc.EngineServiceServicer):
    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    async def Session(
        self, commands: AsyncIterator[pb.SessionCommands], context: _SessionContext
    ) -> AsyncIterator[pb.SessionEvents]:
        description = pb.EngineDescription(engine_id="p", epoch=self._epoch, pid=os.getpid())
        yield pb.SessionEvents(events=[pb.SessionEvent(description=description)])
        while True:
            load = pb.LoadSnapshot(engine_id="p", epoch=self._epoch)
            yield pb.SessionEvents(events=[pb.SessionEvent(load=load)])
            await asyncio.sleep(0.1)

    async def Drain(self, request: pb.DrainRequest, context: _DrainContext) -> pb.DrainResponse:
        return pb.DrainResponse(drained=True)


class AnyRole(scaler_pb2_grpc.RoleServiceServicer):
    async def SetRole(self, request: scaler_pb2.SetRoleRequest, context: _RoleContext) -> scaler_pb2.SetRoleResponse:
        return scaler_pb2.SetRoleResponse()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    await writer.drain()
    writer.close()


async def existence(path: str | None) -> None:
    """Of a file, if one is named."""
    while path and not await asyncio.to_thread(Path(path).exists):
        await asyncio.sleep(0.02)


async def main(payload: Mapping[str, Any], parent: Parent, drain: asyncio.Event) -> None:
    behaviour = payload.get("behaviour", "")
    if behaviour == "refuse":
        await existence(payload.get("when"))
        raise CheckpointError("no config.json")
    if behaviour == "gateway":
        listener = await asyncio.start_server(answer, "127.0.0.1", 0)
        probe = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        parent.ready(address=payload.get("address", probe), probe=probe)
    elif behaviour != "silent":
        server = new_server()
        epoch = payload["epoch"] ^ 1 if behaviour == "impostor" else payload["epoch"]
        pb_grpc.add_EngineServiceServicer_to_server(Heartbeats(epoch), server)
        scaler_pb2_grpc.add_RoleServiceServicer_to_server(AnyRole(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        parent.ready(address=f"127.0.0.1:{port}")
    if behaviour == "stubborn":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)
    await drain.wait()
    await existence(payload.get("lasts_until"))


if __name__ == "__main__":
    run_child(main)
