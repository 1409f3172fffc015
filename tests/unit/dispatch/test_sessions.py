"""The pool's picture of its engines: who is there, what is booked on whom, what a newcomer may be expected to do."""

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from pdserve.config.times import Times
from pdserve.core.blocks import KVEvent, KVEventKind, KVSnapshot
from pdserve.core.cluster import FETCH_SECONDS, Booked, BookedDecode, EngineView, Mode, Route
from pdserve.core.endpoint import BlockCounts, Endpoint, EngineCapacity, EngineState, LoadSnapshot, Role, StepTally
from pdserve.core.errors import EngineDied
from pdserve.core.protocols import DeltaStream
from pdserve.core.request import EngineTrace, PrefixFetch, Request, SamplingParams
from pdserve.core.ticket import Departure, KVSource, TransferTicket
from pdserve.dispatch.ledger import EngineLedger
from pdserve.dispatch.pair_watch import SLOW_STREAK
from pdserve.dispatch.sessions import SessionPool
from tests.clocks import ManualClock, settle


class Line:
    """A connection that says nothing but what the test says through its ledger."""

    def __init__(self, ledger: EngineLedger, on_change: Callable[[], None]) -> None:
        self.ledger = ledger
        self.on_change = on_change
        self.usable = True
        self.failed = False
        self.closed = False

    def submit(
        self,
        request: Request,
        *,
        handoff: bool = False,
        ticket: TransferTicket | None = None,
        source: KVSource | None = None,
    ) -> DeltaStream:
        raise AssertionError("nothing is submitted here")

    def snapshot(self) -> LoadSnapshot | None:
        return None

    async def depart(self, request_id: str) -> Departure:
        raise AssertionError("nobody is asked to leave here")

    async def close(self) -> None:
        self.closed = True


class Bench:
    def __init__(self) -> None:
        self.lines: dict[tuple[str, int], Line] = {}
        self.clock = ManualClock()
        self.pool = SessionPool(Times(heartbeat=1.0), self.clock, connect=self.connect)

    def connect(self, endpoint: Endpoint, ledger: EngineLedger, on_change: Callable[[], None]) -> Line:
        line = self.lines[endpoint.engine_id, endpoint.epoch] = Line(ledger, on_change)
        return line

    def view(self, engine_id: str) -> EngineView:
        return next(view for view in self.pool.state().engines if view.endpoint.engine_id == engine_id)


def endpoint(engine_id: str, epoch: int = 1, state: EngineState = EngineState.READY) -> Endpoint:
    role = Role.PREFILL if engine_id.startswith("p") else Role.DECODE
    return Endpoint(engine_id=engine_id, role=role, epoch=epoch, address="127.0.0.1:1", pid=1, state=state)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    opened = Bench()
    opened.pool.update(tuple(endpoint(name) for name in ("p0", "d0", "d1")))
    yield opened
    await opened.pool.close()
    assert all(line.closed for line in opened.lines.values())


REQUEST = Request(id="r", prompt_token_ids=(1,) * 50, sampling=SamplingParams(seed=0, max_tokens=10))
ROUTE = Route(mode=Mode.DISAGGREGATED, prefill=endpoint("p0"), decode=endpoint("d0"), reason="test", uncached_tokens=40)
DECODING = Booked(decoding=(BookedDecode(10, 50),), reserved_tokens=60)


async def test_a_booking_is_seen_at_once_and_gone_when_the_request_ends(bench: Bench) -> None:
    with suppress(EngineDied), bench.pool.book(REQUEST, ROUTE):
        booked = bench.view("p0").booked
        assert replace(booked, unseen=()) == Booked(prefilling=1, prompt_tokens=40)
        assert bench.view("d0").booked == DECODING
        assert bench.view("d1").booked == Booked()
        raise EngineDied("p0 died")
    assert {bench.view(name).booked.decoding for name in ("p0", "d0", "d1")} == {()}
    assert bench.view("p0").booked == Booked()


async def test_a_move_takes_the_decode_share_along_and_leaves_the_prompt(bench: Bench) -> None:
    with bench.pool.book(REQUEST, ROUTE) as booking:
        booking.move(endpoint("d1"))
        assert bench.view("d0").booked == Booked()
        assert bench.view("d1").booked == DECODING
        assert bench.view("p0").booked.prompt_tokens == 40
    assert bench.view("d1").booked == Booked()


async def test_a_booking_outlives_its_engines(bench: Bench) -> None:
    with bench.pool.book(REQUEST, ROUTE) as booking:
        bench.pool.update((endpoint("d1"),))
        booking.move(endpoint("d1"))
        assert bench.view("d1").booked == DECODING
        bench.pool.update((endpoint("d1", epoch=2),))
        assert bench.view("d1").booked == Booked()
    assert bench.view("d1").booked == Booked()


async def test_what_an_incarnation_held_goes_with_it(bench: Bench) -> None:
    held = KVSnapshot(number=1, hashes=(bytes(16),), first=True, last=True)
    bench.lines["d0", 1].ledger.kv_restored(held)
    assert bench.pool.index.match([bytes(16)], 0.0).keys() == {("d0", 1)}
    bench.pool.update((endpoint("d0", epoch=2),))
    assert bench.pool.index.match([bytes(16)], 0.0) == {}
    with pytest.raises(EngineDied, match="d0 has left"):
        bench.pool.client(endpoint("d0", epoch=1))


async def test_what_an_incarnation_still_says_as_it_leaves_is_not_noted(bench: Bench) -> None:
    ledger = bench.lines["d0", 1].ledger
    bench.pool.update((endpoint("d1"),))
    ledger.kv_restored(KVSnapshot(number=1, hashes=(bytes(16),), first=True, last=True))
    assert ledger.kv_changed([KVEvent(number=2, kind=KVEventKind.STORED, hashes=(bytes(16),))])
    assert len(bench.pool.index) == 0
    assert bench.pool.index.match([bytes(16)], 0.0) == {}


async def test_an_engine_that_is_not_heard_from_is_suspect_and_one_that_starts_is_not_connected(bench: Bench) -> None:
    bench.lines["d0", 1].usable = False
    bench.pool.update((endpoint("d0"), endpoint("d2", state=EngineState.STARTING)))
    assert bench.view("d0").endpoint.state is EngineState.SUSPECT
    assert bench.view("d2").endpoint.state is EngineState.STARTING
    assert ("d2", 1) not in bench.lines


async def test_a_newcomer_is_thought_as_fast_as_its_peers(bench: Bench) -> None:
    bench.lines["d0", 1].ledger.loaded(
        LoadSnapshot(
            engine_id="d0",
            epoch=1,
            number=1,
            running=0,
            waiting=0,
            backlog_tokens=0,
            blocks=BlockCounts(total=8, free=8, used=0, leased=0, quarantined=0),
            draining=False,
            steps=(StepTally(), StepTally(steps=10, tokens=10, context=100, seconds=7.0)),
        )
    )
    bench.pool.update(tuple(endpoint(name) for name in ("p0", "p1", "d0", "d1", "d2")))
    learned = bench.view("d0").step_model
    assert learned.seconds(1, 10) == pytest.approx(0.7, rel=0.05)
    assert bench.view("d2").step_model == learned
    assert bench.view("p1").step_model != learned


async def test_a_change_wakes_whoever_waits_for_one(bench: Bench) -> None:
    changed = bench.pool.changed()
    assert not changed.is_set()
    bench.lines["d0", 1].on_change()
    await settle()
    assert changed.is_set()
    assert not bench.pool.changed().is_set()


async def test_a_broken_line_to_a_listed_engine_is_opened_again_once_after_a_heartbeat(bench: Bench) -> None:
    broken = bench.lines["d0", 1]
    broken.failed = True
    broken.on_change()
    broken.on_change()
    await settle()
    await bench.clock.advance(0.9)
    assert broken.closed
    assert bench.lines["d0", 1] is broken
    await bench.clock.advance(0.2)
    fresh = bench.lines["d0", 1]
    assert fresh is not broken
    await bench.clock.advance(5.0)
    assert bench.lines["d0", 1] is fresh


async def test_a_broken_line_to_an_engine_that_has_left_stays_closed(bench: Bench) -> None:
    broken = bench.lines["d0", 1]
    broken.failed = True
    broken.on_change()
    bench.pool.update(())
    await settle()
    await bench.clock.advance(5.0)
    assert bench.lines["d0", 1] is broken


def transfer(seconds: float) -> EngineTrace:
    return EngineTrace(
        engine_id="d0",
        epoch=1,
        cached_tokens=0,
        stamps=(),
        transfer_bytes=64 << 20,
        transfer_stages=(("queue", 9.0), ("post", seconds / 2), ("wire", seconds / 2), ("verify", 9.0)),
    )


async def test_handoffs_avoid_a_link_that_is_slow_again_and_again_and_return_to_it(bench: Bench) -> None:
    bench.pool.update((endpoint("p0"), endpoint("p1"), endpoint("d0")))
    slow, fast = ((("p0", 1), ("d0", 1)), (("p1", 1), ("d0", 1)))
    bench.pool.link_carried(fast, transfer(0.1), 1000)
    for _ in range(SLOW_STREAK - 1):
        bench.pool.link_carried(slow, transfer(1.0), 1000)
    assert bench.view("d0").lost_links == frozenset()
    bench.pool.link_carried(slow, transfer(1.0), 1000)
    assert bench.view("d0").lost_links == {("p0", 1)}
    await bench.clock.advance(Times().link_backoff_max)
    assert bench.view("d0").lost_links == frozenset()


@pytest.mark.parametrize("domains", [("a", "b"), ("a", "a"), ("a", ""), ("", "")])
async def test_what_handoffs_take_is_told_of_links_between_domains(bench: Bench, domains: tuple[str, str]) -> None:
    bench.pool.update((endpoint("p0"), endpoint("d0")))
    for name, domain in zip(("p0", "d0"), domains, strict=True):
        capacity = EngineCapacity(
            model_revision="r1", block_size=16, num_blocks=64, max_rows=4, max_tokens_per_step=64, domain=domain
        )
        bench.lines[name, 1].ledger.described(capacity)
    bench.pool.link_carried((("p0", 1), ("d0", 1)), transfer(0.1), 1000)
    far = {("p0", 1): pytest.approx(1e-4)} if domains == ("a", "b") else {}
    assert bench.view("d0").handoff_speeds == far
    assert bench.view("d0").domain == domains[1]


async def test_handoffs_avoid_a_link_that_damages_bytes_again(bench: Bench) -> None:
    bench.pool.update((endpoint("p0"), endpoint("d0")))
    link = (("p0", 1), ("d0", 1))
    bench.pool.link_damaged(link)
    assert bench.view("d0").lost_links == frozenset()
    bench.pool.link_damaged(link)
    assert bench.view("d0").lost_links == {("p0", 1)}


async def test_a_link_is_not_thought_slow_for_what_its_source_had_to_restore(bench: Bench) -> None:
    link = (("d0", 1), ("p0", 1))
    fetch = PrefixFetch(
        engine_id="d0", tokens=100, num_bytes=1, seconds=0.105, backend="nixl", restore_seconds=0.1 - FETCH_SECONDS
    )
    bench.pool.prefix_fetched(link, fetch)
    assert bench.view("p0").fetch_speeds == pytest.approx({("d0", 1): 5e-5})


async def test_an_engine_that_joins_counts_as_filled_as_its_peers(bench: Bench) -> None:
    """Else everything would be sent there until it is."""
    bench.pool.update((endpoint("p0"), endpoint("p1"), endpoint("d0")))
    capacity = EngineCapacity(model_revision="r1", block_size=16, num_blocks=4, max_rows=4, max_tokens_per_step=64)
    for name in ("p0", "p1", "d0"):
        bench.lines[name, 1].ledger.described(capacity)
    held = KVSnapshot(number=1, hashes=(bytes(16), bytes([1] * 16)), first=True, last=True)
    bench.lines["p0", 1].ledger.kv_restored(held)
    bench.pool.update((endpoint("p0"), endpoint("p1"), endpoint("d0"), endpoint("p2"), endpoint("d1")))
    filled = {name: bench.view(name).kv_filled for name in ("p0", "p1", "p2", "d1")}
    assert filled == {"p0": 0.5, "p1": 0.0, "p2": 0.25, "d1": 0.0}
