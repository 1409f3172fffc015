"""One attempt at a request on one route: the prefill/decode story."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, suppress

import msgspec

from pdserve.core.clock import Clock
from pdserve.core.cluster import Mode, Route
from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import Cancelled, PdserveError
from pdserve.core.request import EngineTrace, FinishReason, Request
from pdserve.core.ticket import KVSource, TransferTicket
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.decoding import Decoding
from pdserve.dispatch.engine_stream import EngineStream
from pdserve.dispatch.replay import lost
from pdserve.dispatch.sessions import SessionPool
from pdserve.telemetry.record import RequestRecord


class Attempt:
    """Streams a request's deltas over a route. Closing `deltas` cancels it on every engine.

    reconfirm looks again at the decode engine once there is a ticket to take over; movable lets what decodes there
    move to others. Raises Lost when an engine or link was lost, else what an engine refused the request with.
    """

    def __init__(
        self,
        sessions: SessionPool,
        route: Route,
        record: RequestRecord,
        clock: Clock,
        reconfirm: Callable[[Route], Route],
        movable: Callable[[Decoding], AbstractAsyncContextManager[None]],
    ) -> None:
        self._sessions = sessions
        self._route = route
        self._record = record
        self._clock = clock
        self._reconfirm = reconfirm
        self._movable = movable

    def deltas(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        if self._route.mode is Mode.DISAGGREGATED:
            return self._disaggregated(request)
        return self._local(request)

    async def _local(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        stream = self._submit(self._route.decode, request, source=self._source)
        decoding = self._decoding(request, stream)
        try:
            async with aclosing(decoding), self._movable(decoding):
                while (delta := await decoding.delta()).finish_reason is None:
                    yield delta
        finally:
            # Of the engine that decoded first: one that the request moved to fetched something else.
            self._note_fetch(self._record.decode_trace)
        yield delta

    async def _disaggregated(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        async with aclosing(self._submit(self._route.prefill, request, handoff=True, source=self._source)) as prefill:
            ticket = await prefill.ticket()
            self._record.stamp("ticket", self._clock.unix())
            self._route = self._record.route = self._reconfirm(self._route)
            stream = self._submit(self._route.decode, request, ticket=ticket)
            decoding = self._decoding(request, stream)
            async with aclosing(decoding):
                decoded = asyncio.ensure_future(decoding.delta())
                try:
                    delta = await _unless_failed(asyncio.ensure_future(prefill.delta()), decoded)
                    self._record.prefill_trace = delta.trace
                    self._note_fetch(delta.trace)
                    if delta.finish_reason is not FinishReason.HANDOFF:
                        yield delta
                        return
                    yield msgspec.structs.replace(delta, finish_reason=None, trace=None)
                    delta = await decoded
                    self._sessions.link_works(self._route.link)
                finally:
                    decoded.cancel()
                async with self._movable(decoding):
                    yield delta
                    while not delta.finish_reason:
                        delta = await decoding.delta()
                        yield delta

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
    ) -> EngineStream:
        try:
            client = self._sessions.client(engine)
            stream = client.submit(request, handoff=handoff, ticket=ticket, source=source)
        except PdserveError as error:
            raise lost(error, engine, self._route) or error from error
        on_failure = self._note_trace if engine == self._route.decode else lambda _: None
        return EngineStream(stream, engine, self._route, on_failure)

    def _decoding(self, request: Request, stream: EngineStream) -> Decoding:
        return Decoding(self._sessions, self._record, self._clock, request, self._route, stream)

    def _note_trace(self, trace: EngineTrace | None) -> None:
        self._record.decode_trace = trace


async def _unless_failed(item: asyncio.Future[TokenDelta], other: asyncio.Future[TokenDelta]) -> TokenDelta:
    """The item, or the other future's error if that comes first and is its own."""
    try:
        await asyncio.wait((item, other), return_when=asyncio.FIRST_COMPLETED)
        if not item.done():
            with suppress(Cancelled):  # it was cancelled where the item comes from, which says why
                other.result()
        return await item
    finally:
        item.cancel()
