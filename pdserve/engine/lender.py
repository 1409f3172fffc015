"""What this engine lends of its cache to others: from the device pool at once, from a tier after restoring it.

Lend ─▶ all of it here ───────────────────────────────────────▶ leased and offered (handoff_source)
    └─▶ it goes on in a tier ─▶ restored into spare blocks ─▶ cached ──▲
"""

import asyncio
from collections.abc import Callable, Sequence

from pdserve.core.blocks import BlockHash
from pdserve.core.errors import PdserveError
from pdserve.core.ticket import TicketGone
from pdserve.engine.handoff_source import Deliver, HandoffSource, Parts
from pdserve.engine.restoring import Restoring
from pdserve.kvcache.manager import KVCacheManager


class Lender:
    """Answers other engines. refusal() says why nothing is lent now, if so; on_change follows what frees blocks."""

    def __init__(
        self,
        *,
        source: HandoffSource,
        kv: KVCacheManager,
        restoring: Restoring,
        refusal: Callable[[], PdserveError | None],
        on_change: Callable[[], None],
    ) -> None:
        self._source = source
        self._kv = kv
        self._restoring = restoring
        self._refusal = refusal
        self._on_change = on_change
        self._restores: dict[str, asyncio.Task[None]] = {}
        """By the ticket that waits for it."""

    def lend(self, ticket_id: str, hashes: Sequence[BlockHash], deliver: Deliver, parts: Parts) -> None:
        """deliver hears what comes of it: Lent and regions, or TicketGone."""
        if error := self._refusal():
            deliver(TicketGone(ticket_id=ticket_id, code=error.code, message=str(error)))
            return
        if ticket_id in self._restores:
            return  # asked twice
        missing, blocks = self._spare_blocks(hashes)
        if not blocks:
            self._offer(ticket_id, hashes, deliver, parts)
            return
        work = self._restore_and_offer(ticket_id, hashes, deliver, parts, missing, blocks)
        self._restores[ticket_id] = task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda _: self._restores.pop(ticket_id))

    async def close(self) -> None:
        tasks = list(self._restores.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spare_blocks(self, hashes: Sequence[BlockHash]) -> tuple[Sequence[BlockHash], tuple[int, ...]]:
        """What of a chain is worth restoring before it is lent, and blocks for it."""
        first, tiers = self._kv.continuation(hashes)
        blocks = self._kv.borrow(self._restoring.choose_restore(tiers)) if tiers else ()
        return hashes[first : first + len(blocks)], blocks

    async def _restore_and_offer(
        self,
        ticket_id: str,
        hashes: Sequence[BlockHash],
        deliver: Deliver,
        parts: Parts,
        missing: Sequence[BlockHash],
        blocks: tuple[int, ...],
    ) -> None:
        """The blocks stay ours until nothing writes into them, however long that is."""
        restored = await self._restoring.bring(tuple(missing), blocks)
        self._kv.adopt(missing[:restored], blocks)
        self._offer(ticket_id, hashes, deliver, parts)
        self._on_change()

    def _offer(self, ticket_id: str, hashes: Sequence[BlockHash], deliver: Deliver, parts: Parts) -> None:
        self._source.lend(ticket_id, deliver, parts, lambda lease_id: self._kv.lend(lease_id, hashes))
