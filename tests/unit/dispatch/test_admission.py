"""The gate in virtual time: engines that can be filled and emptied, and requests that come, wait, go and give up."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from pdserve.core.admission import Rejection, TenantRules
from pdserve.core.cluster import ClusterState, EngineView, Mode, Route, RouteAsk
from pdserve.core.endpoint import Role
from pdserve.core.errors import DeadlineExceeded, Overloaded, RateLimited, Unavailable
from pdserve.core.request import Request, SamplingParams
from pdserve.dispatch.admission import AdmissionGate
from pdserve.dispatch.sessions import SessionPool
from pdserve.router.admission import AdmissionRules
from pdserve.router.router import Router
from pdserve.simulator.virtual_time import VirtualClock, run_virtual
from pdserve.telemetry.record import RequestRecord
from tests.clocks import settle
from tests.unit.router.views import cluster, view

RULES = AdmissionRules(ttft=2.0, headroom=1.0, steps_ahead=0.1)
PROMPT = tuple(range(100))


@dataclass
class World:
    """One unified engine with a backlog; SessionPool and Router as far as the gate needs them."""

    tenants: dict[str, TenantRules] = field(default_factory=dict)
    rules: AdmissionRules = RULES
    backlog: int = 0
    gone: bool = False
    sent: list[str] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)
    """Whenever a route was chosen, for whom."""
    engine: EngineView = field(default_factory=lambda: view("u0", Role.UNIFIED))
    on_load: list[Callable[[], None]] = field(default_factory=list)
    change: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        clock = VirtualClock(asyncio.get_running_loop())
        self.clock = clock
        self.gate = AdmissionGate(cast("SessionPool", self), cast("Router", self), clock, self.rules, self.tenants)
        self.records: dict[str, RequestRecord] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.told_at = 0.0

    def changed(self) -> asyncio.Event:
        return self.change

    def comes(self) -> None:
        """An engine can be had again."""
        self.gone = False
        self.change.set()
        self.change = asyncio.Event()

    def state(self) -> ClusterState:
        assert self.engine.load
        load = replace(self.engine.load, backlog_tokens=self.backlog)
        engine = replace(self.engine, load=load, load_at=self.told_at)
        return cluster(engine, now=self.clock.monotonic())

    def choose(self, request: Request, state: ClusterState) -> tuple[RouteAsk, Route]:
        self.chosen.append(request.id)
        if self.gone:
            raise Unavailable("no engine is ready")
        [engine] = state.engines
        ask = RouteAsk(request_id=request.id, prompt_tokens=len(PROMPT), max_tokens=1)
        return ask, Route(
            mode=Mode.DECODE_LOCAL,
            prefill=engine.endpoint,
            decode=engine.endpoint,
            reason="test",
            uncached_tokens=len(PROMPT),
        )

    def expect(self, request: Request, route: Route, state: ClusterState) -> None:
        self.sent.append(request.id)
        self.tell(self.backlog + len(PROMPT))

    def tell(self, backlog: int) -> None:
        self.backlog, self.told_at = backlog, self.clock.monotonic()

    def load(self, backlog: int) -> None:
        """The engine tells its load."""
        self.tell(backlog)
        for told in self.on_load:
            told()

    async def ask(self, name: str, tenant: str = "default", *, priority: int = 0, timeout: float = 60.0) -> None:
        self.records[name] = RequestRecord(request_id=name)
        request = Request(
            id=name,
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(max_tokens=1),
            tenant=tenant,
            priority=priority,
            timeout=timeout,
        )
        self.tasks[name] = asyncio.create_task(self._serve(request, self.records[name]))
        await settle()

    async def _serve(self, request: Request, record: RequestRecord) -> None:
        async with self.gate.visit(request, record) as visit:
            await visit.route()
            visit.booked()
            await asyncio.sleep(1000)

    async def close(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def in_virtual_time(test: Callable[[], Coroutine[Any, Any, World]]) -> None:
    async def main() -> None:
        world = await test()
        await world.close()
        assert world.gate.waiting() == {}, "nobody is left behind"

    run_virtual(main())


def error_of(world: World, name: str) -> BaseException | None:
    task = world.tasks[name]
    return task.exception() if task.done() else None


def test_they_wait_while_the_engine_is_busy_and_go_one_after_another_as_it_gets_on() -> None:
    async def test() -> World:
        world = World(backlog=2000)
        for name in ("a", "b", "c"):
            await world.ask(name)
        assert (world.sent, world.gate.waiting()) == ([], {"default": 3})
        world.load(0)
        await settle()
        assert world.sent == ["a"], "its load counts before the next is looked at"
        await asyncio.sleep(0.1)
        assert world.sent == ["a", "b", "c"], "when the engine should be free again, though it has told nothing"
        admission = world.records["c"].admission
        assert admission
        assert admission.waited
        assert admission.ahead == 2
        assert admission.waited == pytest.approx(admission.predicted_wait, abs=0.25)
        return world

    in_virtual_time(test)


def test_a_route_is_chosen_when_a_request_comes_and_when_it_may_go_however_often_it_is_looked_at() -> None:
    async def test() -> World:
        world = World(backlog=4000)
        for name in ("a", "b"):
            await world.ask(name)
        for _ in range(20):
            world.load(4000)
            await asyncio.sleep(0.01)
        assert world.chosen == ["a", "b"]
        world.load(0)
        await settle()
        assert (world.chosen, world.sent) == (["a", "b", "a"], ["a"])
        await asyncio.sleep(0.1)
        assert (world.chosen, world.sent) == (["a", "b", "a", "b"], ["a", "b"])
        return world

    in_virtual_time(test)


def test_a_route_is_chosen_anew_once_a_second_and_when_there_are_other_engines() -> None:
    async def test() -> World:
        world = World(backlog=15_000)
        await world.ask("a")
        await asyncio.sleep(0.5)
        world.engine = view("u1", Role.UNIFIED)
        world.load(15_000)
        assert world.chosen == ["a"] * 2, "it may go to the new engine"
        await asyncio.sleep(0.9)
        world.load(14_000)
        assert world.chosen == ["a"] * 2
        await asyncio.sleep(0.2)
        world.load(14_000)
        assert world.chosen == ["a"] * 3
        assert world.sent == []
        return world

    in_virtual_time(test)


def test_an_idle_engine_is_not_waited_for() -> None:
    async def test() -> World:
        world = World()
        await world.ask("a")
        admission = world.records["a"].admission
        assert world.sent == ["a"]
        assert admission
        assert (admission.waited, admission.rejection) == (0.0, None)
        return world

    in_virtual_time(test)


def test_who_would_be_late_is_told_at_once_and_when_to_come_back() -> None:
    async def test() -> World:
        world = World(backlog=25_000)
        began = world.clock.monotonic()
        await world.ask("late")
        error = error_of(world, "late")
        assert isinstance(error, Overloaded)
        assert 0 < error.retry_after < 2
        assert world.clock.monotonic() == began
        admission = world.records["late"].admission
        assert admission
        assert admission.rejection is Rejection.TTFT
        await asyncio.sleep(error.retry_after + 0.1)
        await world.ask("back")
        assert error_of(world, "back") is None
        return world

    in_virtual_time(test)


def test_the_cancelled_and_the_expired_leave_at_once() -> None:
    async def test() -> World:
        world = World(backlog=10_000)
        await world.ask("expires", timeout=1.5)
        await world.ask("cancelled")
        await world.ask("stays")
        world.tasks["cancelled"].cancel()
        await settle()
        assert world.gate.waiting() == {"default": 2}
        world.tell(100_000)
        await asyncio.sleep(1.6)
        assert isinstance(error_of(world, "expires"), DeadlineExceeded)
        assert world.gate.waiting() == {"default": 1}
        world.load(0)
        await settle()
        assert world.sent == ["stays"]
        return world

    in_virtual_time(test)


def test_who_predicts_too_little_lets_fewer_in() -> None:
    async def test() -> World:
        world = World(backlog=12_000)
        await world.ask("fits")
        assert error_of(world, "fits") is None
        admission = world.records["fits"].admission
        assert admission
        admission.waited = 1.0
        for _ in range(20):
            world.gate.first_token(admission, 2 * admission.predicted_ttft)
        await world.ask("too late")
        assert isinstance(error_of(world, "too late"), Overloaded)
        for _ in range(60):
            world.gate.first_token(admission, admission.predicted_ttft)
        await world.ask("fits again")
        assert error_of(world, "fits again") is None
        return world

    in_virtual_time(test)


def test_all_that_wait_may_leave_in_the_same_moment() -> None:
    async def test() -> World:
        world = World(backlog=2000)
        for name in ("a", "b", "c", "stays"):
            await world.ask(name)
        world.tell(0)
        for name in ("a", "b", "c"):
            world.tasks[name].cancel()
        await settle()
        assert all(world.tasks[name].cancelled() for name in ("a", "b", "c"))
        assert world.sent == ["stays"]
        return world

    in_virtual_time(test)


def test_whoever_gives_up_when_called_holds_up_nobody() -> None:
    async def test() -> World:
        world = World(backlog=2000)
        await world.ask("first")
        await world.ask("second")
        world.load(0)
        world.tasks["first"].cancel()
        await settle()
        assert world.sent == ["second"]
        return world

    in_virtual_time(test)


def test_the_more_urgent_go_first_then_tenants_in_turn() -> None:
    async def test() -> World:
        world = World(backlog=4000, tenants={"a": TenantRules(), "b": TenantRules()}, rules=replace(RULES, ttft=30))
        for number in range(3):
            await world.ask(f"a{number}", "a")
        await world.ask("b0", "b")
        await world.ask("b1", "b", priority=5)
        await world.ask("a3", "a", priority=-1)
        for _ in range(6):
            world.load(0)
            await settle()
        assert world.sent[0] == "a3"
        assert world.sent[-1] == "b1"
        assert world.sent.index("b0") <= 2
        return world

    in_virtual_time(test)


def test_each_tenant_fills_its_own_queue_only() -> None:
    async def test() -> World:
        world = World(backlog=4000, rules=replace(RULES, max_waiting=2), tenants={"a": TenantRules()})
        for number in range(3):
            await world.ask(f"a{number}", "a")
        await world.ask("other")
        assert isinstance(error_of(world, "a2"), Overloaded)
        admission = world.records["a2"].admission
        assert admission
        assert admission.rejection is Rejection.QUEUE
        assert error_of(world, "other") is None
        return world

    in_virtual_time(test)


def test_without_engines_who_comes_and_who_waits_hears_it_at_once() -> None:
    async def test() -> World:
        world = World(backlog=2000)
        await world.ask("waits")
        world.gone = True
        await world.ask("comes")
        world.load(0)
        await settle()
        assert isinstance(error_of(world, "comes"), Unavailable)
        assert isinstance(error_of(world, "waits"), Unavailable)
        return world

    in_virtual_time(test)


def test_a_tenants_limits_hold_and_say_when_to_come_back() -> None:
    async def test() -> World:
        rules = TenantRules(requests_per_second=2.0, burst=2, concurrent_requests=3)
        world = World(tenants={"a": rules}, rules=replace(RULES, enabled=False))
        for name in ("1", "2", "3"):
            await world.ask(name, "a")
        error = error_of(world, "3")
        assert isinstance(error, RateLimited)
        assert error.retry_after == pytest.approx(0.5)
        await world.ask("other")
        await asyncio.sleep(0.5)
        await world.ask("4", "a")
        await asyncio.sleep(5)
        await world.ask("5", "a")
        assert world.sent == ["1", "2", "other", "4"]
        admission = world.records["5"].admission
        assert admission
        assert admission.rejection is Rejection.CONCURRENCY
        world.tasks["1"].cancel()
        await settle()
        await world.ask("6", "a")
        assert world.sent[-1] == "6"
        return world

    in_virtual_time(test)


def test_switched_off_it_lets_everything_through() -> None:
    async def test() -> World:
        world = World(backlog=1_000_000, rules=replace(RULES, enabled=False))
        await world.ask("a")
        assert world.sent == ["a"]
        return world

    in_virtual_time(test)


def test_where_an_engine_will_be_started_requests_wait_for_it() -> None:
    async def test() -> World:
        world = World(gone=True)
        world.gate.patience = 30.0
        await world.ask("a")
        await world.ask("b")
        assert (world.gate.held().knocking, world.gate.held().requests) == (2, 2)
        await asyncio.sleep(20)
        world.comes()
        await settle()
        assert "a" in world.sent
        assert world.gate.held().knocking == 0
        return world

    in_virtual_time(test)


def test_who_waited_already_when_the_engines_went_waits_for_the_next_as_well() -> None:
    async def test() -> World:
        world = World(backlog=2000)
        world.gate.patience = 30.0
        await world.ask("a")
        await world.ask("b")
        world.gone = True
        world.load(0)
        await settle()
        assert (world.gate.held().knocking, world.sent) == (2, [])
        await asyncio.sleep(20)
        world.comes()
        await settle()
        assert world.sent == ["a"]
        world.load(0)
        await settle()
        assert world.sent == ["a", "b"]
        return world

    in_virtual_time(test)


def test_patience_ends_and_who_leaves_is_not_counted() -> None:
    async def test() -> World:
        world = World(gone=True)
        world.gate.patience = 30.0
        await world.ask("waits")
        await world.ask("leaves")
        world.tasks["leaves"].cancel()
        await settle()
        assert world.gate.held().knocking == 1
        await asyncio.sleep(29)
        assert error_of(world, "waits") is None
        await asyncio.sleep(2)
        assert isinstance(error_of(world, "waits"), Unavailable)
        assert world.gate.held().knocking == 0
        return world

    in_virtual_time(test)
