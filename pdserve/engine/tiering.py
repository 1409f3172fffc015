"""The engine's end of the tiers: sends blocks out, brings them back, and keeps what it hears of them.

A restore, as its sequence sees it:

    RestoreReady ──ended──▶ goes on with what verified, computes the rest
         └──deadline──▶ LATE: computes everything in other blocks ──ended──▶ targets leave quarantine
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace

import structlog

from pdserve.core.blocks import BlockHash
from pdserve.core.tiers import RestoreReceipt, Tier, TierNews, TierService, TierTally
from pdserve.engine.core_events import RestoreReady, SaveReady
from pdserve.engine.restore_choice import RestoreChoice, seconds_per_token
from pdserve.engine.step_timing import StepTimer
from pdserve.kvcache.tier_index import TierIndex

log = structlog.get_logger("pdserve.engine")

_DELETE_PATIENCE = 10.0
"""Seconds close waits until the tiers have deleted what was computed wrong."""


class Tiering:
    """Owns the saves and restores of one engine. on_late may precede on_restored, which comes once per restore."""

    def __init__(
        self,
        tiers: TierService,
        timer: StepTimer,
        *,
        block_size: int,
        restore_deadline: float,
        on_news: Callable[[TierNews], None],
        on_saved: Callable[[Sequence[int]], None],
        on_restored: Callable[[RestoreReady, int], None],
        on_late: Callable[[RestoreReady], None],
    ) -> None:
        self.index = TierIndex()
        self._tallies: tuple[TierTally, ...] = ()
        self._tiers = tiers
        self._timer = timer
        self._choice = RestoreChoice(block_size)
        self._deadline = restore_deadline
        self._on_news = on_news
        self._on_saved = on_saved
        self._on_restored = on_restored
        self._on_late = on_late
        self._tasks: set[asyncio.Task[None]] = set()
        self._deletions: set[asyncio.Task[None]] = set()

    @property
    def tallies(self) -> tuple[TierTally, ...]:
        """Of each tier, as last heard, with what its restores take."""
        return tuple(
            replace(tally, seconds_per_block=self._choice.seconds_per_block(tally.tier)) for tally in self._tallies
        )

    async def open(self) -> None:
        """Learn what the tiers hold from before. Raises EngineDied when the worker is gone."""
        self._hear(await self._tiers.contents())

    def choose(self, tiers: Sequence[Tier]) -> int:
        """How many of a chain's next blocks to restore."""
        return self._choice.choose(tiers, seconds_per_token(self._timer.tallies))

    def save(self, event: SaveReady) -> None:
        task = self._keep(self._save(event))
        if event.wrong:
            self._deletions.add(task)
            task.add_done_callback(self._deletions.discard)

    def restore(self, event: RestoreReady) -> None:
        self._keep(self._restore(event))

    async def bring(self, hashes: tuple[BlockHash, ...], blocks: tuple[int, ...]) -> int:
        """Restore blocks for no sequence; how many verified. Returns when nothing writes into them any more."""
        return await self._restored(hashes, blocks, on_late=lambda: None)

    async def close(self) -> None:
        """End what is under way; deletions first, for the next incarnation would find what they leave."""
        if self._deletions and (await asyncio.wait(self._deletions, timeout=_DELETE_PATIENCE))[1]:
            log.error("KV computed wrong may still lie in the tiers: empty the disk tier before the next start")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _keep(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _save(self, event: SaveReady) -> None:
        try:
            self._hear(await self._tiers.save(event.blocks, event.used, event.wrong))
        except Exception as error:  # a tier is a cache: whatever befalls it, the engine goes on without
            log.warning("saving KV failed", blocks=len(event.blocks), error=str(error))
        self._on_saved([block for _, block in event.blocks])

    async def _restore(self, event: RestoreReady) -> None:
        num_restored = await self._restored(event.hashes, event.blocks, on_late=lambda: self._on_late(event))
        self._on_restored(event, num_restored)

    async def _restored(
        self, hashes: tuple[BlockHash, ...], blocks: tuple[int, ...], on_late: Callable[[], None]
    ) -> int:
        """How many verified. The targets are not ours before it ends; while it is late no other is begun."""
        work = asyncio.ensure_future(self._tiers.restore(hashes, blocks))
        try:
            if not (await asyncio.wait({work}, timeout=self._deadline))[0]:
                log.warning("a restore is late", blocks=len(blocks), seconds=self._deadline)
                self._choice.late()
                on_late()
                await asyncio.wait({work})
                self._choice.settled()
        finally:
            work.cancel()
        return self._num_restored(work)

    def _num_restored(self, work: "asyncio.Future[RestoreReceipt]") -> int:
        if error := work.exception():
            log.warning("restoring KV failed", error=str(error))
            return 0
        receipt = work.result()
        self._choice.measured(receipt.reads)
        self._hear(receipt.news)
        return receipt.num_blocks

    def _hear(self, news: TierNews) -> None:
        self._on_news(news)
        self._tallies = news.tallies
