"""One engine incarnation over one gRPC session: submits requests and hands each its own deltas."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import grpc

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.endpoint import Endpoint, LoadSnapshot
from pdserve.core.errors import EngineDied, EngineSilent, PdserveError
from pdserve.core.request import Request
from pdserve.core.silence import Silence
from pdserve.core.ticket import Departure, KVSource, TransferTicket
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.ledger import EngineLedger
from pdserve.dispatch.pacing import Pacer
from pdserve.dispatch.request_stream import RequestStream
from pdserve.rpc import convert
from pdserve.rpc.channel import open_channel
from pdserve.rpc.failure import root_cause
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.engine_pb2_grpc import EngineServiceStub

_SessionCall = grpc.aio.StreamStreamCall[pb.SessionCommands, pb.SessionEvents]


_COMMANDS_AT_ONCE = 16
"""In one message, which has room for so many prompts of a million tokens."""


class EngineConnection:
    """core.protocols.EngineClient for one (engine, epoch). `close` fails whatever still streams.

    What the engine reports of itself goes to the ledger. on_change is called when the engine becomes usable, when it
    begins to drain and when it is lost. pacer lets tokens wait for one another while this process is busy.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        ledger: EngineLedger,
        times: Times,
        clock: Clock,
        on_change: Callable[[], None],
        pacer: Pacer | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._pacer = pacer
        self._ledger = ledger
        self._on_change = on_change
        self._times = times
        self._clock = clock
        self._outbox: asyncio.Queue[pb.SessionCommand] = asyncio.Queue()
        self._streams: dict[str, RequestStream] = {}
        self._departing: dict[str, asyncio.Future[Departure]] = {}
        self._load: LoadSnapshot | None = None
        self._kv_asked = False
        self._silence = Silence(clock, times.heartbeat / 2)
        self._error: PdserveError | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def usable(self) -> bool:
        """Whether the engine has been heard from recently enough to get new work."""
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
        stream = RequestStream(self, request.id, self._pacer)
        if self._error:
            stream.push(self._error)
            return stream
        self._streams[request.id] = stream
        submit = pb.Submit(
            request=convert.request_to_proto(request),
            handoff=handoff,
            ticket=convert.ticket_to_proto(ticket) if ticket else None,
            source=convert.source_to_proto(source) if source else None,
        )
        self._outbox.put_nowait(pb.SessionCommand(submit=submit))
        return stream

    def cancel(self, request_id: str) -> None:
        self._outbox.put_nowait(pb.SessionCommand(cancel_request_id=request_id))

    def forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    async def depart(self, request_id: str) -> Departure:
        if self._error:
            raise self._error
        answer: asyncio.Future[Departure] = asyncio.get_running_loop().create_future()
        self._departing[request_id] = answer
        self._outbox.put_nowait(pb.SessionCommand(depart_request_id=request_id))
        try:
            return await answer
        finally:
            if self._departing.get(request_id) is answer:
                del self._departing[request_id]

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._fail(EngineDied(f"{self.endpoint.engine_id} has left the cluster"))

    async def _run(self) -> None:
        engine_id = self.endpoint.engine_id
        channel = open_channel(self.endpoint.address)
        try:
            session = EngineServiceStub(channel).Session()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(session))
                group.create_task(self._write(session))
                group.create_task(self._watch())
        except Exception as error:  # whatever it was: who waits for this engine must hear of its end
            cause = root_cause(error)
            self._fail(cause if isinstance(cause, PdserveError) else EngineDied(f"{engine_id} died"))
        finally:
            await channel.close()

    async def _write(self, session: _SessionCall) -> None:
        while True:
            commands = [await self._outbox.get()]
            while len(commands) < _COMMANDS_AT_ONCE and not self._outbox.empty():
                commands.append(self._outbox.get_nowait())
            await session.write(pb.SessionCommands(commands=commands))

    async def _read(self, session: _SessionCall) -> None:
        async for message in session:
            self._silence.heard()
            for event in message.events:
                self._take(event)
        raise EngineDied(f"{self.endpoint.engine_id} ended its session")

    def _take(self, event: pb.SessionEvent) -> None:
        match event.WhichOneof("event"):
            case "description":
                self._check_epoch(event.description.epoch)
                self._ledger.described(convert.capacity_from_proto(event.description))
            case "step":
                self._check_epoch(event.step.epoch)
                for message in event.step.deltas:
                    self._push(message.request_id, convert.delta_from_proto(message))
            case "load":
                self._check_epoch(event.load.epoch)
                self._on_load(convert.load_from_proto(event.load))
            case "ticket":
                self._push(event.ticket.request_id, convert.ticket_from_proto(event.ticket))
            case "departure":
                departure = convert.departure_from_proto(event.departure)
                settle_departure(self._departing.get(event.departure.request_id), departure)
            case "kv_events":
                self._check_epoch(event.kv_events.epoch)
                self._on_kv_events(event.kv_events)
            case "kv_snapshot":
                self._check_epoch(event.kv_snapshot.epoch)
                self._ledger.kv_restored(convert.kv_snapshot_from_proto(event.kv_snapshot))
                self._kv_asked = self._kv_asked and not event.kv_snapshot.last

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.endpoint.epoch:
            raise EngineDied(f"{self.endpoint.engine_id} has restarted")

    def _on_load(self, load: LoadSnapshot) -> None:
        news = self._load is None or load.draining > self._load.draining
        self._load = load
        self._ledger.loaded(load)
        if news:
            self._on_change()

    def _on_kv_events(self, message: pb.KVEvents) -> None:
        known = self._ledger.kv_changed(convert.kv_events_from_proto(message))
        if known:
            self._kv_asked = False
        elif not self._kv_asked:
            self._kv_asked = True
            resend = pb.ResendKV(after_number=self._ledger.kv_number)
            self._outbox.put_nowait(pb.SessionCommand(resend_kv=resend))

    def _push(self, request_id: str, item: TokenDelta | TransferTicket) -> None:
        if isinstance(item, TokenDelta):
            self._ledger.tokens_arrived(request_id, len(item.token_ids))
        if stream := self._streams.get(request_id):
            stream.push(item)

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(self._times.heartbeat / 2)
            if (silence := self._silence.look()) > self._times.suspect:
                raise EngineSilent(f"{self.endpoint.engine_id} has been silent for {silence:.1f} s")

    def _fail(self, error: PdserveError) -> None:
        self._error = self._error or error
        for stream in list(self._streams.values()):
            stream.push(self._error)
        self._streams.clear()
        for answer in self._departing.values():
            settle_departure(answer, self._error)
        self._on_change()


def settle_departure(waiting: "asyncio.Future[Departure] | None", answer: Departure | PdserveError) -> None:
    """Tell whoever asked a request to depart, if he still waits."""
    if waiting is None or waiting.done():
        return
    if isinstance(answer, PdserveError):
        waiting.set_exception(answer)
    else:
        waiting.set_result(answer)
