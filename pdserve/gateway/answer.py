"""One accepted request from its arrival to its last character."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import structlog

from pdserve.core.clock import Clock
from pdserve.core.deadline import Deadline
from pdserve.core.errors import Cancelled, DeadlineExceeded, PdserveError
from pdserve.core.request import FinishReason, Request
from pdserve.core.token_delta import TokenDelta
from pdserve.gateway.detokenizer import Detokenizer, TextDelta
from pdserve.gateway.intake import Intake
from pdserve.gateway.ports import Generator, PreparePrompt
from pdserve.telemetry.metrics import Metrics
from pdserve.telemetry.record import RequestRecord
from pdserve.telemetry.request_log import log_request
from pdserve.telemetry.request_ring import RequestRing

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)

_BACKSTOP = 2.0
"""Seconds past its deadline after which a request is given up here, should nobody below have ended it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerContext:
    """What all answers of a gateway share."""

    generator: Generator
    intake: Intake
    metrics: Metrics
    ring: RequestRing
    clock: Clock
    on_end: list[Callable[[RequestRecord], None]]
    """Told every record, complete; must not block."""
    prepare: PreparePrompt | None = None


class AnswerView(Protocol):
    """What whoever words an answer needs of it. Counts and told() are complete once the delta with the finish_reason is
    out."""

    @property
    def request_id(self) -> str: ...

    @property
    def created(self) -> int:
        """Unix seconds."""
        ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def completion_tokens(self) -> int: ...

    @property
    def cached_tokens(self) -> int: ...

    @property
    def repeated(self) -> bool:
        """Whether another request with the same idempotency key had it executed."""
        ...

    def told(self) -> dict[str, object]:
        """The request's record, JSON-ready."""
        ...

    def sent(self) -> None:
        """Text has gone to the client's connection."""
        ...

    def deltas(self) -> AsyncGenerator[TextDelta, None]: ...


class Answer:
    """Runs a request when deltas() is iterated; counts and logs it exactly once when it ends.

    record and usage are complete once the delta with the finish_reason is out. A record that begins with
    stamps says since when the client has been waiting.
    """

    def __init__(
        self, context: AnswerContext, request: Request, detokenizer: Detokenizer, record: RequestRecord
    ) -> None:
        self._context = context
        self.request = request
        self.record = record
        self.created = int(context.clock.unix())
        self.repeated = False
        self._detokenizer = detokenizer
        waited = max(0.0, context.clock.unix() - record.stamps[0][1]) if record.stamps else 0.0
        self._arrived = context.clock.monotonic() - waited
        self._give_up = asyncio.get_running_loop().time() + request.timeout + _BACKSTOP
        self._deadline: Deadline | None = None
        self._aborted: PdserveError | None = None
        self._first_token: float | None = None
        self._last_token = 0.0
        self._sent = False

    def sent(self) -> None:
        """Text has gone to the client's connection; the first time is noted."""
        if not self._sent:
            self._sent = True
            self.record.stamp("first_sent", self._context.clock.unix())

    @property
    def request_id(self) -> str:
        return self.request.id

    @property
    def cached_tokens(self) -> int:
        return self.record.cached_tokens

    def told(self) -> dict[str, object]:
        return self.record.to_dict()

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated, those hidden by a stop string included."""
        return self._detokenizer.num_tokens

    def abort(self, error: PdserveError) -> None:
        """End the request from elsewhere; whoever iterates deltas() gets the error."""
        self._aborted = self._aborted or error
        if self._deadline is not None:
            self._deadline.move(0)

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """The text as it grows; the last delta has a finish_reason. Closing it cancels the request.

        Raises a PdserveError when the request fails, DeadlineExceeded and Cancelled among them."""
        status: str | None = Cancelled.code
        self._context.intake.enter(self)
        self._context.ring.add(self.record)
        deadline = self._deadline = Deadline(0 if self._aborted else self._give_up)
        try:
            if self._context.prepare:
                await self._in_time(deadline, self._context.prepare(self.request))
            async with aclosing(self._context.generator.generate(self.request, self.record)) as source:
                while (delta := await self._next_text(source, deadline)).finish_reason is None:
                    if delta.text or delta.tokens:
                        yield delta
            self.record.finish_reason = delta.finish_reason.value
            self._end("ok")
            status = None
            yield delta
        except Exception as error:
            status = error.code if isinstance(error, PdserveError) else PdserveError.code
            raise
        finally:
            deadline.close()
            if status is not None:
                self._end(status)

    async def _next_text(self, source: AsyncIterator[TokenDelta], deadline: Deadline) -> TextDelta:
        try:
            delta = await self._in_time(deadline, anext(source))
        except StopAsyncIteration:
            raise PdserveError("the answer ended without a finish reason") from None
        if delta.finish_reason not in (None, FinishReason.STOP, FinishReason.LENGTH):
            raise Cancelled(f"the engine ended the request: {delta.finish_reason}")
        self._measure(len(delta.token_ids))
        return self._detokenizer.push(delta)

    async def _in_time(self, deadline: Deadline, work: Awaitable[_T]) -> _T:
        try:
            return await deadline.before(work)
        except TimeoutError:
            if not deadline.struck:
                raise
            if self._aborted:
                raise self._aborted from None
            raise DeadlineExceeded(f"the answer was not complete after {self.request.timeout:g} s") from None

    def _measure(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        now, metrics = self._context.clock.monotonic(), self._context.metrics
        first, last = self._first_token, self._last_token
        self._first_token, self._last_token = now if first is None else first, now
        try:
            if first is None:
                metrics.time_to_first_token.observe(now - self._arrived)
            else:
                for _ in range(num_tokens):
                    metrics.inter_token_latency.observe((now - last) / num_tokens)
        except Exception:
            self._note_telemetry_failure()

    def _end(self, status: str) -> None:
        """The record is complete when this returns, and told to everybody it could be told to."""
        self._context.intake.leave(self)
        record, metrics = self.record, self._context.metrics
        latency = self._context.clock.monotonic() - self._arrived
        record.status, record.output_tokens = status, self.completion_tokens
        first = self._first_token
        to_first_token = None if first is None else first - self._arrived
        tellers: list[Callable[[], object]] = [
            partial(metrics.request_latency.observe, latency),
            partial(metrics.count, record),
            partial(log_request, record, latency, to_first_token),
            *(partial(told, record) for told in self._context.on_end),
        ]
        for tell in tellers:
            try:
                tell()
            except Exception:
                self._note_telemetry_failure()

    def _note_telemetry_failure(self) -> None:
        """Whatever befalls what is told of a request, its client gets the answer."""
        _log.exception("telemetry of a request failed", request_id=self.request.id)
