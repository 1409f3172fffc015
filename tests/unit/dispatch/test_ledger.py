"""A ledger's view of an engine: bookings at once, snapshots corrected for what they cannot have seen."""

import pytest

from pdserve.core.blocks import KVSnapshot
from pdserve.core.cluster import (
    OUTPUT_HORIZON,
    RECENT_SECONDS,
    Booked,
    BookedDecode,
    BookedPrompt,
    EngineView,
    Reservation,
    StepModel,
)
from pdserve.core.endpoint import (
    BlockCounts,
    Endpoint,
    EngineCapacity,
    EngineState,
    LoadSnapshot,
    Role,
    StepTally,
)
from pdserve.dispatch.ledger import EngineLedger
from pdserve.router.kv_index import KVIndex
from pdserve.router.pool_model import PoolModel
from tests.clocks import ManualClock

KEY = ("e0", 1)
DECODING = BookedDecode(expected_tokens=20, context_tokens=100)
ENDPOINT = Endpoint(engine_id="e0", role=Role.DECODE, epoch=1, address="127.0.0.1:1", pid=1, state=EngineState.READY)


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.ledger = EngineLedger(KEY, KVIndex(), self.clock, PoolModel())

    def load(self, *, running: int = 0, backlog: int = 0, steps: tuple[StepTally, ...] = ()) -> None:
        self.ledger.loaded(
            LoadSnapshot(
                engine_id="e0",
                epoch=1,
                number=1,
                running=running,
                waiting=0,
                backlog_tokens=backlog,
                blocks=BlockCounts(total=8, free=8, used=0, leased=0, quarantined=0),
                draining=False,
                steps=steps,
            )
        )

    def book(
        self, request_id: str, *, prefill: bool = True, decode: bool = True, uncached: int = 60, max_tokens: int = 20
    ) -> None:
        self.ledger.book(
            Reservation(
                request_id=request_id,
                prefill=KEY if prefill else ("other", 1),
                decode=KEY if decode else ("other", 1),
                prompt_tokens=100,
                uncached_tokens=uncached,
                max_tokens=max_tokens,
            )
        )

    @property
    def view(self) -> EngineView:
        return self.look()

    def look(self, *, usable: bool = True) -> EngineView:
        return self.ledger.view(ENDPOINT, self.clock.monotonic(), usable=usable)

    @property
    def booked(self) -> Booked:
        return self.view.booked

    @property
    def others(self) -> int:
        return self.view.others_requests


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_each_engine_gets_its_share_of_a_booking(bench: Bench) -> None:
    bench.book("prompt", decode=False)
    begun = bench.clock.monotonic()
    first = BookedPrompt(60, begun)
    assert bench.booked == Booked(prefilling=1, prompt_tokens=60, unseen=(first,))
    bench.book("tokens", prefill=False)
    assert bench.booked == Booked(
        prefilling=1,
        prompt_tokens=60,
        unseen=(first,),
        decoding=(DECODING,),
        reserved_tokens=120,
    )
    bench.book("both", uncached=5)
    assert bench.booked == Booked(
        prefilling=1,
        prompt_tokens=65,
        behind_tokens=5,
        unseen=(first, BookedPrompt(5, begun)),
        decoding=(DECODING, DECODING),
        reserved_tokens=240,
    )


def test_a_prompt_is_booked_until_its_first_token_and_the_rest_until_the_end(bench: Bench) -> None:
    bench.book("a")
    bench.ledger.tokens_arrived("a", 0)
    assert bench.booked == Booked(decoding=(DECODING,), reserved_tokens=120)
    bench.ledger.release("a")
    assert bench.booked == Booked()
    bench.ledger.release("a")
    assert bench.booked == Booked()


def test_what_a_request_may_still_write_shrinks_with_every_token(bench: Bench) -> None:
    bench.book("a")
    bench.ledger.tokens_arrived("a", 1)
    bench.ledger.tokens_arrived("a", 15)
    bench.ledger.tokens_arrived("unknown", 1)
    assert bench.booked.decoding == (BookedDecode(expected_tokens=4, context_tokens=100),)
    bench.ledger.tokens_arrived("a", 9)
    assert bench.booked.decoding == (BookedDecode(expected_tokens=0, context_tokens=100),)


def test_a_request_may_become_as_long_as_it_was_booked_for(bench: Bench) -> None:
    bench.book("a")
    bench.ledger.tokens_arrived("a", 3)
    decoding = bench.ledger.decoding("a")
    assert decoding is not None
    assert (decoding.written, decoding.longest) == (3, 120)


def test_of_a_request_that_may_write_much_no_more_is_expected_for_having_written_little(bench: Bench) -> None:
    bench.book("a", max_tokens=10_000)
    for written in (0, 300):
        bench.ledger.tokens_arrived("a", written)
        assert bench.booked.decoding == (BookedDecode(expected_tokens=OUTPUT_HORIZON, context_tokens=100),)


async def test_a_snapshot_counts_prompts_but_for_those_still_on_their_way(bench: Bench) -> None:
    bench.book("old", uncached=60)
    await bench.clock.advance(0.5)
    bench.book("young", uncached=7)
    bench.load(backlog=60)
    assert (bench.booked.prompt_tokens, [prompt.tokens for prompt in bench.booked.unseen]) == (67, [7])
    await bench.clock.advance(0.5)
    bench.load(backlog=67)
    assert (bench.booked.prompt_tokens, bench.booked.unseen) == (67, ())


def test_requests_of_other_gateways_are_what_the_snapshot_has_beyond_ours(bench: Bench) -> None:
    bench.book("a")
    bench.load(running=3)
    assert bench.others == 2
    bench.book("b")
    assert (len(bench.booked.decoding), bench.others) == (2, 2)
    bench.ledger.release("a")
    assert (len(bench.booked.decoding), bench.others) == (1, 2)


async def test_recent_work_fades(bench: Bench) -> None:
    bench.book("a")
    before = bench.view.recent_work
    await bench.clock.advance(RECENT_SECONDS)
    assert before > 0
    assert bench.view.recent_work == pytest.approx(before / 2.71828, rel=1e-3)


def test_an_engine_that_is_not_heard_from_is_suspect(bench: Bench) -> None:
    assert bench.view.endpoint.state is EngineState.READY
    assert bench.look(usable=False).endpoint.state is EngineState.SUSPECT
    assert bench.view.endpoint.state is EngineState.READY


def test_step_times_and_size_come_with_the_view(bench: Bench) -> None:
    capacity = EngineCapacity(model_revision="r", block_size=16, num_blocks=8, max_rows=4, max_tokens_per_step=64)
    bench.ledger.described(capacity)
    assert (bench.ledger.step_model, bench.view.step_model) == (None, StepModel())
    bench.load(steps=(StepTally(), StepTally(steps=100, tokens=100, context=1000, seconds=2.0)))
    assert bench.view.capacity == capacity
    assert bench.ledger.step_model is not None
    for model in (bench.view.step_model, bench.ledger.step_model):
        assert model.seconds(1, 10) == pytest.approx(0.02, rel=0.05)


def test_the_view_tells_how_much_of_its_memory_an_engine_has_filled(bench: Bench) -> None:
    bench.ledger.kv_restored(KVSnapshot(number=1, hashes=(bytes(16), bytes([1] * 16)), first=True, last=True))
    assert bench.view.kv_filled == 0, "of how much, it has not told"
    bench.ledger.described(
        EngineCapacity(model_revision="r", block_size=16, num_blocks=8, max_rows=4, max_tokens_per_step=64)
    )
    assert bench.view.kv_filled == 0.25


def test_tokens_that_leave_as_many_expected_do_not_change_the_view(bench: Bench) -> None:
    bench.book("a", max_tokens=1000)
    bench.ledger.tokens_arrived("a", 1)
    before = bench.view
    bench.ledger.tokens_arrived("a", 700)
    assert bench.view is before
    bench.ledger.tokens_arrived("a", 100)
    assert [row.expected_tokens for row in bench.view.booked.decoding] == [199]
