"""dispatch.sessions.Connection to a simulated engine: what a gRPC session does, over two wires."""

import asyncio
from collections.abc import Callable
from functools import partial

from pdserve.config.times import Times
from pdserve.core.blocks import KVEvent, KVSnapshot
from pdserve.core.clock import Clock
from pdserve.core.endpoint import LoadSnapshot
from pdserve.core.errors import EngineDied, EngineSilent, PdserveError
from pdserve.core.request import FinishReason, Request
from pdserve.core.silence import Silence
from pdserve.core.ticket import Departure, KVSource, TransferTicket
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.connection import settle_departure
from pdserve.dispatch.ledger import EngineLedger
from pdserve.dispatch.request_stream import RequestStream
from pdserve.engine.kv_feed import KVReader
from pdserve.engine.live_requests import EngineItem
from pdserve.simulator.engines import SimEngine
from pdserve.simulator.node import Wire


class SimConnection:
    """The gateway's end. Methods named `_at_engine…` run in the engine's process."""

    def __init__(
        self, engine: SimEngine, ledger: EngineLedger, times: Times, clock: Clock, on_change: Callable[[], None]
    ) -> None:
        latency = engine.transfer.links.latency
        self._engine = engine
        self._ledger = ledger
        self._times = times
        self._clock = clock
        self._latency = latency
        self._on_change = on_change
        self._commands = Wire(None, engine.node, latency)
        self._events = Wire(engine.node, None, latency)
        self._streams: dict[str, RequestStream] = {}
        self._departing: set[asyncio.Future[Departure]] = set()
        self._load: LoadSnapshot | None = None
        self._kv_asked = False
        self._at_engine_kv = KVReader(engine.engine.kv_feed)
        self._error: PdserveError | None = None
        self._silence = Silence(clock, times.heartbeat / 2)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._at_engine_beat()), loop.create_task(self._watch())]
        engine.node.on_death(self._on_death)

    @property
    def usable(self) -> bool:
        return self._error is None and self._load is not None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def snapshot(self) -> LoadSnapshot | None:
        return self._load

    def submit(
        self,
        request: Request,
        *,
        handoff: bool = False,
        ticket: TransferTicket | None = None,
        source: KVSource | None = None,
    ) -> RequestStream:
        stream = RequestStream(self, request.id)
        if self._error:
            stream.push(self._error)
            return stream
        self._streams[request.id] = stream
        self._commands.send(lambda: self._at_engine_start(request, handoff, ticket, source))
        return stream

    def cancel(self, request_id: str) -> None:
        self._commands.send(lambda: self._engine.engine.cancel(request_id))

    def forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    async def depart(self, request_id: str) -> Departure:
        if self._error:
            raise self._error
        waiting: asyncio.Future[Departure] = asyncio.get_running_loop().create_future()

        def at_engine_answer(answer: Departure | PdserveError) -> None:
            self._events.send(lambda: settle_departure(waiting, answer))

        self._departing.add(waiting)
        self._commands.send(lambda: self._engine.engine.depart(request_id, at_engine_answer))
        try:
            return await waiting
        finally:
            self._departing.discard(waiting)

    async def close(self) -> None:
        for request_id in self._streams:
            self.cancel(request_id)
        self._engine.node.forget(self._on_death)
        self._fail(EngineDied(f"{self._engine.endpoint.engine_id} has left the cluster"))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _at_engine_start(
        self, request: Request, handoff: bool, ticket: TransferTicket | None, source: KVSource | None
    ) -> None:
        engine = self._engine.engine
        try:
            engine.start(request, self._at_engine_deliver, handoff=handoff, ticket=ticket, source=source)
        except PdserveError as error:
            refusal = TokenDelta(
                request_id=request.id,
                index=0,
                token_ids=(),
                finish_reason=FinishReason.ERROR,
                error=(error.code, str(error)),
            )
            self._at_engine_deliver([refusal])

    def _at_engine_deliver(self, items: list[EngineItem]) -> None:
        self._at_engine_send_kv()
        self._events.send(partial(self._on_items, items))

    def _at_engine_send_kv(self) -> None:
        if news := self._at_engine_kv.news():
            self._events.send(partial(self._on_kv, news))

    async def _at_engine_beat(self) -> None:
        told = None
        while True:
            if told != self._engine.capacity:
                told = self._engine.capacity
                self._events.send(partial(self._ledger.described, told))
            self._at_engine_send_kv()
            self._events.send(partial(self._on_load, self._engine.engine.snapshot()))
            await self._engine.node.clock.sleep(self._times.heartbeat)

    def _on_items(self, items: list[EngineItem]) -> None:
        self._silence.heard()
        for item in items:
            if isinstance(item, TokenDelta):
                self._ledger.tokens_arrived(item.request_id, len(item.token_ids))
            if stream := self._streams.get(item.request_id):
                stream.push(item)

    def _on_kv(self, news: list[KVEvent] | list[KVSnapshot]) -> None:
        for part in news:
            if isinstance(part, KVSnapshot):
                self._ledger.kv_restored(part)
                self._kv_asked = self._kv_asked and not part.last
        events = [item for item in news if isinstance(item, KVEvent)]
        if not events:
            return
        if self._ledger.kv_changed(events):
            self._kv_asked = False
        elif not self._kv_asked:
            self._kv_asked = True
            self._commands.send(partial(self._at_engine_kv.resume, self._ledger.kv_number))

    def _on_load(self, load: LoadSnapshot) -> None:
        self._silence.heard()
        news = self._load is None or load.draining > self._load.draining
        self._load = load
        self._ledger.loaded(load)
        if news:
            self._on_change()

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(self._times.heartbeat / 2)
            if (silence := self._silence.look()) > self._times.suspect:
                self._fail(EngineSilent(f"{self._engine.endpoint.engine_id} has been silent for {silence:.1f} s"))

    def _on_death(self) -> None:
        died = EngineDied(f"{self._engine.endpoint.engine_id} died")
        asyncio.get_running_loop().call_later(self._latency, self._fail, died)

    def _fail(self, error: PdserveError) -> None:
        if self._error:
            return
        self._error = error
        for task in self._tasks:
            task.cancel()
        for stream in list(self._streams.values()):
            stream.push(error)
        self._streams.clear()
        for waiting in self._departing:
            settle_departure(waiting, error)
        self._on_change()
