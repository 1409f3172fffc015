"""Claims on keyed requests in Redis, for several routers.

A claim is leased and renewed with every heartbeat of the router that executes; when a router dies its claims end with
their lease, and whoever asks next executes. A Redis that has been away may have forgotten claims of executions that
go on: no new one is given out until their routers have had a lease's time to claim them again. Redis itself remembers
since when routers have been with it without a break ("alive"), so that this holds for routers that have just
started, too.
"""

from collections.abc import Callable
from dataclasses import dataclass

from redis.asyncio import Redis

from pdserve.core.errors import KeyReused, Unavailable
from pdserve.shared.claims import REUSED, Busy, Kept, Mine, check_same
from pdserve.shared.link import RedisLink, SharedStateLost
from pdserve.shared.waiters import Waiters

NEWS = b"c"

_CLAIM = """
local found = redis.call('HMGET', KEYS[1], 'fingerprint', 'result')
if found[1] then
  if found[1] ~= ARGV[2] then return {'reused', ''} end
  if found[2] then return {'kept', found[2]} end
  return {'busy', redis.call('PTTL', KEYS[1])}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local since = redis.call('GET', KEYS[2])
if not since then
  redis.call('SET', KEYS[2], now, 'PX', math.floor(ARGV[3] / 2))
  since = now
end
local hold = since + ARGV[3] - now
if hold > 0 then return {'hold', hold} end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'fingerprint', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {'mine', ''}
"""

_ALIVE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SET', KEYS[1], now, 'NX')
return redis.call('PEXPIRE', KEYS[1], math.floor(ARGV[1] / 2))
"""

_RENEW = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner and owner ~= ARGV[1] then return 0 end
if not ARGV[4] and redis.call('HEXISTS', KEYS[1], 'result') == 1 then return 1 end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'fingerprint', ARGV[2])
if ARGV[4] then redis.call('HSET', KEYS[1], 'result', ARGV[4]) end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
if ARGV[4] then redis.call('PUBLISH', KEYS[2], ARGV[5]) end
return 1
"""

_RELEASE = """
local found = redis.call('HMGET', KEYS[1], 'owner', 'result')
if found[1] == ARGV[1] and not found[2] then
  redis.call('DEL', KEYS[1])
  redis.call('PUBLISH', KEYS[2], ARGV[2])
end
"""


@dataclass(slots=True)
class _Held:
    """What this router executes, or has executed while Redis was away (result)."""

    owner: str
    fingerprint: bytes
    result: bytes | None = None


class RedisClaims:
    """lease: seconds a claim stands without renewal; keep: for how many a result is kept."""

    def __init__(self, link: RedisLink, *, lease: float, keep: float, max_answers: int) -> None:
        """max_answers: results this router keeps for a Redis that is away."""
        self._link = link
        self._lease = round(lease * 1000)
        self._keep = round(keep * 1000)
        self._max_answers = max_answers
        self._held: dict[str, _Held] = {}
        self._waiters = Waiters()
        self.on_taken: Callable[[str, str], None] = lambda name, owner: None
        link.beats.append(self._renew)
        link.listeners[NEWS] = lambda name: self._waiters.wake(name.decode())

    async def claim(self, name: str, owner: str, fingerprint: bytes) -> Mine | Busy | Kept:
        if held := self._held.get(name):
            check_same(held.fingerprint, fingerprint)
            return Kept(held.result) if held.result is not None else Busy(self._lease / 1000)
        answer = await self._link.call(
            lambda redis: redis.register_script(_CLAIM)(
                keys=[self._key(name), self._alive], args=[owner, fingerprint, self._lease]
            )
        )
        match answer[0]:
            case b"mine":
                self._held[name] = _Held(owner, fingerprint)
                return Mine()
            case b"kept":
                return Kept(answer[1])
            case b"busy":
                return Busy(max(0, answer[1]) / 1000)
            case b"hold":
                raise Unavailable("it is not certain yet who executes requests with idempotency keys; try again")
        raise KeyReused(REUSED, "idempotency-key")

    async def finish(self, name: str, owner: str, result: bytes) -> None:
        held = self._held.get(name)
        if held is None or held.owner != owner:
            return
        held.result = result
        try:
            await self._link.call(lambda redis: self._save(redis, name, held))
        except SharedStateLost:
            self._make_room()
        else:
            self._held.pop(name, None)

    async def release(self, name: str, owner: str) -> None:
        held = self._held.get(name)
        if held is None or held.owner != owner:
            return
        del self._held[name]
        keys = [self._key(name), self._link.channel]
        try:
            await self._link.call(
                lambda redis: redis.register_script(_RELEASE)(keys=keys, args=[owner, NEWS + name.encode()])
            )
        except SharedStateLost:
            self._waiters.wake(name)

    async def changed(self, name: str, timeout: float) -> None:
        await self._waiters.wait(name, timeout, lambda: self._under_way(name))

    async def _under_way(self, name: str) -> bool:
        """Whether an execution is under way, as far as can be told."""
        if held := self._held.get(name):
            return held.result is None
        try:
            owner, result = await self._link.call(lambda redis: redis.hmget(self._key(name), ["owner", "result"]))
        except SharedStateLost:
            return True
        return owner is not None and result is None

    @property
    def _alive(self) -> str:
        return self._link.key("alive")

    def _key(self, name: str) -> str:
        return self._link.key("claim", name)

    async def _renew(self, redis: Redis) -> None:
        await redis.register_script(_ALIVE)(keys=[self._alive], args=[self._lease])
        for name, held in list(self._held.items()):
            whole = held.result is not None
            kept = await self._save(redis, name, held)
            if self._held.get(name) is not held:
                continue
            if whole or not kept:  # a result that came meanwhile is not saved
                del self._held[name]
            if not kept:
                self.on_taken(name, held.owner)

    async def _save(self, redis: Redis, name: str, held: _Held) -> bool:
        """False when the claim has passed to another execution."""
        args: list[bytes | str | int] = [held.owner, held.fingerprint, self._lease]
        if held.result is not None:
            args = [held.owner, held.fingerprint, self._keep, held.result, NEWS + name.encode()]
        return bool(await redis.register_script(_RENEW)(keys=[self._key(name), self._link.channel], args=args))

    def _make_room(self) -> None:
        """Of results that wait for Redis the oldest go."""
        waiting = [name for name, held in self._held.items() if held.result is not None]
        for name in waiting[: -self._max_answers]:
            del self._held[name]
