"""A process that holds KV memories for others to read, and reads others'. It is driven by lines of JSON over an
inherited socket.

Its stdout stays unused, so that a test can see whether a library wrote there.
"""

import asyncio
import socket
import sys
import time
from typing import Any

import msgspec
import numpy as np

from pdserve.core.errors import TransferError
from pdserve.core.layout import KVLayout
from pdserve.core.protocols import PeerAddress, PullSpec
from pdserve.transfer.backends import make_backends
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.probe import PROBE_AREA_BYTES
from pdserve.transfer.service import LocalTransferService


class Open(msgspec.Struct, tag=True):
    engine_id: str
    epoch: int
    layout: KVLayout
    backends: tuple[str, ...]
    fill: int
    """Seed of the random bytes the memory begins with."""


class Digest(msgspec.Struct, tag=True):
    index: int
    blocks: tuple[int, ...]
    num_tokens: int
    seed: int


class Write(msgspec.Struct, tag=True):
    index: int
    offset: int
    data: bytes


class Connect(msgspec.Struct, tag=True):
    index: int
    peer: PeerAddress


class Read(msgspec.Struct, tag=True):
    """Answered with the code of the error it ends with; empty when the bytes are there."""

    index: int
    spec: PullSpec


class CpuSeconds(msgspec.Struct, tag=True):
    pass


Command = Open | Digest | Write | Connect | Read | CpuSeconds


class Host:
    def __init__(self) -> None:
        self._opened: list[tuple[LocalTransferService, HostMemory]] = []

    async def answer(self, command: Command) -> Any:
        match command:
            case Open(engine_id, epoch, layout, names, fill):
                memory = HostMemory(layout.total_bytes + PROBE_AREA_BYTES)
                memory.array[: layout.total_bytes] = np.random.default_rng(fill).integers(
                    0, 256, layout.total_bytes, dtype=np.uint8
                )
                backends = make_backends(names, engine_id, epoch)
                service = await LocalTransferService.open(
                    engine_id=engine_id, epoch=epoch, layout=layout, memory=memory, backends=backends
                )
                self._opened.append((service, memory))
                return len(self._opened) - 1, service.address
            case Digest(index, blocks, num_tokens, seed):
                return await self._opened[index][0].digest(blocks, num_tokens, seed)
            case Write(index, offset, data):
                self._opened[index][1].array[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)
                return None
            case Connect(index, peer):
                return await self._opened[index][0].connect(peer)
            case Read(index, spec):
                try:
                    await self._opened[index][0].pull(spec).wait()
                except TransferError as error:
                    return error.code
                return ""
            case CpuSeconds():
                return time.process_time()


async def serve(fd: int) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd))
    host = Host()
    while line := await reader.readline():
        answer = await host.answer(msgspec.json.decode(line, type=Command))
        writer.write(msgspec.json.encode(answer) + b"\n")
        await writer.drain()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
