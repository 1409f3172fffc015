"""An answer as one JSON object or as a stream of server-sent events, whatever the endpoint."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Protocol

import orjson
import structlog
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from pdserve.core.deadline import Deadline
from pdserve.core.errors import Cancelled, PdserveError
from pdserve.core.request import FinishReason
from pdserve.gateway.answer import AnswerView
from pdserve.gateway.detokenizer import OutputToken, TextDelta
from pdserve.gateway.http.disconnect import until_disconnect
from pdserve.gateway.http.errors import error_body, internal_error_body

log = structlog.get_logger("pdserve.gateway")


class Format(Protocol):
    """How an endpoint words its answer. The record goes into the chunk with the finish_reason."""

    def opening(self) -> list[dict[str, object]]:
        """Chunks before any text."""
        ...

    def chunk(self, delta: TextDelta) -> bytes:
        """As JSON: there is one for each token, of which only the text differs."""
        ...

    def closing(self, answer: AnswerView, reason: FinishReason) -> list[dict[str, object]]:
        """Chunks after the text: the one with finish_reason and record, then the usage if asked for."""
        ...

    def whole(self, answer: AnswerView, delta: TextDelta) -> dict[str, object]:
        """The unstreamed body; delta is all deltas in one."""
        ...


class TextChunk:
    """The JSON of a chunk in which only the text differs from one to the next."""

    _TEXT = "\ue000 the text \ue001"
    """Private use: in no other field, names of models included."""

    def __init__(self, chunk: Callable[[str], dict[str, object]]) -> None:
        self._before, _, self._behind = orjson.dumps(chunk(self._TEXT)).partition(orjson.dumps(self._TEXT))

    def __call__(self, text: str) -> bytes:
        return self._before + orjson.dumps(text) + self._behind


def usage(answer: AnswerView) -> dict[str, object]:
    """The usage object of both endpoints."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


async def respond(
    request: Request, answer: AnswerView, wording: Format, *, stream: bool, send_timeout: float
) -> Response:
    """Run an answer. Errors before the first token are raised, and so have a status of their own.

    The answer is cancelled as soon as the client is gone."""
    if not stream:
        whole = await until_disconnect(request.receive, _collect(answer))
        body = orjson.dumps(wording.whole(answer, whole))
        return Response(body, headers=_headers(answer), media_type="application/json")
    deltas = answer.deltas()
    first = await until_disconnect(request.receive, _next(deltas))
    return EventStream(_events(answer, wording, first, deltas), deltas, send_timeout, _headers(answer))


def _headers(answer: AnswerView) -> dict[str, str]:
    return {"Idempotent-Replayed": "true"} if answer.repeated else {}


class EventStream(StreamingResponse):
    """Server-sent events; closes their source when the client is gone or reads nothing for send_timeout seconds, also
    before the first event was asked for."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        source: AsyncGenerator[TextDelta, None],
        send_timeout: float,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events
        self._source = source
        self._send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self.stream_response(send))
        except Cancelled:
            return
        except TimeoutError:
            log.warning("client reads nothing", request_id=scope["state"]["id"], seconds=self._send_timeout)

    async def stream_response(self, send: Send) -> None:
        time = asyncio.get_running_loop().time
        deadline = Deadline(time() + self._send_timeout)
        try:
            async with aclosing(self._source), aclosing(self._events):
                await deadline.before(send({"type": "http.response.start", "status": 200, "headers": self.raw_headers}))
                async for event in self._events:
                    deadline.move(time() + self._send_timeout)
                    await deadline.before(send({"type": "http.response.body", "body": event, "more_body": True}))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            deadline.close()


async def _events(
    answer: AnswerView, wording: Format, first: TextDelta, rest: AsyncGenerator[TextDelta, None]
) -> AsyncGenerator[bytes, None]:
    """A failure after the first token becomes an event with the error envelope, the last of the stream."""
    async with aclosing(rest):
        try:
            for chunk in wording.opening():
                yield _event(chunk)
            delta = first
            while True:
                if delta.text or delta.tokens:
                    yield b"data: %b\n\n" % wording.chunk(delta)
                    answer.sent()
                if delta.finish_reason is not None:
                    break
                delta = await anext(rest)
            for chunk in wording.closing(answer, delta.finish_reason):
                yield _event(chunk)
            yield b"data: [DONE]\n\n"
        except PdserveError as error:
            yield _event(error_body(error))
        except Exception:
            log.exception("unexpected error in a stream", request_id=answer.request_id)
            yield _event(internal_error_body())


def _event(content: dict[str, object]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def _next(deltas: AsyncIterator[TextDelta]) -> TextDelta:
    return await anext(deltas)


async def _collect(answer: AnswerView) -> TextDelta:
    texts: list[str] = []
    tokens: list[OutputToken] = []
    reason = None
    async with aclosing(answer.deltas()) as deltas:
        async for delta in deltas:
            texts.append(delta.text)
            tokens += delta.tokens
            reason = delta.finish_reason
    return TextDelta(text="".join(texts), tokens=tuple(tokens), finish_reason=reason)
