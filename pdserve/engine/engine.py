"""The asynchronous shell around EngineCore: pumps steps, connects handoffs, tiers and loans to the scheduler.

All decisions are EngineCore's. LiveRequests gives its events their effects; this class brings results of effects back
to it, on one event loop.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from secrets import token_hex
from typing import Self

import structlog

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.endpoint import Endpoint, EngineLimits, LoadSnapshot, Role
from pdserve.core.errors import EngineDied, InvalidRequest, PdserveError, Unavailable
from pdserve.core.failpoints import reach
from pdserve.core.protocols import Executor, ModelInfo, TransferService
from pdserve.core.request import Request
from pdserve.core.ticket import KVSource, TransferTicket
from pdserve.core.tiers import TierService
from pdserve.engine.core import EngineCore
from pdserve.engine.core_events import (
    RestoreReady,
)
from pdserve.engine.departures import AnswerDeparture, Departures
from pdserve.engine.handoff_source import HandoffSource
from pdserve.engine.handoff_target import FetchOutcome, HandoffTarget
from pdserve.engine.kv_feed import KVFeed
from pdserve.engine.lender import Lender
from pdserve.engine.live_requests import LiveRequests, Sink
from pdserve.engine.pump import StepPump
from pdserve.engine.quarantine_watch import QuarantineWatch
from pdserve.engine.restoring import Restoring
from pdserve.engine.source_link import OpenLink
from pdserve.engine.source_links import SourceLinks
from pdserve.engine.spare_blocks import SpareBlocks
from pdserve.engine.step_timing import StepTimer

_log = structlog.get_logger(__name__)

_HOUSEKEEPING = 0.25
"""Seconds between looks for expired deadlines and leases."""


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
        quarantine_limit: float = 0.1,
        domain: str = "",
    ) -> None:
        """quarantine_limit: share of the blocks above which quarantine that lasts for times.quarantine ends it. domain
        as in EngineCapacity."""
        self.endpoint = endpoint
        self.domain = domain
        self.info = info
        self.transfer = transfer
        self.clock = clock
        self._timer = StepTimer(clock)
        self._ended = asyncio.Event()
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
        self.kv_feed = KVFeed(self._core.kv.drain_events, self._core.kv.snapshot)
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
            on_change=self._wake,
        )
        self.spare_blocks = SpareBlocks(endpoint.engine_id, self._core.kv, died=lambda: self._died, on_free=self._wake)
        self._departures = Departures(self._core, self.source)
        self._target = HandoffTarget(
            transfer=transfer,
            links=self._links,
            times=times,
            clock=clock,
            on_outcome=self._on_outcome,
            on_settled=self._on_settled,
        )
        self._requests = LiveRequests(
            endpoint=endpoint,
            source=self.source,
            target=self._target,
            departures=self._departures,
            restoring=self._restoring,
            on_ended=self._ended.set,
        )
        self._pump = StepPump(self._core, executor, self._timer, self._requests.apply)
        self._died: EngineDied | None = None
        self._draining = False
        self.drain_watchers: set[Callable[[], None]] = set()
        """Called as soon as the engine drains."""
        self._drain_cause = ""
        self._quarantine = QuarantineWatch(limit=quarantine_limit, patience=times.quarantine)
        self._overrun = asyncio.Event()
        self._snapshots = 0
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
    def limits(self) -> EngineLimits:
        return self._core.limits

    def become(self, role: Role, limits: EngineLimits) -> None:
        """Take another role. What runs here goes on and what others were promised is kept: rows do not become fewer,
        and tickets are taken whatever the role."""
        rows = max(limits.max_rows, self.limits.max_rows)
        self._core.limit(replace(limits, max_rows=rows, accepts_handoff=True))
        self.endpoint = replace(self.endpoint, role=role)
        self._wake()

    @property
    def max_len(self) -> int:
        """Most tokens, prompt and output together, a sequence can have here."""
        return self._core.max_len

    async def death(self) -> EngineDied:
        """Returns when the engine can serve nothing any more; its process should end then."""
        await self._dead.wait()
        assert self._died is not None
        return self._died

    async def overrun(self) -> None:
        """Returns when quarantine has taken too much of the KV memory for too long; its process should drain it and end
        then: nothing else ends what may still write there."""
        await self._overrun.wait()
        blocks = self._core.kv.counts()
        _log.error(
            "too much KV memory in quarantine, draining to start again",
            engine=self.endpoint.engine_id,
            quarantined=blocks.quarantined,
            total=blocks.total,
        )

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
        if self._requests.id_of(request.id) is not None:
            raise InvalidRequest(f"request id {request.id!r} is already running here", "id")
        sequence_id = self._core.add(request, handoff=handoff, ticket=ticket, source=source)
        reach("queued")
        self._requests.add(sequence_id, request.id, sink, handoff=handoff)
        if ticket:
            try:
                self._target.hold(sequence_id, ticket)
            except PdserveError as error:
                self._requests.apply(self._core.abort(sequence_id, error))
        self._wake()

    def cancel(self, request_id: str) -> None:
        """Stop a request and free what it holds; unknown ids are ignored (it has just ended)."""
        sequence_id = self._requests.id_of(request_id)
        if sequence_id is not None:
            self._abort(sequence_id, None)

    def depart(self, request_id: str, answer: AnswerDeparture) -> None:
        """Ask a request to move to another engine. It runs on here until whoever presents the ticket has caught up,
        then it ends with HANDOFF. answer is called once: as soon as the request may leave, or when it has ended."""
        sequence_id = self._requests.id_of(request_id)
        if sequence_id is None or self._requests.is_handoff(sequence_id):
            answer(Unavailable(f"{request_id} does not decode on {self.endpoint.engine_id}"))
        else:
            self._departures.ask(sequence_id, request_id, answer)

    def snapshot(self) -> LoadSnapshot:
        self._snapshots += 1
        load = self._core.load()
        return LoadSnapshot(
            engine_id=self.endpoint.engine_id,
            epoch=self.endpoint.epoch,
            number=self._snapshots,
            running=load.running,
            waiting=load.waiting,
            fetching=load.fetching,
            backlog_tokens=load.backlog_tokens,
            blocks=load.blocks,
            draining=self._draining,
            steps=self._timer.tallies,
            tiers=self._restoring.tallies,
            drain_cause=self._drain_cause,
        )

    async def drain(self, timeout: float, cause: str = "") -> bool:
        """Refuse new requests; True once nothing runs and no lease is open, False after timeout seconds: then what runs
        still ends with Unavailable, for it may go on elsewhere. cause: why, if nobody asked for it, as in
        LoadSnapshot."""
        self._draining = True
        self._drain_cause = cause
        for told in tuple(self.drain_watchers):
            told()
        try:
            async with asyncio.timeout(timeout):
                while len(self._requests) or self.source.num_open:
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            self._abort_all(Unavailable(f"{self.endpoint.engine_id} ends, for it has drained for {timeout:g} s"))
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
            # Whoever ends the engine asks how it died, and nobody what its tasks raised.
            _log.exception("engine failed internally", engine=self.endpoint.engine_id)
            self._die(EngineDied(f"{self.endpoint.engine_id} failed internally"))
            raise bug

    def _die(self, error: EngineDied) -> None:
        self._died = self._died or error
        self._dead.set()
        self._abort_all(error)

    def _wake(self) -> None:
        self._pump.wake()

    async def _keep_house(self) -> None:
        while True:
            await self.clock.sleep(_HOUSEKEEPING)
            self.source.expire()
            self.kv_feed.collect()
            if self._quarantine.look(self._core.kv.counts(), self.clock.monotonic()):
                self._overrun.set()
            self._requests.apply(self._core.expire(self.clock.monotonic()))
            self._wake()

    def _abort(self, sequence_id: int, error: PdserveError | None) -> None:
        self._requests.apply(self._core.abort(sequence_id, error))
        self._wake()

    def _abort_all(self, error: PdserveError) -> None:
        for sequence_id in self._requests.ids:
            self._abort(sequence_id, error)

    def _on_outcome(self, sequence_id: int, outcome: FetchOutcome) -> None:
        aborted = self._requests.take_aborted(sequence_id)
        if aborted is not None:
            self._core.kv.unquarantine(set(aborted) - set(outcome.unsettled))
        elif self._requests.fetched(sequence_id, outcome):
            if outcome.error or outcome.finished:
                self._requests.apply(self._core.fetch_failed(sequence_id, outcome.unsettled, outcome.error))
            else:
                self._requests.apply(self._core.fetched(sequence_id, outcome.token_ids))
        self._wake()

    def _on_saved(self, blocks: Sequence[int]) -> None:
        self._core.kv.saved(blocks)
        self._wake()

    def _on_restored(self, event: RestoreReady, num_blocks: int) -> None:
        self._requests.apply(self._core.restore_ended(event.sequence_id, event.admission, num_blocks))
        self._wake()

    def _on_restore_late(self, event: RestoreReady) -> None:
        self._core.restore_late(event.sequence_id, event.admission)
        self._wake()

    def _on_settled(self, blocks: tuple[int, ...]) -> None:
        self._core.kv.unquarantine(blocks)
        self._wake()

    def _on_caught_up(self, sequence_id: int) -> None:
        self._requests.apply(self._core.stop(sequence_id))
        self._wake()

    def _on_lease_end(self, ticket_id: str, sequence_id: int | None) -> None:
        self._requests.apply(self._core.lease_ended(ticket_id, sequence_id))
        self._ended.set()
        self._wake()
