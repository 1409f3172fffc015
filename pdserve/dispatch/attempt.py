"""One attempt at a request on one route: the prefill/decode story."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from pdserve.core.clock import Clock
from pdserve.core.cluster import Mode, Route
from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import EngineDied, PdserveError, from_wire
from pdserve.core.protocols import DeltaStream
from pdserve.core.request import EngineTrace, FinishReason, Request, TokenDelta
from pdserve.core.ticket import KVSource, TransferTicket
from pdserve.dispatch.replay import lost
from pdserve.dispatch.sessions import SessionPool
from pdserve.telemetry.record import RequestRecord


class Attempt:
    """Streams a request's deltas over a route. Closing `deltas` cancels it on every engine.

    reconfirm looks again at the decode engine once there is a ticket to take over. Raises Lost when an
    engine or link was lost, else what an engine refused the request with.
    """

    def __init__(
        self,
        sessions: SessionPool,
        route: Route,
        record: RequestRecord,
        clock: Clock,
        reconfirm: Callable[[Route], Route],
    ) -> None:
        self._sessions = sessions
        self._route = route
        self._record = record
        self._clock = clock
        self._reconfirm = reconfirm

    def deltas(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        if self._route.mode is Mode.DISAGGREGATED:
            return self._disaggregated(request)
        return self._local(request)

    async def _local(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        async with aclosing(self._submit(self._route.decode, request, source=self._source)) as stream:
            while True:
                delta = await stream.delta()
                self._record.decode_trace = delta.trace
                self._note_fetch(delta.trace)
                yield delta
                if delta.finish_reason:
                    return

    async def _disaggregated(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        async with aclosing(self._submit(self._route.prefill, request, handoff=True, source=self._source)) as prefill:
            ticket = await prefill.ticket()
            self._record.stamp("ticket", self._clock.unix())
            self._route = self._record.route = self._reconfirm(self._route)
            async with aclosing(self._submit(self._route.decode, request, ticket=ticket)) as decode:
                decoded = asyncio.ensure_future(decode.delta())
                try:
                    delta = await _unless_failed(asyncio.ensure_future(prefill.delta()), decoded)
                    self._record.prefill_trace = delta.trace
                    self._note_fetch(delta.trace)
                    if delta.finish_reason is not FinishReason.HANDOFF:
                        yield delta
                        return
                    yield replace(delta, finish_reason=None, trace=None)
                    delta = await decoded
                    self._sessions.link_works(self._route.link)
                finally:
                    decoded.cancel()
                while True:
                    self._record.decode_trace = delta.trace
                    if delta.trace:
                        self._sessions.link_carried(self._route.link, delta.trace)
                    yield delta
                    if delta.finish_reason:
                        return
                    delta = await decode.delta()

    @property
    def _source(self) -> KVSource | None:
        return self._route.fetch.source if self._route.fetch else None

    def _note_fetch(self, trace: EngineTrace | None) -> None:
        link = self._route.fetch_link
        if link and trace and trace.fetch:
            self._sessions.prefix_fetched(link, trace.fetch)

    def _submit(
        self,
        engine: Endpoint,
        request: Request,
        *,
        handoff: bool = False,
        ticket: TransferTicket | None = None,
        source: KVSource | None = None,
    ) -> "_EngineStream":
        try:
            client = self._sessions.client(engine)
            stream = client.submit(request, handoff=handoff, ticket=ticket, source=source)
        except PdserveError as error:
            raise lost(error, engine, self._route) or error from error
        return _EngineStream(stream, engine, self._route, self._record)


class _EngineStream:
    """One engine's stream, with its errors told apart; a decode engine's last words go into the record."""

    def __init__(self, stream: DeltaStream, engine: Endpoint, route: Route, record: RequestRecord) -> None:
        self._stream = stream
        self._engine = engine
        self._route = route
        self._record = record

    async def ticket(self) -> TransferTicket:
        item = await self._next()
        if isinstance(item, TokenDelta):
            raise EngineDied(f"{self._engine.engine_id} sent tokens where a ticket was expected")
        return item

    async def delta(self) -> TokenDelta:
        item = await self._next()
        if isinstance(item, TransferTicket):
            raise EngineDied(f"{self._engine.engine_id} sent a ticket where tokens were expected")
        return item

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def _next(self) -> TokenDelta | TransferTicket:
        try:
            item = await anext(self._stream)
            if isinstance(item, TokenDelta) and item.finish_reason is FinishReason.ERROR:
                if self._engine == self._route.decode:
                    self._record.decode_trace = item.trace
                raise from_wire(*(item.error or ("internal_error", "the engine failed")))
        except PdserveError as error:
            raise lost(error, self._engine, self._route) or error from error
        return item


async def _unless_failed(item: asyncio.Future[TokenDelta], other: asyncio.Future[TokenDelta]) -> TokenDelta:
    """The item, or the other future's error if that comes first."""
    try:
        await asyncio.wait((item, other), return_when=asyncio.FIRST_COMPLETED)
        if not item.done():
            other.result()
        return await item
    finally:
        item.cancel()
