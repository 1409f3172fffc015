"""A lost link is opened again in the background, and refused meanwhile."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from pdserve.config.times import Times
from pdserve.core.blocks import BlockHash
from pdserve.core.errors import LinkLost, PdserveError, StaleEpoch, TransferFailed
from pdserve.core.request import Request, SamplingParams
from pdserve.core.shards import KVShard
from pdserve.core.ticket import TransferTicket
from pdserve.engine.handoff_source import Deliver, Parts
from pdserve.engine.source_link import SourceLink, SourceName
from pdserve.engine.source_links import SourceLinks
from tests.clocks import ManualClock, settle
from tests.unit.engine.tickets import make_ticket

TIMES = Times(heartbeat=1.0, link_backoff=1.0, link_backoff_max=10.0, link_forgotten=30.0)


class Line:
    """A link whose opening ends as the test has it."""

    backend = "any"

    shards: tuple[KVShard, ...] = ()

    def __init__(self, source: SourceName, refusal: PdserveError | None, fail: Callable[[PdserveError], None]):
        self.engine_id, self.epoch = source.engine_id, source.epoch
        self.error: PdserveError | None = None
        self.closed = False
        self._refusal = refusal
        self._fail = fail

    def start(self) -> None:
        pass

    @property
    def is_ready(self) -> bool:
        return self._refusal is None

    async def ready(self) -> None:
        if self._refusal:
            self.lose(self._refusal)
            raise self._refusal

    def lose(self, error: PdserveError) -> None:
        self.error = error
        self._fail(error)

    async def close(self) -> None:
        self.closed = True

    def distrust(self) -> None:
        raise AssertionError("not used here")

    def hold(self, ticket: TransferTicket) -> None:
        raise AssertionError("not used here")

    def attach(
        self, ticket_id: str, first_block: int, deliver: Deliver, parts: Parts = (None,), *, bulk: bool = False
    ) -> None:
        raise AssertionError("not used here")

    def borrow(self, ticket_id: str, hashes: Sequence[BlockHash], deliver: Deliver, parts: Parts = (None,)) -> None:
        raise AssertionError("not used here")

    def caught_up(self, ticket_id: str) -> None:
        raise AssertionError("not used here")

    def lease_left(self, ticket_id: str) -> float:
        raise AssertionError("not used here")

    async def release(self, ticket_id: str) -> None:
        raise AssertionError("not used here")

    def give_up(self, ticket_id: str) -> None:
        raise AssertionError("not used here")


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.opened: list[Line] = []
        self.refusal: PdserveError | None = None
        self.disconnected: list[str] = []
        self.failures: list[tuple[SourceLink, PdserveError]] = []
        self.links = SourceLinks(
            open_link=self.open,
            disconnect=self.disconnect,
            times=TIMES,
            clock=self.clock,
        )

        self.links.tell(lambda link, error: self.failures.append((link, error)))

    def open(self, source: SourceName, on_failure: Callable[[PdserveError], None]) -> SourceLink:
        self.opened.append(Line(source, self.refusal, on_failure))
        return self.opened[-1]

    async def disconnect(self, engine_id: str) -> None:
        self.disconnected.append(engine_id)

    async def lost(self) -> Line:
        """A link that was open is lost, and cannot be opened again at first."""
        self.links.to(TICKET)
        line = self.opened[-1]
        self.refusal = LinkLost("cannot be reached")
        line.lose(LinkLost("silent"))
        await settle()
        return line


TICKET = make_ticket(
    Request(id="r", prompt_token_ids=(1,) * 8, sampling=SamplingParams(seed=0, max_tokens=1)), block_size=4
)


async def test_a_link_serves_all_tickets_of_its_source() -> None:
    bench = Bench()
    assert bench.links.to(TICKET) is bench.links.to(replace(TICKET, id="other"))
    assert len(bench.opened) == 1
    await bench.links.close()
    assert bench.opened[0].closed


async def test_while_a_lost_link_is_mended_its_tickets_are_refused_at_once() -> None:
    bench = Bench()
    line = await bench.lost()
    assert line.closed
    assert bench.disconnected == [TICKET.engine_id], "a connection that stalled must not be taken up again"
    assert bench.failures[0][0] is line
    with pytest.raises(LinkLost, match="it is tried again"):
        bench.links.to(TICKET)
    await bench.clock.advance(2.5)
    assert len(bench.opened) == 4, "at once, then every second"
    bench.refusal = None
    await bench.clock.advance(1.0)
    assert bench.links.to(TICKET) is bench.opened[-1]
    assert all(opened.closed for opened in bench.opened[:-1])
    await bench.links.close()


async def test_a_link_is_not_mended_for_ever_unless_somebody_asks() -> None:
    bench = Bench()
    await bench.lost()
    await bench.clock.advance(20.0)
    with pytest.raises(LinkLost):
        bench.links.to(TICKET)
    await bench.clock.advance(29.0)
    with pytest.raises(LinkLost):
        bench.links.to(TICKET)
    await bench.clock.advance(32.0)
    tried = len(bench.opened)
    await bench.clock.advance(60.0)
    assert len(bench.opened) == tried
    assert bench.links.to(TICKET) is bench.opened[-1], "the next request opens it anew"
    await bench.links.close()


async def test_a_source_that_restarted_is_not_waited_for() -> None:
    bench = Bench()
    await bench.lost()
    bench.refusal = StaleEpoch("restarted")
    await bench.clock.advance(5.0)
    tried = len(bench.opened)
    await bench.clock.advance(5.0)
    assert len(bench.opened) == tried
    await bench.links.close()


async def test_a_new_incarnation_gets_a_link_of_its_own_while_the_old_one_is_mended() -> None:
    bench = Bench()
    await bench.lost()
    bench.refusal = None
    restarted = replace(TICKET, epoch=TICKET.epoch + 1)
    link = bench.links.to(restarted)
    await bench.clock.advance(5.0)
    assert bench.links.to(restarted) is link
    assert link.epoch == restarted.epoch
    await bench.links.close()


async def test_a_link_that_failed_otherwise_is_replaced_when_it_is_asked_for() -> None:
    bench = Bench()
    first = bench.links.to(TICKET)
    bench.opened[0].lose(TransferFailed("no backend reaches it"))
    await settle()
    second = bench.links.to(TICKET)
    assert second is not first
    await asyncio.sleep(0)
    await bench.links.close()
    assert bench.opened[0].closed


async def test_a_ticket_of_an_incarnation_that_is_gone_does_not_end_the_link_to_its_successor() -> None:
    bench = Bench()
    restarted = replace(TICKET, epoch=TICKET.epoch + 1)
    link = bench.links.to(restarted)
    await settle()
    bench.refusal = StaleEpoch("restarted")
    assert bench.links.to(TICKET) is not link
    await settle()
    assert bench.links.to(restarted) is link
    assert link.error is None
    assert bench.opened[1].closed
    assert not bench.opened[0].closed
    assert bench.disconnected == [], "that would end what is read over the other link"
    await bench.links.close()


async def test_the_link_to_an_incarnation_is_closed_once_its_successor_has_answered() -> None:
    bench = Bench()
    bench.links.to(TICKET)
    await settle()
    restarted = replace(TICKET, epoch=TICKET.epoch + 1)
    link = bench.links.to(restarted)
    await settle()
    assert bench.opened[0].closed
    assert bench.links.to(restarted) is link
    assert not bench.opened[1].closed
    await bench.links.close()


async def test_a_link_lost_beside_its_successors_is_not_opened_again() -> None:
    bench = Bench()
    bench.links.to(TICKET)
    await settle()
    bench.links.to(replace(TICKET, epoch=TICKET.epoch + 1))
    bench.opened[0].lose(LinkLost("silent"))
    await bench.clock.advance(5.0)
    assert bench.opened[0].closed
    assert len(bench.opened) == 2
    assert bench.disconnected == []
    await bench.links.close()
