"""A decode engine's transfer side without a model, and the raw reads it is compared with."""

import asyncio
import base64
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from benchmarks.transfer_source import EPOCH, bench_layout
from pdserve.config.times import Times
from pdserve.core.clock import SystemClock
from pdserve.core.protocols import PeerAddress
from pdserve.core.ticket import TransferTicket
from pdserve.engine.handoff_target import FetchOutcome, HandoffTarget
from pdserve.engine.regions import next_region
from pdserve.engine.server import grpc_links
from pdserve.engine.source_links import SourceLinks
from pdserve.transfer.backends import make_backends
from pdserve.transfer.base import ReadPlan, TransferState
from pdserve.transfer.digest import region_digest
from pdserve.transfer.lanes import OFFER
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.plan import plan_read
from pdserve.transfer.service import LocalTransferService

TIMES = Times(lease=60, transfer_deadline=30)
ROOT = Path(__file__).parents[1]
Blocks = list[int]


@dataclass(frozen=True)
class Handoff:
    """seconds from the attach to the last verified block; after_last: from the last chunk on; since_first: from the
    first ready region on."""

    seconds: float
    after_last: float
    since_first: float


class Target:
    """Owns the source's process and everything here. Open with `open`, end with `close`."""

    def __init__(self, process: "subprocess.Popen[str]", peer: PeerAddress, layout_kib: int, backend: str) -> None:
        self.layout = bench_layout(layout_kib)
        self.memory = HostMemory(self.layout.total_bytes)
        self.memory.array[:] = 0
        self._process, self._peer, self.backend_name = process, peer, backend
        self._numbers = itertools.count(1)
        self._outcomes: dict[int, asyncio.Future[FetchOutcome]] = {}

    @classmethod
    async def open(
        cls,
        backend: str,
        block_kib: int,
        host: str = "127.0.0.1",
        source_host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> Self:
        command = [*prefix, sys.executable, "-m", "benchmarks.transfer_source", source_host, backend, str(block_kib)]
        process = _spawn(command)
        assert process.stdout
        peer = msgspec.msgpack.decode(
            base64.b64decode(await asyncio.to_thread(process.stdout.readline)), type=PeerAddress
        )
        self = cls(process, peer, block_kib, backend)
        await self._start(host)
        return self

    async def _start(self, host: str) -> None:
        name = self.backend_name
        self.service = await LocalTransferService.open(
            engine_id="d",
            epoch=9,
            layout=self.layout,
            memory=self.memory,
            backends=make_backends((name,), "d", 9, host),
        )
        clock = SystemClock()
        self._links = SourceLinks(
            open_link=grpc_links(self.service, TIMES, clock),
            disconnect=self.service.disconnect,
            times=TIMES,
            clock=clock,
        )
        self._handoff = HandoffTarget(
            transfer=self.service,
            links=self._links,
            times=TIMES,
            clock=clock,
            on_outcome=lambda number, outcome: self._outcomes.pop(number).set_result(outcome),
            on_settled=lambda _: None,
        )
        (self.raw,) = make_backends((name,), "raw", 11, host)
        self.raw.register(self.memory)
        offer = OFFER.decode(dict(self._peer.ranks[0].backends)[name])
        self.raw.connect("p", offer.metadata)

    @property
    def source_pid(self) -> int:
        return self._process.pid

    async def ask(self, **command: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(await asyncio.to_thread(self._process.stdout.readline))

    def plans(self, source: Blocks, target: Blocks) -> list[tuple[ReadPlan, Blocks]]:
        """One read per region, as a source publishes them."""
        layout, parts, first = self.layout, list[tuple[Blocks, Blocks]](), 0
        while first < len(source):
            end = first + next_region(layout.block_bytes, first, len(source) - first)
            parts.append((source[first:end], target[first:end]))
            first = end
        return [
            (plan_read(layout, layout.whole_blocks(tuple(s)), layout, layout.whole_blocks(tuple(t))), t)
            for s, t in parts
        ]

    def read(self, source: Blocks, target: Blocks, *, digest: bool) -> float:
        """Seconds of plain reads, region after region, each digested in the same thread or not at all."""
        plans = self.plans(source, target)
        begun = time.perf_counter()
        for plan, blocks in plans:
            transfer = self.raw.post("p", plan)
            while (state := transfer.poll()) is TransferState.IN_PROGRESS:
                time.sleep(20e-6)
            assert state is TransferState.DONE, transfer.error
            if digest:
                region_digest(self.memory, self.layout, self.layout.whole_blocks(tuple(blocks)), 5)
        return time.perf_counter() - begun

    async def handoff(
        self, source: Blocks, target: Blocks, *, chunks: int = 1, chunk_seconds: float = 0.0, bulk: bool = False
    ) -> Handoff:
        """Over the real link: ticket, regions digested at the source, verified pulls, release. bulk attaches only when
        the source has computed everything."""
        number = next(self._numbers)
        ticket_id = f"t{number}"
        answer = await self.ask(op="issue", ticket=ticket_id, blocks=source, chunks=chunks, chunk_seconds=chunk_seconds)
        ticket = msgspec.msgpack.decode(base64.b64decode(answer), type=TransferTicket)
        self._outcomes[number] = arriving = asyncio.get_running_loop().create_future()
        self._handoff.hold(number, ticket)
        if bulk:
            last = (await self.ask(op="last", ticket=ticket_id))["last_chunk"]
        begun = time.monotonic()
        self._handoff.fetch(number, dict(enumerate(target)))
        outcome = await arriving
        ended = time.monotonic()
        if outcome.error:
            raise outcome.error
        if not bulk:
            last = (await self.ask(op="last", ticket=ticket_id))["last_chunk"]
        first_ready = last if bulk else last - (chunks - 1) * chunk_seconds
        return Handoff(ended - begun, ended - last, ended - max(first_ready, begun))

    async def close(self) -> None:
        await self._handoff.close()
        await self._links.close()
        self.raw.close()
        await self.service.close()
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        await asyncio.to_thread(self._process.wait, 20)
        self._process.stdout.close()


def _spawn(command: list[str]) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def check_bytes(target: Target, source_blocks: Blocks, target_blocks: Blocks) -> None:
    """Every byte arrived: the source's content is known by its seed."""
    size = target.layout.block_bytes
    expected = np.random.default_rng(EPOCH).integers(0, 256, target.layout.total_bytes, dtype=np.uint8)
    for source, block in zip(source_blocks, target_blocks, strict=True):
        there, here = (
            expected[source * size : (source + 1) * size],
            target.memory.array[block * size : (block + 1) * size],
        )
        assert np.array_equal(there, here)
