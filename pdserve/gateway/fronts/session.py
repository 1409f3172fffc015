"""One front, as the gateway sees it: its requests, its questions, what it has counted."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import structlog

from pdserve.core.blocks import HASH_BYTES
from pdserve.core.errors import Cancelled, PdserveError
from pdserve.core.request import Request
from pdserve.core.token_delta import TokenDelta
from pdserve.gateway.auth import Identity
from pdserve.gateway.fronts.line import Line
from pdserve.gateway.fronts.messages import (
    FRONT_FRAME,
    Abort,
    Answer,
    Ask,
    Asked,
    AwaitChange,
    Call,
    Cancel,
    Claim,
    Claimed,
    Count,
    Counted,
    Drop,
    Ended,
    Failure,
    Finish,
    FromFront,
    FromGateway,
    GetOverview,
    Last,
    Release,
)
from pdserve.shared.claims import Busy, Kept, Mine
from pdserve.telemetry.record import RequestRecord

if TYPE_CHECKING:
    from pdserve.gateway.fronts.hub import FrontHub

_log = structlog.get_logger(__name__)


class _Run:
    """A front's request while it runs here."""

    def __init__(self, ask: Ask) -> None:
        self.request = ask.request
        self.record = ask.record
        self.task: asyncio.Task[TokenDelta] | None = None
        self.ended_by: PdserveError | None = None

    def abort(self, error: PdserveError) -> None:
        """The first time counts: a second would disturb the clearing up."""
        if self.task is not None and self.ended_by is None:
            self.ended_by = error
            self.task.cancel()


class FrontSession:
    """All that one front has here, until its line is lost: then left is told, and nothing of it is left."""

    def __init__(self, hub: "FrontHub", left: Callable[["FrontSession"], object]) -> None:
        self._hub = hub
        self._left = left
        self._loop = asyncio.get_running_loop()
        self._runs: dict[str, _Run] = {}
        self._untold: dict[str, RequestRecord] = {}
        """Of requests of whose end the front has not told yet."""
        self._calls: dict[int, asyncio.Task[object]] = {}
        self._claimed: set[tuple[str, str]] = set()
        """(name, owner) of claims that the front holds."""
        self._counting: asyncio.Future[None] | None = None
        self.line: Line[FromGateway, FromFront] = Line(FRONT_FRAME, self._hear, self._lost)

    def counted(self) -> "asyncio.Future[None]":
        """Ask the front for its metrics; done when the hub has them."""
        if self._counting is None or self._counting.done():
            self._counting = self._loop.create_future()
            self.line.say(Count())
        return self._counting

    def _hear(self, frame: list[FromFront]) -> None:
        for message in frame:
            match message:
                case Ask():
                    self._begin(message)
                case Cancel():
                    if run := self._runs.get(message.request_id):
                        run.abort(Cancelled("the client is gone"))
                case Ended():
                    self._ended(message)
                case Call():
                    task = self._calls[message.number] = self._loop.create_task(self._do(message.asked))
                    task.add_done_callback(partial(self._answer, message.number))
                case Drop():
                    if waiting := self._calls.get(message.number):
                        waiting.cancel()
                case Counted():
                    self._hub.add(message.grown)
                    if self._counting is not None and not self._counting.done():
                        self._counting.set_result(None)

    def _begin(self, ask: Ask) -> None:
        run = _Run(ask)
        self._hub.gateway.ring.add(ask.record)
        self._untold[ask.request.id] = ask.record
        self._hub.routes.keep(ask.request, {name: _apart(hashes) for name, hashes in ask.hashes})
        self._runs[ask.request.id] = run
        self._hub.gateway.intake.enter(run)
        run.task = self._loop.create_task(self._stream(ask.request, ask.record))
        run.task.add_done_callback(partial(self._finish, run))

    def _finish(self, run: _Run, task: "asyncio.Task[TokenDelta]") -> None:
        """Told of every run's end, also of one that was cancelled before it began."""
        del self._runs[run.request.id]
        self._hub.gateway.intake.leave(run)
        if self.line.closed.done():
            self._count(run.record)
        if task.cancelled():
            failure: PdserveError | None = run.ended_by or Cancelled("the request was cancelled")
        else:
            failure = _deliberate(task.exception(), run.request.id)
        last = None if failure else task.result()
        self.line.say(Last(run.request.id, run.record, last, Failure.of(failure) if failure else None))

    async def _stream(self, request: Request, record: RequestRecord) -> TokenDelta:
        """Pass on all deltas but the last, which is returned when the record is complete."""
        gateway = self._hub.gateway
        gateway.intake.check()
        async with aclosing(gateway.generator.generate(request, record)) as deltas:
            async for delta in deltas:
                if delta.finish_reason is not None:
                    return delta
                self.line.say(delta)
        raise PdserveError("the answer ended without a finish reason")

    def _ended(self, end: Ended) -> None:
        record = self._untold.pop(end.request_id, None)
        if record is None:
            return
        record.status, record.finish_reason = end.status, end.finish_reason
        record.output_tokens = end.output_tokens
        if end.first_sent is not None:
            record.stamp("first_sent", end.first_sent)

    def _answer(self, number: int, task: "asyncio.Task[object]") -> None:
        del self._calls[number]
        if task.cancelled():
            return
        failure = _deliberate(task.exception(), "")
        value = msgspec.msgpack.encode(None if failure else task.result())
        self.line.say(Answer(number, msgspec.Raw(value), Failure.of(failure) if failure else None))

    async def _do(self, asked: Asked) -> object:
        gateway, claims = self._hub.gateway, self._hub.claims
        match asked:
            case Claim():
                return await self._claim(asked)
            case Finish():
                await claims.finish(asked.name, asked.owner, asked.result)
                self._claimed.discard((asked.name, asked.owner))
            case Release():
                await claims.release(asked.name, asked.owner)
                self._claimed.discard((asked.name, asked.owner))
            case AwaitChange():
                await claims.changed(asked.name, asked.timeout)
            case Abort():
                return await gateway.abort(asked.request_id, Identity(salt=asked.salt, tenant=asked.tenant))
            case GetOverview():
                return await gateway.overview()
        return None

    async def _claim(self, asked: Claim) -> Claimed:
        match await self._hub.claims.claim(asked.name, asked.owner, asked.fingerprint):
            case Mine():
                self._claimed.add((asked.name, asked.owner))
                return Claimed()
            case Busy(left):
                return Claimed(busy=left)
            case Kept(result):
                return Claimed(kept=result)

    def _lost(self) -> None:
        for run in self._runs.values():
            run.abort(Cancelled("the front that served the client is gone"))
        for task in self._calls.values():
            task.cancel()
        for name, owner in self._claimed:
            self._hub.background(self._hub.claims.release(name, owner))
        for request_id, record in self._untold.items():
            if request_id not in self._runs:
                self._count(record)
        if self._untold:
            _log.warning("a front is gone, its requests are cancelled", requests=len(self._untold))
        if self._counting is not None and not self._counting.done():
            self._counting.set_result(None)
        self._left(self)

    def _count(self, record: RequestRecord) -> None:
        """A request that the front can count no more."""
        record.status = Cancelled.code
        self._hub.gateway.metrics.count(record)


def _deliberate(error: BaseException | None, request_id: str) -> PdserveError | None:
    """What the front hears of an error: nothing of one that nobody foresaw."""
    if error is None or isinstance(error, PdserveError):
        return error
    _log.error("unexpected error in what a front asked for", request_id=request_id, exc_info=error)
    return PdserveError("internal error; the server's log has the details")


def _apart(hashes: bytes) -> tuple[bytes, ...]:
    return tuple(hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES))
