"""One accepted request from its arrival to its last character."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from pdserve.core.clock import Clock
from pdserve.core.errors import Cancelled, DeadlineExceeded, PdserveError
from pdserve.core.request import FinishReason, Request, TokenDelta
from pdserve.gateway.detokenizer import Detokenizer, TextDelta
from pdserve.gateway.intake import Intake
from pdserve.gateway.ports import Generator
from pdserve.telemetry.metrics import Metrics
from pdserve.telemetry.record import RequestRecord

log = structlog.get_logger("pdserve.request")

_BACKSTOP = 2.0
"""Seconds past its deadline after which a request is given up here, should nobody below have ended it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerContext:
    """What all answers of a gateway share."""

    generator: Generator
    intake: Intake
    metrics: Metrics
    clock: Clock


class Answer:
    """Runs a request when deltas() is iterated; counts and logs it exactly once when it ends.

    record and usage are complete once the delta with the finish_reason is out.
    """

    def __init__(
        self, context: AnswerContext, request: Request, detokenizer: Detokenizer, endpoint: str, client_id: str
    ) -> None:
        self._context = context
        self.request = request
        self.record = RequestRecord(request_id=request.id)
        self.endpoint = endpoint
        self.client_id = client_id
        self._detokenizer = detokenizer
        self._arrived = context.clock.monotonic()
        self._deadline = asyncio.get_running_loop().time() + request.timeout + _BACKSTOP
        self._timer: asyncio.Timeout | None = None
        self._aborted = False
        self._first_token: float | None = None
        self._last_token = 0.0
        self._finish_reason: FinishReason | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated, those hidden by a stop string included."""
        return self._detokenizer.num_tokens

    def abort(self) -> None:
        """End the request from elsewhere; whoever iterates deltas() gets Cancelled."""
        self._aborted = True
        if self._timer is not None:
            self._timer.reschedule(0)

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """The text as it grows; the last delta has a finish_reason. Closing it cancels the request.

        Raises a PdserveError when the request fails, DeadlineExceeded and Cancelled among them."""
        status: str | None = Cancelled.code
        self._context.intake.enter(self)
        try:
            async with aclosing(self._context.generator.generate(self.request, self.record)) as source:
                while (delta := await self._next_text(source)).finish_reason is None:
                    if delta.text or delta.tokens:
                        yield delta
            self._finish_reason = delta.finish_reason
            self._end("ok")
            status = None
            yield delta
        except Exception as error:
            status = error.code if isinstance(error, PdserveError) else PdserveError.code
            raise
        finally:
            if status is not None:
                self._end(status)

    async def _next_text(self, source: AsyncIterator[TokenDelta]) -> TextDelta:
        deadline = 0 if self._aborted else self._deadline
        try:
            async with asyncio.timeout_at(deadline) as self._timer:
                delta = await anext(source)
        except TimeoutError:
            if self._timer is None or not self._timer.expired():
                raise
            if self._aborted:
                raise Cancelled("the request was aborted") from None
            raise DeadlineExceeded(f"the answer was not complete after {self.request.timeout:g} s") from None
        except StopAsyncIteration:
            raise PdserveError("the answer ended without a finish reason") from None
        finally:
            self._timer = None
        if delta.finish_reason not in (None, FinishReason.STOP, FinishReason.LENGTH):
            raise Cancelled(f"the engine ended the request: {delta.finish_reason}")
        self._measure(len(delta.token_ids))
        return self._detokenizer.push(delta)

    def _measure(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        now, metrics = self._context.clock.monotonic(), self._context.metrics
        if self._first_token is None:
            self._first_token = now
            metrics.time_to_first_token.observe(now - self._arrived)
        else:
            for _ in range(num_tokens):
                metrics.inter_token_latency.observe((now - self._last_token) / num_tokens)
        self._last_token = now

    def _end(self, status: str) -> None:
        self._context.intake.leave(self)
        metrics, latency = self._context.metrics, self._context.clock.monotonic() - self._arrived
        metrics.requests.labels(self.endpoint, status).inc()
        metrics.request_latency.observe(latency)
        metrics.prompt_tokens.inc(self.prompt_tokens)
        metrics.cached_tokens.inc(self.record.cached_tokens)
        metrics.output_tokens.inc(self.completion_tokens)
        if self.record.handoff_gap is not None:
            metrics.handoff_gap.observe(self.record.handoff_gap)
        self._log(status, latency)

    def _log(self, status: str, latency: float) -> None:
        route, first = self.record.route, self._first_token
        log.info(
            "request",
            request_id=self.request.id,
            client_request_id=self.client_id,
            endpoint=self.endpoint,
            status=status,
            finish_reason=self._finish_reason.value if self._finish_reason else None,
            mode=route.mode.value if route else None,
            prefill=route.prefill.engine_id if route else None,
            decode=route.decode.engine_id if route else None,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.record.cached_tokens,
            output_tokens=self.completion_tokens,
            time_to_first_token=round(first - self._arrived, 4) if first is not None else None,
            latency=round(latency, 4),
        )
