"""What an HTTP connection may bring, and for how long it may be held."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from starlette.types import Receive, Scope, Send

from pdserve.gateway.protocol import MAX_HEADER_BYTES
from pdserve.gateway.serve import bind, serve_http
from pdserve.gateway.settings import Patience

SHORT = 0.5
LONG = 60.0
MUCH = 64 * 2**20
"""More than the kernel keeps for a client."""
FILLER = b"x-filler: " + b"x" * 1000 + b"\r\n"


async def answer(send: Send, body: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body's length; at /unread without having read it, at /slow late."""
    length, more = 0, scope["path"] != "/unread"
    while more:
        message = await receive()
        length += len(message["body"])
        more = message["more_body"]
    if scope["path"] == "/slow":
        await asyncio.sleep(2 * SHORT)
    await answer(send, b"<%d>" % length)


@asynccontextmanager
async def connection(receive_timeout: float) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    listener, stop = bind("127.0.0.1", 0), asyncio.Event()
    address = listener.getsockname()
    serving = asyncio.create_task(serve_http(echo, listener, stop, 1.0, patience=Patience(receive=receive_timeout)))
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield reader, writer
    finally:
        writer.close()
        stop.set()
        await asyncio.wait_for(serving, 10)


async def sent_until_closed(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, parts: Callable[[int], bytes], pause: float = 0.0
) -> bytes:
    """What the server answered to a client that goes on sending, once it has closed the connection."""

    async def go_on() -> None:
        for number in range(2**20):
            writer.write(parts(number))
            await writer.drain()
            await asyncio.sleep(pause)

    sending = asyncio.create_task(go_on())
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        return b""
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n",
        b"GET /",
        b"GET / HTTP/1.1\r\nx: ",
        b"POST /unread HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    ],
    ids=["headers", "target", "header", "trailers"],
)
async def test_headers_without_an_end_are_refused(head: bytes) -> None:
    line = FILLER if head.endswith(b"\n") else b"x" * 1000
    taken = 0

    def parts(number: int) -> bytes:
        nonlocal taken
        taken += len(line)
        return line if number else head

    async with connection(LONG) as (reader, writer):
        answer = await sent_until_closed(reader, writer, parts)
    assert not answer or b"HTTP/1.1 431 " in answer, "what is still unread at the end may cost the client the answer"
    assert taken < 100 * MAX_HEADER_BYTES


@pytest.mark.parametrize("start", [b"", b"GET /", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\r\n"])
async def test_client_that_sends_no_whole_headers_is_cut_off(start: bytes) -> None:
    async with connection(SHORT) as (reader, writer):
        writer.write(start)
        assert await asyncio.wait_for(reader.read(), 10) == b""


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n", b"POST /unread HTTP/1.1\r\nContent-Length: 9999\r\n\r\n"])
async def test_client_that_sends_drop_by_drop_is_cut_off(start: bytes) -> None:
    async with connection(SHORT) as (reader, writer):
        await sent_until_closed(reader, writer, lambda number: b"x" if number else start, pause=0.05)


async def test_connection_may_be_idle_between_messages() -> None:
    async with connection(SHORT) as (reader, writer):
        for _ in range(2):
            writer.write(b"POST /unread HTTP/1.1\r\nContent-Length: 4\r\n\r\n")
            assert await asyncio.wait_for(reader.readuntil(b">"), 10)
            writer.write(b"late\r\n")
            await asyncio.sleep(2 * SHORT)


async def test_slow_client_is_served() -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n"
    async with connection(4 * SHORT) as (reader, writer):
        for byte in head:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.01)
        for _ in range(20):
            writer.write(b"xx")
            await asyncio.sleep(SHORT / 4)
        assert (await asyncio.wait_for(reader.readuntil(b">"), 10)).endswith(b"<40>")


async def test_nobody_is_cut_off_while_an_answer_is_made() -> None:
    async with connection(SHORT) as (reader, writer):
        writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n")
        assert (await asyncio.wait_for(reader.readuntil(b">"), 10)).endswith(b"<0>")
        writer.write(b"Host: x\r\n\r\n")
        assert (await asyncio.wait_for(reader.readuntil(b">"), 10)).endswith(b"<0>")


async def answers_to(message: bytes, count: int) -> list[bytes]:
    async with connection(LONG) as (reader, writer):

        async def read() -> list[bytes]:
            return [(await reader.readuntil(b">")).rpartition(b"\r\n")[2] for _ in range(count)]

        reading: Awaitable[list[bytes]] = asyncio.create_task(read())
        for _ in range(count):
            writer.write(message)
            await writer.drain()
        return await asyncio.wait_for(reading, 20)


async def test_pipelined_requests_are_served() -> None:
    lines = FILLER * 50
    assert await answers_to(b"GET / HTTP/1.1\r\n" + lines + b"\r\n", 20) == [b"<0>"] * 20


async def test_bodies_do_not_count_as_headers() -> None:
    body = b"x" * 8 * MAX_HEADER_BYTES
    message = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    assert await answers_to(message, 3) == [b"<%d>" % len(body)] * 3


async def test_chunked_bodies_do_not_count_as_headers() -> None:
    chunks = b"3\r\nabc\r\n" * 2 * MAX_HEADER_BYTES
    message = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nx-trailer: x\r\n\r\n"
    assert await answers_to(message, 2) == [b"<%d>" % (6 * MAX_HEADER_BYTES)] * 2


async def much(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, b"x" * MUCH)


@asynccontextmanager
async def asking_for_much(requests: bytes, patience: Patience) -> AsyncIterator[socket.socket]:
    """A client that has asked; the server must have no connection left at the end."""
    listener, stop = bind("127.0.0.1", 0), asyncio.Event()
    address = listener.getsockname()
    serving = asyncio.create_task(serve_http(much, listener, stop, LONG, patience=patience))
    with socket.create_connection(address) as client:
        client.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(client, requests)
        yield client
        stop.set()
        await asyncio.wait_for(serving, 10)


async def test_closed_connection_that_nobody_reads_is_gone() -> None:
    async with asking_for_much(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", Patience(close=0.2)):
        await asyncio.sleep(1.0)


async def test_answers_that_nobody_reads_do_not_hold_their_connection() -> None:
    async with asking_for_much(b"GET / HTTP/1.1\r\n\r\n" * 2, Patience(send=0.5, close=0.2)):
        await asyncio.sleep(1.5)


async def test_closed_connection_stays_for_a_slow_reader() -> None:
    loop, taken = asyncio.get_running_loop(), 0
    requests = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"
    async with asking_for_much(requests, Patience(close=0.3)) as client:
        while data := await loop.sock_recv(client, 2**20):
            taken += len(data)
            await asyncio.sleep(0.02)
    assert taken > MUCH
