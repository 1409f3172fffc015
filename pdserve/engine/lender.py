"""What this engine lends of its cache to others: from the device pool at once, from a tier after restoring it.

Lend ─▶ all of it here ───────────────────────────────────────▶ leased and offered (handoff_source)
    └─▶ it goes on in a tier ─▶ restored into spare blocks ─▶ cached ──▲
                                  once for all loans of it
"""

import asyncio
from collections.abc import Callable, Sequence

from pdserve.core.blocks import BlockHash
from pdserve.core.clock import Clock
from pdserve.core.errors import PdserveError, Unavailable
from pdserve.core.ticket import TicketGone
from pdserve.engine.handoff_source import Deliver, HandoffSource, Parts
from pdserve.engine.restoring import Restoring
from pdserve.kvcache.manager import KVCacheManager


class Lender:
    """Answers other engines. patience: seconds a loan waits for restores, for a tier may hang; refusal() says why
    nothing is lent now, if so; on_change follows what frees blocks."""

    def __init__(
        self,
        *,
        source: HandoffSource,
        kv: KVCacheManager,
        restoring: Restoring,
        clock: Clock,
        patience: float,
        refusal: Callable[[], PdserveError | None],
        on_change: Callable[[], None],
    ) -> None:
        self._source = source
        self._kv = kv
        self._restoring = restoring
        self._clock = clock
        self._patience = patience
        self._refusal = refusal
        self._on_change = on_change
        self._waiting: dict[str, asyncio.Task[None]] = {}
        """By ticket, what offers it after a restore."""
        self._restores: dict[BlockHash, asyncio.Task[int]] = {}
        """By block that is being restored."""

    def lend(self, ticket_id: str, hashes: Sequence[BlockHash], deliver: Deliver, parts: Parts) -> None:
        """deliver hears what comes of it: Lent and regions, or TicketGone."""
        if error := self._refusal():
            deliver(TicketGone(ticket_id=ticket_id, code=error.code, message=str(error)))
            return
        if ticket_id in self._waiting:
            return  # asked twice
        _, tiers = self._kv.continuation(hashes)
        if not tiers:
            self._offer(ticket_id, hashes, deliver, parts)
            return
        work = self._restore_and_offer(ticket_id, hashes, deliver, parts)
        self._waiting[ticket_id] = task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda _: self._waiting.pop(ticket_id))

    async def close(self) -> None:
        tasks = {*self._waiting.values(), *self._restores.values()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _restore_and_offer(
        self, ticket_id: str, hashes: Sequence[BlockHash], deliver: Deliver, parts: Parts
    ) -> None:
        asked = self._clock.monotonic()
        try:
            async with asyncio.timeout(self._patience):
                await self._brought(hashes)
        except TimeoutError:
            late = Unavailable(f"its tiers did not give the KV back within {self._patience:g} s")
            deliver(TicketGone(ticket_id=ticket_id, code=late.code, message=str(late)))
        else:
            self._offer(ticket_id, hashes, deliver, parts, self._clock.monotonic() - asked)

    async def _brought(self, hashes: Sequence[BlockHash]) -> None:
        """What other loans restore already is waited for; what they leave is restored for this one."""
        while joined := self._under_way(hashes):
            if not await asyncio.shield(joined):
                break  # it failed, and so would ours
        else:
            if begun := self._begin(hashes):
                await asyncio.shield(begun)

    def _under_way(self, hashes: Sequence[BlockHash]) -> asyncio.Task[int] | None:
        """The restore that brings the first missing block of a chain."""
        first, _ = self._kv.continuation(hashes)
        return self._restores.get(hashes[first]) if first < len(hashes) else None

    def _begin(self, hashes: Sequence[BlockHash]) -> asyncio.Task[int] | None:
        """Restore what of a chain is worth it before it is lent, and finds spare blocks; None if nothing is."""
        first, tiers = self._kv.continuation(hashes)
        blocks = self._kv.borrow(self._restoring.choose_restore(tiers)) if tiers else ()
        if not blocks:
            return None
        missing = tuple(hashes[first : first + len(blocks)])
        restore = asyncio.get_running_loop().create_task(self._restore(missing, blocks))
        self._restores |= dict.fromkeys(missing, restore)
        return restore

    async def _restore(self, missing: tuple[BlockHash, ...], blocks: tuple[int, ...]) -> int:
        """How many became hits. The blocks stay ours until nothing writes into them, however long that is."""
        try:
            restored = await self._restoring.bring(missing, blocks)
            self._kv.adopt(missing[:restored], blocks)
            self._on_change()
            return restored
        finally:
            ended = asyncio.current_task()
            self._restores = {block: other for block, other in self._restores.items() if other is not ended}

    def _offer(
        self,
        ticket_id: str,
        hashes: Sequence[BlockHash],
        deliver: Deliver,
        parts: Parts,
        restore_seconds: float = 0.0,
    ) -> None:
        self._source.lend(ticket_id, deliver, parts, lambda lease_id: self._kv.lend(lease_id, hashes), restore_seconds)
