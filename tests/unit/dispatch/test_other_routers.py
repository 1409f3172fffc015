"""What one router books, another sees before the engine has told, and no longer than the one lives."""

import asyncio
from collections.abc import Callable

import pytest

from pdserve.core.cluster import Booked, BookedDecode, Reservation
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.core.errors import MalformedMessage
from pdserve.dispatch.ledger import EngineLedger
from pdserve.dispatch.other_routers import GATHER, OtherRouters
from pdserve.router.kv_index import KVIndex
from pdserve.router.pool_model import PoolModel
from tests.clocks import ManualClock

P, D = ("p", 1), ("d", 1)
LEASE = 6.0


class Wire:
    """Carries news to everybody at once, or loses them."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.takers: list[Callable[[bytes], None]] = []
        self.works = True

    def send(self, news: bytes) -> None:
        for take in self.takers if self.works else ():
            take(news)


class Router:
    def __init__(self, name: str, wire: Wire) -> None:
        self.clock = wire.clock
        self.ledgers: dict[tuple[str, int], EngineLedger] = {}
        self.others = OtherRouters(name, lambda: self.ledgers, wire.clock, LEASE, wire.send)
        for key in (P, D):
            self.ledgers[key] = EngineLedger(
                key,
                KVIndex(),
                wire.clock,
                PoolModel(),
                on_booked=lambda request_id, key=key: self.others.booked(key, request_id),  # type: ignore[misc]
            )
        wire.takers.append(self.others.take)

    def book(self, request_id: str) -> None:
        reservation = Reservation(
            request_id=request_id, prefill=P, decode=D, prompt_tokens=100, uncached_tokens=60, max_tokens=20
        )
        for ledger in self.ledgers.values():
            ledger.book(reservation)

    def booked(self, key: tuple[str, int]) -> Booked:
        name, epoch = key
        endpoint = Endpoint(
            engine_id=name, role=Role.PREFILL, epoch=epoch, address="127.0.0.1:1", pid=1, state=EngineState.READY
        )
        return self.ledgers[key].view(endpoint, self.clock.monotonic(), usable=True).booked


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def routers(wire: Wire) -> tuple[Router, Router]:
    pair = Router("a", wire), Router("b", wire)
    for router in pair:
        router.others.tell_all()
    return pair


async def gathered() -> None:
    await asyncio.sleep(2 * GATHER)


async def test_a_booking_is_seen_by_the_other_as_by_its_own_router(routers: tuple[Router, Router]) -> None:
    a, b = routers
    a.book("r")
    await gathered()
    assert [b.booked(key) for key in (P, D)] == [a.booked(key) for key in (P, D)]
    assert b.booked(P).prompt_tokens == 60
    a.ledgers[P].tokens_arrived("r", 1)
    await gathered()
    assert b.booked(P) == Booked()
    assert b.booked(D).decoding == (BookedDecode(20, 100),)
    for ledger in a.ledgers.values():
        ledger.release("r")
    await gathered()
    assert b.booked(D) == Booked()


async def test_what_was_missed_is_made_good_by_the_next_whole(wire: Wire, routers: tuple[Router, Router]) -> None:
    a, b = routers
    wire.works = False
    a.book("r")
    await gathered()
    assert b.booked(D) == Booked()
    wire.works = True
    a.others.tell_all()
    assert b.booked(D).decoding
    wire.works = False
    for ledger in a.ledgers.values():
        ledger.release("r")
    await gathered()
    wire.works = True
    a.others.tell_all()
    assert b.booked(D) == Booked()


async def test_progress_comes_with_the_whole_and_a_prompt_keeps_its_age(routers: tuple[Router, Router]) -> None:
    a, b = routers
    a.book("r")
    await gathered()
    since = b.booked(P).unseen[0].since
    await a.clock.advance(1)
    a.ledgers[D].tokens_arrived("r", 5)
    a.others.tell_all()
    assert b.booked(D).decoding == (BookedDecode(15, 100),)
    assert b.booked(P).unseen[0].since == since


async def test_a_router_that_is_silent_for_a_lease_has_nothing_booked(routers: tuple[Router, Router]) -> None:
    a, b = routers
    a.book("r")
    await gathered()
    assert b.others.num_known == 1
    await a.clock.advance(LEASE - 1)
    b.others.tell_all()
    assert b.booked(D).decoding
    await a.clock.advance(2)
    b.others.tell_all()
    assert b.booked(D) == Booked()
    assert b.others.num_known == 0


async def test_who_cannot_tell_anything_forgets_the_others_nevertheless(
    wire: Wire, routers: tuple[Router, Router]
) -> None:
    a, b = routers
    a.book("r")
    await gathered()
    wire.works = False
    await a.clock.advance(LEASE - 1)
    b.others.forget_silent()
    assert b.booked(P).prompt_tokens == 60
    await a.clock.advance(2)
    b.others.forget_silent()
    assert b.booked(P) == Booked()


async def test_a_router_hears_nothing_of_itself(routers: tuple[Router, Router]) -> None:
    a, _ = routers
    a.book("r")
    await gathered()
    a.others.tell_all()
    assert len(a.booked(D).decoding) == 1


def test_news_that_are_none_are_refused(routers: tuple[Router, Router]) -> None:
    with pytest.raises(MalformedMessage):
        routers[0].others.take(b"\x93\x01\x02\x03")
