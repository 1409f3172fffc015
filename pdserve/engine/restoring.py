"""Where KV of a prompt's beginning comes from instead of being computed: this engine's tiers and others' caches.

Both are sources of one thing, a restore: the scheduler gives it blocks, its end raises num_computed_tokens, and being
late sends its sequence back to compute while the blocks wait in quarantine.
"""

from collections.abc import Callable, Sequence
from secrets import token_hex

from pdserve.config.times import Times
from pdserve.core.blocks import BlockHash
from pdserve.core.clock import Clock
from pdserve.core.protocols import TransferService
from pdserve.core.request import PrefixFetch
from pdserve.core.ticket import KVSource
from pdserve.core.tiers import Tier, TierNews, TierService, TierTally
from pdserve.engine.core_events import RestoreReady, SaveReady
from pdserve.engine.prefix_fetches import PrefixFetches
from pdserve.engine.source_links import SourceLinks
from pdserve.engine.step_timing import StepTimer
from pdserve.engine.tiering import Tiering
from pdserve.kvcache.tier_index import TierIndex


class Restoring:
    """The sources of one engine. on_late may precede on_ended(event, num_blocks), which comes once per restore."""

    def __init__(
        self,
        tiers: TierService | None,
        *,
        transfer: TransferService,
        links: SourceLinks,
        timer: StepTimer,
        times: Times,
        clock: Clock,
        on_news: Callable[[TierNews], None],
        on_saved: Callable[[Sequence[int]], None],
        on_ended: Callable[[RestoreReady, int], None],
        on_late: Callable[[RestoreReady], None],
    ) -> None:
        self._on_ended = on_ended
        self._on_late = on_late
        self._tiering = tiers and Tiering(
            tiers,
            timer,
            block_size=transfer.layout.block_size,
            restore_deadline=times.restore_deadline,
            on_news=on_news,
            on_saved=on_saved,
            on_restored=on_ended,
            on_late=on_late,
        )
        self._fetches = PrefixFetches(
            transfer=transfer,
            links=links,
            times=times,
            clock=clock,
            new_ticket_id=lambda: token_hex(16),
            on_ended=self._on_fetch_ended,
            on_late=self._on_fetch_late,
        )
        self._summaries: dict[int, PrefixFetch | None] = {}
        """Of each sequence that fetched and lives, None while it does."""

    @property
    def index(self) -> TierIndex | None:
        """What the tiers hold, if there are any."""
        return self._tiering.index if self._tiering else None

    @property
    def tallies(self) -> tuple[TierTally, ...]:
        return self._tiering.tallies if self._tiering else ()

    @property
    def num_fetches(self) -> int:
        """Fetches from other engines whose blocks are not settled."""
        return self._fetches.num_open

    async def open(self) -> None:
        """Learn what the tiers hold from before. Raises EngineDied when the worker is gone."""
        if self._tiering:
            await self._tiering.open()

    async def close(self) -> None:
        await self._fetches.close()
        if self._tiering:
            await self._tiering.close()

    def choose_restore(self, tiers: Sequence[Tier]) -> int:
        """How many of a chain's next blocks, which lie in these tiers, to restore."""
        return self._tiering.choose(tiers) if self._tiering else 0

    def choose_fetch(self, source: KVSource, num_blocks: int) -> int:
        """How many of a chain's next blocks, which the source should hold, to ask it for."""
        return self._fetches.choose(source, num_blocks)

    def restore(self, event: RestoreReady) -> None:
        if event.source:
            self._summaries[event.sequence_id] = None
            self._fetches.restore(event)
        elif self._tiering:
            self._tiering.restore(event)

    async def bring(self, hashes: tuple[BlockHash, ...], blocks: tuple[int, ...]) -> int:
        """Restore blocks from the tiers for no sequence; how many verified. Returns when nothing writes into them any
        more."""
        return await self._tiering.bring(hashes, blocks) if self._tiering else 0

    def save(self, event: SaveReady) -> None:
        if self._tiering:
            self._tiering.save(event)

    def forget(self, sequence_id: int) -> PrefixFetch | None:
        """The sequence has ended. How its fetch went, if there was one and it has ended, too."""
        self._fetches.cancel(sequence_id)
        return self._summaries.pop(sequence_id, None)

    def _on_fetch_ended(self, event: RestoreReady, num_blocks: int, summary: PrefixFetch) -> None:
        self._note(event, summary)
        self._on_ended(event, num_blocks)

    def _on_fetch_late(self, event: RestoreReady, summary: PrefixFetch) -> None:
        self._note(event, summary)
        self._on_late(event)

    def _note(self, event: RestoreReady, summary: PrefixFetch) -> None:
        if event.sequence_id in self._summaries:
            self._summaries[event.sequence_id] = summary
