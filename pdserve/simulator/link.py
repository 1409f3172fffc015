"""engine.source_link.SourceLink over simulated wires: the rules of leases and heartbeats as over gRPC."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from pdserve.config.times import Times
from pdserve.core.blocks import BlockHash
from pdserve.core.clock import Clock
from pdserve.core.errors import LinkLost, PdserveError
from pdserve.core.protocols import PeerAddress, TransferService
from pdserve.core.silence import Silence
from pdserve.core.ticket import HandoffNews, TransferTicket
from pdserve.engine.engine import Engine
from pdserve.engine.handoff_source import Deliver, Parts
from pdserve.engine.held_tickets import HeldTickets
from pdserve.simulator.node import Node, Wire


class SimLink:
    """The target's end. What reaches the source's process is in the methods named `_at_source…`."""

    def __init__(
        self,
        *,
        here: tuple[Node, TransferService],
        there: tuple[Node, Engine, PeerAddress],
        times: Times,
        latency: float,
        on_failure: Callable[[PdserveError], None],
    ) -> None:
        self.error: PdserveError | None = None
        self.backend = ""
        self._node, self._transfer = here
        self._peer, engine, self._address = there
        self._source, self._lender = engine.source, engine.lender
        self.engine_id = self._address.engine_id
        self.epoch = self._address.epoch
        self.shards = self._address.shards
        self._clock: Clock = self._node.clock
        self._times = times
        self._latency = latency
        self._on_failure = on_failure
        self._commands = Wire(self._node, self._peer, latency)
        self._events = Wire(self._peer, self._node, latency)
        self._opened = asyncio.Event()
        self._tickets = HeldTickets(self.engine_id, times, self._clock)
        self._silence = Silence(self._clock, times.heartbeat)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._peer.on_death(self._on_peer_death)
        self._node.on_death(self._detach)

    @property
    def is_ready(self) -> bool:
        return self._opened.is_set() and not self.error

    async def ready(self) -> None:
        await self._opened.wait()
        if self.error:
            raise self.error

    def distrust(self) -> None:
        """A simulated read fails with its peer, never with a connection."""

    def hold(self, ticket: TransferTicket) -> None:
        self._tickets.hold(ticket)

    def attach(
        self, ticket_id: str, first_block: int, deliver: Deliver, parts: Parts = (None,), *, bulk: bool = False
    ) -> None:
        self._tickets.subscribe(ticket_id, deliver)
        self._send(lambda: self._source.attach(ticket_id, first_block, self._at_source_deliver, parts, bulk=bulk))

    def borrow(self, ticket_id: str, hashes: Sequence[BlockHash], deliver: Deliver, parts: Parts = (None,)) -> None:
        self._tickets.borrow(ticket_id, deliver)
        self._send(lambda: self._lender.lend(ticket_id, hashes, self._at_source_deliver, parts))

    def caught_up(self, ticket_id: str) -> None:
        self._send(lambda: self._source.caught_up(ticket_id))

    def lease_left(self, ticket_id: str) -> float:
        return self._tickets.lease_left(ticket_id)

    async def release(self, ticket_id: str) -> None:
        if self.error:
            raise self.error
        await self._tickets.release(ticket_id, lambda: self._send(lambda: self._at_source_release(ticket_id)))

    def give_up(self, ticket_id: str) -> None:
        self._tickets.forget(ticket_id)
        self._send(lambda: self._source.release(ticket_id))

    async def close(self) -> None:
        self._detach()
        self._peer.forget(self._on_peer_death)
        self._node.forget(self._detach)
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def _send(self, command: Callable[[], object]) -> None:
        if self.error is None:
            self._commands.send(command)

    async def _run(self) -> None:
        try:
            await self._shake_hands()
            self._silence.heard()
            self._opened.set()
            await self._beat()
        except PdserveError as error:
            self._fail(error)

    async def _shake_hands(self) -> None:
        answered = asyncio.Event()
        self._send(lambda: self._events.send(answered.set))
        try:
            async with asyncio.timeout(self._times.suspect):
                await answered.wait()
        except TimeoutError:
            raise LinkLost(f"{self.engine_id} cannot be reached") from None
        self.backend = await self._transfer.connect(self._address)

    async def _beat(self) -> None:
        while True:
            await self._clock.sleep(self._times.heartbeat)
            if (silence := self._silence.look()) > self._times.suspect:
                raise LinkLost(f"{self.engine_id} has been silent for {silence:.1f} s")
            self._send_heartbeat(self._clock.monotonic(), self._tickets.ids)

    def _send_heartbeat(self, sent_at: float, ticket_ids: tuple[str, ...]) -> None:
        def at_source() -> None:
            renewed = self._source.renew(ticket_ids)
            self._events.send(lambda: self._on_ack(sent_at, renewed))

        self._send(at_source)

    def _on_ack(self, sent_at: float, ticket_ids: tuple[str, ...]) -> None:
        self._silence.heard()
        self._tickets.renewed(sent_at, ticket_ids)

    def _at_source_deliver(self, news: HandoffNews) -> None:
        self._events.send(lambda: self._on_news(news))

    def _at_source_release(self, ticket_id: str) -> None:
        expired = self._source.release(ticket_id)
        self._events.send(lambda: self._on_released(ticket_id, expired))

    def _on_news(self, news: HandoffNews) -> None:
        self._silence.heard()
        self._tickets.deliver(news)

    def _on_released(self, ticket_id: str, expired: bool) -> None:
        self._silence.heard()
        self._tickets.released(ticket_id, expired=expired)

    def _on_peer_death(self) -> None:
        lost = LinkLost(f"{self.engine_id} cannot be reached")
        asyncio.get_running_loop().call_later(self._latency, self._node.run, lambda: self._fail(lost))

    def _detach(self) -> None:
        """The source's process notices that its target has gone, however it went."""
        loop = asyncio.get_running_loop()
        loop.call_later(self._latency, self._peer.run, lambda: self._source.detach(self._at_source_deliver))

    def _fail(self, error: PdserveError) -> None:
        if self.error:
            return
        self.error = error
        self._opened.set()
        if self._task:
            self._task.cancel()
        self._tickets.fail(error)
        self._detach()
        self._on_failure(error)
