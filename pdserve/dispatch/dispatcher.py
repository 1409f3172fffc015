"""One request from route to last token, in one place."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import replace

from pdserve.core.clock import Clock
from pdserve.core.cluster import EngineView, Mode, Route
from pdserve.core.errors import DeadlineExceeded, EngineDied, Unavailable, from_wire
from pdserve.core.protocols import DeltaStream
from pdserve.core.request import FinishReason, Request, TokenDelta
from pdserve.core.ticket import TransferTicket
from pdserve.dispatch.sessions import SessionPool
from pdserve.router.route import RoutingRules, choose_route
from pdserve.telemetry.record import RequestRecord

_DEADLINE_GRACE = 1.0
"""Seconds an engine gets to report an expired deadline itself, with its trace."""


class Dispatcher:
    """Runs requests on the engines of a SessionPool."""

    def __init__(self, sessions: SessionPool, rules: RoutingRules, clock: Clock) -> None:
        self._sessions = sessions
        self._rules = rules
        self._clock = clock

    @property
    def ready(self) -> bool:
        """Whether a long prompt could be served now."""
        try:
            choose_route(self._sessions.state(), self._rules.decode_local_below, self._rules)
        except Unavailable:
            return False
        return True

    def engines(self) -> tuple[EngineView, ...]:
        return self._sessions.state().engines

    async def generate(self, request: Request, record: RequestRecord) -> AsyncGenerator[TokenDelta, None]:
        """Stream a request's tokens; every delta but the last has no finish_reason.

        Closing the iterator cancels the request everywhere. Raises Unavailable, EngineDied,
        DeadlineExceeded, a TransferError, or what an engine refused the request with.
        """
        record.stamp("received", self._clock.unix())
        route = choose_route(self._sessions.state(), len(request.prompt_token_ids), self._rules)
        record.route = route
        run = self._run_disaggregated if route.mode is Mode.DISAGGREGATED else self._run_local
        deadline = asyncio.get_running_loop().time() + request.timeout + _DEADLINE_GRACE
        emitted = 0
        try:
            with self._sessions.book(request, route):
                async with aclosing(run(request, route, record)) as deltas:
                    while delta := await _before(deadline, anext(deltas, None)):
                        emitted = self._count(record, emitted, delta)
                        yield delta
        except TimeoutError:
            raise DeadlineExceeded(f"the request took longer than {request.timeout:g} s") from None
        finally:
            record.stamp("finished", self._clock.unix())

    async def _run_local(
        self, request: Request, route: Route, record: RequestRecord
    ) -> AsyncGenerator[TokenDelta, None]:
        async with aclosing(self._sessions.client(route.decode).submit(request)) as stream:
            async for item in stream:
                delta = _checked(item)
                record.decode_trace = delta.trace or record.decode_trace
                yield delta

    async def _run_disaggregated(
        self, request: Request, route: Route, record: RequestRecord
    ) -> AsyncGenerator[TokenDelta, None]:
        prefill_engine = self._sessions.client(route.prefill)
        decode_engine = self._sessions.client(route.decode)
        async with aclosing(prefill_engine.submit(request, handoff=True)) as prefill:
            ticket = await anext(prefill)
            if not isinstance(ticket, TransferTicket):
                yield _checked(ticket)
                return
            record.stamp("ticket", self._clock.unix())
            async with aclosing(decode_engine.submit(request, ticket=ticket)) as decode:
                first_decoded = asyncio.ensure_future(anext(decode))
                try:
                    delta = _checked(await _unless_failed(prefill, first_decoded))
                    record.prefill_trace = delta.trace
                    if delta.finish_reason is not FinishReason.HANDOFF:
                        yield delta
                        return
                    yield replace(delta, finish_reason=None, trace=None)
                    delta = _checked(await first_decoded)
                finally:
                    first_decoded.cancel()
                while True:
                    record.decode_trace = delta.trace or record.decode_trace
                    yield delta
                    if delta.finish_reason:
                        return
                    delta = _checked(await anext(decode))

    def _count(self, record: RequestRecord, emitted: int, delta: TokenDelta) -> int:
        if delta.index != emitted:
            raise EngineDied(f"tokens {emitted} to {delta.index} of the answer were lost")
        total = emitted + len(delta.token_ids)
        for position, name in ((0, "first_token"), (1, "second_token")):
            if emitted <= position < total:
                record.stamp(name, self._clock.unix())
        return total


async def _before(deadline: float, item: Awaitable[TokenDelta | None]) -> TokenDelta | None:
    """The item, awaited no longer than the deadline in event-loop seconds. Raises TimeoutError."""
    async with asyncio.timeout_at(deadline):
        return await item


async def _unless_failed(
    stream: DeltaStream, other: asyncio.Future[TokenDelta | TransferTicket]
) -> TokenDelta | TransferTicket:
    """The stream's next item, or the other future's error if that comes first."""
    item = asyncio.ensure_future(anext(stream))
    try:
        await asyncio.wait((item, other), return_when=asyncio.FIRST_COMPLETED)
        if not item.done():
            _checked(other.result())
        return await item
    finally:
        item.cancel()


def _checked(item: TokenDelta | TransferTicket) -> TokenDelta:
    """The delta, unless it reports an error."""
    if isinstance(item, TransferTicket):
        raise EngineDied("an engine sent a ticket where tokens were expected")
    if item.finish_reason is FinishReason.ERROR:
        code, message = item.error or ("internal_error", "the engine failed")
        raise from_wire(code, message)
    return item
