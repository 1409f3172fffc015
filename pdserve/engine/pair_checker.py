"""Checking the way from a source engine to this one: test patterns in spare blocks, read and verified like KV.

The source fills blocks that its pool can spare with bytes drawn by a seed, digests them and holds them as long as the
call lasts. The target overwrites its own spare blocks with other bytes first, so that a read which moves nothing cannot
verify. Both sides take blocks as sequences do, and give them back whatever happens; a target's block that a
read may still write into is quarantined until it no longer is.
"""

import asyncio
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from secrets import randbits
from typing import Protocol

from pdserve.config.times import Times
from pdserve.core.errors import PdserveError, StaleEpoch, TransferFailed
from pdserve.core.pair_check import MachineFacts, PairCheck, SizeCheck, Transport, WireBytes
from pdserve.core.protocols import CheckedTransfer, PeerAddress, Pull, PullReceipt, PullSpec
from pdserve.core.shards import KVPart, plan_parts
from pdserve.engine.engine import Engine

MOST_BLOCKS = 64
MOST_BYTES = 64 << 20
PULLS_PER_SIZE = 9
SIZE_SECONDS = 0.5
"""How long one size is read again and again, at most."""
_SIZE_STEP = 4
_CARRIED = 0.5
"""A transport that received this part of the bytes, or more, carried them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What a source offers. digests[n][i] is over part i of the first n blocks, seeded with pattern_seed(seed, i)."""

    blocks: tuple[int, ...]
    digests: dict[int, tuple[bytes, ...]]
    facts: MachineFacts


class PatternSource(Protocol):
    """One incarnation of a source, as a target asks it. Implementation: gRPC (pair_check_service)."""

    def pattern(self, most_blocks: int, seed: int, parts: Sequence[KVPart]) -> AbstractAsyncContextManager[Pattern]:
        """A pattern that is held until the context ends. Raises PdserveError."""
        ...


def pattern_seed(seed: int, part: int) -> int:
    return (seed + part) % (1 << 64)


class PairChecker:
    """Both sides of checks, for one engine."""

    def __init__(self, engine: Engine, transfer: CheckedTransfer, times: Times) -> None:
        self._engine = engine
        self._transfer = transfer
        self._times = times
        self._checking = asyncio.Lock()
        self._settling: set[asyncio.Task[None]] = set()

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def kv_kind(self) -> str:
        return self._transfer.layout.group.kind.value

    @asynccontextmanager
    async def pattern(self, epoch: int, most_blocks: int, seed: int, parts: Sequence[KVPart]) -> AsyncIterator[Pattern]:
        """Offer a pattern; its blocks are held until the context ends. Raises PdserveError."""
        engine, transfer = self._engine, self._transfer
        if epoch != engine.endpoint.epoch:
            raise StaleEpoch(f"{engine.endpoint.engine_id} is another incarnation than the one asked for")
        blocks = engine.spare_blocks.borrow(min(most_blocks, self._most_blocks()))
        filling = asyncio.ensure_future(transfer.fill(blocks, seed))
        try:
            await asyncio.shield(filling)
            size, digests = transfer.layout.block_size, {}
            for count in _sizes(len(blocks)):
                digests[count] = tuple(
                    [
                        await transfer.digest(blocks[:count], count * size, pattern_seed(seed, number), part)
                        for number, part in enumerate(parts)
                    ]
                )
            yield Pattern(blocks=blocks, digests=digests, facts=await transfer.facts())
        finally:
            self._give_back(blocks, filling, ())

    async def measure(self, check: PairCheck, peer: PeerAddress, source: PatternSource) -> PairCheck:
        """Connect to the peer, read its pattern in several sizes, and add what was found to the check. One at a time;
        never raises for what the peer or the way to it can cause."""
        async with self._checking:
            try:
                check = replace(check, target_facts=await self._transfer.facts())
                check = replace(check, backend=await self._transfer.connect(peer))
                return await self._measure(check, peer, source)
            except PdserveError as error:
                return replace(check, error=(error.code, str(error)))

    async def close(self) -> None:
        for task in self._settling:
            task.cancel()
        await asyncio.gather(*self._settling, return_exceptions=True)

    async def _measure(self, check: PairCheck, peer: PeerAddress, source: PatternSource) -> PairCheck:
        parts = plan_parts(peer.shards, self._transfer.address.shards)
        seed = randbits(64)
        blocks = self._engine.spare_blocks.borrow(self._most_blocks())
        reads = _Reads(self._transfer, peer, parts, seed, self._times.transfer_deadline)
        filling = asyncio.ensure_future(self._transfer.fill(blocks, seed ^ 1))
        try:
            await asyncio.shield(filling)
            async with source.pattern(len(blocks), seed, parts) as pattern:
                check = replace(check, source_facts=pattern.facts)
                before = await self._transfer.wire_bytes()
                for count, digests in sorted(pattern.digests.items()):
                    found = await self._read_size(reads, pattern.blocks[:count], blocks, digests)
                    check = replace(check, sizes=(*check.sizes, found), backend=reads.backend)
                after = await self._transfer.wire_bytes()
            return replace(check, transport=transport_of(before, after, check))
        finally:
            self._give_back(blocks, filling, reads.unsettled)

    async def _read_size(
        self, reads: "_Reads", source: tuple[int, ...], spare: tuple[int, ...], digests: tuple[bytes, ...]
    ) -> SizeCheck:
        """Read again and again, each time from another place to another place."""
        clock, seconds = self._engine.clock, list[float]()
        receipts: list[list[PullReceipt]] = []
        begun = clock.monotonic()
        while len(seconds) < PULLS_PER_SIZE and (clock.monotonic() - begun < SIZE_SECONDS or not seconds):
            start = clock.monotonic()
            turn = len(seconds) % len(spare)
            targets = (spare[turn:] + spare[:turn])[: len(source)]
            receipts.append(await reads.read(source, targets, digests))
            seconds.append(clock.monotonic() - start)
        return SizeCheck(
            num_bytes=sum(receipt.num_bytes for receipt in receipts[0]),
            pulls=len(seconds),
            seconds=statistics.median(seconds),
            wire=statistics.median(max(receipt.wire_seconds for receipt in read) for read in receipts),
            verify=statistics.median(max(receipt.verify_seconds for receipt in read) for read in receipts),
        )

    def _most_blocks(self) -> int:
        return max(1, min(MOST_BLOCKS, MOST_BYTES // self._transfer.layout.block_bytes))

    def _give_back(self, blocks: tuple[int, ...], filling: "asyncio.Future[None]", pulls: Sequence[Pull]) -> None:
        """At once, or when neither we nor a read write into them any more."""
        if filling.done() and not pulls:
            self._engine.spare_blocks.give_back(blocks)
            return
        self._engine.spare_blocks.quarantine(blocks)
        task = asyncio.get_running_loop().create_task(self._settle(blocks, filling, pulls))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settle(self, blocks: tuple[int, ...], filling: "asyncio.Future[None]", pulls: Sequence[Pull]) -> None:
        await asyncio.wait({filling})
        for pull in pulls:
            pull.cancel()
            await pull.settled()
        self._engine.spare_blocks.give_back(blocks, quarantined=True)


class _Reads:
    """Verified reads of one pattern; unsettled are those that may still write."""

    def __init__(
        self, transfer: CheckedTransfer, peer: PeerAddress, parts: tuple[KVPart, ...], seed: int, deadline: float
    ) -> None:
        self._transfer, self._peer, self._parts, self._seed = transfer, peer, parts, seed
        self._deadline = deadline
        self.unsettled: list[Pull] = []
        self.backend = ""
        """What the last read really used, whatever the connection names first."""

    async def read(
        self, source: tuple[int, ...], target: tuple[int, ...], digests: tuple[bytes, ...]
    ) -> list[PullReceipt]:
        """All parts at once. Raises TransferError for the first that fails."""
        if len(digests) != len(self._parts):
            raise TransferFailed(f"{self._peer.engine_id} offered {len(digests)} digests for {len(self._parts)} parts")
        pulls = [
            self._transfer.pull(
                PullSpec(
                    peer=self._peer.engine_id,
                    epoch=self._peer.epoch,
                    source_blocks=source,
                    target_blocks=target,
                    digest=digests[number],
                    seed=pattern_seed(self._seed, number),
                    deadline=self._deadline,
                    start_within=self._deadline,
                    part=part,
                )
            )
            for number, part in enumerate(self._parts)
        ]
        self.unsettled = pulls
        receipts = await asyncio.gather(*(pull.wait() for pull in pulls))
        for pull in pulls:
            await pull.settled()
        self.unsettled = []
        self.backend = "+".join(dict.fromkeys(receipt.backend for receipt in receipts))
        return receipts


def transport_of(before: WireBytes, after: WireBytes, check: PairCheck) -> Transport:
    """Which counter grew by what was read; on one machine, bytes that no network counted were copied."""
    moved = sum(size.num_bytes * size.pulls for size in check.sizes)
    if after.tcp - before.tcp >= _CARRIED * moved:
        return Transport.TCP
    if after.rdma - before.rdma >= _CARRIED * moved:
        return Transport.RDMA
    source, target = check.source_facts, check.target_facts
    if source and target and source.boot_id and source.boot_id == target.boot_id:
        return Transport.MEMORY
    return Transport.UNKNOWN


def _sizes(num_blocks: int) -> list[int]:
    """Numbers of blocks to read: 1, 4, 16, … and all."""
    sizes = {num_blocks}
    count = 1
    while count < num_blocks:
        sizes.add(count)
        count *= _SIZE_STEP
    return sorted(sizes)
