"""Engines are found by address: who is there, who is silent, who has moved or left."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from pdserve.cluster.discovery import Discovery, Sighting, addresses_of, introductions_at, visible
from pdserve.config.times import Times
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.core.errors import LayoutMismatch, MalformedMessage
from pdserve.rpc.channel import new_server
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.engine_pb2_grpc import (
    EngineServiceServicer,
    add_EngineServiceServicer_to_server,
)
from tests.clocks import ManualClock, settle

TIMES = Times()
READY, SUSPECT, DRAINING = EngineState.READY, EngineState.SUSPECT, EngineState.DRAINING


def engine(name: str, address: str, epoch: int = 1) -> Endpoint:
    return Endpoint(engine_id=name, role=Role.DECODE, epoch=epoch, address=address, pid=7, state=READY)


def states(endpoints: tuple[Endpoint, ...]) -> dict[str, EngineState]:
    return {endpoint.engine_id: endpoint.state for endpoint in endpoints}


@pytest.mark.parametrize(
    ("silence", "state"),
    [(0.0, READY), (2.9, READY), (3.0, SUSPECT), (3.9, SUSPECT), (4.0, None), (60.0, None)],
)
def test_silence_makes_an_engine_suspect_and_then_gone(silence: float, state: EngineState | None) -> None:
    seen = visible([Sighting(engine("d", "a:1"), 100.0)], 100.0 + silence, TIMES)
    assert states(seen) == ({"d": state} if state else {})


@pytest.mark.parametrize(("silence", "state"), [(0.0, DRAINING), (3.5, DRAINING), (4.0, None)])
def test_one_that_drains_is_never_suspect(silence: float, state: EngineState | None) -> None:
    draining = replace(engine("d", "a:1"), state=DRAINING)
    seen = visible([Sighting(draining, 100.0)], 100.0 + silence, TIMES)
    assert states(seen) == ({"d": state} if state else {})


def test_an_engine_that_moved_is_where_it_was_heard_last() -> None:
    before, after = Sighting(engine("d", "a:1"), 99.0), Sighting(engine("d", "b:1", epoch=2), 100.0)
    for order in ([before, after], [after, before]):
        assert visible(order, 100.5, TIMES) == (after.engine,)


class Network:
    """Names, and engines that answer at addresses."""

    def __init__(self) -> None:
        self.names: dict[str, tuple[str, ...]] = {}
        self.fails = False
        self._there: dict[str, Endpoint] = {}
        self._signs: dict[str, asyncio.Queue[Endpoint | None]] = {}

    async def resolve(self, target: str) -> tuple[str, ...]:
        if self.fails:
            raise OSError("no name server")
        return self.names.get(target, ())

    async def introductions(self, address: str) -> AsyncGenerator[Endpoint, None]:
        signs = self._signs.setdefault(address, asyncio.Queue())
        while (sign := await signs.get()) is not None:
            yield sign

    def speak(self, endpoint: Endpoint) -> None:
        self._signs.setdefault(endpoint.address, asyncio.Queue()).put_nowait(endpoint)


class Watching:
    def __init__(self) -> None:
        self.network = Network()
        self.clock = ManualClock()
        self.sets: list[tuple[Endpoint, ...]] = []
        self.discovery = Discovery(
            ("decode:1",),
            times=TIMES,
            clock=self.clock,
            on_change=self.sets.append,
            resolve=self.network.resolve,
            introductions=self.network.introductions,
        )

    async def hear(self, *endpoints: Endpoint, seconds: float = 1.0) -> None:
        """Time passes while these engines give signs of life."""
        for _ in range(round(seconds)):
            for endpoint in endpoints:
                self.network.speak(endpoint)
            await settle()
            await self.clock.advance(1.0)

    @property
    def now(self) -> dict[str, EngineState]:
        return states(self.sets[-1]) if self.sets else {}


@pytest.fixture
async def watching() -> AsyncIterator[Watching]:
    watching = Watching()
    run = asyncio.create_task(watching.discovery.run())
    await settle()
    yield watching
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)


D0, D1 = engine("d-0", "10.0.0.1:1"), engine("d-1", "10.0.0.2:1")


async def test_engines_come_and_go_with_their_name(watching: Watching) -> None:
    watching.network.names["decode:1"] = (D0.address, D1.address)
    await watching.hear(seconds=2)
    assert watching.now == {}, "an address alone is no engine"
    await watching.hear(D0, D1, seconds=2)
    assert watching.now == {"d-0": READY, "d-1": READY}
    watching.network.names["decode:1"] = (D0.address,)
    await watching.hear(D0, D1, seconds=10)
    assert watching.now == {"d-0": READY, "d-1": READY}, "one that drains is no longer named, and still there"
    await watching.hear(D0, seconds=2)
    assert watching.now == {"d-0": READY, "d-1": SUSPECT}
    await watching.hear(D0, seconds=2)
    assert watching.now == {"d-0": READY}


async def test_a_name_server_that_fails_takes_no_engine_away(watching: Watching) -> None:
    watching.network.names["decode:1"] = (D0.address,)
    await watching.hear(D0, seconds=3)
    watching.network.fails = True
    await watching.hear(D0, seconds=20)
    assert watching.now == {"d-0": READY}


async def test_another_incarnation_takes_the_place(watching: Watching) -> None:
    watching.network.names["decode:1"] = (D0.address,)
    await watching.hear(D0, seconds=3)
    await watching.hear(replace(D0, epoch=2), seconds=1)
    assert [endpoint.epoch for endpoint in watching.sets[-1]] == [2]


async def test_nobody_was_silent_while_this_process_did_not_run(watching: Watching) -> None:
    watching.network.names["decode:1"] = (D0.address, D1.address)
    await watching.hear(D0, D1, seconds=3)
    watching.clock.jump(60.0)
    await watching.hear(D0, seconds=1)
    assert watching.now == {"d-0": READY, "d-1": READY}
    await watching.hear(D0, seconds=5)
    assert watching.now == {"d-0": READY}


async def test_an_engine_that_is_back_is_ready_again(watching: Watching) -> None:
    watching.network.names["decode:1"] = (D0.address,)
    await watching.hear(D0, seconds=2)
    await watching.hear(seconds=3)
    assert watching.now == {"d-0": SUSPECT}
    await watching.hear(D0)
    assert watching.now == {"d-0": READY}


async def test_a_name_is_resolved_to_addresses_with_its_port() -> None:
    assert await addresses_of("localhost:8100") == ("127.0.0.1:8100",)
    assert await addresses_of("no-such-name.invalid:8100") == ()


async def test_a_name_without_machines_takes_addresses_away_that_nobody_answers_at(watching: Watching) -> None:
    watching.network.names["decode:1"] = (D0.address,)
    await watching.hear(D0, seconds=3)
    watching.network.names["decode:1"] = ()
    await watching.hear(seconds=6)
    assert watching.now == {}
    await watching.hear(D0, seconds=3)
    assert watching.now == {}, "whoever has the address now is asked no more"


class _Engine(EngineServiceServicer):
    """Describes itself and draws breath."""

    def __init__(self, *events: pb.SessionEvent) -> None:
        self._events = events

    async def Session(self, commands: Any, context: Any) -> AsyncGenerator[pb.SessionEvents, None]:
        for event in self._events:
            yield pb.SessionEvents(events=[event])

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        return pb.DrainResponse(drained=True)


@asynccontextmanager
async def served(*events: pb.SessionEvent) -> AsyncIterator[str]:
    server = new_server()
    add_EngineServiceServicer_to_server(_Engine(*events), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


def described(**changed: Any) -> pb.SessionEvent:
    about = {"engine_id": "d-0", "role": "decode", "epoch": 5, "pid": 7, "model_revision": "r1", **changed}
    return pb.SessionEvent(description=pb.EngineDescription(**about))


async def test_an_engine_tells_who_it_is_and_that_it_drains() -> None:
    load = pb.SessionEvent(load=pb.LoadSnapshot(draining=True))
    async with served(described(), load) as address:
        told = [engine async for engine in introductions_at(address, revision="r1")]
    assert [(engine.engine_id, engine.epoch, engine.address, engine.state) for engine in told] == [
        ("d-0", 5, address, READY),
        ("d-0", 5, address, DRAINING),
    ]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"model_revision": "r2"}, LayoutMismatch),
        ({"role": "chef"}, MalformedMessage),
        ({"epoch": 0}, MalformedMessage),
    ],
)
async def test_what_is_no_engine_of_this_model_is_refused(changed: dict[str, Any], error: type[Exception]) -> None:
    async with served(described(**changed)) as address:
        with pytest.raises(error):
            await anext(introductions_at(address, revision="r1"))


async def test_where_nobody_listens_nobody_is() -> None:
    assert [engine async for engine in introductions_at("127.0.0.1:1", revision="r1")] == []
