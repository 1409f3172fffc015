"""The KV-transfer service of one rank: owns its KV memory, lets peers read it, pulls and verifies theirs."""

import asyncio
import logging
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec
import numpy as np

from pdserve.core.clock import Clock, SystemClock
from pdserve.core.errors import EngineDied, LayoutMismatch, StaleEpoch, TransferError, TransferFailed, Unsupported
from pdserve.core.layout import KVLayout, KVRegion
from pdserve.core.pair_check import MachineFacts, WireBytes
from pdserve.core.protocols import PeerAddress, Pull, PullSpec, RankAddress
from pdserve.core.shards import KVPart, KVShard, sole_shard
from pdserve.transfer.base import TransferBackend
from pdserve.transfer.digest import DigestKind, digest_kind, region_digest, zero_tail
from pdserve.transfer.host_spans import warm_up
from pdserve.transfer.lanes import Lane, Offer, in_order, mend_lanes, open_lanes
from pdserve.transfer.machine import machine_facts, wire_bytes
from pdserve.transfer.memory import KVMemory, MemoryKind
from pdserve.transfer.plan import BlockIds, canonical_spans, plan_read
from pdserve.transfer.probe import Prober
from pdserve.transfer.pull import FailedPull, LocalPull, PullContext
from pdserve.transfer.pump import TransferPump
from pdserve.transfer.stats import StatsCounter, TransferStats

CLOSE_DEADLINE = 2.0
"""Seconds close() waits for reads that have not ended; their threads then finish by themselves."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Peer:
    """One rank of a peer. lanes are in the order of their speed; they agree on how the blocks lie and are digested."""

    epoch: int
    shard: KVShard
    layout: KVLayout
    lanes: list[Lane]
    digest: DigestKind
    pulls: set[LocalPull] = field(default_factory=set)

    @property
    def readable(self) -> bool:
        return any(lane.broken_at is None for lane in self.lanes)


class LocalTransferService:
    """Implements core.protocols.TransferService over backends in order of preference, as the only rank or as one of
    several. Open with `open`."""

    def __init__(
        self, address: PeerAddress, layout: KVLayout, prober: Prober, pumps: tuple[TransferPump, ...], clock: Clock
    ) -> None:
        self.address = address
        self.layout = layout
        self._shard = address.ranks[0].shard
        self._held = layout.of_heads(self._shard.heads)
        self._memory = prober.memory
        self._prober = prober
        self._digest_kind = digest_kind(prober.memory, layout)
        self._pumps = pumps
        self._clock = clock
        self._stats = StatsCounter()
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._pulls: set[LocalPull] = set()
        self._connecting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By engine: one that does not answer keeps nobody from the others."""
        self._digests = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-digest")

    @classmethod
    async def open(
        cls,
        *,
        engine_id: str,
        epoch: int,
        layout: KVLayout,
        memory: KVMemory,
        backends: tuple[TransferBackend, ...],
        shard: KVShard | None = None,
        clock: Clock | None = None,
    ) -> "LocalTransferService":
        """Start the backends on the memory, which belongs to the service from now on.

        layout is the engine's, shard what this rank holds of it; None is everything. A backend that cannot serve this
        kind of memory is left out while there is another one. Raises ConfigError when a backend cannot run here,
        Unsupported when the last one cannot serve the memory.
        """
        if memory.kind is MemoryKind.HOST:
            await asyncio.to_thread(warm_up)
        shard = shard or sole_shard(layout)
        needed = layout.of_heads(shard.heads).total_bytes
        if memory.nbytes < needed:
            raise ValueError(f"a layout of {needed} bytes does not fit a memory of {memory.nbytes}")
        prober = Prober(memory, needed, epoch)
        offers = dict[str, bytes]()
        pumps = [TransferPump(backend) for backend in backends]
        try:
            for pump in tuple(pumps):
                try:
                    offers[pump.name] = await _offer(pump, prober, layout)
                except Unsupported as error:
                    if len(pumps) == 1:
                        raise
                    _log.info("%s", error)
                    pumps.remove(pump)
                    pump.close()
        except BaseException:
            for pump in pumps:
                pump.close()
            raise
        address = PeerAddress(
            engine_id=engine_id,
            epoch=epoch,
            layout_hash=layout.wire_hash,
            ranks=(RankAddress(shard=shard, backends=tuple(offers.items())),),
        )
        return cls(address, layout, prober, tuple(pumps), clock or SystemClock())

    async def connect(self, peer: PeerAddress) -> str:
        """Connects to every rank of the peer; of several backends, names those in use, joined by +."""
        async with self._connecting[peer.engine_id]:
            if peer.layout_hash != self.layout.wire_hash:
                raise LayoutMismatch(
                    f"{peer.engine_id} keeps KV in another form: both engines must run the same model revision, "
                    "KV dtype and block size"
                )
            names = [await self._connect_rank(peer, rank) for rank in peer.ranks]
            return "+".join(dict.fromkeys(names))

    async def disconnect(self, engine_id: str) -> None:
        async with self._connecting[engine_id]:
            for key in [key for key in self._peers if key[0] == engine_id]:
                self._drop(key, TransferFailed(f"{engine_id} was disconnected"))

    async def digest(self, blocks: BlockIds, num_tokens: int, seed: int, part: KVPart | None = None) -> bytes:
        region = self._region(blocks, part)

        def seal() -> bytes:
            zero_tail(self._memory, self._held, blocks, num_tokens)
            return region_digest(self._memory, self._held, region, seed, self._digest_kind)

        return await asyncio.get_running_loop().run_in_executor(self._digests, seal)

    async def fill(self, blocks: BlockIds, seed: int) -> None:
        region = self._held.whole_blocks(blocks)

        def write() -> None:
            random = np.random.default_rng(seed)
            for offset, length in zip(*(spans.tolist() for spans in canonical_spans(self._held, region)), strict=True):
                self._memory.write(offset, random.integers(0, 256, length, dtype=np.uint8))

        await asyncio.get_running_loop().run_in_executor(self._digests, write)

    async def facts(self) -> MachineFacts:
        return machine_facts()

    async def wire_bytes(self) -> WireBytes:
        return await asyncio.to_thread(wire_bytes)

    def pull(self, spec: PullSpec) -> Pull:
        """Raises ValueError when the block lists do not pair up or a target is not ours; everything a peer
        can cause comes from wait()."""
        source_rank = spec.part.source_rank if spec.part else 0
        peer = self._peers.get((spec.peer, source_rank))
        if peer is None:
            return self._refuse(TransferFailed(f"not connected to {spec.peer}"))
        if peer.epoch != spec.epoch:
            return self._refuse(StaleEpoch(f"{spec.peer} is not the incarnation that holds these blocks"))
        if any(not 0 <= block < peer.layout.num_blocks for block in spec.source_blocks):
            return self._refuse(TransferFailed(f"{spec.peer} has only {peer.layout.num_blocks} blocks"))
        if spec.part and not _covers(peer.shard, spec.part):
            return self._refuse(TransferFailed(f"rank {source_rank} of {spec.peer} does not hold these heads"))
        taken = _region_of(peer.shard, peer.layout, spec.source_blocks, spec.part)
        filled = self._region(spec.target_blocks, spec.part)
        plan = plan_read(peer.layout, taken, self._held, filled)
        digest = partial(self._target_digest, filled, spec.seed, peer.digest)
        running = plan.in_order and peer.digest is DigestKind.XXH3
        context = PullContext(partial(self._lanes, peer), digest, running, self._digests, self._clock, self._stats)
        pull = LocalPull(spec, plan, context)
        for pulls in (self._pulls, peer.pulls):
            pulls.add(pull)
        pull.task.add_done_callback(partial(_forget, pull, (self._pulls, peer.pulls)))
        return pull

    async def death(self) -> EngineDied:
        """Wait until a backend has failed in a way that leaves open what its reads still write: only the end of the
        process makes the memory anybody's again."""
        failures = [asyncio.wrap_future(pump.failure) for pump in self._pumps]
        if not failures:
            await asyncio.Event().wait()
        done, _ = await asyncio.wait(failures, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()

    def stats(self) -> TransferStats:
        return self._stats.snapshot()

    async def close(self) -> None:
        """Fail what waits, then give up threads and memory within CLOSE_DEADLINE.

        A read that has not ended by then keeps its thread, which keeps the memory mapped until it ends.
        """
        for key in list(self._peers):
            self._drop(key, TransferFailed("the transfer service was closed"))
        half = CLOSE_DEADLINE / 2
        if self._pulls:
            await asyncio.wait([pull.task for pull in self._pulls], timeout=half)
        for pump in self._pumps:
            pump.close()
        joins = (asyncio.to_thread(pump.join, half) for pump in self._pumps)
        await asyncio.gather(*joins)
        # Not cancelled: pulls wait for what is queued there, and it takes milliseconds.
        self._digests.shutdown(wait=False)
        self._memory.close()

    async def _connect_rank(self, peer: PeerAddress, rank: RankAddress) -> str:
        """The name of the backend that reads this rank."""
        key = (peer.engine_id, rank.shard.rank)
        known = self._peers.get(key)
        if known is None or known.epoch != peer.epoch:
            lanes = await open_lanes(peer, rank, self._pumps, self._prober)
            # Not before: what fails or is cancelled here ends nothing that is read over the old ones.
            self._drop(key, TransferFailed(f"the connection to {peer.engine_id} was replaced"))
            offer = lanes[0].offer
            layout = replace(self.layout, num_blocks=offer.num_blocks, order=offer.order)
            held = layout.of_heads(rank.shard.heads)
            self._peers[key] = known = _Peer(peer.epoch, rank.shard, held, lanes, offer.digest)
        elif not known.readable:
            await mend_lanes(known.lanes)
        return self._lanes(known)[0].name

    def _lanes(self, peer: _Peer) -> list[Lane]:
        return in_order(peer.lanes, self._clock.monotonic())

    def _region(self, blocks: BlockIds, part: KVPart | None) -> KVRegion:
        return _region_of(self._shard, self._held, blocks, part)

    def _target_digest(self, region: KVRegion, seed: int, kind: DigestKind) -> bytes:
        return region_digest(self._memory, self._held, region, seed, kind)

    def _refuse(self, error: TransferError) -> Pull:
        self._stats.pulls += 1
        self._stats.failed(error.code)
        return FailedPull(error)

    def _drop(self, key: tuple[str, int], error: TransferError) -> None:
        peer = self._peers.pop(key, None)
        if peer is not None:
            for pull in peer.pulls:
                pull.stop(error)
            for lane in peer.lanes:
                lane.pump.disconnect(lane.key)


def _covers(shard: KVShard, part: KVPart) -> bool:
    return shard.heads[0] <= part.heads[0] and part.heads[1] <= shard.heads[1]


def _region_of(shard: KVShard, held: KVLayout, blocks: BlockIds, part: KVPart | None) -> KVRegion:
    """A part of a rank's blocks, with heads counted as they lie in its memory; None is whole blocks."""
    if part is None:
        return held.whole_blocks(blocks)
    return held.heads_of(blocks, (part.heads[0] - shard.heads[0], part.heads[1] - shard.heads[0]))


async def _offer(pump: TransferPump, prober: Prober, layout: KVLayout) -> bytes:
    """Start a backend; what a RankAddress carries for it. Raises ConfigError or Unsupported."""

    def start(backend: TransferBackend) -> bytes:
        backend.register(prober.memory)
        return backend.metadata()

    metadata = await asyncio.wrap_future(pump.call(start))
    digest = digest_kind(prober.memory, layout)
    return msgspec.msgpack.encode(Offer(layout.num_blocks, layout.order, digest, metadata, prober.offset))


def _forget(pull: LocalPull, sets: tuple[set[LocalPull], ...], _: "asyncio.Task[None]") -> None:
    for pulls in sets:
        pulls.discard(pull)
