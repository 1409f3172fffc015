"""An engine without a model: it speaks the session protocol and answers every prompt with drawn tokens, a token per
request and step. What the front costs can be measured with it, apart from any engine.

`python -m benchmarks.front_engine` reads {"engine_id", "role", "pace", "vocab_size", "stores"} as JSON from stdin,
prints its endpoint as JSON, and runs until stdin ends. pace is the seconds a step takes; 0 is as fast as the session
takes them. One that stores tells of new blocks for every prompt, and of the oldest ones' removal when it is full.
"""

import asyncio
import json
import os
import random
import sys
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from pdserve.core.endpoint import Role
from pdserve.rpc.channel import new_server
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from pdserve.rpc.generated.pdserve.v1 import engine_pb2_grpc as pb_grpc

BLOCK_SIZE = 16
NUM_BLOCKS = 65_536
_HASH_BYTES = 16
HEARTBEAT = 0.5
LEASE = 10.0
_FIRST_DRAWN = 512
"""Ids below may be special tokens or single bytes; those are left out of the drawn ones."""

_Context = grpc.aio.ServicerContext[AsyncIterator[pb.SessionCommands], AsyncIterator[pb.SessionEvents]]


@dataclass(slots=True)
class _Running:
    request_id: str
    written: int
    max_tokens: int


class ScriptedEngine(pb_grpc.EngineServiceServicer):
    def __init__(self, engine_id: str, role: Role, pace: float, vocab_size: int, *, stores: bool) -> None:
        self._engine_id = engine_id
        self._role = role
        self._pace = pace
        self._random = random.Random(engine_id)
        self._vocab_size = vocab_size
        self.epoch = random.Random().getrandbits(63)
        self._loads = 0
        self._stored: deque[bytes] | None = deque() if stores else None
        self._kv_events = 0
        self.address = ""

    async def Session(
        self, commands: AsyncIterator[pb.SessionCommands], context: _Context
    ) -> AsyncIterator[pb.SessionEvents]:
        nothing_cached = pb.KVSnapshot(epoch=self.epoch, number=0, first=True, last=True)
        yield pb.SessionEvents(events=[self._description(), pb.SessionEvent(kv_snapshot=nothing_cached)])
        running: dict[str, _Running] = {}
        outbox: list[pb.SessionEvent] = [self._load(0)]
        fresh = asyncio.Event()
        fresh.set()
        tasks = [
            asyncio.create_task(self._obey(commands, running, outbox, fresh)),
            asyncio.create_task(self._beat(running, outbox, fresh)),
        ]
        try:
            while True:
                if not running:
                    await fresh.wait()
                fresh.clear()
                if running:
                    outbox.append(self._step(running))
                events = list(outbox)
                outbox.clear()
                yield pb.SessionEvents(events=events)
                if running:
                    await asyncio.sleep(self._pace)
        finally:
            for task in tasks:
                task.cancel()

    async def _obey(
        self,
        messages: AsyncIterator[pb.SessionCommands],
        running: dict[str, _Running],
        outbox: list[pb.SessionEvent],
        fresh: asyncio.Event,
    ) -> None:
        async for message in messages:
            for command in message.commands:
                if command.HasField("submit"):
                    submit = command.submit
                    if self._stored is not None and submit.handoff:
                        outbox.append(self._stores(self._stored, len(submit.request.prompt_token_ids) // BLOCK_SIZE))
                    if submit.handoff:
                        outbox += self._handed_over(submit.request)
                    else:
                        known = 1 if submit.HasField("ticket") else 0
                        request = submit.request
                        running[request.id] = _Running(request.id, known, request.sampling.max_tokens)
                elif command.HasField("cancel_request_id"):
                    running.pop(command.cancel_request_id, None)
            fresh.set()

    async def _beat(self, running: dict[str, _Running], outbox: list[pb.SessionEvent], fresh: asyncio.Event) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            outbox.append(self._load(len(running)))
            fresh.set()

    def _handed_over(self, request: pb.Request) -> list[pb.SessionEvent]:
        ticket = pb.TransferTicket(
            id=request.id,
            request_id=request.id,
            engine_id=self._engine_id,
            epoch=self.epoch,
            address=self.address,
            layout_hash=b"layout",
            num_tokens=len(request.prompt_token_ids),
            block_size=BLOCK_SIZE,
            lease=LEASE,
        )
        first = pb.TokenDelta(request_id=request.id, index=0, token_ids=[self._token()], finish_reason="handoff")
        return [pb.SessionEvent(ticket=ticket), self._event([first])]

    def _stores(self, stored: deque[bytes], num_blocks: int) -> pb.SessionEvent:
        new = [self._random.randbytes(_HASH_BYTES) for _ in range(num_blocks)]
        stored += new
        old = [stored.popleft() for _ in range(max(0, len(stored) - NUM_BLOCKS))]
        kinds = ((pb.KVChange.KIND_STORED, new), (pb.KVChange.KIND_REMOVED, old))
        changes = [pb.KVChange(kind=kind, hashes=b"".join(hashes)) for kind, hashes in kinds if hashes]
        first, self._kv_events = self._kv_events + 1, self._kv_events + len(changes)
        return pb.SessionEvent(kv_events=pb.KVEvents(epoch=self.epoch, first_number=first, changes=changes))

    def _step(self, running: dict[str, _Running]) -> pb.SessionEvent:
        deltas = []
        for sequence in list(running.values()):
            last = sequence.written + 1 >= sequence.max_tokens
            deltas.append(
                pb.TokenDelta(
                    request_id=sequence.request_id,
                    index=sequence.written,
                    token_ids=[self._token()],
                    finish_reason="length" if last else "",
                )
            )
            sequence.written += 1
            if last:
                del running[sequence.request_id]
        return self._event(deltas)

    def _event(self, deltas: list[pb.TokenDelta]) -> pb.SessionEvent:
        return pb.SessionEvent(step=pb.StepEvent(epoch=self.epoch, deltas=deltas))

    def _token(self) -> int:
        return self._random.randrange(_FIRST_DRAWN, self._vocab_size)

    def _description(self) -> pb.SessionEvent:
        return pb.SessionEvent(
            description=pb.EngineDescription(
                engine_id=self._engine_id,
                role=self._role.value,
                epoch=self.epoch,
                model_name="front",
                model_revision="front",
                max_model_len=8192,
                pid=os.getpid(),
                block_size=BLOCK_SIZE,
                num_blocks=NUM_BLOCKS,
                max_rows=4096,
                max_tokens_per_step=8192,
                prefix_caching=True,
            )
        )

    def _load(self, running: int) -> pb.SessionEvent:
        blocks = pb.BlockCounts(total=NUM_BLOCKS, free=NUM_BLOCKS)
        self._loads += 1
        return pb.SessionEvent(
            load=pb.LoadSnapshot(
                engine_id=self._engine_id, epoch=self.epoch, number=self._loads, running=running, blocks=blocks
            )
        )


async def main(told: dict[str, Any]) -> None:
    role = Role(told["role"])
    engine = ScriptedEngine(told["engine_id"], role, told["pace"], told["vocab_size"], stores=told["stores"])
    server = new_server()
    pb_grpc.add_EngineServiceServicer_to_server(engine, server)
    engine.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    print(json.dumps({"address": engine.address, "epoch": engine.epoch, "pid": os.getpid()}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.stdin.readline())))
