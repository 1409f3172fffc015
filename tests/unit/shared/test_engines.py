"""Engines announced in Redis: what routers make of announcements that come, clash, go missing and come again."""

import asyncio

import pytest

from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.shared.engines import Announcement, EngineAnnouncer, EngineFollower, merged
from pdserve.shared.link import RedisLink
from tests.clocks import ManualClock
from tests.redis_server import redis_server
from tests.shared_links import connected

LEASE = 6.0


def engine(name: str, epoch: int = 2**64 - 1, state: EngineState = EngineState.READY) -> Endpoint:
    return Endpoint(engine_id=name, role=Role.DECODE, epoch=epoch, address="127.0.0.1:9", pid=7, state=state)


def of(owner: str, *endpoints: Endpoint, since: float = 0.0) -> Announcement:
    return Announcement(owner=owner, since=since, endpoints=endpoints)


def test_engines_of_all_supervisors_are_one_set() -> None:
    assert merged([engine("a")], [of("x", engine("b")), of("y", engine("c"))]) == (
        engine("a"),
        engine("b"),
        engine("c"),
    )


def test_of_equal_names_its_own_engine_counts_then_that_of_the_latest_supervisor() -> None:
    clashes: list[str] = []
    old, new = of("old", engine("a", 1), engine("b", 1), since=1.0), of("new", engine("b", 2), since=2.0)
    assert merged([engine("a", 3)], [old, new], clashes.append) == (engine("a", 3), engine("b", 2))
    assert sorted(clashes) == ["a", "b"]


def test_a_dead_incarnation_is_no_clash() -> None:
    clashes: list[str] = []
    dead = of("old", engine("b", 1, EngineState.DEAD), since=1.0)
    assert merged([], [dead, of("new", engine("b", 2), since=2.0)], clashes.append) == (engine("b", 2),)
    assert clashes == []


async def test_an_announcement_that_is_missing_stands_for_a_lease() -> None:
    clock, changes = ManualClock(), []
    link = RedisLink("redis://127.0.0.1:1", "n", clock, heartbeat=1.0, answer=1.0)
    follower = EngineFollower(link, clock, LEASE, lambda: changes.append(set(follower.announced)))
    both = {"x": of("x", engine("a")), "y": of("y", engine("b"))}
    follower.take(both)
    follower.take(both)
    follower.take({"y": both["y"]})
    await clock.advance(LEASE - 1)
    follower.take({"y": both["y"]})
    assert set(follower.announced) == {"x", "y"}
    follower.take(both)
    await clock.advance(LEASE - 1)
    follower.take({"y": both["y"]})
    assert set(follower.announced) == {"x", "y"}, "its time began anew when it was there again"
    await clock.advance(LEASE)
    follower.take({"y": both["y"]})
    assert changes == [{"x", "y"}, {"y"}]


async def _sees(follower: EngineFollower, *names: str) -> None:
    async with asyncio.timeout(20):
        while {e.engine_id for a in follower.announced.values() for e in a.endpoints} != set(names):
            await asyncio.sleep(0.01)


@pytest.mark.timeout(60)
async def test_a_router_follows_a_supervisor_over_a_redis_that_forgets_everything() -> None:
    with redis_server() as server:
        async with connected(server, 2, heartbeat=0.1) as (supervisor, router):
            announcer = EngineAnnouncer(supervisor, "owner", SystemClock(), LEASE)
            follower = EngineFollower(router, SystemClock(), LEASE, lambda: None)
            announcer.publish((engine("a"), engine("b", 1)))
            await _sees(follower, "a", "b")
            assert follower.announced["owner"].endpoints == (engine("a"), engine("b", 1))
            server.kill()
            announcer.publish((engine("a"),))
            await asyncio.sleep(0.5)
            assert set(follower.announced) == {"owner"}, "what was known last stands"
            server.start()
            await _sees(follower, "a")
            await announcer.withdraw()
            await _sees(follower)
