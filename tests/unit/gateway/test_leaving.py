"""How a gateway leaves: who may still come, and what becomes of connections."""

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from pdserve.core.errors import PdserveError, Unavailable
from pdserve.core.request import Request, SamplingParams
from pdserve.gateway.intake import Intake
from pdserve.gateway.serve import bind, serve_http

LONG = 600.0
QUIET = 0.3


class Running:
    request = Request(id="r", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1), salt=b"", timeout=LONG)

    def abort(self, error: PdserveError) -> None:
        raise AssertionError("nobody ends it")


async def test_whom_nobody_asks_leaves_at_once() -> None:
    intake = Intake()
    await asyncio.wait_for(intake.left(LONG, QUIET), 5)
    assert intake.leaving
    intake.check()


async def test_whoever_comes_meanwhile_is_let_in_and_put_off_the_end() -> None:
    intake, time = Intake(), asyncio.get_running_loop().time
    intake.enter(Running())
    began = time()
    leaving = asyncio.create_task(intake.left(LONG, QUIET))
    await asyncio.sleep(0.2)
    assert intake.leaving
    intake.check()
    intake.enter(Running())
    await asyncio.wait_for(leaving, 30)
    assert time() - began >= 0.2 + QUIET


async def test_connections_that_pause_are_waited_for_from_their_first_use() -> None:
    intake, time = Intake(), asyncio.get_running_loop().time
    intake.hold("gone", 0.1)
    await asyncio.sleep(0.2)
    began = time()
    intake.hold("pausing", 0.5)
    intake.hold("pausing", LONG)
    await asyncio.wait_for(intake.left(LONG, QUIET), 30)
    assert time() - began >= 0.5


async def test_no_connection_is_waited_for_longer_than_allowed() -> None:
    intake = Intake()
    intake.hold("pausing", LONG)
    await asyncio.wait_for(intake.left(0.05, LONG), 30)


async def test_leaving_ends_in_time_though_requests_run_and_come() -> None:
    intake = Intake()
    intake.enter(Running())
    await asyncio.wait_for(intake.left(0.05, LONG), 30)
    draining = asyncio.create_task(intake.drained(LONG))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        intake.check()
    assert not draining.done()
    intake.leave(Running())
    assert await asyncio.wait_for(draining, 30)


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hi"})


async def asked(address: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection by which one answer has come."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\nhi"), 10)
    return reader, writer


async def test_idle_connections_end_while_new_ones_are_taken() -> None:
    listener = bind("127.0.0.1", 0)
    address = listener.getsockname()
    stop, leaving = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(serve_http(hello, listener, stop, 1.0, leaving))
    idle, idle_writer = await asked(address)
    leaving.set()
    assert await asyncio.wait_for(idle.read(), 10) == b""
    _, writer = await asked(address)
    stop.set()
    await asyncio.wait_for(serving, 10)
    for each in (idle_writer, writer):
        each.close()
