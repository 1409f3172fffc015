"""Claims on keyed requests: executed once, kept for whoever asks again; in one process, from its fronts,
and over a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from redis.asyncio import Redis

from pdserve.core.clock import SystemClock
from pdserve.core.errors import KeyReused, Unavailable
from pdserve.shared.claims import Busy, Claims, Kept, LocalClaims, Mine
from pdserve.shared.link import RedisLink, SharedStateLost
from pdserve.shared.redis_claims import RedisClaims, _Held
from tests.fronts import fronted
from tests.redis_server import RedisServer, redis_server
from tests.scripted_generator import ScriptedGenerator
from tests.shared_links import connected

BODY, OTHER = b"a body", b"another body"
LEASE, KEEP, MOST = 1.0, 60.0, 3


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


def over(link: RedisLink, lease: float = LEASE, keep: float = KEEP) -> RedisClaims:
    return RedisClaims(link, lease=lease, keep=keep, max_answers=MOST)


@pytest.fixture(params=["one process", "fronts", "redis"])
async def claims(request: pytest.FixtureRequest, server: RedisServer) -> AsyncIterator[tuple[Claims, Claims]]:
    """As two routers, or two fronts of one, see them; in one process there is one."""
    if request.param == "one process":
        alone = LocalClaims(SystemClock(), keep=KEEP, max_answers=MOST)
        yield alone, alone
        return
    if request.param == "fronts":
        async with fronted(ScriptedGenerator(lambda request: []), 2) as whole:
            yield whole.fronts[0].claims, whole.fronts[1].claims
        return
    async with connected(server, 2) as (one, two):
        pair = over(one), over(two)
        await until_given_out(pair[0])
        yield pair


async def until_given_out(claims: Claims) -> None:
    """Past the time in which routers that lived before may claim again."""
    async with asyncio.timeout(20):
        while True:
            try:
                assert await claims.claim("first", "x", BODY) == Mine()
                return await claims.release("first", "x")
            except Unavailable:
                await asyncio.sleep(0.05)


async def test_whoever_comes_first_executes_and_others_get_its_result(claims: tuple[Claims, Claims]) -> None:
    here, there = claims
    assert await here.claim("k", "r1", BODY) == Mine()
    assert isinstance(await there.claim("k", "r2", BODY), Busy)
    waiting = asyncio.create_task(there.changed("k", 20))
    await asyncio.sleep(0)
    await here.finish("k", "r1", b"said")
    async with asyncio.timeout(10):
        await waiting
        await there.changed("k", 600)  # whoever asks after the end does not wait for another
    assert await there.claim("k", "r2", BODY) == Kept(b"said")
    assert await here.claim("k", "r3", BODY) == Kept(b"said")


async def test_another_body_is_refused_while_it_runs_and_when_it_has_ended(claims: tuple[Claims, Claims]) -> None:
    here, there = claims
    await here.claim("body", "r1", BODY)
    for _ in range(2):
        with pytest.raises(KeyReused):
            await there.claim("body", "r2", OTHER)
        await here.finish("body", "r1", b"said")


async def test_an_execution_that_came_to_nothing_leaves_the_key_to_the_next(claims: tuple[Claims, Claims]) -> None:
    here, there = claims
    await here.claim("failed", "r1", BODY)
    waiting = asyncio.create_task(there.changed("failed", 20))
    await asyncio.sleep(0)
    await here.release("failed", "r1")
    async with asyncio.timeout(10):
        await waiting
    assert await there.claim("failed", "r2", OTHER) == Mine()


async def test_what_does_not_own_a_claim_can_neither_end_nor_release_it(claims: tuple[Claims, Claims]) -> None:
    here, there = claims
    await here.claim("fenced", "r1", BODY)
    for stranger in (here, there):
        await stranger.finish("fenced", "r2", b"wrong")
        await stranger.release("fenced", "r2")
    assert isinstance(await there.claim("fenced", "r3", BODY), Busy)
    await here.finish("fenced", "r1", b"right")
    await here.release("fenced", "r1")
    assert await there.claim("fenced", "r3", BODY) == Kept(b"right")


async def test_a_wait_for_an_end_that_does_not_come_ends(claims: tuple[Claims, Claims]) -> None:
    here, there = claims
    await here.claim("runs on", "r1", BODY)
    async with asyncio.timeout(10):
        await there.changed("runs on", 0.01)
    assert isinstance(await there.claim("runs on", "r2", BODY), Busy)


async def test_one_process_keeps_the_latest_results_only() -> None:
    alone = LocalClaims(SystemClock(), keep=KEEP, max_answers=MOST)
    for number in range(MOST + 1):
        await alone.claim(f"n{number}", "r", BODY)
        await alone.finish(f"n{number}", "r", b"said")
    assert await alone.claim("n0", "r", BODY) == Mine()
    assert await alone.claim(f"n{MOST}", "r", BODY) == Kept(b"said")


async def test_a_dead_routers_claim_ends_with_its_lease_and_a_living_ones_does_not(server: RedisServer) -> None:
    async with connected(server, 2, heartbeat=0.1) as (one, two):
        here, there = over(one), over(two)
        await until_given_out(here)
        await here.claim("dying", "r1", BODY)
        await asyncio.sleep(2 * LEASE)
        assert isinstance(await there.claim("dying", "r2", BODY), Busy), "it is renewed"
        one.beats.clear()
        async with asyncio.timeout(20):
            while not isinstance(await there.claim("dying", "r2", BODY), Mine):
                await there.changed("dying", 0.05)
        await here.finish("dying", "r1", b"late")
        assert isinstance(await there.claim("dying", "r3", BODY), Busy), "the dead one's word does not count"


async def test_a_router_is_told_that_its_claim_has_passed_on(server: RedisServer) -> None:
    async with connected(server, 2, heartbeat=0.1) as (one, two):
        here, there = over(one), over(two)
        await until_given_out(here)
        await here.claim("passed", "r1", BODY)
        taken: list[tuple[str, str]] = []
        here.on_taken = lambda name, owner: taken.append((name, owner))
        beats, one.beats[:] = list(one.beats), []
        async with asyncio.timeout(20):
            while not isinstance(await there.claim("passed", "r2", BODY), Mine):
                await there.changed("passed", 0.05)
            one.beats[:] = beats
            while not taken:
                await asyncio.sleep(0.02)
        assert taken == [("passed", "r1")]


class SlowToRenew(RedisClaims):
    """Its first renewal is answered only after meanwhile has been done."""

    meanwhile: Callable[[], Awaitable[None]] | None = None

    async def _save(self, redis: Redis, name: str, held: _Held) -> bool:
        kept = await super()._save(redis, name, held)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile:
            await meanwhile()
        return kept


async def test_a_result_that_comes_while_its_claim_is_renewed_is_saved(server: RedisServer) -> None:
    async with connected(server, 2, heartbeat=0.1) as (one, two):
        here, there = SlowToRenew(one, lease=LEASE, keep=KEEP, max_answers=MOST), over(two)
        await until_given_out(there)
        assert await here.claim("late", "r1", BODY) == Mine()

        async def finish_without_redis() -> None:
            one.up = False  # as where it has just come back, or this is the last answer before it goes
            await here.finish("late", "r1", b"said")
            one.up = True

        here.meanwhile = finish_without_redis
        async with asyncio.timeout(20):
            while isinstance(answer := await there.claim("late", "r2", BODY), Busy):
                await there.changed("late", 0.1)
        assert answer == Kept(b"said")


async def test_a_renewal_that_arrives_after_the_result_leaves_it_for_as_long_as_results_are_kept(
    server: RedisServer,
) -> None:
    async with connected(server, 1) as (link,):
        claims = over(link)
        await until_given_out(claims)
        await claims.claim("k", "r1", BODY)
        await claims.finish("k", "r1", b"said")
        overtaken = _Held("r1", BODY)
        assert await link.call(lambda redis: claims._save(redis, "k", overtaken))
        left = await link.call(lambda redis: redis.pttl(link.key("claim", "k")))
        assert left > 1000 * LEASE


async def test_a_redis_that_has_forgotten_everything_is_told_again_before_it_gives_anything_out() -> None:
    with redis_server() as server:
        async with connected(server, 2, heartbeat=0.1, namespace="same") as (one, two):
            here, there = over(one), over(two)
            await until_given_out(here)
            await here.claim("runs on", "r1", BODY)
            await here.claim("ends meanwhile", "r2", BODY)
            server.kill()
            with pytest.raises(SharedStateLost):
                await there.claim("new", "r3", BODY)
            await here.finish("ends meanwhile", "r2", b"said")
            assert await here.claim("ends meanwhile", "r4", BODY) == Kept(b"said")
            server.start()
            async with connected(server, 1, namespace="same") as (late,):
                started_later = over(late)
                answers = [await first_answer(started_later, name) for name in ("runs on", "ends meanwhile")]
            assert isinstance(answers[0], Busy)
            assert answers[1] == Kept(b"said")


async def first_answer(claims: Claims, name: str) -> Mine | Busy | Kept:
    async with asyncio.timeout(20):
        while True:
            try:
                return await claims.claim(name, "late", BODY)
            except Unavailable:
                await asyncio.sleep(0.02)
