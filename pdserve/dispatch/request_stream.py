"""One engine's answer to one request, between the session it arrives on and whoever reads it."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Protocol

from pdserve.core.errors import PdserveError
from pdserve.core.request import FinishReason
from pdserve.core.ticket import TransferTicket
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.pacing import Pacer

_MOST_MERGED = 256
"""Tokens beyond which waiting deltas are left apart, so that merging stays linear in them."""

_LAST_WORD = 0.5
"""Seconds an engine gets to tell of a request that was cancelled. It does so within a step."""


class StreamOwner(Protocol):
    """Whom a stream tells that its request is to end, or has ended."""

    def cancel(self, request_id: str) -> None: ...

    def forget(self, request_id: str) -> None: ...


class RequestStream:
    """core.protocols.DeltaStream over a session. Holds at most what the request may produce.

    Deltas that wait for their reader become one: a slow reader, or with a pacer one in a busy process, gets fewer
    and larger ones. What begins or ends an answer never waits.
    """

    def __init__(self, connection: StreamOwner, request_id: str, pacer: Pacer | None = None) -> None:
        self._connection = connection
        self._request_id = request_id
        self._pacer = pacer
        self._loop = asyncio.get_running_loop()
        self._items: deque[TokenDelta | TransferTicket | PdserveError] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._read_at = 0.0
        self._ended = False
        self.ended_at: float | None = None

    def push(self, item: TokenDelta | TransferTicket | PdserveError) -> None:
        if isinstance(item, TokenDelta) and item.finish_reason:
            self.ended_at = self._loop.time()
        if self._items and (merged := _merged(self._items[-1], item)):
            self._items[-1] = merged
        else:
            self._items.append(item)
        if self._reader is not None and not self._reader.done():
            self._wake()

    def __aiter__(self) -> AsyncIterator[TokenDelta | TransferTicket]:
        return self

    async def __anext__(self) -> TokenDelta | TransferTicket:
        if self._ended:
            raise StopAsyncIteration
        while not self._items:
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
                self._cancel_timer()
        item = self._items.popleft()
        self._read_at = self._loop.time()
        if isinstance(item, PdserveError):
            self._finish()
            raise item
        if isinstance(item, TokenDelta) and item.finish_reason:
            self._finish()
        return item

    def _wake(self) -> None:
        """The reader, now or when its window has passed."""
        due = self._due(self._items[0]) if len(self._items) == 1 else 0.0
        if due <= self._loop.time():
            self._let_read()
        elif self._timer is None:
            self._timer = self._loop.call_at(due, self._let_read)

    def _due(self, item: TokenDelta | TransferTicket | PdserveError) -> float:
        """When (event-loop seconds) an item should be read."""
        if self._pacer is None or not isinstance(item, TokenDelta) or item.finish_reason or not item.index:
            return 0.0
        return self._read_at + self._pacer.sample(self._loop.time())

    def _let_read(self) -> None:
        self._cancel_timer()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def conclude(self) -> TokenDelta | None:
        if self._ended:
            return None
        self._connection.cancel(self._request_id)
        try:
            async with asyncio.timeout(_LAST_WORD):
                async for item in self:
                    if isinstance(item, TokenDelta) and item.finish_reason:
                        return item
        except (TimeoutError, PdserveError):
            pass
        finally:
            if not self._ended:
                self._finish()
        return None

    async def aclose(self) -> None:
        if not self._ended:
            self._finish()
            self._connection.cancel(self._request_id)

    def _finish(self) -> None:
        self._ended = True
        self._connection.forget(self._request_id)


def _merged(
    first: TokenDelta | TransferTicket | PdserveError, then: TokenDelta | TransferTicket | PdserveError
) -> TokenDelta | None:
    """Both as one delta; None where they must stay apart: a handoff ends what one engine wrote, and an error may end
    in a replay from the tokens before it."""
    if not isinstance(first, TokenDelta) or not isinstance(then, TokenDelta):
        return None
    if first.finish_reason or then.error or then.finish_reason is FinishReason.HANDOFF:
        return None
    contiguous = then.index == first.index + len(first.token_ids) and bool(first.token_ids)
    alike = (first.logprobs is None) == (then.logprobs is None)
    if not contiguous or not alike or len(first.token_ids) > _MOST_MERGED:
        return None
    return TokenDelta(
        request_id=first.request_id,
        index=first.index,
        token_ids=first.token_ids + then.token_ids,
        logprobs=first.logprobs + then.logprobs if first.logprobs and then.logprobs else None,
        finish_reason=then.finish_reason,
        trace=then.trace,
    )
