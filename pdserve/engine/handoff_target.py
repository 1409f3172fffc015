"""The decode side of a handoff: fetches a prompt's KV block by block, verified, while prefill still runs.

The whole protocol is one state machine; handoff_source has the left half, transfer.base says what a pull is. A source
may be a running sequence that moves: then leave says what happens to it.

    SOURCE, a ticket                 messages               TARGET, a fetch               target's blocks

    ISSUED    blocks leased     ── the ticket, by a gateway ──▶ HELD      renews the lease    none yet
      │                                                           │ link open, blocks there
      │                         ◀── Attach, renews the lease ───  ▼
    ATTACHED  may be read       ─── RegionReady … ─────────────▶ FETCHING  a pull per region  used, unverified
      │                         ◀── CaughtUp (source runs) ────   │ all of what was ready verified
      │                         ─── HandoffDone ───────────────▶  │ all verified, tokens known
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
from functools import partial

import structlog

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.errors import (
    Cancelled,
    LayoutMismatch,
    LeaseExpired,
    MalformedMessage,
    PdserveError,
    TransferError,
    TransferFailed,
    from_wire,
)
from pdserve.core.failpoints import reach
from pdserve.core.protocols import PullReceipt, TransferService
from pdserve.core.shards import KVPart, plan_parts
from pdserve.core.ticket import HandoffDone, HandoffNews, RegionReady, TicketGone, TransferTicket
from pdserve.engine.pull_mode import PullHistory, PullMode
from pdserve.engine.pull_tally import PullTally
from pdserve.engine.region_pulls import RegionPulls
from pdserve.engine.source_link import SourceLink
from pdserve.engine.source_links import SourceLinks

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOutcome:
    """How a fetch ended. error None and finished False: the sequence may run.

    token_ids: what the source sampled behind the ticket's tokens. finished: the request ended on the source with
    them. unsettled: target blocks that may still be written. stamps as in core.request.EngineTrace.
    """

    token_ids: tuple[int, ...]
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
    pulls: RegionPulls | None = None
    """None until the target's blocks are there."""
    news: asyncio.Queue[HandoffNews | PdserveError | None] = field(default_factory=asyncio.Queue)
    """What the source said, an error that ends the fetch, or None when a pull completed."""
    stamps: list[tuple[str, float]] = field(default_factory=list)
    pulled: PullTally = field(default_factory=PullTally)
    latest: tuple[int, float] | None = None
    """First block of the region that became ready last, and when (monotonic)."""
    caught_up: bool = False
    """The source of a running sequence was told that it may stop."""
    done: HandoffDone | None = None


class HandoffTarget:
    """Fetches of one engine, by sequence id, over its links to other engines.

    on_outcome(sequence_id, outcome) is called exactly once per started fetch; on_settled(blocks) follows
    an outcome with unsettled blocks.
    """

    def __init__(
        self,
        *,
        transfer: TransferService,
        links: SourceLinks,
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
        self._links = links
        links.tell(self._on_link_failure)
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
        link = self._links.to(ticket)
        link.hold(ticket)
        self._fetches[sequence_id] = _Fetch(ticket, link, parts)

    def fetch(self, sequence_id: int, targets: dict[int, int]) -> None:
        """Pull the given logical blocks (index → target block); the rest is already here."""
        fetch = self._fetches[sequence_id]
        fetch.pulls = RegionPulls(
            ticket_id=fetch.ticket.id,
            link=fetch.link,
            parts=fetch.parts,
            targets=targets,
            transfer=self._transfer,
            deadline=self._times.transfer_deadline,
            on_end=partial(self._on_pull, fetch),
        )
        fetch.task = asyncio.get_running_loop().create_task(self._run(sequence_id, fetch, fetch.pulls, targets))

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

    def _on_link_failure(self, link: SourceLink, error: PdserveError) -> None:
        for sequence_id, fetch in list(self._fetches.items()):
            if fetch.link is not link:
                continue
            if fetch.task:
                fetch.news.put_nowait(error)
            else:
                del self._fetches[sequence_id]
                self._on_outcome(sequence_id, self._outcome(fetch, error))

    async def _run(self, sequence_id: int, fetch: _Fetch, pulls: RegionPulls, targets: dict[int, int]) -> None:
        error: PdserveError | None = None
        try:
            await self._complete(fetch, pulls, targets)
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

    async def _complete(self, fetch: _Fetch, pulls: RegionPulls, targets: dict[int, int]) -> None:
        ticket = fetch.ticket
        await self._open(fetch)
        history = self._histories.setdefault(ticket.engine_id, PullHistory())
        fetch.pulled.backend = fetch.link.backend
        if not ticket.growth:
            fetch.pulled.forecast = history.decide(len(targets), self._transfer.layout.block_bytes)
        first_block = min(targets, default=ticket.num_blocks)
        bulk = fetch.pulled.forecast.mode is PullMode.BULK
        fetch.link.attach(ticket.id, first_block, fetch.news.put_nowait, fetch.parts, bulk=bulk)
        self._stamp(fetch, "attached")
        try:
            while not self._satisfied(fetch):
                self._tell_caught_up(fetch)
                news = await self._next_news(fetch)
                if isinstance(news, RegionReady):
                    if not ticket.growth:
                        self._time_production(fetch, news, history)
                    pulls.start(news)
        finally:
            pulls.unwatch()
        if fetch.done and not fetch.done.finished:
            self._stamp(fetch, "last_pull")
            await fetch.link.release(ticket.id)
            self._stamp(fetch, "released")

    async def _open(self, fetch: _Fetch) -> None:
        """Wait for the link. Raises what made it fail, or what ends the fetch meanwhile."""
        if fetch.link.is_ready:
            return
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

    def _tell_caught_up(self, fetch: _Fetch) -> None:
        """Once all is verified that was final when the ticket was issued, and whatever came in since."""
        ticket = fetch.ticket
        if not ticket.growth or fetch.caught_up or fetch.done or fetch.pulls is None:
            return
        if not fetch.pulls.verified_below(ticket.num_tokens // ticket.block_size):
            return
        fetch.caught_up = True
        reach("caught_up")
        self._stamp(fetch, "caught_up")
        fetch.link.caught_up(ticket.id)

    def _take_done(self, fetch: _Fetch, done: HandoffDone) -> None:
        """Blocks a sequence might have grown into and did not are not waited for."""
        ticket = fetch.ticket
        num_tokens = ticket.num_tokens + len(done.tokens) - 1
        if num_tokens > ticket.max_tokens:
            raise MalformedMessage(f"{ticket.engine_id} hands over {num_tokens} tokens of {ticket.max_tokens}")
        fetch.done = done
        if fetch.pulls:
            fetch.pulls.forgo(ticket.blocks_for(num_tokens))

    def _satisfied(self, fetch: _Fetch) -> bool:
        verified = fetch.pulls is not None and fetch.pulls.missing == 0
        return fetch.done is not None and (fetch.done.finished or verified)

    async def _next_news(self, fetch: _Fetch) -> RegionReady | None:
        """Next region to pull, or None if something else changed. Raises what ends the fetch."""
        news = await fetch.news.get()
        match news:
            case RegionReady():
                return news
            case HandoffDone():
                self._take_done(fetch, news)
            case TicketGone():
                raise _end_of_ticket(news, fetch.ticket.engine_id)
            case PdserveError():
                raise news
        return None

    def _on_pull(self, fetch: _Fetch, result: PullReceipt | PdserveError) -> None:
        if isinstance(result, PdserveError):
            fetch.news.put_nowait(result)
            return
        if fetch.pulled.num_pulls == 0:
            self._stamp(fetch, "first_pull")
        fetch.pulled.add(result)
        self._histories[fetch.ticket.engine_id].pulled(result.num_bytes, result.seconds, self._clock.monotonic())
        fetch.news.put_nowait(None)

    def _abandon(self, fetch: _Fetch, outcome: FetchOutcome) -> None:
        if fetch.pulls:
            fetch.pulls.cancel()
        settling = asyncio.get_running_loop().create_task(self._settle(fetch, outcome.unsettled))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)

    async def _settle(self, fetch: _Fetch, unsettled: tuple[int, ...]) -> None:
        if fetch.pulls:
            await fetch.pulls.settled()
        fetch.link.give_up(fetch.ticket.id)
        if unsettled:
            self._on_settled(unsettled)

    def _outcome(self, fetch: _Fetch, error: PdserveError | None) -> FetchOutcome:
        return FetchOutcome(
            token_ids=fetch.done.tokens if fetch.done else (),
            finished=bool(fetch.done and fetch.done.finished),
            error=error,
            unsettled=fetch.pulls.unsettled if fetch.pulls else (),
            stamps=tuple(fetch.stamps),
            pulled=fetch.pulled,
        )

    def _stamp(self, fetch: _Fetch, name: str) -> None:
        fetch.stamps.append((name, self._clock.unix()))


def _end_of_ticket(gone: TicketGone, source: str) -> PdserveError:
    """A source may end it because it dies. Its target lives, and must not report that death as if it were its own."""
    error = from_wire(gone.code, f"{source}: {gone.message}")
    return error if isinstance(error, TransferError | Cancelled) else LeaseExpired(str(error))
