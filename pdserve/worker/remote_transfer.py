"""The transfer service of a worker in another process. Bytes move between workers, never through here."""

import asyncio
from contextlib import suppress

from pdserve.core.errors import EngineDied, TransferFailed, TransferTimeout
from pdserve.core.layout import KVLayout
from pdserve.core.pair_check import MachineFacts, WireBytes
from pdserve.core.protocols import PeerAddress, Pull, PullReceipt, PullSpec
from pdserve.core.shards import KVPart
from pdserve.transfer.plan import check_pairing
from pdserve.worker.frames import BeginPull, CancelPull, Connect, Digest, Disconnect, Fill, GetFacts, GetWireBytes
from pdserve.worker.link import WorkerLink

CALL_DEADLINE = 30.0
"""Seconds a living worker process may take to answer what writes into no blocks."""

PULL_GRACE = 1.0
"""Seconds beyond a pull's own deadline after which a silent worker process is not waited for."""


class RemoteTransfer:
    """Implements core.protocols.CheckedTransfer. The process's death fails everything with EngineDied: no peer is to
    blame for it, nor the way to one.

    Who digests or fills blocks gives them back afterwards, and the worker writes into them whenever its turn comes. So
    only its answer or its death ends these waits; whoever must know sooner leaves the blocks alone until then."""

    def __init__(self, link: WorkerLink, layout: KVLayout, address: PeerAddress) -> None:
        self._link = link
        self.layout = layout
        self.address = address

    async def connect(self, peer: PeerAddress) -> str:
        try:
            return await self._link.call(lambda reply: Connect(reply, peer), str, CALL_DEADLINE)
        except EngineDied as error:
            if self._link.death:
                raise
            raise TransferFailed(f"cannot connect to {peer.engine_id}: {error}") from error

    async def disconnect(self, engine_id: str) -> None:
        """A worker that is gone holds no connections: nothing to do."""
        with suppress(EngineDied):
            await self._link.call(lambda reply: Disconnect(reply, engine_id), type(None), CALL_DEADLINE)

    async def digest(self, blocks: tuple[int, ...], num_tokens: int, seed: int, part: KVPart | None = None) -> bytes:
        return await self._link.ask(lambda reply: Digest(reply, blocks, num_tokens, seed, part), bytes)

    async def fill(self, blocks: tuple[int, ...], seed: int) -> None:
        await self._link.ask(lambda reply: Fill(reply, blocks, seed), type(None))

    async def facts(self) -> MachineFacts:
        return await self._link.call(GetFacts, MachineFacts, CALL_DEADLINE)

    async def wire_bytes(self) -> WireBytes:
        return await self._link.call(GetWireBytes, WireBytes, CALL_DEADLINE)

    def pull(self, spec: PullSpec) -> Pull:
        """Raises ValueError when the block lists do not pair up or a target is not the worker's."""
        check_pairing(self.layout, spec.source_blocks, spec.target_blocks)
        return RemotePull(self._link, spec)


class RemotePull:
    """A pull in the worker process. When that process dies its memory dies with it: settled."""

    def __init__(self, link: WorkerLink, spec: PullSpec) -> None:
        self._link, self._spec = link, spec
        self._number, self._outcome = link.expect(PullReceipt)
        settled_number, self._settled = link.expect(type(None))
        self._latest = asyncio.get_running_loop().time() + spec.deadline + PULL_GRACE
        with suppress(EngineDied):
            link.send(BeginPull(self._number, settled_number, spec))

    async def wait(self) -> PullReceipt:
        try:
            async with asyncio.timeout_at(self._latest):
                return await asyncio.shield(self._outcome)
        except TimeoutError:
            raise TransferTimeout(f"the worker process said nothing of its pull from {self._spec.peer}") from None

    async def settled(self) -> None:
        with suppress(EngineDied):
            await asyncio.shield(self._settled)

    def cancel(self) -> None:
        with suppress(EngineDied):
            self._link.send(CancelPull(self._number))
