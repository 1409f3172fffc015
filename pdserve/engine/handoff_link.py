"""An engine's line to one incarnation of another whose KV it reads: handshake, news, heartbeats, releases.

One link per (engine, epoch). It fails as a whole: when the stream breaks or the peer stays silent for
times.suspect, every ticket on it fails with the same error and the link is not used again.
"""

import asyncio
from collections.abc import Callable, Sequence

import grpc

from pdserve.config.times import Times
from pdserve.core.blocks import BlockHash
from pdserve.core.clock import Clock
from pdserve.core.errors import (
    LayoutMismatch,
    LinkLost,
    PdserveError,
    StaleEpoch,
    TransferFailed,
)
from pdserve.core.protocols import PeerAddress, TransferService
from pdserve.core.shards import KVShard
from pdserve.core.silence import Silence
from pdserve.core.ticket import TransferTicket
from pdserve.engine.handoff_source import Deliver, Parts
from pdserve.engine.held_tickets import HeldTickets
from pdserve.rpc import convert
from pdserve.rpc.channel import open_channel
from pdserve.rpc.failure import root_cause
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.engine_pb2_grpc import HandoffServiceStub

_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
_HandoffCall = grpc.aio.StreamStreamCall[pb.HandoffCommand, pb.HandoffEvent]


class HandoffLink:
    """Opened by `start`, which never raises; whoever needs the link awaits `ready`."""

    def __init__(
        self,
        *,
        engine_id: str,
        epoch: int,
        address: str,
        transfer: TransferService,
        times: Times,
        clock: Clock,
        on_failure: Callable[[PdserveError], None],
    ) -> None:
        self.engine_id = engine_id
        self.epoch = epoch
        self.error: PdserveError | None = None
        self.backend = ""
        self._address = address
        self._transfer = transfer
        self._times = times
        self._clock = clock
        self._on_failure = on_failure
        self._opened = asyncio.Event()
        self._peer: PeerAddress | None = None
        self._distrusted = False
        self._connecting = asyncio.Lock()
        self._outbox: asyncio.Queue[pb.HandoffCommand] = asyncio.Queue()
        self._tickets = HeldTickets(engine_id, times, clock)
        self._silence = Silence(clock, times.heartbeat)
        self._heartbeats_sent: dict[int, float] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def shards(self) -> tuple[KVShard, ...]:
        return self._peer.shards if self._peer else ()

    @property
    def is_ready(self) -> bool:
        return self._opened.is_set() and not self.error and not self._distrusted

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def ready(self) -> None:
        """Wait until pulls may start. Raises what made the link fail."""
        await self._opened.wait()
        if self.error:
            raise self.error
        async with self._connecting:
            if self._distrusted and self._peer:
                self.backend = await self._transfer.connect(self._peer)
                self._distrusted = False

    def distrust(self) -> None:
        """A read failed although the link holds: connect for transfers again before the next fetch."""
        self._distrusted = True

    def hold(self, ticket: TransferTicket) -> None:
        """Renew the ticket's lease with every heartbeat until released."""
        self._tickets.hold(ticket)

    def attach(
        self, ticket_id: str, first_block: int, deliver: Deliver, parts: Parts = (None,), *, bulk: bool = False
    ) -> None:
        self._tickets.subscribe(ticket_id, deliver)
        messages = [convert.part_to_proto(part) for part in parts if part]
        self._send(attach=pb.Attach(ticket_id=ticket_id, first_block=first_block, parts=messages, bulk=bulk))

    def borrow(self, ticket_id: str, hashes: Sequence[BlockHash], deliver: Deliver, parts: Parts = (None,)) -> None:
        self._tickets.borrow(ticket_id, deliver)
        self._send(lend=convert.lend_to_proto(ticket_id, hashes, [part for part in parts if part]))

    def caught_up(self, ticket_id: str) -> None:
        self._send(caught_up=pb.CaughtUp(ticket_id=ticket_id))

    def lease_left(self, ticket_id: str) -> float:
        return self._tickets.lease_left(ticket_id)

    async def release(self, ticket_id: str) -> None:
        """Tell the source we are done. Raises LeaseExpired if what was read must be discarded."""
        if self.error:
            raise self.error
        await self._tickets.release(ticket_id, lambda: self._send(release=pb.Release(ticket_id=ticket_id)))

    def give_up(self, ticket_id: str) -> None:
        """Release without waiting for the answer; for KV nobody wants any more."""
        self._tickets.forget(ticket_id)
        self._send(release=pb.Release(ticket_id=ticket_id))

    async def close(self) -> None:
        """Whoever still waits on it hears of its end, as of a failure's."""
        if self._task is None:
            return
        if self.error is None:
            self._task.cancel()
        try:
            # Not awaited itself: that would take a cancellation of the caller for the task's own end.
            await asyncio.wait({self._task})
        finally:
            if self.error is None:
                self._fail(LinkLost(f"the link to {self.engine_id} was closed"))

    def _send(
        self,
        *,
        attach: pb.Attach | None = None,
        release: pb.Release | None = None,
        heartbeat: pb.Heartbeat | None = None,
        lend: pb.Lend | None = None,
        caught_up: pb.CaughtUp | None = None,
    ) -> None:
        command = pb.HandoffCommand(
            source_epoch=self.epoch,
            attach=attach,
            release=release,
            heartbeat=heartbeat,
            lend=lend,
            caught_up=caught_up,
        )
        self._outbox.put_nowait(command)

    async def _run(self) -> None:
        channel = open_channel(self._address)
        try:
            stub = HandoffServiceStub(channel)
            await self._shake_hands(stub)
            self._silence.heard()
            self._opened.set()
            stream = stub.Handoff()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(stream))
                group.create_task(self._write(stream))
                group.create_task(self._beat())
        except Exception as error:  # whatever it was: who waits for this link must hear of its end
            self._fail(_translate(self.engine_id, root_cause(error)))
        finally:
            await channel.close()

    async def _shake_hands(self, stub: HandoffServiceStub) -> None:
        hello = convert.peer_to_proto(self._transfer.address)
        hello.kv_kind = self._transfer.layout.group.kind.value
        answer = await stub.Connect(hello, timeout=self._times.suspect)
        if answer.epoch != self.epoch:
            raise StaleEpoch(f"{self.engine_id} has restarted since it issued the ticket")
        if answer.kv_kind != hello.kv_kind:
            raise LayoutMismatch(f"{self.engine_id} holds {answer.kv_kind!r} KV, this engine {hello.kv_kind!r}")
        self._peer = convert.peer_from_proto(answer)
        self.backend = await self._transfer.connect(self._peer)

    async def _write(self, stream: _HandoffCall) -> None:
        while True:
            await stream.write(await self._outbox.get())

    async def _read(self, stream: _HandoffCall) -> None:
        async for event in stream:
            self._silence.heard()
            if event.source_epoch != self.epoch:
                raise StaleEpoch(f"{self.engine_id} answers under another epoch")
            self._on_event(event)
        raise LinkLost(f"{self.engine_id} ended the handoff stream")

    def _on_event(self, event: pb.HandoffEvent) -> None:
        match event.WhichOneof("event"):
            case "region":
                self._tickets.deliver(convert.region_from_proto(event.region))
            case "done":
                self._tickets.deliver(convert.done_from_proto(event.done))
            case "gone":
                self._tickets.deliver(convert.gone_from_proto(event.gone))
            case "lent":
                self._tickets.deliver(convert.lent_from_proto(event.lent))
            case "released":
                self._tickets.released(event.released.ticket_id, expired=event.released.expired)
            case "ack":
                sent_at = self._heartbeats_sent.pop(event.ack.number, 0.0)
                self._tickets.renewed(sent_at, tuple(event.ack.renewed_ticket_ids))

    async def _beat(self) -> None:
        number = 0
        while True:
            await self._clock.sleep(self._times.heartbeat)
            if (silence := self._silence.look()) > self._times.suspect:
                raise LinkLost(f"{self.engine_id} has been silent for {silence:.1f} s")
            number += 1
            self._heartbeats_sent[number] = self._clock.monotonic()
            self._send(heartbeat=pb.Heartbeat(number=number, ticket_ids=self._tickets.ids))

    def _fail(self, error: PdserveError) -> None:
        self.error = error
        self._opened.set()
        self._tickets.fail(error)
        self._on_failure(error)


def _translate(engine_id: str, error: PdserveError | grpc.aio.AioRpcError | None) -> PdserveError:
    if isinstance(error, PdserveError):
        return error
    if error is not None and error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return LayoutMismatch(error.details() or f"{engine_id} refused the handshake")
    if error is None or error.code() in _UNREACHABLE:
        return LinkLost(f"{engine_id} cannot be reached")
    return TransferFailed(f"the link to {engine_id} failed")
