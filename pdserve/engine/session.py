"""One client session of an engine: what the engine produces for it, gathered into one message per step."""

import asyncio
from collections.abc import AsyncGenerator

from pdserve.config.times import Times
from pdserve.core.blocks import KVEvent, KVSnapshot
from pdserve.core.errors import PdserveError
from pdserve.core.request import FinishReason
from pdserve.core.ticket import Departure, TransferTicket
from pdserve.core.token_delta import TokenDelta
from pdserve.engine.engine import Engine
from pdserve.engine.kv_feed import KVReader
from pdserve.rpc import convert
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb


class EngineSession:
    """Takes deliveries without ever blocking the engine; `events` drains them as fast as the client reads.

    A slow client merges steps into fewer, larger messages. What waits is bounded by the max_tokens of
    the session's own requests.
    """

    def __init__(self, engine: Engine, times: Times) -> None:
        self._engine = engine
        self._times = times
        self._deltas: list[TokenDelta] = []
        self._tickets: list[TransferTicket] = []
        self._departures: list[pb.Departure] = []
        self._fresh = asyncio.Event()
        self._active: set[str] = set()
        self._load_due = False
        self._over = False
        self._kv = KVReader(engine.kv_feed)
        self._told = engine.limits

    def deliver(self, items: list[TokenDelta | TransferTicket]) -> None:
        for item in items:
            if isinstance(item, TransferTicket):
                self._tickets.append(item)
            else:
                self._deltas.append(item)
                if item.finish_reason:
                    self._active.discard(item.request_id)
        self._fresh.set()

    def obey(self, command: pb.SessionCommand) -> None:
        match command.WhichOneof("command"):
            case "submit":
                self._submit(command.submit)
            case "cancel_request_id":
                if command.cancel_request_id in self._active:
                    self._engine.cancel(command.cancel_request_id)
            case "resend_kv":
                resend = command.resend_kv
                self._kv.resume(resend.after_number if resend.HasField("after_number") else None)
                self._fresh.set()
            case "depart_request_id":
                request_id = command.depart_request_id
                self._engine.depart(request_id, lambda answer: self._answer_departure(request_id, answer))

    async def events(self) -> AsyncGenerator[pb.SessionEvents, None]:
        """Description first, then steps as they come and a LoadSnapshot per heartbeat; with either, what has
        changed in the prefix cache."""
        yield pb.SessionEvents(events=[pb.SessionEvent(description=self._describe())])
        beating = asyncio.create_task(self._beat())
        self._engine.drain_watchers.add(self._report_load)
        try:
            while not self._over:
                self._fresh.clear()
                for message in self._drain():
                    yield message
                await self._fresh.wait()
        finally:
            self._engine.drain_watchers.discard(self._report_load)
            beating.cancel()

    def end(self) -> None:
        """Nothing more is obeyed: the events end, so that the client goes elsewhere."""
        self._over = True
        self._fresh.set()

    def close(self) -> None:
        """The client is gone: nobody reads what its requests would produce."""
        for request_id in list(self._active):
            self._engine.cancel(request_id)

    async def _beat(self) -> None:
        while True:
            self._report_load()
            await self._engine.clock.sleep(self._times.heartbeat)

    def _report_load(self) -> None:
        self._load_due = True
        self._fresh.set()

    def _answer_departure(self, request_id: str, answer: Departure | PdserveError) -> None:
        self._departures.append(convert.departure_to_proto(request_id, answer))
        self._fresh.set()

    def _submit(self, submit: pb.Submit) -> None:
        request_id = submit.request.id
        try:
            request = convert.request_from_proto(submit.request)
            ticket = convert.ticket_from_proto(submit.ticket) if submit.HasField("ticket") else None
            source = convert.source_from_proto(submit.source) if submit.HasField("source") else None
            self._active.add(request_id)
            self._engine.start(request, self.deliver, handoff=submit.handoff, ticket=ticket, source=source)
        except PdserveError as error:
            refusal = TokenDelta(
                request_id=request_id,
                index=0,
                token_ids=(),
                finish_reason=FinishReason.ERROR,
                error=(error.code, str(error)),
            )
            self.deliver([refusal])

    def _drain(self) -> list[pb.SessionEvents]:
        """All that waits, in one message; but parts of a snapshot, which are large, each in one of its own before."""
        news = self._kv.news()
        epoch = self._engine.endpoint.epoch
        parts = [convert.kv_snapshot_to_proto(epoch, item) for item in news if isinstance(item, KVSnapshot)]
        messages = [pb.SessionEvents(events=[pb.SessionEvent(kv_snapshot=part)]) for part in parts]
        events = []
        if changes := [item for item in news if isinstance(item, KVEvent)]:
            events.append(pb.SessionEvent(kv_events=convert.kv_events_to_proto(epoch, changes)))
        events += self._drain_requests()
        if self._told != self._engine.limits:
            events.append(pb.SessionEvent(description=self._describe()))
        if self._load_due:
            self._load_due = False
            events.append(pb.SessionEvent(load=convert.load_to_proto(self._engine.snapshot())))
        if events:
            messages.append(pb.SessionEvents(events=events))
        return messages

    def _drain_requests(self) -> list[pb.SessionEvent]:
        tickets, self._tickets = self._tickets, []
        deltas, self._deltas = self._deltas, []
        departures, self._departures = self._departures, []
        events = [pb.SessionEvent(ticket=convert.ticket_to_proto(ticket)) for ticket in tickets]
        if deltas:
            step = pb.StepEvent(
                epoch=self._engine.endpoint.epoch, deltas=[convert.delta_to_proto(delta) for delta in deltas]
            )
            events.append(pb.SessionEvent(step=step))
        events += [pb.SessionEvent(departure=departure) for departure in departures]
        return events

    def _describe(self) -> pb.EngineDescription:
        engine = self._engine
        self._told = engine.limits
        return pb.EngineDescription(
            engine_id=engine.endpoint.engine_id,
            role=engine.endpoint.role.value,
            epoch=engine.endpoint.epoch,
            model_name=engine.info.name,
            model_revision=engine.info.revision,
            max_model_len=engine.max_len,
            pid=engine.endpoint.pid,
            block_size=engine.transfer.layout.block_size,
            num_blocks=engine.transfer.layout.num_blocks,
            max_rows=engine.limits.max_rows,
            max_tokens_per_step=engine.limits.max_tokens_per_step,
            prefix_caching=engine.limits.prefix_caching,
            numerics=engine.info.numerics,
            domain=engine.domain,
        )
