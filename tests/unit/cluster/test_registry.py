"""Gateways follow the supervisor's endpoint set."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from pdserve.cluster.registry import EngineOrder, Registry, order_engine, watch_endpoints
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.core.errors import InvalidRequest, Unavailable


def endpoint(epoch: int) -> Endpoint:
    return Endpoint(
        engine_id="p", role=Role.PREFILL, epoch=epoch, address="127.0.0.1:1", pid=5, state=EngineState.READY
    )


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    registry = Registry()
    await registry.start()
    yield registry
    await registry.stop()


async def test_a_watcher_gets_the_present_set_at_once_and_every_change(registry: Registry) -> None:
    registry.publish((endpoint(2**64 - 1),))
    async with asyncio.timeout(10), aclosing(watch_endpoints(registry.address)) as sets:
        assert await anext(sets) == (endpoint(2**64 - 1),)
        registry.publish((endpoint(2),))
        assert await anext(sets) == (endpoint(2),)
        registry.publish(())
        assert await anext(sets) == ()


async def test_a_slow_watcher_ends_at_the_latest_set(registry: Registry) -> None:
    async with asyncio.timeout(10), aclosing(watch_endpoints(registry.address)) as sets:
        assert await anext(sets) == ()
        for epoch in range(1, 50):
            registry.publish((endpoint(epoch),))
            await asyncio.sleep(0)
        async for latest in sets:
            if latest == (endpoint(49),):
                break


async def test_every_watcher_is_told(registry: Registry) -> None:
    async with (
        asyncio.timeout(10),
        aclosing(watch_endpoints(registry.address)) as one,
        aclosing(watch_endpoints(registry.address)) as two,
    ):
        assert [await anext(one), await anext(two)] == [(), ()]
        registry.publish((endpoint(1),))
        assert [await anext(one), await anext(two)] == [(endpoint(1),)] * 2


async def test_a_watcher_survives_a_registry_that_is_away_for_a_while() -> None:
    first = Registry()
    await first.start()
    port = int(first.address.rpartition(":")[2])
    async with asyncio.timeout(20), aclosing(watch_endpoints(first.address)) as sets:
        assert await anext(sets) == ()
        await first.stop()
        second = Registry(port=port)
        await second.start()
        second.publish((endpoint(1),))
        try:
            async for latest in sets:
                if latest == (endpoint(1),):
                    break
        finally:
            await second.stop()


async def test_an_order_reaches_whoever_carries_it_out_and_what_he_refuses_comes_back(registry: Registry) -> None:
    obeyed: list[tuple[str, EngineOrder]] = []
    with pytest.raises(Unavailable):
        await order_engine(registry.address, "p", EngineOrder.LEAVE)
    registry.obey = lambda engine_id, order: obeyed.append((engine_id, order))
    for order in EngineOrder:
        await order_engine(registry.address, "p", order)
    assert obeyed == [("p", order) for order in EngineOrder]

    def refuse(engine_id: str, order: EngineOrder) -> None:
        raise InvalidRequest(f"there is no engine {engine_id}")

    registry.obey = refuse
    with pytest.raises(InvalidRequest, match="no engine p"):
        await order_engine(registry.address, "p", EngineOrder.RESTART)


async def test_an_order_to_nobody_says_so() -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        await order_engine("127.0.0.1:1", "p", EngineOrder.RETURN)
