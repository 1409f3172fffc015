"""The reading side of a loan: KV of a prompt's beginning, pulled from what another engine has cached.

A loan is a ticket whose KV is final when it is issued, so it takes the same way as a handoff's (handoff_target):

    RestoreReady ─▶ ASKED ── Lent ──▶ PULLING  a pull per region ── all verified ──▶ RELEASING ── Released(no) ──▶ ended
                      └─────────────────┴── TicketGone, error, deadline, cancel, Released(expired) ──┘
                                                    ├── no read in flight ─────────▶ ended, nothing arrived
                                                    └── LATE: targets in quarantine ── every pull settled ──▶ ended

Whatever happens, the request goes on: what did not arrive is computed.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import structlog

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.errors import Cancelled, PdserveError, TransferFailed, TransferTimeout, from_wire
from pdserve.core.protocols import PullReceipt, TransferService
from pdserve.core.request import PrefixFetch
from pdserve.core.shards import KVPart, plan_parts
from pdserve.core.ticket import HandoffNews, KVSource, Lent, RegionReady, TicketGone
from pdserve.engine.core_events import RestoreReady
from pdserve.engine.region_pulls import RegionPulls
from pdserve.engine.source_link import SourceLink
from pdserve.engine.source_links import SourceLinks

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Fetch:
    event: RestoreReady
    source: KVSource
    ticket_id: str
    began: float
    """When (monotonic) it was asked for; anew once the link is open, which later fetches need not wait for."""
    news: asyncio.Queue[HandoffNews | PdserveError | None] = field(default_factory=asyncio.Queue)
    """What the source said, an error that ends the fetch, or None when a pull completed."""
    task: asyncio.Task[None] | None = None
    link: SourceLink | None = None
    parts: tuple[KVPart, ...] = ()
    pulls: RegionPulls | None = None
    """None until the source has said what it lends."""
    num_blocks: int = 0
    """Of those asked for, how many it lends."""
    num_bytes: int = 0
    restore_seconds: float = 0.0


class PrefixFetches:
    """Fetches of one engine by sequence id, over its links to other engines.

    on_ended(event, num_blocks, summary) is called exactly once per fetch, when nothing writes into the event's blocks
    any more; on_late(event) before it if the sequence should not wait for that."""

    def __init__(
        self,
        *,
        transfer: TransferService,
        links: SourceLinks,
        times: Times,
        clock: Clock,
        new_ticket_id: Callable[[], str],
        on_ended: Callable[[RestoreReady, int, PrefixFetch], None],
        on_late: Callable[[RestoreReady, PrefixFetch], None],
    ) -> None:
        self._transfer = transfer
        self._links = links
        self._times = times
        self._clock = clock
        self._new_ticket_id = new_ticket_id
        self._on_ended = on_ended
        self._on_late = on_late
        self._fetches: dict[int, _Fetch] = {}
        self._settling: dict[asyncio.Task[None], str] = {}
        """What waits for reads that were given up, and the engine they read from."""
        self._closed = False
        links.tell(self._on_link_failure)

    @property
    def num_open(self) -> int:
        """Fetches that run, or wait for reads to end."""
        return len(self._fetches) + len(self._settling)

    def choose(self, source: KVSource, num_blocks: int) -> int:
        """How many of num_blocks blocks that the source should hold to ask it for: all, or none where that does not
        pay, or while reads from it that were given up have not ended."""
        worth = num_blocks >= source.least_blocks and source.engine_id not in self._settling.values()
        return num_blocks if worth else 0

    def restore(self, event: RestoreReady) -> None:
        assert event.source is not None
        fetch = _Fetch(event, event.source, self._new_ticket_id(), self._clock.monotonic())
        self._fetches[event.sequence_id] = fetch
        fetch.task = asyncio.get_running_loop().create_task(self._run(fetch))
        fetch.task.add_done_callback(partial(self._done, fetch))

    def cancel(self, sequence_id: int) -> None:
        """Nobody waits for it any more."""
        if (fetch := self._fetches.get(sequence_id)) and fetch.task:
            fetch.task.cancel()

    async def close(self) -> None:
        self._closed = True
        tasks = [*(fetch.task for fetch in self._fetches.values() if fetch.task), *self._settling]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_link_failure(self, link: SourceLink, error: PdserveError) -> None:
        for fetch in self._fetches.values():
            if fetch.link is link:
                fetch.news.put_nowait(error)

    async def _run(self, fetch: _Fetch) -> None:
        async with asyncio.timeout(self._times.fetch_deadline):
            link = fetch.link = self._links.to(fetch.source)
            await link.ready()
            fetch.parts = plan_parts(link.shards, self._transfer.address.shards)
            fetch.began = self._clock.monotonic()
            link.borrow(fetch.ticket_id, fetch.event.hashes, fetch.news.put_nowait, fetch.parts)
            try:
                while fetch.pulls is None or fetch.pulls.missing:
                    self._take(fetch, link, await fetch.news.get())
            finally:
                if fetch.pulls:
                    fetch.pulls.unwatch()
            await link.release(fetch.ticket_id)

    def _take(self, fetch: _Fetch, link: SourceLink, news: HandoffNews | PdserveError | None) -> None:
        match news:
            case Lent() if fetch.pulls is None:
                fetch.restore_seconds = news.restore_seconds
                fetch.pulls = self._open_pulls(fetch, link, news.num_blocks)
            case RegionReady() if fetch.pulls:
                fetch.pulls.start(news)
            case RegionReady():
                raise TransferFailed(f"{link.engine_id} offers blocks without saying how many it lends")
            case TicketGone():
                raise from_wire(news.code, f"{link.engine_id}: {news.message}")
            case PdserveError():
                raise news

    def _open_pulls(self, fetch: _Fetch, link: SourceLink, num_blocks: int) -> RegionPulls:
        blocks = fetch.event.blocks
        if num_blocks > len(blocks):
            raise TransferFailed(f"{link.engine_id} lends more blocks than it was asked for")
        fetch.num_blocks = num_blocks
        return RegionPulls(
            ticket_id=fetch.ticket_id,
            link=link,
            parts=fetch.parts,
            targets=dict(enumerate(blocks[:num_blocks])),
            transfer=self._transfer,
            deadline=min(self._times.transfer_deadline, self._times.fetch_deadline),
            on_end=partial(self._on_pull, fetch),
        )

    def _on_pull(self, fetch: _Fetch, result: PullReceipt | PdserveError) -> None:
        if isinstance(result, PullReceipt):
            fetch.num_bytes += result.num_bytes
            fetch.news.put_nowait(None)
        else:
            fetch.news.put_nowait(result)

    def _done(self, fetch: _Fetch, task: asyncio.Task[None]) -> None:
        """Also of a task that was cancelled before it began."""
        error = self._error(fetch, task)
        del self._fetches[fetch.event.sequence_id]
        if self._closed:
            return
        summary = self._summary(fetch, error)
        if error is None:
            self._on_ended(fetch.event, fetch.num_blocks, summary)
        elif fetch.pulls and fetch.pulls.unsettled:
            fetch.pulls.cancel()
            settling = asyncio.get_running_loop().create_task(self._settle(fetch, fetch.pulls, summary))
            self._settling[settling] = fetch.source.engine_id
            settling.add_done_callback(self._settling.pop)
            self._on_late(fetch.event, summary)
        else:
            self._give_up(fetch)
            self._on_ended(fetch.event, 0, summary)

    async def _settle(self, fetch: _Fetch, pulls: RegionPulls, summary: PrefixFetch) -> None:
        await pulls.settled()
        self._give_up(fetch)
        self._on_ended(fetch.event, 0, summary)

    def _give_up(self, fetch: _Fetch) -> None:
        if fetch.link:
            fetch.link.give_up(fetch.ticket_id)

    def _error(self, fetch: _Fetch, task: asyncio.Task[None]) -> PdserveError | None:
        if task.cancelled():
            return Cancelled("the request was cancelled")
        error = task.exception()
        if error is None or isinstance(error, PdserveError):
            return error
        if isinstance(error, TimeoutError):
            seconds = self._times.fetch_deadline
            return TransferTimeout(f"{fetch.source.engine_id} did not lend its KV within {seconds:g} s")
        _log.error("fetch failed internally", ticket=fetch.ticket_id, exc_info=error)
        return TransferFailed("the fetch failed internally; the log has the details")

    def _summary(self, fetch: _Fetch, error: PdserveError | None) -> PrefixFetch:
        return PrefixFetch(
            engine_id=fetch.source.engine_id,
            tokens=0 if error else fetch.num_blocks * self._transfer.layout.block_size,
            num_bytes=fetch.num_bytes,
            seconds=self._clock.monotonic() - fetch.began,
            backend=fetch.link.backend if fetch.link else "",
            error=error.code if error else "",
            restore_seconds=fetch.restore_seconds,
        )
