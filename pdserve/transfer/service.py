"""The KV-transfer service of one worker: owns its KV memory, lets peers read it, pulls and verifies theirs."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated

import msgspec

from pdserve.core.clock import Clock, SystemClock
from pdserve.core.errors import LayoutMismatch, StaleEpoch, TransferError, TransferFailed
from pdserve.core.layout import KVLayout, KVOrder
from pdserve.core.msgpack import unpack
from pdserve.core.protocols import PeerAddress, Pull, PullSpec
from pdserve.transfer.base import TransferBackend
from pdserve.transfer.digest import DigestKind, block_digest, digest_kind, zero_tail
from pdserve.transfer.memory import KVMemory
from pdserve.transfer.plan import BlockIds, plan_read
from pdserve.transfer.pull import FailedPull, LocalPull, PullContext
from pdserve.transfer.pump import TransferPump
from pdserve.transfer.stats import StatsCounter, TransferStats

CONNECT_DEADLINE = 5.0
"""Seconds a backend may take to make a peer readable."""

CLOSE_DEADLINE = 2.0
"""Seconds close() waits for reads that have not ended; their threads then finish by themselves."""


class Offer(msgspec.Struct, frozen=True):
    """One backend's entry in a PeerAddress: how the peer's blocks lie, how it digests them, and the backend's own
    metadata."""

    num_blocks: Annotated[int, msgspec.Meta(gt=0, lt=2**32)]
    order: KVOrder
    digest: DigestKind
    metadata: bytes


OFFER = msgspec.msgpack.Decoder(Offer)


@dataclass(slots=True)
class _Peer:
    address: PeerAddress
    layout: KVLayout
    pump: TransferPump
    key: str
    digest: DigestKind
    pulls: set[LocalPull] = field(default_factory=set)
    broken: bool = False
    """A read failed: the connection may be gone although the peer's epoch is not."""

    def mark_broken(self) -> None:
        self.broken = True


class LocalTransferService:
    """Implements core.protocols.TransferService over backends in order of preference. Open with `open`."""

    def __init__(
        self, address: PeerAddress, layout: KVLayout, memory: KVMemory, pumps: tuple[TransferPump, ...], clock: Clock
    ) -> None:
        self.address = address
        self.layout = layout
        self._memory = memory
        self._digest_kind = digest_kind(memory, layout)
        self._pumps = pumps
        self._clock = clock
        self._stats = StatsCounter()
        self._peers: dict[str, _Peer] = {}
        self._pulls: set[LocalPull] = set()
        self._connecting = asyncio.Lock()
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
        clock: Clock | None = None,
    ) -> "LocalTransferService":
        """Start the backends on the memory, which belongs to the service from now on.

        Raises ConfigError or Unsupported when one of them cannot run here.
        """
        if memory.nbytes < layout.total_bytes:
            raise ValueError(f"a layout of {layout.total_bytes} bytes does not fit a memory of {memory.nbytes}")
        pumps = tuple(TransferPump(backend) for backend in backends)
        try:
            offers = tuple([(pump.name, await _offer(pump, memory, layout)) for pump in pumps])
        except BaseException:
            for pump in pumps:
                pump.close()
            raise
        address = PeerAddress(engine_id=engine_id, epoch=epoch, layout_hash=layout.wire_hash, backends=offers)
        return cls(address, layout, memory, pumps, clock or SystemClock())

    async def connect(self, peer: PeerAddress) -> str:
        async with self._connecting:
            known = self._peers.get(peer.engine_id)
            if known is not None and known.address.epoch == peer.epoch and not known.broken:
                return known.pump.name
            if peer.layout_hash != self.layout.wire_hash:
                raise LayoutMismatch(
                    f"{peer.engine_id} keeps KV in another form: both engines must run the same model revision, "
                    "KV dtype and block size"
                )
            self._drop(peer.engine_id, TransferFailed(f"the connection to {peer.engine_id} was replaced"))
            self._peers[peer.engine_id] = connected = await self._first_readable(peer)
            return connected.pump.name

    async def disconnect(self, engine_id: str) -> None:
        async with self._connecting:
            self._drop(engine_id, TransferFailed(f"{engine_id} was disconnected"))

    async def digest(self, blocks: BlockIds, num_tokens: int, seed: int) -> bytes:
        def seal() -> bytes:
            zero_tail(self._memory, self.layout, blocks, num_tokens)
            return block_digest(self._memory, self.layout, blocks, seed, self._digest_kind)

        return await asyncio.get_running_loop().run_in_executor(self._digests, seal)

    def pull(self, spec: PullSpec) -> Pull:
        """Raises ValueError when the block lists do not pair up or a target is not ours; everything a peer
        can cause comes from wait()."""
        peer = self._peers.get(spec.peer)
        if peer is None:
            return self._refuse(TransferFailed(f"not connected to {spec.peer}"))
        if peer.address.epoch != spec.epoch:
            return self._refuse(StaleEpoch(f"{spec.peer} is not the incarnation that holds these blocks"))
        if any(not 0 <= block < peer.layout.num_blocks for block in spec.source_blocks):
            return self._refuse(TransferFailed(f"{spec.peer} has only {peer.layout.num_blocks} blocks"))
        plan = plan_read(peer.layout, spec.source_blocks, self.layout, spec.target_blocks)
        digest = partial(self._target_digest, spec, peer.digest)
        context = PullContext(peer.pump, peer.key, digest, peer.mark_broken, self._clock, self._stats)
        pull = LocalPull(spec, plan, context)
        for pulls in (self._pulls, peer.pulls):
            pulls.add(pull)
        pull.task.add_done_callback(partial(_forget, pull, (self._pulls, peer.pulls)))
        return pull

    def stats(self) -> TransferStats:
        return self._stats.snapshot()

    async def close(self) -> None:
        """Fail what waits, then give up threads and memory within CLOSE_DEADLINE.

        A read that has not ended by then keeps its thread, which keeps the memory mapped until it ends.
        """
        for engine_id in list(self._peers):
            self._drop(engine_id, TransferFailed("the transfer service was closed"))
        if self._pulls:
            await asyncio.wait([pull.task for pull in self._pulls], timeout=CLOSE_DEADLINE)
        for pump in self._pumps:
            pump.close()
        joins = (asyncio.to_thread(pump.join, CLOSE_DEADLINE) for pump in self._pumps)
        await asyncio.gather(*joins)
        self._digests.shutdown(wait=False, cancel_futures=True)
        self._memory.close()

    async def _first_readable(self, peer: PeerAddress) -> _Peer:
        """The peer over the first backend both sides have and that reaches it. Raises TransferFailed."""
        offers, failures = dict(peer.backends), []
        key = f"{peer.engine_id}/{peer.epoch:016x}"
        for pump in self._pumps:
            if pump.name not in offers:
                continue
            try:
                offer = unpack(offers[pump.name], OFFER)
                connecting = asyncio.wrap_future(pump.connect(key, offer.metadata))
                await asyncio.wait_for(connecting, CONNECT_DEADLINE)
            except (TransferError, TimeoutError) as error:
                failures.append(f"{pump.name}: {str(error) or 'no answer'}")
                continue
            layout = replace(self.layout, num_blocks=offer.num_blocks, order=offer.order)
            return _Peer(peer, layout, pump, key, offer.digest)
        ours = ", ".join(pump.name for pump in self._pumps)
        reasons = "; ".join(failures) or f"it offers {', '.join(offers) or 'none'}, this worker has {ours}"
        raise TransferFailed(f"no transfer backend reaches {peer.engine_id}: {reasons}")

    async def _target_digest(self, spec: PullSpec, kind: DigestKind) -> bytes:
        digest = partial(block_digest, self._memory, self.layout, spec.target_blocks, spec.seed, kind)
        return await asyncio.get_running_loop().run_in_executor(self._digests, digest)

    def _refuse(self, error: TransferError) -> Pull:
        self._stats.pulls += 1
        self._stats.failed(error.code)
        return FailedPull(error)

    def _drop(self, engine_id: str, error: TransferError) -> None:
        peer = self._peers.pop(engine_id, None)
        if peer is not None:
            for pull in peer.pulls:
                pull.stop(error)
            peer.pump.disconnect(peer.key)


async def _offer(pump: TransferPump, memory: KVMemory, layout: KVLayout) -> bytes:
    """Start a backend; what a PeerAddress carries for it."""

    def start(backend: TransferBackend) -> bytes:
        backend.register(memory)
        return backend.metadata()

    metadata = await asyncio.wrap_future(pump.call(start))
    return msgspec.msgpack.encode(Offer(layout.num_blocks, layout.order, digest_kind(memory, layout), metadata))


def _forget(pull: LocalPull, sets: tuple[set[LocalPull], ...], _: "asyncio.Task[None]") -> None:
    for pulls in sets:
        pulls.discard(pull)
