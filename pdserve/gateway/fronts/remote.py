"""The front's end: the gateway as a Generator, and what else a front asks it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from functools import partial
from itertools import count
from typing import TypeVar

import msgspec

from pdserve.core.blocks import block_hashes, hash_namespace
from pdserve.core.cluster import EngineView
from pdserve.core.errors import PdserveError, Unavailable
from pdserve.core.msgpack import unpack
from pdserve.core.request import Request
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.pacing import Pacer
from pdserve.dispatch.request_stream import RequestStream
from pdserve.gateway.auth import Identity
from pdserve.gateway.fronts.line import Line
from pdserve.gateway.fronts.messages import (
    GATEWAY_FRAME,
    Abort,
    Answer,
    Ask,
    Asked,
    Call,
    Cancel,
    Count,
    Counted,
    Drop,
    Ended,
    FromFront,
    FromGateway,
    GetOverview,
    Last,
    State,
    Taken,
)
from pdserve.gateway.hashing import LONG
from pdserve.gateway.ports import Overview
from pdserve.router.directory import Naming
from pdserve.telemetry.record import RequestRecord
from pdserve.telemetry.totals import Samples

_T = TypeVar("_T")

_RECONNECT = 0.1
_CLOSE_GRACE = 2.0
"""Seconds the gateway gets to say what became of a request that was cancelled."""
_ANSWER_TIMEOUT = 5.0
_AWAY = "the gateway starts again; try again in a few seconds"
_BOOL = msgspec.msgpack.Decoder(bool)
_OVERVIEW = msgspec.msgpack.Decoder(Overview)
_NOT_READY = State(ready=False, degraded=(), namings=())


class _Open:
    """A request that the gateway runs for this front."""

    def __init__(self, stream: RequestStream, record: RequestRecord) -> None:
        self.stream = stream
        self.record = record
        self.num_told = len(record.stamps)
        """Stamps that the gateway was told with the request."""
        self.told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the gateway has said its last word."""


class GatewayLine:
    """gateway.ports.Generator and Elsewhere, over a Unix socket; connects again whenever the line is lost.

    What runs when it is lost fails with Unavailable. growth: as telemetry.totals.Growth, of this process's metrics.
    """

    def __init__(self, path: str, growth: Callable[[], Samples]) -> None:
        self._path = path
        self._growth = growth
        self._pacer = Pacer()
        self._loop = asyncio.get_running_loop()
        self._line: Line[FromFront, FromGateway] | None = None
        self._closing = False
        self._state = _NOT_READY
        self._heard = asyncio.Event()
        self._open: dict[str, _Open] = {}
        self._numbers = count(1)
        self._calls: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self.on_taken: Callable[[str, str], None] = lambda name, owner: None
        """As Claims.on_taken."""

    @property
    def ready(self) -> bool:
        return self._state.ready

    def degraded(self) -> tuple[str, ...]:
        return self._state.degraded

    def engines(self) -> tuple[EngineView, ...]:
        """None: the gateway tells of them, and exports their metrics."""
        return ()

    async def run(self) -> None:
        """Keep the line up until close."""
        while not self._closing:
            with suppress(OSError):
                _, self._line = await self._loop.create_unix_connection(self._new_line, self._path)
                await self._line.closed
                self._line = None
            await asyncio.sleep(_RECONNECT)

    async def heard(self) -> None:
        """Returns once the gateway has told how it stands."""
        await self._heard.wait()

    async def close(self) -> None:
        """Tell what is still to be told, and hang up."""
        self._closing = True
        if (line := self._line) is not None:
            line.say(Counted(self._growth()))
            line.close()
            await line.closed

    async def generate(self, request: Request, record: RequestRecord) -> AsyncGenerator[TokenDelta, None]:
        hashes = await self._hashes(request)
        self._say(Ask(request, record, hashes))
        opened = self._open[request.id] = _Open(RequestStream(self, request.id, self._pacer), record)
        try:
            async with aclosing(opened.stream) as deltas:
                async for delta in deltas:
                    assert isinstance(delta, TokenDelta)
                    yield delta
        finally:
            await asyncio.wait([opened.told], timeout=_CLOSE_GRACE)
            del self._open[request.id]

    def cancel(self, request_id: str) -> None:
        """Of RequestStream: its reader has left."""
        self._tell(Cancel(request_id))

    def forget(self, request_id: str) -> None:
        """Of RequestStream: nothing comes after its last item."""

    def tell_end(self, record: RequestRecord) -> None:
        """For the gateway, which keeps the latest requests' records."""
        # An answer in one piece has ended before that piece is sent, which is noted in this turn of the event loop.
        self._loop.call_soon(self._tell_end, record)

    async def abort(self, request_id: str, identity: Identity) -> bool:
        asked = Abort(request_id, identity.salt, identity.tenant)
        return await self.call(asked, _BOOL, _ANSWER_TIMEOUT)

    async def overview(self) -> Overview:
        return await self.call(GetOverview(), _OVERVIEW, _ANSWER_TIMEOUT)

    async def call(self, asked: Asked, decoder: msgspec.msgpack.Decoder[_T], timeout: float | None = None) -> _T:
        """The gateway's answer. Raises what it failed with, Unavailable when there is none."""
        number, answer = next(self._numbers), self._loop.create_future()
        self._say(Call(number, asked))
        self._calls[number] = answer
        try:
            async with asyncio.timeout(timeout):
                return unpack(await answer, decoder)
        except TimeoutError:
            raise Unavailable("the gateway does not answer; try again in a few seconds") from None
        finally:
            del self._calls[number]
            if not answer.done() or answer.cancelled():
                self._tell(Drop(number))

    def order(self, asked: Asked) -> None:
        """As call, where nobody waits for the answer."""
        self._tell(Call(next(self._numbers), asked))

    def _tell_end(self, record: RequestRecord) -> None:
        first_sent = dict(record.stamps).get("first_sent")
        status = str(record.status)
        self._tell(Ended(record.request_id, status, record.finish_reason, record.output_tokens, first_sent))

    async def _hashes(self, request: Request) -> tuple[tuple[Naming, bytes], ...]:
        work = partial(_hashed, request, self._state.namings)
        if len(request.prompt_token_ids) < LONG:
            return work()
        return await asyncio.to_thread(work, partial(time.sleep, 0))

    def _new_line(self) -> Line[FromFront, FromGateway]:
        return Line(GATEWAY_FRAME, self._hear, self._lost)

    def _tell(self, message: FromFront) -> None:
        """Into the void when the line is lost."""
        if self._line is not None:
            self._line.say(message)

    def _say(self, message: FromFront) -> None:
        if self._line is None:
            raise Unavailable(_AWAY)
        self._line.say(message)

    def _hear(self, frame: list[FromGateway]) -> None:
        for message in frame:
            match message:
                case TokenDelta():
                    if opened := self._open.get(message.request_id):
                        opened.stream.push(message)
                case Last():
                    self._end(message)
                case Answer():
                    self._settle(message)
                case Taken():
                    self.on_taken(message.name, message.owner)
                case State():
                    self._state = message
                    self._heard.set()
                case Count():
                    self._tell(Counted(self._growth()))

    def _end(self, last: Last) -> None:
        opened = self._open.get(last.request_id)
        if opened is None:
            return
        _complete(opened.record, last.record, opened.num_told)
        item = last.failure.error() if last.failure else last.delta
        opened.stream.push(item or PdserveError("the gateway ended a request without a word"))
        _done(opened.told)

    def _settle(self, answer: Answer) -> None:
        waiting = self._calls.get(answer.number)
        if waiting is None or waiting.done():
            return
        if answer.failure:
            waiting.set_exception(answer.failure.error())
        else:
            waiting.set_result(answer.value)

    def _lost(self) -> None:
        self._line, self._state = None, _NOT_READY
        for opened in self._open.values():
            opened.stream.push(Unavailable(_AWAY))
            _done(opened.told)
        for waiting in self._calls.values():
            if not waiting.done():
                waiting.set_exception(Unavailable(_AWAY))


def _complete(record: RequestRecord, known: RequestRecord, told: int) -> None:
    """Take over what the gateway has noted of a request; it was told the first so many stamps."""
    own = record.stamps[told:]
    for name in ("admission", "usage", "route", "failed", "migrations", "prefill_trace", "decode_trace"):
        setattr(record, name, getattr(known, name))
    record.stamps = sorted([*known.stamps, *own], key=lambda stamp: stamp[1])


def _hashed(
    request: Request, namings: tuple[Naming, ...], give_way: Callable[[], object] | None = None
) -> tuple[tuple[Naming, bytes], ...]:
    def of(revision: str, block_size: int) -> bytes:
        namespace = hash_namespace(request.salt, revision)
        return b"".join(block_hashes(request.prompt_token_ids, block_size, namespace, give_way))

    return tuple((name, of(*name)) for name in namings)


def _done(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
