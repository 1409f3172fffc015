"""Loans of KV that lies in a tier: brought back once for all who ask, and lent as far as it came."""

import asyncio
from collections.abc import AsyncIterator
from typing import NoReturn

import pytest

from pdserve.config.times import Times
from pdserve.core.blocks import BlockHash
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.core.errors import Unavailable
from pdserve.core.ticket import HandoffNews, Lent, TicketGone
from pdserve.core.tiers import RestoreReceipt, SavedBlock, Tier, TierNews
from pdserve.engine.handoff_source import HandoffSource
from pdserve.engine.lender import Lender
from pdserve.engine.restoring import Restoring
from pdserve.engine.source_links import SourceLinks
from pdserve.engine.step_timing import StepTimer
from pdserve.kvcache.manager import KVCacheManager
from tests.clocks import ManualClock, settle
from tests.unit.engine.test_handoff_source import LAYOUT, RecordingTransfer

NOTHING = TierNews(changes=(), tallies=())
CHAIN = tuple(bytes([number]) * 16 for number in range(6))

PATIENCE = 0.2


class Tiers:
    """Holds CHAIN in host memory, and brings blocks back when it is let."""

    def __init__(self) -> None:
        self.asked: list[tuple[BlockHash, ...]] = []
        self.whole = len(CHAIN)
        """How many of CHAIN's blocks are not damaged."""
        self.go = asyncio.Event()

    async def contents(self) -> TierNews:
        return TierNews(changes=tuple((block_hash, Tier.HOST) for block_hash in CHAIN), tallies=())

    async def save(
        self, blocks: tuple[SavedBlock, ...], used: tuple[BlockHash, ...], wrong: tuple[BlockHash, ...] = ()
    ) -> TierNews:
        return NOTHING

    async def restore(self, hashes: tuple[BlockHash, ...], blocks: tuple[int, ...]) -> RestoreReceipt:
        self.asked.append(hashes)
        await self.go.wait()
        return RestoreReceipt(num_blocks=len(set(hashes) & set(CHAIN[: self.whole])), reads=(), news=NOTHING)


class Bench:
    def __init__(self) -> None:
        self.tiers = Tiers()
        self.clock = clock = ManualClock()
        times, transfer = Times(restore_deadline=2 * PATIENCE), RecordingTransfer(LAYOUT)
        self.restoring = Restoring(
            self.tiers,
            transfer=transfer,
            links=SourceLinks(open_link=_nobody, disconnect=transfer.disconnect, times=times, clock=clock),
            timer=StepTimer(clock),
            times=times,
            clock=clock,
            on_news=lambda news: self.kv.hear(news),
            on_saved=lambda blocks: None,
            on_ended=lambda event, num_blocks: None,
            on_late=lambda event: None,
        )
        self.kv = KVCacheManager(num_blocks=256, block_size=4, tiers=self.restoring.index)
        source = HandoffSource(
            endpoint=Endpoint(
                engine_id="d0", role=Role.DECODE, epoch=7, address="127.0.0.1:1", pid=1, state=EngineState.READY
            ),
            transfer=transfer,
            times=times,
            clock=clock,
            on_end=lambda ticket_id, sequence_id: None,
            on_caught_up=lambda sequence_id: None,
        )
        self.lender = Lender(
            source=source,
            kv=self.kv,
            restoring=self.restoring,
            clock=clock,
            patience=PATIENCE,
            refusal=lambda: None,
            on_change=lambda: None,
        )
        self.news: dict[str, list[HandoffNews]] = {}

    def lend(self, ticket_id: str, num_blocks: int) -> None:
        self.lender.lend(ticket_id, CHAIN[:num_blocks], self.news.setdefault(ticket_id, []).append, (None,))

    def lent(self, ticket_id: str) -> int:
        """How many blocks were lent."""
        return self.answer(ticket_id).num_blocks

    def answer(self, ticket_id: str) -> Lent:
        first = self.news[ticket_id][0]
        assert isinstance(first, Lent)
        return first


def _nobody(*_: object) -> NoReturn:
    raise AssertionError("a lender reads from nobody")


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    opened = Bench()
    await opened.restoring.open()
    yield opened
    await opened.lender.close()
    await opened.restoring.close()


async def test_loans_of_one_prefix_wait_for_one_restore(bench: Bench) -> None:
    for ticket_id in "abc":
        bench.lend(ticket_id, 4)
    await settle()
    assert bench.tiers.asked == [CHAIN[:4]]
    assert not any(bench.news.values())
    bench.tiers.go.set()
    await settle()
    assert [bench.lent(ticket_id) for ticket_id in "abc"] == [4, 4, 4]
    assert bench.tiers.asked == [CHAIN[:4]]
    bench.kv.check()


async def test_a_loan_tells_how_long_it_waited_for_a_restore(bench: Bench) -> None:
    bench.lend("a", 2)
    await settle()
    await bench.clock.advance(0.2)
    bench.lend("b", 2)
    await settle()
    await bench.clock.advance(0.1)
    bench.tiers.go.set()
    await settle()
    bench.lend("c", 2)
    waited = [bench.answer(ticket_id).restore_seconds for ticket_id in "abc"]
    assert waited == pytest.approx([0.3, 0.1, 0.0])


async def test_what_another_loans_restore_leaves_is_restored_behind_it(bench: Bench) -> None:
    bench.lend("short", 2)
    await settle()
    bench.lend("long", 5)
    await settle()
    assert bench.tiers.asked == [CHAIN[:2]]
    bench.tiers.go.set()
    await settle()
    assert bench.tiers.asked == [CHAIN[:2], CHAIN[2:5]]
    assert (bench.lent("short"), bench.lent("long")) == (2, 5)
    bench.lend("again", 5)
    assert bench.lent("again") == 5, "it is here, and offered at once"
    bench.kv.check()


async def test_a_restore_that_brings_nothing_is_not_repeated_by_those_who_wait_for_it(bench: Bench) -> None:
    bench.tiers.whole = 0
    bench.lend("a", 4)
    bench.lend("b", 4)
    await settle()
    bench.tiers.go.set()
    await settle()
    assert [isinstance(news[0], TicketGone) for news in bench.news.values()] == [True, True]
    assert bench.tiers.asked == [CHAIN[:4]]
    assert bench.kv.counts().free == 256


async def test_restores_that_overlap_because_a_block_before_them_has_gone_do_no_harm(bench: Bench) -> None:
    bench.lend("short", 2)
    bench.tiers.go.set()
    await settle()
    bench.tiers.go.clear()
    bench.lend("long", 5)
    await settle()
    bench.kv.release("short")
    bench.kv._cache.forget(bench.kv._cache.lookup(CHAIN[:2])[1:])
    bench.lend("longer", 6)
    await settle()
    assert bench.tiers.asked == [CHAIN[:2], CHAIN[2:5], CHAIN[1:6]]
    bench.tiers.go.set()
    await settle()
    assert bench.lent("longer") == 6
    assert bench.kv.counts().free == 256 - 6


async def test_a_loan_that_comes_just_as_a_restore_ends_is_answered(bench: Bench) -> None:
    bench.tiers.whole = 2
    bench.lend("0", 4)
    await settle()
    bench.tiers.go.set()
    for number in range(1, 20):
        bench.lend(str(number), 4)
        await asyncio.sleep(0)
    await settle()
    assert {bench.lent(ticket_id) for ticket_id in bench.news} == {2}


async def test_a_lender_that_closes_leaves_no_restore_running(bench: Bench) -> None:
    bench.lend("a", 4)
    bench.lend("b", 4)
    await settle()
    async with asyncio.timeout(5):
        await bench.lender.close()


async def test_a_restore_that_hangs_holds_up_no_loan_for_ever_and_no_other_is_begun(bench: Bench) -> None:
    for ticket_id in "ab":
        bench.lend(ticket_id, 4)
    async with asyncio.timeout(5):
        while not (bench.news["a"] and bench.news["b"]):
            await asyncio.sleep(0.01)
    for ticket_id in "ab":
        (gone,) = bench.news[ticket_id]
        assert isinstance(gone, TicketGone)
        assert gone.code == Unavailable.code
    bench.lend("c", 4)
    async with asyncio.timeout(5):
        while not bench.news["c"]:
            await asyncio.sleep(0.01)
    assert bench.tiers.asked == [CHAIN[:4]]
    await asyncio.sleep(2 * PATIENCE)
    assert bench.restoring.choose_restore((Tier.HOST,)) == 0, "nothing is restored before that has ended"
    bench.tiers.go.set()
    await settle()
    assert bench.restoring.choose_restore((Tier.HOST,)) == 1
    bench.lend("d", 4)
    assert bench.lent("d") == 4, "what came late is here"
