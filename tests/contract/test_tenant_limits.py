"""A tenant's limits hold for all its requests: of one router, and of two that count in a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from pdserve.core.admission import Rejection, TenantRules
from pdserve.core.clock import SystemClock
from pdserve.dispatch.tenant_limits import LimitReached, TenantLimits
from pdserve.shared.redis_tenants import RedisTenantCounters
from tests.redis_server import RedisServer, redis_server
from tests.shared_links import connected

RULES = {
    "two at a time": TenantRules(concurrent_requests=2),
    "three at once": TenantRules(requests_per_second=0.001, burst=3),
    "free": TenantRules(),
}
LEASE = 1.0


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(params=["one router", "two routers"])
async def limits(request: pytest.FixtureRequest, server: RedisServer) -> AsyncIterator[tuple[TenantLimits, ...]]:
    if request.param == "one router":
        alone = TenantLimits(RULES, SystemClock())
        yield alone, alone
        return
    async with connected(server, 2) as links:
        yield tuple(TenantLimits(RULES, SystemClock(), RedisTenantCounters(link, LEASE)) for link in links)


async def refusal(limits: TenantLimits, tenant: str) -> LimitReached:
    with pytest.raises(LimitReached) as refused:
        async with limits.inside(tenant, "one more"):
            pass
    return refused.value


async def test_so_many_at_a_time_and_again_when_one_has_ended(limits: tuple[TenantLimits, ...]) -> None:
    here, there = limits
    async with here.inside("two at a time", "a"):
        async with there.inside("two at a time", "b"):
            for router in limits:
                assert (await refusal(router, "two at a time")).rejection is Rejection.CONCURRENCY
        async with asyncio.timeout(20):
            while not await _is_let_in(here, "two at a time"):
                await asyncio.sleep(0.01)


async def _is_let_in(limits: TenantLimits, tenant: str) -> bool:
    try:
        async with limits.inside(tenant, "again"):
            return True
    except LimitReached:
        return False


async def test_so_many_at_once_and_then_at_the_rate(limits: tuple[TenantLimits, ...]) -> None:
    here, there = limits
    for router in (here, there, here):
        async with router.inside("three at once", f"{router}"):
            pass
    for router in limits:
        refused = await refusal(router, "three at once")
        assert refused.rejection is Rejection.RATE
        assert 900 < refused.retry_after <= 1000


async def test_a_tenant_without_limits_has_none(limits: tuple[TenantLimits, ...]) -> None:
    async with AsyncExitStack() as stack:
        for number in range(20):
            await stack.enter_async_context(limits[number % 2].inside("free", f"{number}"))


async def test_requests_of_a_router_that_died_count_no_longer_than_a_lease(server: RedisServer) -> None:
    async with connected(server, 2, heartbeat=0.1) as (one, two):
        here = TenantLimits(RULES, SystemClock(), RedisTenantCounters(one, LEASE))
        there = TenantLimits(RULES, SystemClock(), RedisTenantCounters(two, LEASE))
        async with here.inside("two at a time", "a"), here.inside("two at a time", "b"):
            await asyncio.sleep(2 * LEASE)
            assert not await _is_let_in(there, "two at a time"), "they are renewed"
            one.beats.clear()
            async with asyncio.timeout(20):
                while not await _is_let_in(there, "two at a time"):
                    await asyncio.sleep(0.05)


async def test_without_redis_each_router_holds_its_own_clients_to_the_limits() -> None:
    with redis_server() as server:
        async with connected(server, 1) as (link,):
            alone = TenantLimits(RULES, SystemClock(), RedisTenantCounters(link, LEASE))
            server.kill()
            async with alone.inside("two at a time", "a"), alone.inside("two at a time", "b"):
                assert (await refusal(alone, "two at a time")).rejection is Rejection.CONCURRENCY
