"""The decode side of a handoff: fetches a prompt's KV block by block, verified, while prefill still runs.

The whole protocol is one state machine; handoff_source has the left half, transfer.base says what a pull is:

    SOURCE, a ticket                 messages               TARGET, a fetch               target's blocks

    ISSUED    blocks leased     ── the ticket, by a gateway ──▶ HELD      renews the lease    none yet
      │                                                           │ link open, blocks there
      │                         ◀── Attach, renews the lease ───  ▼
    ATTACHED  may be read       ─── RegionReady … ─────────────▶ FETCHING  a pull per region  used, unverified
      │                         ─── PrefillDone ───────────────▶  │ all verified, token known
      │                         ◀── Release ───────────────────  ▼
      ▼                                                          RELEASING
    RELEASED  blocks free       ─── Released(no) ──────────────▶ COMPLETE                     used: it runs

    ISSUED, ATTACHED ─ lease ran out ─▶ EXPIRED     blocks free; TicketGone, and Released(expired) to a late Release
    ISSUED           ─ cancel ────────▶ WITHDRAWN   blocks free; TicketGone to a late Attach
    ATTACHED         ─ cancel ────────▶ ATTACHED    TicketGone; still leased, for the target may be reading

    HELD, FETCHING, RELEASING ─ TicketGone, Released(expired), error, cancel, link lost ─▶ ABANDONED
    ABANDONED ─ every pull settled ─▶ SETTLED       until then blocks of reads in flight are quarantined, others free;
                                                    then Release, and all are free

    A PULL, whose every read starts only while the lease surely holds, for blocks that no pull was started for

    POSTED ── DONE ──▶ ARRIVED ── digest equal ──▶ VERIFIED ─────────────┐
      │  ▲               │                                               │
      │  └─ read again ──┴─ digest differs ──▶ (second time) MISMATCHED ─┤
      ├── ERROR ─────────────────────────────▶ FAILED ───────────────────┼──▶ SETTLED
      └── deadline, cancel, peer gone ──▶ QUARANTINED ── DONE or ERROR ──┘

The caller learns of COMPLETE or ABANDONED at once. Blocks of an abandoned fetch that a pull may still
write to are named in the outcome and stay quarantined until `settled`. The source's lease is given back
only when nothing reads from it any more.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.errors import (
    Cancelled,
    LayoutMismatch,
    LeaseExpired,
    PdserveError,
    TransferFailed,
    from_wire,
)
from pdserve.core.failpoints import reach
from pdserve.core.protocols import Pull, PullReceipt, PullSpec, TransferService
from pdserve.core.shards import KVPart, plan_parts
from pdserve.core.ticket import HandoffNews, PrefillDone, RegionReady, TicketGone, TransferTicket, region_seed
from pdserve.engine.pull_mode import PullHistory, PullMode
from pdserve.engine.pull_tally import PullTally
from pdserve.engine.source_link import OpenLink, SourceLink
from pdserve.engine.source_links import SourceLinks

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOutcome:
    """How a fetch ended. error None and finished False: the sequence may run.

    finished: the request ended on the prefill engine with its first token. unsettled: target blocks
    that may still be written. stamps as in core.request.EngineTrace.
    """

    first_token: int
    finished: bool
    error: PdserveError | None
    unsettled: tuple[int, ...]
    stamps: tuple[tuple[str, float], ...]
    pulled: PullTally


@dataclass(slots=True)
class _Fetch:
    ticket: TransferTicket
    link: SourceLink
    parts: tuple[KVPart, ...]
    """What each of our ranks takes of every block, and from which rank of the source."""
    task: asyncio.Task[None] | None = None
    targets: dict[int, int] = field(default_factory=dict)
    """Logical block index → target block."""
    news: asyncio.Queue[HandoffNews | PdserveError | None] = field(default_factory=asyncio.Queue)
    """What the source said, an error that ends the fetch, or None when a pull completed."""
    pulls: list[tuple[Pull, tuple[int, ...]]] = field(default_factory=list)
    stamps: list[tuple[str, float]] = field(default_factory=list)
    pulled: PullTally = field(default_factory=PullTally)
    latest: tuple[int, float] | None = None
    """First block of the region that became ready last, and when (monotonic)."""
    unoffered: set[tuple[int, KVPart | None]] = field(default_factory=set)
    """Blocks, by logical index, and their parts that no region has brought yet."""
    missing: int = 0
    """Parts of blocks that are not verified yet."""
    done: PrefillDone | None = None


class HandoffTarget:
    """Fetches of one engine, by sequence id.

    on_outcome(sequence_id, outcome) is called exactly once per started fetch; on_settled(blocks) follows
    an outcome with unsettled blocks.
    """

    def __init__(
        self,
        *,
        transfer: TransferService,
        open_link: OpenLink,
        times: Times,
        clock: Clock,
        on_outcome: Callable[[int, FetchOutcome], None],
        on_settled: Callable[[tuple[int, ...]], None],
    ) -> None:
        self._transfer = transfer
        self._times = times
        self._clock = clock
        self._on_outcome = on_outcome
        self._on_settled = on_settled
        self._links = SourceLinks(
            open_link=open_link,
            disconnect=transfer.disconnect,
            times=times,
            clock=clock,
            on_failure=self._on_link_failure,
        )
        self._fetches: dict[int, _Fetch] = {}
        self._histories: dict[str, PullHistory] = {}
        """By engine id: an engine that restarts is as fast as it was."""
        self._settling: set[asyncio.Task[None]] = set()

    def hold(self, sequence_id: int, ticket: TransferTicket) -> None:
        """Take over the ticket: keep its lease alive while the sequence waits for blocks.

        Raises LayoutMismatch if its KV cannot be used here, LinkLost while its source cannot be reached."""
        if ticket.layout_hash != self._transfer.layout.wire_hash:
            raise LayoutMismatch(
                f"KV of {ticket.engine_id} does not fit here: model, KV dtype and block size must be equal"
            )
        parts = plan_parts(ticket.ranks, self._transfer.address.shards)
        link = self._links.to_source_of(ticket)
        link.hold(ticket)
        self._fetches[sequence_id] = _Fetch(ticket, link, parts)

    def fetch(self, sequence_id: int, targets: dict[int, int]) -> None:
        """Pull the given logical blocks (index → target block); the rest is already here."""
        fetch = self._fetches[sequence_id]
        fetch.targets = targets
        fetch.unoffered = {(index, part) for index in targets for part in fetch.parts}
        fetch.missing = len(fetch.unoffered)
        fetch.task = asyncio.get_running_loop().create_task(self._run(sequence_id, fetch))

    def cancel(self, sequence_id: int) -> None:
        """Stop. A started fetch still reports its outcome (with error Cancelled)."""
        fetch = self._fetches.get(sequence_id)
        if fetch is None:
            return
        if fetch.task:
            fetch.news.put_nowait(Cancelled("the request was cancelled"))
        else:
            del self._fetches[sequence_id]
            fetch.link.give_up(fetch.ticket.id)

    async def close(self) -> None:
        tasks = [*(f.task for f in self._fetches.values() if f.task), *self._settling]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._links.close()

    def _on_link_failure(self, link: SourceLink, error: PdserveError) -> None:
        for sequence_id, fetch in list(self._fetches.items()):
            if fetch.link is not link:
                continue
            if fetch.task:
                fetch.news.put_nowait(error)
            else:
                del self._fetches[sequence_id]
                self._on_outcome(sequence_id, self._outcome(fetch, error))

    async def _run(self, sequence_id: int, fetch: _Fetch) -> None:
        error: PdserveError | None = None
        try:
            await self._complete(fetch)
        except PdserveError as failure:
            error = failure
        except Exception:
            _log.exception("fetch failed internally", ticket=fetch.ticket.id)
            error = TransferFailed("the fetch failed internally; the log has the details")
        finally:
            self._fetches.pop(sequence_id, None)
        outcome = self._outcome(fetch, error)
        if error or outcome.finished:
            self._abandon(fetch, outcome)
        self._on_outcome(sequence_id, outcome)

    async def _complete(self, fetch: _Fetch) -> None:
        ticket = fetch.ticket
        await self._open(fetch)
        history = self._histories.setdefault(ticket.engine_id, PullHistory())
        fetch.pulled.backend = fetch.link.backend
        fetch.pulled.forecast = history.decide(len(fetch.targets), self._transfer.layout.block_bytes)
        first_block = min(fetch.targets, default=ticket.num_blocks)
        bulk = fetch.pulled.forecast.mode is PullMode.BULK
        fetch.link.attach(ticket.id, first_block, fetch.news.put_nowait, fetch.parts, bulk=bulk)
        self._stamp(fetch, "attached")
        watchers: list[asyncio.Task[None]] = []
        try:
            while not self._satisfied(fetch):
                news = await self._next_news(fetch)
                if isinstance(news, RegionReady):
                    self._time_production(fetch, news, history)
                    watchers.append(self._start_pull(fetch, news))
        finally:
            for watcher in watchers:
                watcher.cancel()
        if fetch.done and not fetch.done.finished:
            self._stamp(fetch, "last_pull")
            await fetch.link.release(ticket.id)
            self._stamp(fetch, "released")

    async def _open(self, fetch: _Fetch) -> None:
        """Wait for the link. Raises what made it fail, or what ends the fetch meanwhile."""
        opening = asyncio.ensure_future(fetch.link.ready())
        opening.add_done_callback(lambda _: fetch.news.put_nowait(None))
        try:
            while not opening.done():
                await self._next_news(fetch)
            opening.result()
        finally:
            opening.cancel()

    def _time_production(self, fetch: _Fetch, region: RegionReady, history: PullHistory) -> None:
        if fetch.latest and fetch.latest[0] == region.first_block:
            return  # another part of it
        now = self._clock.monotonic()
        if fetch.latest and fetch.pulled.forecast.mode is PullMode.PROGRESSIVE:
            history.produced(len(region.source_blocks), now - fetch.latest[1])
        fetch.latest = (region.first_block, now)

    def _satisfied(self, fetch: _Fetch) -> bool:
        return fetch.done is not None and (fetch.done.finished or fetch.missing == 0)

    async def _next_news(self, fetch: _Fetch) -> RegionReady | None:
        """Next region to pull, or None if something else changed. Raises what ends the fetch."""
        news = await fetch.news.get()
        match news:
            case RegionReady():
                return news
            case PrefillDone():
                fetch.done = news
            case TicketGone():
                raise from_wire(news.code, f"{fetch.ticket.engine_id}: {news.message}")
            case PdserveError():
                raise news
        return None

    def _start_pull(self, fetch: _Fetch, region: RegionReady) -> asyncio.Task[None]:
        ticket = fetch.ticket
        lease_left = fetch.link.lease_left(ticket.id)
        if lease_left <= 0:
            raise LeaseExpired(f"the lease of {ticket.engine_id} was not renewed in time to read")
        logical = range(region.first_block, region.first_block + len(region.source_blocks))
        offered = {(index, region.part) for index in logical}
        if not offered <= fetch.unoffered:
            raise TransferFailed(f"{ticket.engine_id} offered blocks that were not asked for, or twice")
        fetch.unoffered -= offered
        targets = tuple(fetch.targets[index] for index in logical)
        reach("transferring")
        pull = self._transfer.pull(
            PullSpec(
                peer=ticket.engine_id,
                epoch=ticket.epoch,
                source_blocks=region.source_blocks,
                target_blocks=targets,
                digest=region.digest,
                seed=region_seed(ticket.id, ticket.epoch, region.first_block, region.part),
                deadline=self._times.transfer_deadline,
                start_within=lease_left,
                part=region.part,
            )
        )
        fetch.pulls.append((pull, targets))
        return asyncio.get_running_loop().create_task(self._watch(fetch, pull, len(targets)))

    async def _watch(self, fetch: _Fetch, pull: Pull, num_blocks: int) -> None:
        try:
            receipt: PullReceipt = await pull.wait()
        except PdserveError as error:
            if isinstance(error, TransferFailed):
                fetch.link.distrust()
            fetch.news.put_nowait(error)
            return
        except Exception:
            _log.exception("pull failed internally", ticket=fetch.ticket.id)
            fetch.news.put_nowait(TransferFailed("a pull failed internally; the log has the details"))
            return
        if fetch.pulled.num_pulls == 0:
            self._stamp(fetch, "first_pull")
        fetch.pulled.add(receipt)
        self._histories[fetch.ticket.engine_id].pulled(receipt.num_bytes, receipt.seconds)
        fetch.missing -= num_blocks
        fetch.pulls = [entry for entry in fetch.pulls if entry[0] is not pull]
        fetch.news.put_nowait(None)

    def _abandon(self, fetch: _Fetch, outcome: FetchOutcome) -> None:
        for pull, _ in fetch.pulls:
            pull.cancel()
        settling = asyncio.get_running_loop().create_task(self._settle(fetch, outcome.unsettled))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)

    async def _settle(self, fetch: _Fetch, unsettled: tuple[int, ...]) -> None:
        for pull, _ in fetch.pulls:
            await pull.settled()
        fetch.link.give_up(fetch.ticket.id)
        if unsettled:
            self._on_settled(unsettled)

    def _outcome(self, fetch: _Fetch, error: PdserveError | None) -> FetchOutcome:
        return FetchOutcome(
            first_token=fetch.done.first_token if fetch.done else 0,
            finished=bool(fetch.done and fetch.done.finished),
            error=error,
            unsettled=tuple(dict.fromkeys(block for _, targets in fetch.pulls for block in targets)),
            stamps=tuple(fetch.stamps),
            pulled=fetch.pulled,
        )

    def _stamp(self, fetch: _Fetch, name: str) -> None:
        fetch.stamps.append((name, self._clock.unix()))
