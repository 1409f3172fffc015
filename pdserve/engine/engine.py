"""The asynchronous shell around EngineCore: pumps steps, streams deltas, connects handoffs, tiers and loans to the
scheduler.

All decisions are EngineCore's. This class moves its events to where they have effects, and effects'
results back, on one event loop.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Self

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.endpoint import Endpoint, EngineLimits, LoadSnapshot
from pdserve.core.errors import EngineDied, InvalidRequest, PdserveError, Unavailable
from pdserve.core.failpoints import reach
from pdserve.core.protocols import Executor, ModelInfo, TransferService
from pdserve.core.request import FinishReason, Request, TokenDelta
from pdserve.core.ticket import KVSource, TransferTicket
from pdserve.core.tiers import TierService
from pdserve.engine.core import EngineCore
from pdserve.engine.core_events import (
    Computed,
    CoreEvent,
    Emitted,
    FetchAborted,
    FetchReady,
    Finished,
    HandedOver,
    HandoffScheduled,
    Outgrown,
    RestoreReady,
    SaveReady,
)
from pdserve.engine.deltas import engine_trace, to_delta
from pdserve.engine.departures import AnswerDeparture, Departures
from pdserve.engine.handoff_source import HandoffSource
from pdserve.engine.handoff_target import FetchOutcome, HandoffTarget
from pdserve.engine.kv_feed import KVFeed
from pdserve.engine.lender import Lender
from pdserve.engine.pump import StepPump
from pdserve.engine.restoring import Restoring
from pdserve.engine.source_link import OpenLink
from pdserve.engine.source_links import SourceLinks
from pdserve.engine.step_timing import StepTimer

EngineItem = TokenDelta | TransferTicket
Sink = Callable[[list[EngineItem]], None]
"""Takes what a step produced for one client; must not block."""

_HOUSEKEEPING = 0.25
"""Seconds between looks for expired deadlines and leases."""


@dataclass(slots=True)
class _Live:
    """A request from start until its last delta has gone to its sink."""

    request_id: str
    sink: Sink
    handoff: bool
    last: TokenDelta | None = None
    """Held back until the core's Finished brings the trace that travels with it."""
    outcome: FetchOutcome | None = None


class Engine:
    """One engine. Use as `async with Engine(…)`; leaving ends whatever still runs."""

    def __init__(
        self,
        *,
        endpoint: Endpoint,
        info: ModelInfo,
        limits: EngineLimits,
        executor: Executor,
        transfer: TransferService,
        open_link: OpenLink,
        times: Times,
        clock: Clock,
        tiers: TierService | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.info = info
        self.transfer = transfer
        self.clock = clock
        self._timer = StepTimer(clock)
        self._links = SourceLinks(open_link=open_link, disconnect=transfer.disconnect, times=times, clock=clock)
        self._restoring = Restoring(
            tiers,
            transfer=transfer,
            links=self._links,
            timer=self._timer,
            times=times,
            clock=clock,
            on_news=lambda news: self._core.kv.hear(news),
            on_saved=self._on_saved,
            on_ended=self._on_restored,
            on_late=self._on_restore_late,
        )
        self._core = EngineCore(
            info=info,
            limits=limits,
            layout=transfer.layout,
            clock=clock,
            new_ticket_id=lambda: token_hex(16),
            tiers=self._restoring.index,
            choose_restore=self._restoring.choose_restore,
            choose_fetch=self._restoring.choose_fetch,
        )
        self.limits = limits
        self.kv_feed = KVFeed(self._core.kv.drain_events, self._core.kv.snapshot)
        self._pump = StepPump(self._core, executor, self._timer, self._apply)
        self.source = HandoffSource(
            endpoint=endpoint,
            transfer=transfer,
            times=times,
            clock=clock,
            on_end=self._on_lease_end,
            on_caught_up=self._on_caught_up,
        )
        self.lender = Lender(
            source=self.source,
            kv=self._core.kv,
            restoring=self._restoring,
            clock=clock,
            patience=times.fetch_deadline,
            refusal=self._refusal,
            on_change=self._pump.wake,
        )
        self._departures = Departures(self._core, self.source)
        self._target = HandoffTarget(
            transfer=transfer,
            links=self._links,
            times=times,
            clock=clock,
            on_outcome=self._on_outcome,
            on_settled=self._on_settled,
        )
        self._live: dict[int, _Live] = {}
        self._by_request: dict[str, int] = {}
        self._aborted_fetches: dict[int, tuple[int, ...]] = {}
        """Target blocks the core quarantined, until the fetch's outcome says which may still be written."""
        self._died: EngineDied | None = None
        self._draining = False
        self.drain_watchers: set[Callable[[], None]] = set()
        """Called as soon as the engine drains."""
        self._snapshots = 0
        self._ended = asyncio.Event()
        self._dead = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._restoring.open()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._guard(work)) for work in (self._pump.run(), self._keep_house())]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._abort_all(Unavailable(f"{self.endpoint.engine_id} has shut down"))
        await self._target.close()
        await self.lender.close()
        await self._restoring.close()
        await self._links.close()
        await self.source.close()

    @property
    def max_len(self) -> int:
        """Most tokens, prompt and output together, a sequence can have here."""
        return self._core.max_len

    async def death(self) -> EngineDied:
        """Returns when the engine can serve nothing any more; its process should end then."""
        await self._dead.wait()
        assert self._died is not None
        return self._died

    def start(
        self,
        request: Request,
        sink: Sink,
        *,
        handoff: bool = False,
        ticket: TransferTicket | None = None,
        source: KVSource | None = None,
    ) -> None:
        """Begin a request; everything it produces goes to sink. Raises PdserveError to refuse it."""
        if refusal := self._refusal():
            raise refusal
        if request.id in self._by_request:
            raise InvalidRequest(f"request id {request.id!r} is already running here", "id")
        sequence_id = self._core.add(request, handoff=handoff, ticket=ticket, source=source)
        reach("queued")
        self._live[sequence_id] = _Live(request.id, sink, handoff)
        self._by_request[request.id] = sequence_id
        if ticket:
            try:
                self._target.hold(sequence_id, ticket)
            except PdserveError as error:
                self._apply(self._core.abort(sequence_id, error))
        self._pump.wake()

    def cancel(self, request_id: str) -> None:
        """Stop a request and free what it holds; unknown ids are ignored (it has just ended)."""
        sequence_id = self._by_request.get(request_id)
        if sequence_id is not None:
            self._abort(sequence_id, None)

    def depart(self, request_id: str, answer: AnswerDeparture) -> None:
        """Ask a request to move to another engine. It runs on here until whoever presents the ticket has caught up,
        then it ends with HANDOFF. answer is called once: as soon as the request may leave, or when it has ended."""
        sequence_id = self._by_request.get(request_id)
        if sequence_id is None or self._live[sequence_id].handoff:
            answer(Unavailable(f"{request_id} does not decode on {self.endpoint.engine_id}"))
        else:
            self._departures.ask(sequence_id, request_id, answer)

    def borrow_blocks(self, most: int) -> tuple[int, ...]:
        """Spare blocks for a check of the transfers, at most so many. Raises Unavailable when there are none."""
        if self._died:
            raise self._died
        blocks = self._core.kv.borrow(most)
        if not blocks:
            raise Unavailable(f"{self.endpoint.engine_id} has no spare KV blocks now")
        return blocks

    def quarantine_borrowed(self, blocks: tuple[int, ...]) -> None:
        """A transfer may still write into these borrowed blocks; they are given back when it no longer does."""
        self._core.kv.quarantine(blocks)

    def give_back_blocks(self, blocks: tuple[int, ...], *, quarantined: bool = False) -> None:
        if quarantined:
            self._core.kv.unquarantine(blocks)
        self._core.kv.give_back(blocks)
        self._pump.wake()

    def snapshot(self) -> LoadSnapshot:
        self._snapshots += 1
        load = self._core.load()
        return LoadSnapshot(
            engine_id=self.endpoint.engine_id,
            epoch=self.endpoint.epoch,
            number=self._snapshots,
            running=load.running,
            waiting=load.waiting,
            backlog_tokens=load.backlog_tokens,
            blocks=load.blocks,
            draining=self._draining,
            steps=self._timer.tallies,
            tiers=self._restoring.tallies,
        )

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests; True once nothing runs and no lease is open, False after timeout seconds."""
        self._draining = True
        for told in tuple(self.drain_watchers):
            told()
        try:
            async with asyncio.timeout(timeout):
                while self._live or self.source.num_open:
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def _refusal(self) -> PdserveError | None:
        """Why nothing new is taken on, if so."""
        if self._draining and not self._died:
            return Unavailable(f"{self.endpoint.engine_id} is draining")
        return self._died

    async def _guard(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except EngineDied as error:
            self._die(error)
        except Exception as bug:
            self._die(EngineDied(f"{self.endpoint.engine_id} failed internally"))
            raise bug

    def _die(self, error: EngineDied) -> None:
        self._died = self._died or error
        self._dead.set()
        self._abort_all(error)

    async def _keep_house(self) -> None:
        while True:
            await self.clock.sleep(_HOUSEKEEPING)
            self.source.expire()
            self.kv_feed.collect()
            self._apply(self._core.expire(self.clock.monotonic()))
            self._pump.wake()

    def _abort(self, sequence_id: int, error: PdserveError | None) -> None:
        self._apply(self._core.abort(sequence_id, error))
        self._pump.wake()

    def _abort_all(self, error: PdserveError) -> None:
        for sequence_id in list(self._live):
            self._abort(sequence_id, error)

    def _apply(self, events: list[CoreEvent]) -> None:
        """Give the core's events their effects; each sink is called once."""
        out: dict[Sink, list[EngineItem]] = defaultdict(list)
        for event in events:
            match event:
                case Emitted():
                    self._on_emitted(event, out)
                case HandoffScheduled():
                    self._on_handoff_scheduled(event, out)
                case Computed():
                    self.source.computed(event.sequence_id, event.num_tokens, event.source_blocks)
                    reach("prefilling")
                case HandedOver() | Outgrown():
                    self._departures.over(event)
                case FetchReady():
                    self._target.fetch(event.sequence_id, dict(event.fetch_blocks))
                case FetchAborted():
                    self._aborted_fetches[event.sequence_id] = event.block_ids
                case RestoreReady():
                    self._restoring.restore(event)
                case SaveReady():
                    self._restoring.save(event)
                case Finished():
                    self._on_finished(event, out)
        for sink, items in out.items():
            sink(items)

    def _on_emitted(self, event: Emitted, out: dict[Sink, list[EngineItem]]) -> None:
        live = self._live[event.sequence_id]
        reason = event.finish_reason
        if event.token_ids:
            reach("first_token" if event.index == 0 else "decoding")
        if live.handoff and event.token_ids:
            self.source.prefilled(event.sequence_id, event.token_ids[0], finished=reason is not None)
            reason = reason or FinishReason.HANDOFF
        delta = to_delta(event, reason)
        if reason:
            live.last = delta
        else:
            out[live.sink].append(delta)
            self._departures.emitted(event.sequence_id)

    def _on_handoff_scheduled(self, event: HandoffScheduled, out: dict[Sink, list[EngineItem]]) -> None:
        ticket = self.source.issue(
            event.ticket_id, event.sequence_id, event.request_id, event.num_tokens, event.source_blocks
        )
        self.source.computed(event.sequence_id, event.num_cached_tokens)
        out[self._live[event.sequence_id].sink].append(ticket)
        reach("leased")

    def _on_finished(self, event: Finished, out: dict[Sink, list[EngineItem]]) -> None:
        live = self._live.pop(event.sequence_id)
        self._departures.ended(event.sequence_id)
        self._target.cancel(event.sequence_id)
        fetch = self._restoring.forget(event.sequence_id)
        del self._by_request[live.request_id]
        if live.last:
            trace = engine_trace(self.endpoint, event, live.outcome, fetch)
            out[live.sink].append(replace(live.last, trace=trace))
        self._ended.set()

    def _on_outcome(self, sequence_id: int, outcome: FetchOutcome) -> None:
        aborted = self._aborted_fetches.pop(sequence_id, None)
        if aborted is not None:
            self._core.kv.unquarantine(set(aborted) - set(outcome.unsettled))
        elif live := self._live.get(sequence_id):
            live.outcome = outcome
            if outcome.error or outcome.finished:
                self._apply(self._core.fetch_failed(sequence_id, outcome.unsettled, outcome.error))
            else:
                self._apply(self._core.fetched(sequence_id, outcome.token_ids))
        self._pump.wake()

    def _on_saved(self, blocks: Sequence[int]) -> None:
        self._core.kv.saved(blocks)
        self._pump.wake()

    def _on_restored(self, event: RestoreReady, num_blocks: int) -> None:
        self._apply(self._core.restore_ended(event.sequence_id, event.admission, num_blocks))
        self._pump.wake()

    def _on_restore_late(self, event: RestoreReady) -> None:
        self._core.restore_late(event.sequence_id, event.admission)
        self._pump.wake()

    def _on_settled(self, blocks: tuple[int, ...]) -> None:
        self._core.kv.unquarantine(blocks)
        self._pump.wake()

    def _on_caught_up(self, sequence_id: int) -> None:
        self._apply(self._core.stop(sequence_id))
        self._pump.wake()

    def _on_lease_end(self, ticket_id: str, sequence_id: int | None) -> None:
        self._apply(self._core.lease_ended(ticket_id, sequence_id))
        self._ended.set()
        self._pump.wake()
