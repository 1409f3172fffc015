"""The transfer services of an engine's ranks as one: each rank moves its own heads, and all use the same block ids."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from pdserve.core.pair_check import MachineFacts, WireBytes
from pdserve.core.protocols import PeerAddress, Pull, PullSpec
from pdserve.core.shards import KVPart, plan_parts
from pdserve.core.tasks import all_ended
from pdserve.worker.remote_transfer import RemoteTransfer


class GangTransfer:
    """Implements core.protocols.CheckedTransfer. What it digests and pulls names a part, and so a rank."""

    def __init__(self, ranks: Sequence[RemoteTransfer]) -> None:
        self._ranks = tuple(ranks)
        self.layout = ranks[0].layout
        self.address = replace(ranks[0].address, ranks=tuple(one for rank in ranks for one in rank.address.ranks))

    async def connect(self, peer: PeerAddress) -> str:
        """Each rank connects to the peer's ranks that it will read from."""
        parts = plan_parts(peer.shards, self.address.shards)
        connecting = []
        for number, rank in enumerate(self._ranks):
            sources = {part.source_rank for part in parts if part.target_rank == number}
            needed = tuple(one for one in peer.ranks if one.shard.rank in sources)
            connecting.append(rank.connect(replace(peer, ranks=needed)))
        names = await asyncio.gather(*connecting)
        return "+".join(dict.fromkeys(name for joined in names for name in joined.split("+")))

    async def disconnect(self, engine_id: str) -> None:
        await asyncio.gather(*(rank.disconnect(engine_id) for rank in self._ranks))

    async def digest(self, blocks: tuple[int, ...], num_tokens: int, seed: int, part: KVPart | None = None) -> bytes:
        """Raises EngineDied when the rank's process is gone."""
        source = self._ranks[_required(part).source_rank]
        return await source.digest(blocks, num_tokens, seed, part)

    async def fill(self, blocks: tuple[int, ...], seed: int) -> None:
        """Each rank has bytes of its own. Ends when no rank writes any more, also when one fails."""
        await all_ended(rank.fill(blocks, seed + number) for number, rank in enumerate(self._ranks))

    async def facts(self) -> MachineFacts:
        """The ranks of an engine share a machine."""
        return await self._ranks[0].facts()

    async def wire_bytes(self) -> WireBytes:
        """Sockets are a rank's own, network cards are the machine's."""
        received = await asyncio.gather(*(rank.wire_bytes() for rank in self._ranks))
        return WireBytes(tcp=sum(one.tcp for one in received), rdma=received[0].rdma)

    def pull(self, spec: PullSpec) -> Pull:
        """Raises ValueError when the block lists do not pair up or a target is not ours."""
        return self._ranks[_required(spec.part).target_rank].pull(spec)


def _required(part: KVPart | None) -> KVPart:
    if part is None:
        raise ValueError("KV of several ranks moves in parts: say which")
    return part
