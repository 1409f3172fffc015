"""What a process needs to be one of several: the line to Redis, and what comes over it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import TYPE_CHECKING

import structlog

from pdserve.config.schema import Config
from pdserve.core.clock import Clock
from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import ConfigError
from pdserve.core.tasks import running
from pdserve.dispatch.other_routers import OtherRouters
from pdserve.dispatch.sessions import SessionPool

if TYPE_CHECKING:
    from pdserve.dispatch.tenant_limits import TenantCounters
    from pdserve.shared.claims import Claims
    from pdserve.shared.engines import EngineFollower
    from pdserve.shared.link import RedisLink

_log = structlog.get_logger(__name__)

Publish = Callable[[tuple[Endpoint, ...]], None]


def open_link(config: Config, clock: Clock) -> "RedisLink | None":
    """None without redis.url. Raises ConfigError for one that cannot work."""
    if config.redis.url is None:
        return None
    try:
        from pdserve.shared.link import RedisLink
    except ModuleNotFoundError as error:
        raise ConfigError(f"redis.url needs {error.name}: pip install 'pdserve[redis]', or leave it out") from error
    return RedisLink(
        config.redis.url.get_secret_value(),
        config.redis.namespace,
        clock,
        heartbeat=config.times.heartbeat,
        answer=config.times.redis_answer,
    )


def shared_claims(config: Config, link: "RedisLink") -> "Claims":
    """On keyed requests, among all routers."""
    from pdserve.shared.redis_claims import RedisClaims

    keep, most = config.idempotency.keep, config.idempotency.max_answers
    return RedisClaims(link, lease=config.times.shared_lease, keep=keep, max_answers=most)


def shared_counters(config: Config, link: "RedisLink") -> "TenantCounters":
    """Of tenants' requests, over all routers."""
    from pdserve.shared.redis_tenants import RedisTenantCounters

    return RedisTenantCounters(link, config.times.shared_lease)


def exchange_bookings(config: Config, link: "RedisLink", sessions: SessionPool, clock: Clock) -> OtherRouters:
    """Other routers hear of what this one books on engines, and this one of theirs."""
    from pdserve.shared.redis_news import NewsSender

    kind = b"b"
    sender = NewsSender(link, kind)
    lease = config.times.shared_lease
    others = OtherRouters(token_hex(8), lambda: sessions.ledgers, clock, lease, sender.send)
    sessions.on_booked.append(others.booked)
    link.listeners[kind] = others.take

    async def tell_all(_: object) -> None:
        others.tell_all()

    link.beats.append(tell_all)
    link.away.append(others.forget_silent)
    return others


@asynccontextmanager
async def announcing(config: Config, owner: str, clock: Clock) -> AsyncIterator[Publish]:
    """A function that tells other deployments' routers of this supervisor's engines; does nothing without Redis."""
    link = open_link(config, clock)
    if link is None or config.only == "router":
        yield lambda endpoints: None
        return
    from pdserve.shared.engines import EngineAnnouncer

    announcer = EngineAnnouncer(link, owner, clock, config.times.shared_lease)
    try:
        async with running(link.run()):
            yield announcer.publish
            await announcer.withdraw()
    finally:
        await link.close()


class KnownEngines:
    """Those of this router's own supervisor and those that others announce, as one set for on_change."""

    def __init__(self, on_change: Publish) -> None:
        self._on_change = on_change
        self._own: tuple[Endpoint, ...] = ()
        self._follower: EngineFollower | None = None
        self._owner = ""
        self._clashes: set[str] = set()

    def follow(self, link: "RedisLink", owner: str, clock: Clock, lease: float) -> None:
        """owner: this router's own supervisor, which tells it directly."""
        from pdserve.shared.engines import EngineFollower

        self._owner = owner
        self._follower = EngineFollower(link, clock, lease, self._tell)

    def update(self, own: tuple[Endpoint, ...]) -> None:
        self._own = own
        self._tell()

    def _tell(self) -> None:
        if self._follower is None:
            self._on_change(self._own)
            return
        from pdserve.shared.engines import merged

        announced = self._follower.announced.values()
        others = (each for each in announced if each.owner != self._owner)
        self._on_change(merged(self._own, others, self._clash))

    def _clash(self, engine_id: str) -> None:
        if engine_id not in self._clashes:
            self._clashes.add(engine_id)
            _log.error("two deployments have an engine of this name; set engine_prefix in one", engine=engine_id)
