"""A gateway's sessions follow the engines: ready only when all are known, mended when only the line broke."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.config.times import Times
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import EngineState, Role
from pdserve.core.request import Request, SamplingParams
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.dispatcher import Dispatcher
from pdserve.dispatch.sessions import SessionPool
from pdserve.router.loading import load_policy
from pdserve.router.router import Router
from pdserve.router.rules import RoutingRules
from tests.checkpoints import make_checkpoint
from tests.flows.inproc import NodeSpec, open_cluster

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=5, ignore_eos=True)
SPECS = {"p": NodeSpec(role=Role.PREFILL), "d": NodeSpec(role=Role.DECODE)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


async def test_a_session_that_broke_while_its_engine_lives_is_opened_again(checkpoint: Path) -> None:
    async with open_cluster(checkpoint, SPECS, times=Times(heartbeat=0.1)) as cluster:
        before = await cluster.answer(range(60), GREEDY)
        engine = cluster.engines["d"]
        await cluster.sessions.client(engine.endpoint).close()
        assert {v.endpoint.engine_id: v.endpoint.state for v in cluster.dispatcher.engines()}[
            "d"
        ] is EngineState.SUSPECT
        async with asyncio.timeout(5):
            while any(view.endpoint.state is not EngineState.READY for view in cluster.dispatcher.engines()):
                await asyncio.sleep(0.01)
        assert (await cluster.answer(range(60), GREEDY)).token_ids == before.token_ids
        await cluster.until_idle()


async def test_an_engine_that_cannot_obey_a_command_does_not_stay_deaf_to_those_behind_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_cluster(checkpoint, SPECS, times=Times(heartbeat=0.1)) as cluster:
        engine = cluster.engines["d"]

        def fail(*_: object) -> None:
            raise ValueError("a defect")

        connection = cluster.sessions.client(engine.endpoint)
        with monkeypatch.context() as defect:
            defect.setattr(engine, "depart", fail)
            departing = asyncio.ensure_future(connection.depart("nobody"))
            async with asyncio.timeout(10):
                while not connection.failed:
                    await asyncio.sleep(0.01)
        departing.cancel()
        await asyncio.gather(departing, return_exceptions=True)
        answer = await cluster.answer(range(60), GREEDY, timeout=10.0)
        assert len(answer.token_ids) == GREEDY.max_tokens
        await cluster.until_idle()


async def test_a_new_gateway_is_not_ready_before_every_engine_has_been_heard_from(checkpoint: Path) -> None:
    async with open_cluster(checkpoint, SPECS) as cluster:
        endpoints = tuple(engine.endpoint for engine in cluster.engines.values())
        sessions = SessionPool(Times(), SystemClock())
        rules = RoutingRules()
        dispatcher = Dispatcher(sessions, Router(load_policy("kv_aware", rules), sessions.index, rules), SystemClock())
        assert not dispatcher.ready
        sessions.update(endpoints[:1])
        await _until_usable(dispatcher, 1)
        sessions.update(endpoints)
        assert not dispatcher.ready, "one pool alone would be ready, but the other is just being connected"
        await _until_usable(dispatcher, 2)
        assert dispatcher.ready
        sessions.update(endpoints[:1])
        assert dispatcher.ready, "once acquainted, one pool can stand in for both"
        await sessions.close()


async def test_an_engine_keeps_the_requests_of_two_routers_apart(checkpoint: Path) -> None:
    async with open_cluster(checkpoint, SPECS) as cluster:
        endpoint = cluster.engines["d"].endpoint
        other = SessionPool(Times(), SystemClock())
        other.update((endpoint,))
        request = Request(id="same", prompt_token_ids=tuple(range(40)), sampling=replace(GREEDY, max_tokens=200))
        ours = cluster.sessions.client(endpoint).submit(request)
        said = [await anext(ours)]
        other.client(endpoint).cancel("same")  # type: ignore[attr-defined]
        [refused] = [item async for item in other.client(endpoint).submit(request)]
        assert isinstance(refused, TokenDelta)
        assert refused.error
        assert refused.error[0] == "invalid_request"
        other.client(endpoint).cancel("same")  # type: ignore[attr-defined]
        said += [item async for item in ours]
        assert sum(len(delta.token_ids) for delta in said if isinstance(delta, TokenDelta)) == 200
        await other.close()
        await cluster.until_idle()


async def _until_usable(dispatcher: Dispatcher, count: int) -> None:
    async with asyncio.timeout(5):
        while sum(view.endpoint.state is EngineState.READY for view in dispatcher.engines()) < count:
            await asyncio.sleep(0.005)
