"""A request's tokens from the engine that decodes it, and from those it moves to.

    D1  decodes ── asked to depart ── decodes on, its KV is fetched ── has stopped: HANDOFF
    D2                       submitted with D1's ticket, fetches ───────────────── decodes on

A move is made beside the stream, so that a client that reads slowly does not hold it up. Until D1 has stopped a
move that fails changes nothing; from then on the request has its tokens and no engine, and is replayed.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, replace

from pdserve.core.clock import Clock
from pdserve.core.cluster import Mode, Route
from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import Cancelled, EngineDied, PdserveError, TransferTimeout
from pdserve.core.request import FinishReason, Request
from pdserve.core.ticket import Departure
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.booking import Booking
from pdserve.dispatch.engine_stream import EngineStream
from pdserve.dispatch.replay import Lost, continued, rebased
from pdserve.dispatch.sessions import SessionPool
from pdserve.telemetry.record import Migration, MoveReason, RequestRecord

_MOVED = "ok"


@dataclass(slots=True)
class _Leg:
    """The part of the answer that one engine decodes, from output token `offset` on."""

    request: Request
    engine: Endpoint
    route: Route
    stream: EngineStream
    offset: int
    migration: Migration | None = None
    """How it came here."""
    first: TokenDelta | None = None
    """Read already, to know that it arrived."""
    moved: asyncio.Future[None] | None = None
    """Done when another leg follows, or none will."""

    async def delta(self) -> TokenDelta:
        first, self.first = self.first, None
        return first or await self.stream.delta()


class Decoding:
    """The decoding of one attempt at a request. Closing it cancels the request wherever it is; once tokens have come,
    the record is told what the engines did for it all the same."""

    def __init__(
        self,
        sessions: SessionPool,
        record: RequestRecord,
        clock: Clock,
        request: Request,
        route: Route,
        stream: EngineStream,
    ) -> None:
        self._sessions = sessions
        self._record = record
        self._clock = clock
        self._name = request.id
        self._moves = 0
        self._begun = False
        self._legs = deque([_Leg(request, route.decode, route, stream, 0)])
        """Those not read to their end, oldest first."""

    @property
    def request_id(self) -> str:
        """As the client's request is called, whatever its parts are."""
        return self._record.request_id

    @property
    def request(self) -> Request:
        """As the engine has it that decodes it now."""
        return self._legs[-1].request

    @property
    def engine(self) -> Endpoint:
        return self._legs[-1].engine

    async def delta(self) -> TokenDelta:
        """The next tokens, with their place in the whole answer. Raises Lost, or what an engine refused it with."""
        while True:
            leg = self._legs[0]
            delta = await leg.delta()
            self._begun = True
            self._take_trace(leg, delta)
            if delta.finish_reason is not FinishReason.HANDOFF:
                return delta if leg.migration is None else rebased(delta, self._name, leg.offset)
            if leg.moved is None:
                raise EngineDied(f"{leg.engine.engine_id} handed {self._name} over to nobody")
            await asyncio.shield(leg.moved)
            self._legs.popleft()

    async def move(
        self, target: Endpoint, booking: Booking, deadline: float, reason: MoveReason, why: str = ""
    ) -> Migration:
        """Have another engine go on, within so many seconds. Raises Lost or PdserveError when that did not come about:
        then the request is where it was, or lost, which its reader hears of."""
        leg = self._legs[-1]
        if leg.moved is None or leg.moved.done():
            leg.moved = asyncio.get_running_loop().create_future()
        self._moves += 1
        migration = Migration(
            source=leg.engine.engine_id, target=target.engine_id, asked=self._clock.unix(), reason=reason, why=why
        )
        self._record.migrations.append(migration)
        try:
            async with asyncio.timeout(deadline):
                successor = await self._continued(leg, target, booking, migration)
        except TimeoutError as late:
            failure = TransferTimeout(f"the request did not move within {deadline:g} s")
            self._fail(leg, migration, Lost(failure, target, died=False))
            raise failure from late
        except BaseException as failure:
            self._fail(leg, migration, failure if isinstance(failure, Lost) else _lost(failure, target))
            raise
        migration.outcome, migration.ended = _MOVED, self._clock.unix()
        self._legs.append(successor)
        leg.moved.set_result(None)
        return migration

    async def aclose(self) -> None:
        try:
            # Before, another may still wait for the stream's first item, and there is little to tell.
            if self._begun:
                for leg in self._legs:
                    if last := await leg.stream.conclude() or leg.first:
                        self._take_trace(leg, last)
        finally:
            for leg in self._legs:
                await leg.stream.aclose()

    async def _continued(self, leg: _Leg, target: Endpoint, booking: Booking, migration: Migration) -> _Leg:
        departure = await self._sessions.client(leg.engine).depart(leg.request.id)
        successor = self._submit(leg, target, departure)
        successor.migration = migration
        booking.move(target, successor.request, source=leg.engine.key)
        try:
            successor.first = await successor.stream.delta()
            if successor.first.finish_reason is FinishReason.CANCELLED:
                raise Cancelled("the request ended before it had moved")
        except BaseException:
            booking.move(leg.engine, leg.request)
            await successor.stream.aclose()
            raise
        now = asyncio.get_running_loop().time()
        migration.pause = now - (leg.stream.ended_at or now)
        self._sessions.link_works(successor.route.link)
        return successor

    def _submit(self, leg: _Leg, target: Endpoint, departure: Departure) -> _Leg:
        request = continued(leg.request, departure.output_token_ids, f"{self._name}>{self._moves}")
        route = replace(leg.route, mode=Mode.DISAGGREGATED, prefill=leg.engine, decode=target)
        stream = self._sessions.client(target).submit(request, ticket=departure.ticket)
        return _Leg(
            request, target, route, EngineStream(stream, target, route), leg.offset + len(departure.output_token_ids)
        )

    def _fail(self, leg: _Leg, migration: Migration, loss: Lost) -> None:
        """Whoever waits for the next leg, because the source has stopped already, hears that it is lost."""
        migration.outcome, migration.ended = loss.error.code, self._clock.unix()
        assert leg.moved is not None
        leg.moved.set_exception(loss)
        leg.moved.exception()  # nobody may be waiting

    def _take_trace(self, leg: _Leg, delta: TokenDelta) -> None:
        if leg.migration is None:
            self._record.decode_trace = delta.trace
        else:
            leg.migration.trace = delta.trace
        if delta.trace and leg.route.mode is Mode.DISAGGREGATED:
            tokens = len(leg.request.prompt_token_ids) - delta.trace.cached_tokens
            self._sessions.link_carried(leg.route.link, delta.trace, tokens)


def _lost(failure: BaseException, target: Endpoint) -> Lost:
    error = failure if isinstance(failure, PdserveError) else Cancelled("the move was given up")
    return Lost(error, target, died=False)
