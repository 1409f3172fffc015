"""A prefill engine's transfer side without a model, in a process of its own: prompts become final on a schedule.

Driven by lines of JSON. Answers are lines of JSON on stdout.
"""

import asyncio
import base64
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import grpc
import msgspec
import numpy as np
import uvloop

from pdserve.config.times import Times
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.core.layout import KVGroup, KVLayout
from pdserve.engine.handoff_source import HandoffSource
from pdserve.engine.server import HandoffService
from pdserve.rpc.generated.pdserve.v1 import engine_pb2_grpc as pb_grpc
from pdserve.transfer.backends import make_backends
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.service import LocalTransferService

NUM_BLOCKS = 2048
EPOCH = 7


def bench_layout(block_kib: int) -> KVLayout:
    """Blocks of block_kib KiB: 16 tokens of 8 layers with KV heads of 64 bf16."""
    group = KVGroup(num_layers=8, num_kv_heads=block_kib // 32, head_dim=64, dtype="bfloat16")
    return KVLayout(group=group, block_size=16, num_blocks=NUM_BLOCKS * 256 // block_kib, model_revision="bench")


@dataclass
class SourceEngine:
    """What the handoff service needs of an engine."""

    endpoint: Endpoint
    transfer: LocalTransferService
    source: HandoffSource


class Host:
    def __init__(self, engine: SourceEngine) -> None:
        self._engine = engine
        self._sequences = 0
        self._producing: dict[str, asyncio.Task[float]] = {}

    async def answer(self, command: dict[str, Any]) -> Any:
        if command["op"] == "issue":
            return self._issue(**{key: value for key, value in command.items() if key != "op"})
        return {"last_chunk": await self._producing.pop(command["ticket"])}

    def _issue(self, ticket: str, blocks: list[int], chunks: int, chunk_seconds: float) -> str:
        """Lease blocks to a ticket; they become final in equal chunks, chunk_seconds apart."""
        self._sequences += 1
        tokens = len(blocks) * self._engine.transfer.layout.block_size
        issued = self._engine.source.issue(ticket, self._sequences, ticket, tokens, tuple(blocks))
        work = self._produce(self._sequences, tokens, chunks, chunk_seconds)
        self._producing[ticket] = asyncio.create_task(work)
        return base64.b64encode(msgspec.msgpack.encode(issued)).decode()

    async def _produce(self, sequence: int, tokens: int, chunks: int, chunk_seconds: float) -> float:
        """The monotonic time at which the last chunk was final."""
        begun = time.monotonic()
        for chunk in range(1, chunks + 1):
            await asyncio.sleep(begun + chunk * chunk_seconds - time.monotonic() if chunk_seconds else 0)
            final = time.monotonic()
            self._engine.source.computed(sequence, tokens * chunk // chunks)
        self._engine.source.prefilled(sequence, 42, finished=False)
        return final


async def main(host: str, backend: str, block_kib: int) -> None:
    layout = bench_layout(block_kib)
    memory = HostMemory(layout.total_bytes)
    memory.array[:] = np.random.default_rng(EPOCH).integers(0, 256, layout.total_bytes, dtype=np.uint8)
    transfer = await LocalTransferService.open(
        engine_id="p", epoch=EPOCH, layout=layout, memory=memory, backends=make_backends((backend,), "p", EPOCH, host)
    )
    server = grpc.aio.server()
    port = server.add_insecure_port(f"{host}:0")
    endpoint = Endpoint(
        engine_id="p", role=Role.PREFILL, epoch=EPOCH, address=f"{host}:{port}", pid=0, state=EngineState.READY
    )
    source = HandoffSource(
        endpoint=endpoint,
        transfer=transfer,
        times=Times(lease=60),
        clock=SystemClock(),
        on_end=lambda *_: None,
        on_caught_up=lambda _: None,
    )
    engine = SourceEngine(endpoint, transfer, source)
    pb_grpc.add_HandoffServiceServicer_to_server(HandoffService(engine), server)
    await server.start()
    print(base64.b64encode(msgspec.msgpack.encode(transfer.address)).decode(), flush=True)
    reader = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    service = Host(engine)
    while line := await reader.readline():
        print(json.dumps(await service.answer(json.loads(line))), flush=True)
    await server.stop(0)
    await source.close()
    await transfer.close()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
