"""The supervisor as the scaler's cloud, with real child processes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pdserve.cluster.cloud import SupervisedCloud
from pdserve.cluster.member import Phase
from pdserve.core.endpoint import Role
from pdserve.core.errors import Unavailable, Unsupported
from pdserve.scaler.decision import Replicas
from tests.unit.cluster.test_supervisor import Running, process, supervised


@asynccontextmanager
async def owned(*, flippable: str = "") -> AsyncIterator[tuple[Running, SupervisedCloud]]:
    """A prefill engine and a gateway; engines that join are like it."""
    async with supervised(process("prefill-0", Role.PREFILL), process("gateway")) as running:
        cloud = SupervisedCloud(running.supervisor, process, flippable=flippable)
        await running.reaches(lambda members: all(each.phase is Phase.READY for each in members.values()))
        yield running, cloud


async def test_a_pool_grows_shrinks_and_grows_again_under_the_same_names() -> None:
    async with owned() as (running, cloud), asyncio.timeout(30):
        await cloud.scale(Role.PREFILL, 3, ())
        assert cloud.pools()[Role.PREFILL] == Replicas(wanted=3, ready=1, warming=2)
        await running.reaches(lambda _: cloud.pools()[Role.PREFILL].ready == 3)
        await cloud.scale(Role.PREFILL, 1, ("prefill-0", "prefill-1"))
        await running.reaches(lambda members: members["prefill-1"].phase is Phase.STOPPED)
        await running.reaches(lambda members: members["prefill-0"].phase is Phase.STOPPED)
        assert cloud.pools()[Role.PREFILL] == Replicas(wanted=1, ready=1)
        assert running.supervisor.members["prefill-2"].phase is Phase.READY
        await cloud.scale(Role.PREFILL, 2, ())
        await running.reaches(lambda _: cloud.pools()[Role.PREFILL].ready == 2)
        assert set(running.supervisor.members) == {"prefill-0", "prefill-1", "prefill-2", "gateway"}


async def test_engines_that_start_go_before_those_that_serve() -> None:
    async with owned() as (running, cloud), asyncio.timeout(30):
        await cloud.scale(Role.PREFILL, 2, ())
        await cloud.scale(Role.PREFILL, 1, ("prefill-0",))
        await running.reaches(lambda members: members["prefill-1"].phase is Phase.STOPPED)
        assert running.supervisor.members["prefill-0"].phase is Phase.READY


async def test_an_engine_an_operator_has_drained_stays_away() -> None:
    async with owned() as (running, cloud), asyncio.timeout(30):
        running.supervisor.drain_engine("prefill-0", returns=False)
        await running.reaches(lambda members: members["prefill-0"].phase is Phase.STOPPED)
        await cloud.scale(Role.PREFILL, 1, ())
        await running.reaches(lambda _: cloud.pools()[Role.PREFILL].ready == 1)
        assert running.supervisor.members["prefill-0"].phase is Phase.STOPPED


async def test_a_pool_may_go_to_zero_and_come_back() -> None:
    async with owned() as (running, cloud), asyncio.timeout(30):
        await cloud.scale(Role.PREFILL, 0, ())
        await running.reaches(lambda members: members["prefill-0"].phase is Phase.STOPPED)
        assert running.supervisor.members["gateway"].phase is Phase.READY
        await cloud.scale(Role.PREFILL, 1, ())
        await running.reaches(lambda _: cloud.pools()[Role.PREFILL].ready == 1)


async def test_engines_that_take_other_roles_and_leave_are_those_that_come_back() -> None:
    async with owned() as (running, cloud), asyncio.timeout(60):
        for _ in range(20):
            await cloud.scale(Role.PREFILL, 2, ())
            await running.reaches(lambda _: cloud.pools()[Role.PREFILL].ready == 2)
            await cloud.flip("prefill-1", Role.DECODE)
            await cloud.scale(Role.DECODE, 0, ())
            await running.reaches(lambda members: members["prefill-1"].phase is Phase.STOPPED)
        assert set(running.supervisor.members) == {"prefill-0", "prefill-1", "gateway"}
        assert len(running.history[-1]) == 2


async def test_an_engine_of_the_role_comes_back_before_one_that_is_to_take_it() -> None:
    async with owned() as (running, cloud), asyncio.timeout(30):
        await cloud.scale(Role.DECODE, 1, ())
        await cloud.scale(Role.PREFILL, 0, ())
        await running.reaches(lambda members: members["prefill-0"].phase is Phase.STOPPED)
        await cloud.scale(Role.DECODE, 0, ())
        await running.reaches(lambda members: members["decode-0"].phase is Phase.STOPPED)
        await cloud.scale(Role.DECODE, 1, ())
        assert cloud.pools()[Role.DECODE].wanted == 1
        assert running.supervisor.members["prefill-0"].phase is Phase.STOPPED
        await cloud.scale(Role.DECODE, 2, ())
        await running.reaches(lambda _: cloud.pools()[Role.DECODE].ready == 2)
        assert set(running.supervisor.members) == {"prefill-0", "decode-0", "gateway"}


async def test_an_engine_that_can_take_no_other_role_comes_back_in_its_own_only() -> None:
    async with owned(flippable="pools differ") as (running, cloud), asyncio.timeout(30):
        await cloud.scale(Role.PREFILL, 0, ())
        await running.reaches(lambda members: members["prefill-0"].phase is Phase.STOPPED)
        await cloud.scale(Role.DECODE, 1, ())
        await running.reaches(lambda _: cloud.pools()[Role.DECODE].ready == 1)
        assert running.supervisor.members["prefill-0"].phase is Phase.STOPPED
        assert "decode-0" in running.supervisor.members


async def test_a_flip_that_cannot_be_is_refused_with_the_reason() -> None:
    async with owned(flippable="pools differ") as (_, cloud):
        with pytest.raises(Unsupported, match="pools differ"):
            await cloud.flip("prefill-0", Role.DECODE)
    async with owned() as (_, cloud):
        with pytest.raises(Unavailable, match="prefill-7 is not there"):
            await cloud.flip("prefill-7", Role.DECODE)
