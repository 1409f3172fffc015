"""What a router does with the line to Redis."""

import pytest
from redis.exceptions import ConnectionError as RedisGone

from pdserve.config.schema import Config
from pdserve.core.tasks import running
from pdserve.dispatch.other_routers import OtherRouters
from pdserve.dispatch.sessions import SessionPool
from pdserve.launch.routers import exchange_bookings
from pdserve.shared.link import RedisLink
from tests.clocks import ManualClock, settle


async def test_without_redis_other_routers_are_forgotten_after_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, config = ManualClock(), Config()
    link = RedisLink("redis://127.0.0.1:1", "pdserve", clock, heartbeat=1.0, answer=1.0)

    async def gone() -> None:
        raise RedisGone("nobody there")

    monkeypatch.setattr(link, "_keep", gone)
    others = exchange_bookings(config, link, SessionPool(config.times, clock), clock)
    OtherRouters("b", dict, clock, config.times.shared_lease, others.take).tell_all()
    assert others.num_known == 1
    async with running(link.run()):
        await settle()
        await clock.advance(config.times.shared_lease)
        assert others.num_known == 1
        await clock.advance(1.5)
        assert others.num_known == 0
    await link.close()
