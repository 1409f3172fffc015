"""One engine's stream for one request, with its errors told apart."""

from collections.abc import Callable

from pdserve.core.cluster import Route
from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import EngineDied, PdserveError, from_wire
from pdserve.core.protocols import DeltaStream
from pdserve.core.request import EngineTrace, FinishReason
from pdserve.core.ticket import TransferTicket
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.replay import lost


class EngineStream:
    """Raises Lost when an engine or link was lost, else what the engine refused the request with. on_failure gets
    the trace that came with the engine's error."""

    def __init__(
        self,
        stream: DeltaStream,
        engine: Endpoint,
        route: Route,
        on_failure: Callable[[EngineTrace | None], None] = lambda _: None,
    ) -> None:
        self._stream = stream
        self._engine = engine
        self._route = route
        self._on_failure = on_failure

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

    @property
    def ended_at(self) -> float | None:
        """When (event-loop seconds) its last delta arrived, which may be before it is read."""
        return self._stream.ended_at

    async def conclude(self) -> TokenDelta | None:
        return await self._stream.conclude()

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def _next(self) -> TokenDelta | TransferTicket:
        try:
            item = await anext(self._stream)
            if isinstance(item, TokenDelta) and item.finish_reason is FinishReason.ERROR:
                self._on_failure(item.trace)
                raise from_wire(*(item.error or ("internal_error", "the engine failed")))
        except PdserveError as error:
            raise lost(error, self._engine, self._route) or error from error
        return item
