"""Which engines there are, of all supervisors that share a Redis: leased announcements."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import structlog
from redis.asyncio import Redis

from pdserve.core.clock import Clock
from pdserve.core.endpoint import Endpoint, EngineState
from pdserve.core.errors import MalformedMessage
from pdserve.core.msgpack import unpack
from pdserve.shared.link import RedisLink, SharedStateLost, as_bytes, as_text

_log = structlog.get_logger(__name__)

NEWS = b"e"


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """The engines of one supervisor, which has been there since a Unix time."""

    owner: str
    since: float
    endpoints: tuple[Endpoint, ...]


_DECODER = msgspec.msgpack.Decoder(Announcement)


class EngineAnnouncer:
    """A supervisor's side: what was published last stands for as long as the supervisor lives, and one lease more."""

    def __init__(self, link: RedisLink, owner: str, clock: Clock, lease: float) -> None:
        """owner: names this supervisor's incarnation. lease: seconds."""
        self._link = link
        self._owner = owner
        self._since = clock.unix()
        self._lease = round(lease * 1000)
        self._endpoints: tuple[Endpoint, ...] = ()
        self._told: tuple[Endpoint, ...] | None = None
        link.beats.append(self._renew)

    def publish(self, endpoints: tuple[Endpoint, ...]) -> None:
        """Replace the endpoint set."""
        self._endpoints = endpoints
        self._link.nudge()

    async def withdraw(self) -> None:
        """The engines have ended: others need not wait for the lease to find out."""
        self._endpoints = ()
        with suppress(SharedStateLost):
            await self._link.call(self._renew)

    async def _renew(self, redis: Redis) -> None:
        endpoints = self._endpoints
        mine = Announcement(owner=self._owner, since=self._since, endpoints=endpoints)
        await redis.sadd(self._link.key("owners"), self._owner)
        await redis.set(self._link.key("engines", self._owner), msgspec.msgpack.encode(mine), px=self._lease)
        if endpoints != self._told:
            await self._link.tell(redis, NEWS, b"")
            self._told = endpoints


class EngineFollower:
    """A router's side: the announcements of all supervisors, in `announced`.

    While Redis is away the last ones stand. One that is missing stands for another lease: its supervisor may be
    about to announce again to a Redis that has forgotten everything. on_change is told whenever they differ.
    """

    def __init__(self, link: RedisLink, clock: Clock, lease: float, on_change: Callable[[], None]) -> None:
        self._link = link
        self._clock = clock
        self._lease = lease
        self._on_change = on_change
        self._missing: dict[str, float] = {}
        """Owner → since when (monotonic) Redis does not know it."""
        self.announced: dict[str, Announcement] = {}
        link.beats.append(self._look)
        link.listeners[NEWS] = lambda _: link.nudge()

    async def _look(self, redis: Redis) -> None:
        owners = sorted(as_text(owner) for owner in await redis.smembers(self._link.key("owners")))
        values = await redis.mget([self._link.key("engines", owner) for owner in owners]) if owners else []
        told = {owner: as_bytes(value) for owner, value in zip(owners, values, strict=True) if value}
        if gone := [owner for owner in owners if owner not in told]:
            await redis.srem(self._link.key("owners"), *gone)
        self.take({owner: found for owner, value in told.items() if (found := _read(owner, value))})

    def take(self, found: Mapping[str, Announcement]) -> None:
        """What Redis knows now."""
        now = self._clock.monotonic()
        self._missing = {o: self._missing.get(o, now) for o in self.announced if o not in found}
        kept = {o: self.announced[o] for o, since in self._missing.items() if now - since < self._lease}
        before, self.announced = self.announced, {**kept, **found}
        if self.announced != before:
            self._on_change()


def _read(owner: str, value: bytes) -> Announcement | None:
    try:
        return unpack(value, _DECODER)
    except MalformedMessage as error:
        _log.error("an announcement of engines cannot be read", owner=owner, error=str(error))
        return None


def merged(
    own: Iterable[Endpoint], announced: Iterable[Announcement], told: Callable[[str], None] = lambda engine_id: None
) -> tuple[Endpoint, ...]:
    """One endpoint per engine id: this deployment's own, else the supervisor's that was started last. told is called
    with ids that two living engines have."""
    endpoints = {endpoint.engine_id: endpoint for endpoint in own}
    for announcement in sorted(announced, key=lambda a: (-a.since, a.owner)):
        for endpoint in announcement.endpoints:
            other = endpoints.setdefault(endpoint.engine_id, endpoint)
            if other.epoch != endpoint.epoch and EngineState.READY is other.state is endpoint.state:
                told(endpoint.engine_id)
    return tuple(endpoints.values())
