"""A stream of events ends its answer with the client, however early that goes."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import Message

from pdserve.gateway.detokenizer import TextDelta
from pdserve.gateway.http.respond import EventStream


async def test_an_answer_ends_whose_client_is_gone_before_the_headers_could_be_sent() -> None:
    ended = False

    async def answer() -> AsyncGenerator[TextDelta, None]:
        nonlocal ended
        try:
            yield TextDelta(text="a", tokens=(), finish_reason=None)
            yield TextDelta(text="b", tokens=(), finish_reason=None)
        finally:
            ended = True

    async def events() -> AsyncGenerator[bytes, None]:
        raise AssertionError("nobody reads them")
        yield b""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.Event().wait()

    deltas = answer()
    await anext(deltas)
    stream = EventStream(events(), deltas, send_timeout=5.0)
    await stream({"type": "http", "state": {"id": "r"}}, receive, send)
    assert ended
