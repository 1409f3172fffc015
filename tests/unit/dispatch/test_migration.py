"""A gateway moves what decodes on engines that drain: to whom, how many at a time, and what a failure changes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from pdserve.config.times import Times
from pdserve.core.admission import TenantRules
from pdserve.core.cluster import BookedDecode, FetchPlan, Route, RouteAsk, expected_output
from pdserve.core.endpoint import (
    BlockCounts,
    Endpoint,
    EngineCapacity,
    EngineState,
    LoadSnapshot,
    Role,
    StepTally,
)
from pdserve.core.errors import Cancelled, InvalidRequest, PdserveError, TransferFailed, TransferTimeout, Unavailable
from pdserve.core.request import EngineTrace, FinishReason, PrefixFetch, Request, SamplingParams
from pdserve.core.ticket import Departure, KVSource, TransferTicket
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.dispatcher import Dispatcher
from pdserve.dispatch.ledger import EngineLedger
from pdserve.dispatch.migration import MigrationRules
from pdserve.dispatch.request_stream import RequestStream
from pdserve.dispatch.sessions import SessionPool
from pdserve.router.loading import load_policy
from pdserve.router.router import Router
from pdserve.router.rules import RoutingRules
from pdserve.telemetry.record import MoveReason, RequestRecord
from tests.clocks import ManualClock, settle

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)


class Line:
    """A connection whose engine does what the test says."""

    def __init__(self, endpoint: Endpoint, ledger: EngineLedger, on_change: Callable[[], None]) -> None:
        self.endpoint = endpoint
        self.ledger = ledger
        self.on_change = on_change
        self.usable = True
        self.failed = False
        self.streams: dict[str, RequestStream] = {}
        self.submitted: list[tuple[Request, TransferTicket | None]] = []
        self.cancelled: list[str] = []
        self.answers_cancels = True
        self.forgotten: list[str] = []
        self.departing: dict[str, asyncio.Future[Departure]] = {}
        self.hold(num_blocks=1000)
        self.load: LoadSnapshot | None = None
        asyncio.get_running_loop().call_soon(self.report)

    def hold(self, num_blocks: int, numerics: str = "") -> None:
        capacity = EngineCapacity(
            model_revision="r",
            block_size=4,
            num_blocks=num_blocks,
            max_rows=8,
            max_tokens_per_step=64,
            numerics=numerics,
        )
        self.ledger.described(capacity)

    def report(self, *, draining: bool = False, steps: tuple[StepTally, ...] = ()) -> None:
        self.load = LoadSnapshot(
            engine_id=self.endpoint.engine_id,
            epoch=1,
            number=1,
            running=0,
            waiting=0,
            backlog_tokens=0,
            blocks=BlockCounts(total=1000, free=1000, used=0, leased=0, quarantined=0),
            draining=draining,
            steps=steps,
        )
        self.ledger.loaded(self.load)
        self.on_change()

    def snapshot(self) -> LoadSnapshot | None:
        return self.load

    def submit(
        self,
        request: Request,
        *,
        handoff: bool = False,
        ticket: TransferTicket | None = None,
        source: KVSource | None = None,
    ) -> RequestStream:
        self.submitted.append((request, ticket))
        stream = self.streams[request.id] = RequestStream(self, request.id)
        return stream

    async def depart(self, request_id: str) -> Departure:
        waiting: asyncio.Future[Departure] = asyncio.get_running_loop().create_future()
        self.departing[request_id] = waiting
        return await waiting

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        if self.answers_cancels:
            self.say(request_id, 0, end=FinishReason.CANCELLED)

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    async def close(self) -> None:
        pass

    def say(self, request_id: str, index: int, *token_ids: int, end: FinishReason | None = None) -> None:
        self.ledger.tokens_arrived(request_id, len(token_ids))
        delta = TokenDelta(request_id=request_id, index=index, token_ids=token_ids, finish_reason=end)
        self.streams[request_id].push(delta)

    def fail(self, request_id: str, error: PdserveError) -> None:
        delta = TokenDelta(
            request_id=request_id,
            index=0,
            token_ids=(),
            finish_reason=FinishReason.ERROR,
            error=(error.code, str(error)),
        )
        self.streams[request_id].push(delta)

    def let_go(self, request_id: str, *output: int) -> None:
        ticket = TransferTicket(
            id="t",
            request_id=request_id,
            engine_id=self.endpoint.engine_id,
            epoch=1,
            address="127.0.0.1:1",
            layout_hash=b"h",
            num_tokens=len(PROMPT) + len(output),
            block_size=4,
            lease=10.0,
            ranks=(),
            growth=50,
        )
        self.departing[request_id].set_result(Departure(ticket=ticket, output_token_ids=output))


class Bench:
    def __init__(
        self, rules: MigrationRules, *, rebalance: bool = False, tenants: Mapping[str, TenantRules] | None = None
    ) -> None:
        self.lines: dict[str, Line] = {}
        self.clock = ManualClock()
        self.pool = SessionPool(Times(), self.clock, connect=self.connect)
        routing = RoutingRules(decode_local_below=1000, rebalance=rebalance)
        router = Router(load_policy("kv_aware", routing), self.pool.index, routing)
        self.dispatcher = Dispatcher(self.pool, router, self.clock, migration=rules, tenants=tenants)
        self.answers: dict[str, list[int]] = {}
        self.records: dict[str, RequestRecord] = {}
        self.tasks: dict[str, asyncio.Task[FinishReason | None]] = {}

    def connect(self, endpoint: Endpoint, ledger: EngineLedger, on_change: Callable[[], None]) -> Line:
        line = self.lines[endpoint.engine_id] = Line(endpoint, ledger, lambda: None)
        line.on_change = on_change
        return line

    def engines(self, *names: str) -> None:
        self.pool.update(
            tuple(
                Endpoint(
                    engine_id=name, role=Role.DECODE, epoch=1, address="127.0.0.1:1", pid=1, state=EngineState.READY
                )
                for name in names
            )
        )

    async def ask(self, name: str, max_tokens: int = 20) -> None:
        self.answers[name], self.records[name] = [], RequestRecord(request_id=name)
        self.tasks[name] = asyncio.create_task(self._answer(name, max_tokens))
        await settle()

    async def _answer(self, name: str, max_tokens: int) -> FinishReason | None:
        sampling = SamplingParams(seed=0, max_tokens=max_tokens, min_tokens=6)
        request = Request(id=name, prompt_token_ids=PROMPT, sampling=sampling)
        async with aclosing(self.dispatcher.generate(request, self.records[name])) as deltas:
            async for delta in deltas:
                self.answers[name] += delta.token_ids
                if delta.finish_reason:
                    return delta.finish_reason
        return None

    def booked(self, name: str) -> int:
        return len(self.expected(name))

    def expected(self, name: str) -> list[int]:
        """Tokens each request booked to decode there may still write."""
        [view] = [view for view in self.pool.state().engines if view.endpoint.engine_id == name]
        return [row.expected_tokens for row in view.booked.decoding]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    opened = Bench(MigrationRules(deadline=5.0, at_once=2, tries=2, pause=0.5))
    opened.engines("d0")
    yield opened
    for task in opened.tasks.values():
        task.cancel()
    await asyncio.gather(*opened.tasks.values(), return_exceptions=True)
    await opened.pool.close()


async def decoding(bench: Bench, *names: str) -> tuple[Line, Line]:
    """Requests decode on d0, which begins to drain beside d1."""
    for name in names:
        await bench.ask(name)
        bench.lines["d0"].say(name, 0, 10, 11)
    bench.engines("d0", "d1")
    bench.lines["d0"].report(draining=True)
    await settle()
    return bench.lines["d0"], bench.lines["d1"]


async def test_a_request_goes_on_at_another_engine_with_what_is_left_of_it(bench: Bench) -> None:
    here, there = await decoding(bench, "r")
    here.let_go("r", 10, 11)
    await settle()
    [(request, ticket)] = there.submitted
    assert request.prompt_token_ids == (*PROMPT, 10, 11)
    assert (request.sampling.max_tokens, request.sampling.min_tokens) == (18, 4)
    assert ticket is not None
    assert (bench.booked("d0"), bench.booked("d1")) == (0, 1)
    here.say("r", 2, 12, 13)
    here.say("r", 4, end=FinishReason.HANDOFF)
    there.say(request.id, 2, 14)
    there.say(request.id, 3, 15, end=FinishReason.STOP)
    assert await bench.tasks["r"] is FinishReason.STOP
    assert bench.answers["r"] == [10, 11, 12, 13, 14, 15]
    [move] = bench.records["r"].migrations
    assert (move.source, move.target, move.outcome) == ("d0", "d1", "ok")
    assert move.pause is not None
    assert move.reason is MoveReason.DRAIN
    assert bench.records["r"].failed == []
    assert bench.booked("d1") == 0


async def test_the_new_engines_load_is_what_is_left_of_the_request(bench: Bench) -> None:
    here, there = await decoding(bench, "r")
    here.let_go("r", 10, 11)
    await settle()
    there.ledger.tokens_arrived("r>1", 3)
    [view] = [view for view in bench.pool.state().engines if view.endpoint.engine_id == "d1"]
    assert view.booked.decoding == (BookedDecode(expected_output(20 - 2 - 3), len(PROMPT) + 2),)


@pytest.mark.parametrize("leaves", [False, True], ids=["to its end", "left by its client"])
async def test_a_request_that_moved_tells_how_its_prompts_beginning_was_fetched(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    source = KVSource(engine_id="p9", epoch=1, address="127.0.0.1:1", num_blocks=1)
    plan = FetchPlan(source=source, tokens=4, seconds=0.1, saved_seconds=0.2)
    choose = Router.choose

    def choose_to_fetch(*given: Any) -> tuple[RouteAsk, Route]:
        ask, route = choose(*given)
        return ask, replace(route, fetch=plan)

    monkeypatch.setattr(Router, "choose", choose_to_fetch)
    told: list[PrefixFetch] = []
    monkeypatch.setattr(bench.pool, "prefix_fetched", lambda link, fetch: told.append(fetch))
    here, there = await decoding(bench, "r")
    here.let_go("r", 10, 11)
    await settle()
    fetch = PrefixFetch(engine_id="p9", tokens=4, num_bytes=1, seconds=0.1, backend="nixl")
    trace = EngineTrace(engine_id="d0", epoch=1, cached_tokens=4, stamps=(), fetch=fetch)
    end = TokenDelta(request_id="r", index=2, token_ids=(), finish_reason=FinishReason.HANDOFF, trace=trace)
    here.streams["r"].push(end)
    if leaves:
        bench.tasks["r"].cancel()
    else:
        there.say("r>1", 0, 12, end=FinishReason.STOP)
    await asyncio.gather(bench.tasks["r"], return_exceptions=True)
    assert bench.tasks["r"].cancelled() is leaves
    assert told == [fetch]


async def test_tokens_of_the_new_engine_wait_for_the_last_of_the_old_one(bench: Bench) -> None:
    here, there = await decoding(bench, "r")
    here.let_go("r", 10, 11)
    await settle()
    there.say(there.submitted[0][0].id, 1, 13)
    await settle()
    assert bench.answers["r"] == [10, 11]
    here.say("r", 2, 12)
    here.say("r", 3, end=FinishReason.HANDOFF)
    await settle()
    assert bench.answers["r"] == [10, 11, 12, 13]


async def test_a_move_that_fails_before_the_source_has_stopped_is_not_seen_and_made_again(bench: Bench) -> None:
    here, there = await decoding(bench, "r")
    here.let_go("r", 10, 11)
    await settle()
    there.fail(there.submitted[0][0].id, TransferFailed("the wire is cut"))
    await settle()
    here.say("r", 2, 12)
    assert (bench.booked("d0"), bench.booked("d1")) == (1, 0)
    # The link that failed is avoided for a second, so there is nowhere to go meanwhile.
    await bench.clock.advance(0.5)
    await bench.clock.advance(0.5)
    await bench.clock.advance(0.5)
    here.let_go("r", 10, 11, 12)
    await settle()
    assert [request.id for request, _ in there.submitted] == ["r>1", "r>2"]
    here.say("r", 3, end=FinishReason.HANDOFF)
    there.say("r>2", 0, 13, end=FinishReason.STOP)
    assert await bench.tasks["r"] is FinishReason.STOP
    assert bench.answers["r"] == [10, 11, 12, 13]
    assert [move.outcome for move in bench.records["r"].migrations] == ["transfer_failed", "ok"]
    assert bench.records["r"].failed == []


async def test_what_failed_to_move_counts_as_far_as_it_has_come(bench: Bench) -> None:
    here, there = await decoding(bench, "r")
    here.let_go("r", 10, 11)
    await settle()
    here.say("r", 2, 12)
    there.fail("r>1", TransferFailed("the wire is cut"))
    await settle()
    assert bench.expected("d0") == [17]
    here.say("r", 3, 13, end=FinishReason.STOP)
    assert await bench.tasks["r"] is FinishReason.STOP
    assert bench.booked("d0") == 0


async def test_a_move_that_fails_after_the_source_has_stopped_is_a_replay_and_no_death(bench: Bench) -> None:
    here, there = await decoding(bench, "r")
    here.let_go("r", 10, 11)
    await settle()
    here.say("r", 2, 12)
    here.say("r", 3, end=FinishReason.HANDOFF)
    await settle()
    there.fail("r>1", TransferFailed("the wire is cut"))
    await settle()
    replayed = there.submitted[-1][0]
    assert replayed.id == "r~1"
    assert replayed.prompt_token_ids == (*PROMPT, 10, 11, 12)
    there.say("r~1", 0, 13, end=FinishReason.STOP)
    assert await bench.tasks["r"] is FinishReason.STOP
    assert bench.answers["r"] == [10, 11, 12, 13]
    [lost] = bench.records["r"].failed
    assert (lost.code, lost.emitted_tokens) == ("transfer_failed", 3)


async def test_a_client_that_leaves_ends_its_request_on_both_engines(bench: Bench) -> None:
    here, there = await decoding(bench, "r")
    here.let_go("r", 10, 11)
    await settle()
    bench.tasks["r"].cancel()
    await settle()
    assert here.cancelled == ["r"]
    assert there.cancelled == ["r>1"]
    assert (bench.booked("d0"), bench.booked("d1")) == (0, 0)


async def test_what_is_torn_down_while_an_engine_is_silent_about_a_cancelled_request_keeps_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.dispatch.request_stream._LAST_WORD", 60.0)
    await bench.ask("r")
    here = bench.lines["d0"]
    here.answers_cancels = False
    here.say("r", 0, 10, 11)
    await settle()
    bench.tasks["r"].cancel()
    await settle()
    assert (here.cancelled, here.forgotten, bench.booked("d0")) == (["r"], [], 1)
    bench.tasks["r"].cancel()
    await settle()
    assert bench.tasks["r"].done()
    assert (here.cancelled, here.forgotten, bench.booked("d0")) == (["r"], ["r"], 0)


async def test_both_engines_tell_what_they_did_for_a_client_that_left_after_a_move(bench: Bench) -> None:
    here, there = await decoding(bench, "r")
    here.let_go("r", 10, 11)
    await settle()
    first, second = (EngineTrace(engine_id=name, epoch=1, cached_tokens=4, stamps=()) for name in ("d0", "d1"))
    there.say("r>1", 0, 12)
    await settle()
    end = TokenDelta(request_id="r", index=2, token_ids=(), finish_reason=FinishReason.HANDOFF, trace=first)
    here.streams["r"].push(end)
    end = TokenDelta(request_id="r>1", index=1, token_ids=(), finish_reason=FinishReason.CANCELLED, trace=second)
    there.streams["r>1"].push(end)
    bench.tasks["r"].cancel()
    await settle()
    record = bench.records["r"]
    assert (record.decode_trace, record.migrations[0].trace) == (first, second)
    assert (here.forgotten, there.forgotten) == (["r"], ["r>1"])


async def test_only_so_many_leave_an_engine_at_a_time(bench: Bench) -> None:
    here, there = await decoding(bench, "a", "b", "c")
    assert set(here.departing) == {"a", "b"}
    here.let_go("a", 10, 11)
    await settle()
    here.say("a", 2, end=FinishReason.HANDOFF)
    there.say("a>1", 0, 12)
    await settle()
    assert set(here.departing) == {"a", "b", "c"}


async def test_with_nowhere_to_go_it_waits_for_an_engine(bench: Bench) -> None:
    await bench.ask("r")
    here = bench.lines["d0"]
    here.say("r", 0, 10)
    here.report(draining=True)
    await settle()
    await bench.clock.advance(5)
    assert here.departing == {}
    bench.engines("d0", "d1")
    await settle()
    assert set(here.departing) == {"r"}


async def test_what_finds_no_room_lets_smaller_requests_go_first(bench: Bench) -> None:
    for name in ("large", "huge"):
        await bench.ask(name, max_tokens=90)
    await bench.ask("small")
    here = bench.lines["d0"]
    for name in ("large", "huge", "small"):
        here.say(name, 0, 10)
    bench.engines("d0", "d1")
    bench.lines["d1"].hold(num_blocks=10)
    here.report(draining=True)
    await settle()
    assert set(here.departing) == {"small"}
    bench.lines["d1"].hold(num_blocks=1000)
    await bench.clock.advance(0.5)
    assert len(here.departing) == 2


async def test_after_so_many_failures_it_stays(bench: Bench) -> None:
    here, there = await decoding(bench, "r")
    for _ in range(4):
        if (waiting := here.departing.get("r")) and not waiting.done():
            waiting.set_exception(Unavailable("not now"))
        await bench.clock.advance(0.5)
    assert there.submitted == []
    assert [move.outcome for move in bench.records["r"].migrations] == ["unavailable"] * 2
    here.say("r", 2, 12, end=FinishReason.STOP)
    assert await bench.tasks["r"] is FinishReason.STOP


async def test_an_operator_moves_a_request_by_name(bench: Bench) -> None:
    await bench.ask("r")
    here = bench.lines["d0"]
    here.say("r", 0, 10, 11)
    await settle()
    with pytest.raises(Unavailable, match="no other engine has room"):
        await bench.dispatcher.move("r")
    bench.engines("d0", "d1")
    moving = asyncio.create_task(bench.dispatcher.move("r"))
    await settle()
    with pytest.raises(Unavailable, match="is moving already"):
        await bench.dispatcher.move("r")
    here.let_go("r", 10, 11)
    await settle()
    here.say("r", 2, end=FinishReason.HANDOFF)
    bench.lines["d1"].say("r>1", 0, 12)
    await moving
    with pytest.raises(InvalidRequest, match="no request 'x' decodes now"):
        await bench.dispatcher.move("x")


async def test_a_move_takes_no_longer_than_its_deadline() -> None:
    bench = Bench(MigrationRules(deadline=0.02))
    bench.engines("d0", "d1")
    await bench.ask("r")
    here, there = (bench.lines[name] for name in ("d0", "d1"))
    if not here.submitted:
        here, there = there, here
    here.say("r", 0, 10, 11)
    await settle()
    moving = asyncio.create_task(bench.dispatcher.move("r"))
    await settle()
    here.let_go("r", 10, 11)
    with pytest.raises(TransferTimeout):
        await moving
    assert there.cancelled == ["r>1"]
    here.say("r", 2, 12, end=FinishReason.STOP)
    assert await bench.tasks["r"] is FinishReason.STOP
    await bench.pool.close()


async def test_an_operator_hears_when_the_request_he_moves_has_ended(bench: Bench) -> None:
    await bench.ask("r")
    bench.lines["d0"].say("r", 0, 10, 11)
    bench.engines("d0", "d1")
    await settle()
    moving = asyncio.create_task(bench.dispatcher.move("r"))
    await settle()
    bench.lines["d0"].say("r", 2, 12, end=FinishReason.STOP)
    with pytest.raises(Cancelled, match="r ended before it had moved"):
        await moving
    assert [move.outcome for move in bench.records["r"].migrations] == ["cancelled"]


async def test_nobody_is_asked_to_move_a_request_that_has_ended(bench: Bench) -> None:
    await bench.ask("r")
    here = bench.lines["d0"]
    here.say("r", 0, 10, 11)
    bench.engines("d0", "d1")
    await settle()
    moving = asyncio.create_task(bench.dispatcher.move("r"))
    await settle()
    asked = here.departing["r"]
    here.report(draining=True)
    bench.tasks["r"].cancel()
    with pytest.raises(Cancelled):
        await moving
    await settle()
    assert here.departing["r"] is asked


async def test_a_client_that_leaves_unread_tokens_of_several_engines_frees_all_streams(bench: Bench) -> None:
    request = Request(id="r", prompt_token_ids=PROMPT, sampling=SamplingParams(seed=0, max_tokens=20))
    deltas = bench.dispatcher.generate(request, RequestRecord(request_id="r"))
    reading = asyncio.ensure_future(anext(deltas))
    await settle()
    lines = [bench.lines["d0"]]
    lines[0].say("r", 0, 10)
    await reading
    bench.engines("d0", "d1")
    lines += [bench.lines["d1"], lines[0]]
    names = ["r", "r>1", "r>2"]
    for here, there, old, new in zip(lines, lines[1:], names, names[1:], strict=False):
        moving = asyncio.create_task(bench.dispatcher.move("r"))
        await settle()
        here.let_go(old)
        await settle()
        here.say(old, 1, end=FinishReason.HANDOFF)
        there.say(new, 0, 11)
        await moving
    await deltas.aclose()
    assert lines[0].forgotten == ["r", "r>2"]
    assert lines[1].forgotten == ["r>1"]


STEPS = tuple(
    StepTally(steps=100, tokens=100 * size, context=100 * size * len(PROMPT), seconds=size) for size in (0, 1, 2, 4)
)
"""Of engines whose steps take ten milliseconds per row."""


@pytest.fixture
async def uneven() -> AsyncIterator[Bench]:
    """Four requests decode on d0, beside d1 which is idle."""
    opened = Bench(MigrationRules(deadline=5.0, tries=2, pause=0.5, rest=3.0), rebalance=True)
    opened.engines("d0")
    for name in "abcd":
        await opened.ask(name)
        opened.lines["d0"].say(name, 0, 10)
    opened.engines("d0", "d1")
    await settle()
    yield opened
    for task in opened.tasks.values():
        task.cancel()
    await asyncio.gather(*opened.tasks.values(), return_exceptions=True)
    await opened.pool.close()


async def told(bench: Bench, seconds: float = 1.0) -> None:
    """Some time passes, then every engine tells its load."""
    await bench.clock.advance(seconds)
    for line in bench.lines.values():
        line.report(steps=STEPS)
    await settle()


async def leave(bench: Bench, name: str, source: str = "d0", target: str = "d1") -> None:
    """The source lets it go, and the target goes on with it."""
    here, there = bench.lines[source], bench.lines[target]
    here.let_go(name, 10)
    await settle()
    here.say(name, 1, end=FinishReason.HANDOFF)
    there.say(there.submitted[-1][0].id, 0, 11)
    await settle()


async def test_load_evens_out_one_request_at_a_time(uneven: Bench) -> None:
    here = uneven.lines["d0"]
    await told(uneven)
    assert set(here.departing) == {"a"}
    await told(uneven)
    assert set(here.departing) == {"a"}
    await leave(uneven, "a")
    await told(uneven, 0.1)
    assert set(here.departing) == {"a"}
    await told(uneven)
    [moving] = here.departing.keys() - {"a"}
    await leave(uneven, moving)
    assert (uneven.booked("d0"), uneven.booked("d1")) == (2, 2)
    for _ in range(5):
        await told(uneven)
    assert len(here.departing) == 2
    assert not uneven.lines["d1"].departing
    [move] = uneven.records["a"].migrations
    assert (move.reason, move.outcome) == (MoveReason.REBALANCE, "ok")
    assert "d0 under pressure" in move.why


async def test_what_failed_to_move_rests_and_is_not_tried_for_ever(uneven: Bench) -> None:
    here = uneven.lines["d0"]
    for _ in range(30):
        await told(uneven)
        for waiting in here.departing.values():
            if not waiting.done():
                waiting.set_exception(Unavailable("not now"))
        await settle()
    for name in "abcd":
        moves = uneven.records[name].migrations
        assert [move.outcome for move in moves] == ["unavailable"] * 2
        assert moves[1].asked - moves[0].asked >= 3.0


async def test_a_request_that_ends_while_it_moves_lets_others_move(uneven: Bench) -> None:
    here = uneven.lines["d0"]
    await told(uneven)
    here.say("a", 1, 12, end=FinishReason.STOP)
    assert await uneven.tasks["a"] is FinishReason.STOP
    # A look that finds an engine not heard from since changes nothing.
    await told(uneven)
    await told(uneven)
    assert len(here.departing) == 2


async def test_what_has_moved_counts_as_far_as_it_has_come(uneven: Bench) -> None:
    """Three tokens of 20 have come, one from the first engine before it let go, then one from each."""
    await told(uneven)
    assert uneven.expected("d0") == [19] * 4
    await leave(uneven, "a")
    assert uneven.expected("d1") == [18]
    uneven.lines["d1"].say("a>1", 1, 12)
    assert uneven.expected("d1") == [17]


async def test_nothing_moves_for_load_unless_it_is_wanted(bench: Bench) -> None:
    for name in "abcd":
        await bench.ask(name)
        bench.lines["d0"].say(name, 0, 10)
    bench.engines("d0", "d1")
    for _ in range(3):
        await told(bench)
    assert not bench.lines["d0"].departing
