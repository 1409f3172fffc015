"""Tickets: leases begin, are renewed and end exactly once; regions are published as they become final."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace

import pytest

from pdserve.config.times import Times
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.core.errors import Cancelled, LayoutMismatch, LeaseExpired, TransferFailed
from pdserve.core.layout import KVGroup, KVLayout
from pdserve.core.protocols import PeerAddress, Pull, PullSpec, RankAddress
from pdserve.core.shards import KVPart, KVShard, plan_parts, sole_shard
from pdserve.core.ticket import HandoffDone, HandoffNews, Lent, RegionReady, TicketGone, region_seed
from pdserve.engine.handoff_source import HandoffSource
from pdserve.engine.regions import (
    FIRST_REGION_BYTES,
    LAST_REGION_BYTES,
    MAX_REGION_BLOCKS,
    REGION_BYTES,
    next_region,
)
from tests.clocks import ManualClock, settle

TIMES = Times(lease=10.0)
LAYOUT = KVLayout(
    group=KVGroup(num_layers=2, num_kv_heads=1, head_dim=4, dtype="float32"), block_size=4, num_blocks=256
)


class RecordingTransfer:
    """Digests name what they were asked for; nothing else of a TransferService is used here."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.address = PeerAddress(
            engine_id="p0",
            epoch=7,
            layout_hash=layout.wire_hash,
            ranks=(RankAddress(shard=sole_shard(layout), backends=()),),
        )
        self.failing = False
        self.go = asyncio.Event()
        self.go.set()
        self.digested: list[KVPart | None] = []

    async def digest(self, blocks: tuple[int, ...], num_tokens: int, seed: int, part: KVPart | None = None) -> bytes:
        if self.failing:
            raise TransferFailed("the worker is gone")
        await self.go.wait()
        self.digested.append(part)
        return f"{blocks}:{num_tokens}:{seed}".encode()

    def connect(self, peer: PeerAddress) -> Awaitable[str]:
        raise AssertionError("a source connects to nobody")

    def disconnect(self, engine_id: str) -> Awaitable[None]:
        raise AssertionError("a source connects to nobody")

    def pull(self, spec: PullSpec) -> Pull:
        raise AssertionError("a source pulls nothing")


class Bench:
    """A source with one ticket of num_tokens tokens in blocks 100, 101, …"""

    def __init__(self, num_tokens: int, layout: KVLayout = LAYOUT, growth: int = 0) -> None:
        self.clock = ManualClock()
        self.transfer = RecordingTransfer(layout)
        self.ended: list[tuple[str, int | None]] = []
        self.caught_up: list[int] = []
        self.news: list[HandoffNews] = []
        self.source = HandoffSource(
            endpoint=Endpoint(
                engine_id="p0", role=Role.PREFILL, epoch=7, address="127.0.0.1:1", pid=1, state=EngineState.READY
            ),
            transfer=self.transfer,
            times=TIMES,
            clock=self.clock,
            on_end=lambda ticket_id, sequence_id: self.ended.append((ticket_id, sequence_id)),
            on_caught_up=self.caught_up.append,
        )
        num_blocks = -(-num_tokens // LAYOUT.block_size)
        self.blocks = tuple(range(100, 100 + num_blocks))
        self.ticket = self.source.issue("t", 5, "r", num_tokens, self.blocks, growth)

    def regions(self) -> list[tuple[int, tuple[int, ...]]]:
        return [(n.first_block, n.source_blocks) for n in self.news if isinstance(n, RegionReady)]


async def test_blocks_are_published_as_soon_as_they_are_full_and_the_last_one_when_all_is_computed() -> None:
    bench = Bench(num_tokens=10)
    bench.source.attach("t", 0, bench.news.append)
    bench.source.computed(5, 7)
    await settle()
    assert bench.regions() == [(0, (100,))]
    bench.source.computed(5, 10)
    await settle()
    assert bench.regions() == [(0, (100,)), (1, (101, 102))]


async def test_blocks_are_not_freed_before_their_digests_which_write_behind_the_last_token_have_ended() -> None:
    bench = Bench(num_tokens=10)
    bench.source.attach("t", 0, bench.news.append)
    bench.transfer.go.clear()
    bench.source.computed(5, 7)
    bench.source.computed(5, 10)
    assert not bench.source.release("t")
    await settle()
    assert (bench.source.num_open, bench.ended) == (0, [])
    bench.transfer.go.set()
    await settle()
    assert bench.ended == [("t", 5)]
    assert bench.regions() == []
    assert bench.source.release("t")
    await settle()
    assert bench.ended == [("t", 5)]


async def test_a_target_that_wants_everything_at_once_hears_of_it_when_the_prompt_is_complete() -> None:
    bench = Bench(num_tokens=10)
    bench.source.attach("t", 1, bench.news.append, bulk=True)
    bench.source.computed(5, 9)
    await settle()
    assert bench.regions() == []
    bench.source.computed(5, 10)
    await settle()
    assert bench.regions() == [(1, (101, 102))]


async def test_a_digest_covers_exactly_the_tokens_of_its_region_and_is_bound_to_ticket_epoch_and_place() -> None:
    bench = Bench(num_tokens=10)
    bench.source.attach("t", 1, bench.news.append)
    bench.source.computed(5, 10)
    await settle()
    assert bench.news == [
        RegionReady(
            ticket_id="t",
            first_block=1,
            source_blocks=(101, 102),
            digest=f"(101, 102):6:{region_seed('t', 7, 1)}".encode(),
        )
    ]


async def test_each_part_asked_for_is_offered_and_equal_bytes_are_digested_once() -> None:
    """Two heads; the target has four ranks, of which two and two hold the same head."""
    layout = replace(LAYOUT, group=replace(LAYOUT.group, num_kv_heads=2))
    bench = Bench(num_tokens=4, layout=layout)
    halves = [KVShard(rank=rank, layers=(0, 2), heads=(rank // 2, rank // 2 + 1)) for rank in range(4)]
    parts = plan_parts([sole_shard(layout)], halves)
    bench.source.attach("t", 0, bench.news.append, parts)
    bench.source.computed(5, 4)
    await settle()
    regions = {n.part: n.digest for n in bench.news if isinstance(n, RegionReady)}
    assert set(regions) == set(parts)
    assert bench.transfer.digested == [parts[0], parts[2]]
    assert regions[parts[0]] == regions[parts[1]] == f"(100,):4:{region_seed('t', 7, 0, parts[0])}".encode()
    assert regions[parts[2]] == regions[parts[3]] != regions[parts[0]]


@pytest.mark.parametrize(("rank", "heads"), [(1, (0, 1)), (0, (0, 2)), (0, (1, 1))])
async def test_parts_that_no_rank_holds_are_refused(rank: int, heads: tuple[int, int]) -> None:
    bench = Bench(num_tokens=4)
    part = KVPart(source_rank=rank, target_rank=0, heads=heads)
    bench.source.attach("t", 0, bench.news.append, (part,))
    bench.source.computed(5, 4)
    await settle()
    assert [n.code for n in bench.news if isinstance(n, TicketGone)] == [LayoutMismatch.code]
    assert len(bench.news) == 1
    assert bench.source.release("t") is False


async def test_a_target_that_attaches_late_gets_everything_in_bounded_regions_and_the_first_token() -> None:
    bench = Bench(num_tokens=4 * (MAX_REGION_BLOCKS + 3))
    bench.source.computed(5, bench.ticket.num_tokens)
    bench.source.prefilled(5, 42, finished=False)
    bench.source.attach("t", 0, bench.news.append)
    await settle()
    assert HandoffDone(ticket_id="t", tokens=(42,), finished=False) in bench.news
    assert [len(blocks) for _, blocks in bench.regions()] == [MAX_REGION_BLOCKS, 3]


@pytest.mark.parametrize("block_bytes", [384, 1 << 18, 1 << 20, 3 << 20, 1 << 25])
@pytest.mark.parametrize("num_blocks", [1, 7, 40, 1000, 5000])
def test_regions_grow_from_small_ones_and_shrink_towards_the_end(block_bytes: int, num_blocks: int) -> None:
    def blocks_of(size: int) -> int:
        return max(1, min(MAX_REGION_BLOCKS, size // block_bytes))

    sizes, left = list[int](), num_blocks
    while left:
        sizes.append(next_region(block_bytes, sum(sizes), left))
        left -= sizes[-1]
    first, last = blocks_of(FIRST_REGION_BYTES), blocks_of(LAST_REGION_BYTES)
    assert sizes[0] == min(first, num_blocks)
    assert sizes[-1] <= last
    assert max(sizes) <= blocks_of(REGION_BYTES)
    peak = sizes.index(max(sizes))
    assert sizes[: peak + 1] == sorted(sizes[: peak + 1])
    assert all(size <= max(first, sum(sizes[:turn])) for turn, size in enumerate(sizes))


async def test_release_ends_the_lease_once_and_a_second_one_is_told_it_had_ended() -> None:
    bench = Bench(num_tokens=10)
    assert bench.source.release("t") is False
    assert bench.source.release("t") is True
    assert bench.ended == [("t", 5)]


async def test_a_lease_ends_without_renewal_and_says_so() -> None:
    bench = Bench(num_tokens=10)
    bench.source.attach("t", 0, bench.news.append)
    await bench.clock.advance(9.0)
    bench.source.renew(("t",))
    await bench.clock.advance(9.0)
    bench.source.expire()
    assert bench.ended == []
    await bench.clock.advance(1.0)
    bench.source.expire()
    assert bench.ended == [("t", 5)]
    assert [n.code for n in bench.news if isinstance(n, TicketGone)] == [LeaseExpired.code]
    assert bench.source.release("t") is True


async def test_attaching_to_an_expired_or_unknown_ticket_is_answered_at_once() -> None:
    bench = Bench(num_tokens=10)
    await bench.clock.advance(11.0)
    bench.source.expire()
    for ticket_id in ("t", "never issued"):
        bench.source.attach(ticket_id, 0, bench.news.append)
    assert [(n.ticket_id, n.code) for n in bench.news if isinstance(n, TicketGone)] == [
        ("t", LeaseExpired.code),
        ("never issued", LeaseExpired.code),
    ]


async def test_cancel_before_anyone_attached_frees_at_once() -> None:
    bench = Bench(num_tokens=10)
    bench.source.withdraw(5, "the test says so")
    assert bench.ended == [("t", 5)]
    bench.source.attach("t", 0, bench.news.append)
    assert [n.code for n in bench.news if isinstance(n, TicketGone)] == [Cancelled.code]


async def test_cancel_while_a_target_may_be_reading_waits_for_its_release() -> None:
    bench = Bench(num_tokens=10)
    bench.source.attach("t", 0, bench.news.append)
    bench.source.withdraw(5, "the test says so")
    assert [n.code for n in bench.news if isinstance(n, TicketGone)] == [Cancelled.code]
    assert bench.ended == []
    bench.source.release("t")
    assert bench.ended == [("t", 5)]


async def test_a_broken_link_does_not_free_what_its_target_may_still_read() -> None:
    bench = Bench(num_tokens=10)
    deliver = bench.news.append
    bench.source.attach("t", 0, deliver)
    bench.source.detach(deliver)
    bench.source.withdraw(5, "the test says so")
    assert bench.ended == []
    bench.source.computed(5, 10)
    await settle()
    assert bench.news == []
    await bench.clock.advance(10.0)
    bench.source.expire()
    assert bench.ended == [("t", 5)]


async def test_a_digest_that_cannot_be_made_ends_the_handoff_instead_of_stalling_it() -> None:
    bench = Bench(num_tokens=10)
    bench.transfer.failing = True
    bench.source.attach("t", 0, bench.news.append)
    bench.source.computed(5, 10)
    await settle()
    assert [n.code for n in bench.news if isinstance(n, TicketGone)] == [TransferFailed.code]


@pytest.mark.parametrize("finished", [False, True])
async def test_after_the_first_token_the_end_of_the_sequence_keeps_the_offer(finished: bool) -> None:
    bench = Bench(num_tokens=10)
    bench.source.prefilled(5, 42, finished=finished)
    bench.source.withdraw(5, "the test says so")
    assert bench.ended == []
    assert bench.source.num_open == 1


async def test_only_tickets_that_still_have_a_lease_are_renewed() -> None:
    bench = Bench(8)
    assert bench.source.renew(("t", "another")) == ("t",)
    await bench.clock.advance(TIMES.lease)
    bench.source.expire()
    assert bench.source.renew(("t", "another")) == ()


def lend(bench: Bench, ticket_id: str, num_blocks: int, part: KVPart | None = None) -> list[str]:
    """Ask for blocks of which num_blocks are there; returns the tickets they were leased under."""
    leased: list[str] = []

    def lease(name: str) -> tuple[int, ...]:
        leased.append(name)
        return tuple(range(200, 200 + num_blocks))

    bench.source.lend(ticket_id, bench.news.append, (part,), lease)
    return leased


async def test_a_loan_says_how_much_it_is_and_offers_all_of_it() -> None:
    bench = Bench(num_tokens=10)
    assert lend(bench, "loan", 3) == ["loan"]
    await settle()
    assert bench.news[0] == Lent(ticket_id="loan", num_blocks=3)
    assert bench.regions() == [(0, (200, 201, 202))]
    assert bench.source.num_open == 2
    assert bench.source.release("loan") is False
    assert bench.source.release("loan") is True
    assert bench.ended == [("loan", None)]


async def test_a_loan_without_renewal_ends() -> None:
    bench = Bench(num_tokens=10)
    lend(bench, "loan", 1)
    await bench.clock.advance(TIMES.lease / 2)
    assert bench.source.renew(("loan",)) == ("loan",)
    await bench.clock.advance(TIMES.lease * 0.75)
    bench.source.expire()
    assert ("loan", None) not in bench.ended
    await bench.clock.advance(TIMES.lease)
    bench.source.expire()
    assert ("loan", None) in bench.ended


async def test_a_loan_is_given_once_however_often_it_is_asked_for() -> None:
    bench = Bench(num_tokens=10)
    assert lend(bench, "loan", 1) == ["loan"]
    assert lend(bench, "loan", 1) == []
    bench.source.release("loan")
    bench.news.clear()
    assert lend(bench, "loan", 1) == []
    assert [type(news) for news in bench.news] == [TicketGone]


@pytest.mark.parametrize(
    ("num_blocks", "part", "code"),
    [(0, None, "unavailable"), (2, KVPart(source_rank=1, target_rank=0, heads=(0, 1)), "layout_mismatch")],
)
async def test_a_loan_that_cannot_be_is_refused(num_blocks: int, part: KVPart | None, code: str) -> None:
    bench = Bench(num_tokens=10)
    lend(bench, "loan", num_blocks, part)
    await settle()
    assert [news.code for news in bench.news if isinstance(news, TicketGone)] == [code]
    assert (len(bench.news), bench.source.num_open) == (1, 1)


async def test_a_running_sequence_is_offered_by_full_blocks_and_its_end_when_it_has_stopped() -> None:
    bench = Bench(num_tokens=10, growth=20)
    bench.source.attach("t", 0, bench.news.append)
    bench.source.computed(5, 10)
    await settle()
    assert bench.regions() == [(0, (100, 101))]
    bench.source.computed(5, 12, (100, 101, 102, 103))
    await settle()
    assert bench.regions() == [(0, (100, 101)), (2, (102,))]
    bench.source.handed_over(5, 14, (7, 8, 9, 10, 11), (100, 101, 102, 103))
    await settle()
    assert bench.regions()[2:] == [(3, (103,))]
    assert HandoffDone(ticket_id="t", tokens=(7, 8, 9, 10, 11), finished=False) in bench.news
    (digest,) = [n.digest for n in bench.news if isinstance(n, RegionReady) and n.first_block == 3]
    assert digest == f"{(103,)}:2:{region_seed('t', 7, 3)}".encode()


async def test_only_who_runs_and_was_not_withdrawn_is_told_that_its_target_caught_up() -> None:
    prompt, running, withdrawn, done = (Bench(num_tokens=10, growth=growth) for growth in (0, 9, 9, 9))
    withdrawn.source.attach("t", 0, withdrawn.news.append)
    withdrawn.source.withdraw(5, "it outgrew it")
    done.source.handed_over(5, 10, (7,), done.blocks)
    for bench in (prompt, running, withdrawn, done):
        bench.source.caught_up("t")
        bench.source.caught_up("another")
    assert [bench.caught_up for bench in (prompt, running, withdrawn, done)] == [[], [5], [], []]


async def test_a_sequence_may_be_offered_anew_while_its_first_ticket_is_still_read() -> None:
    bench = Bench(num_tokens=10, growth=20)
    bench.source.attach("t", 0, bench.news.append)
    bench.source.withdraw(5, "it leaves with another ticket")
    again: list[HandoffNews] = []
    bench.source.issue("u", 5, "r", 12, bench.blocks, 20)
    bench.source.attach("u", 0, again.append)
    bench.source.computed(5, 12)
    await settle()
    assert bench.regions() == []
    assert [n.first_block for n in again if isinstance(n, RegionReady)] == [0]
    assert bench.ended == []
    bench.source.release("t")
    assert bench.ended == [("t", 5)]
    bench.source.computed(5, 16, (*bench.blocks, 103))
    await settle()
    assert [n.first_block for n in again if isinstance(n, RegionReady)] == [0, 3]


async def test_who_attaches_to_a_ticket_withdrawn_since_hears_so() -> None:
    bench = Bench(num_tokens=10, growth=20)
    bench.source.attach("t", 0, bench.news.append)
    bench.source.withdraw(5, "it outgrew it")
    late: list[HandoffNews] = []
    bench.source.attach("t", 0, late.append)
    assert [type(news) for news in late] == [TicketGone]
