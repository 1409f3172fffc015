"""Tenants' requests per second and at a time, counted in Redis over all routers."""

import asyncio
from contextlib import suppress
from functools import partial

from redis.asyncio import Redis

from pdserve.core.admission import Rejection, TenantRules
from pdserve.shared.link import RedisLink, SharedStateLost

_ENTER = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local most, rate, burst = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if most then
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
  if redis.call('ZCARD', KEYS[1]) >= most then return {'concurrency', 0} end
end
if rate then
  local found = redis.call('HMGET', KEYS[2], 'tokens', 'at')
  local tokens = burst
  if found[1] then tokens = math.min(burst, found[1] + (now - found[2]) / 1000 * rate) end
  if tokens < 1 then return {'rate', math.ceil((1 - tokens) / rate * 1000)} end
  redis.call('HSET', KEYS[2], 'tokens', tokens - 1, 'at', now)
  redis.call('PEXPIRE', KEYS[2], math.ceil(burst / rate * 1000) + 1000)
end
if most then
  redis.call('ZADD', KEYS[1], now + ARGV[5], ARGV[1])
  redis.call('PEXPIRE', KEYS[1], 2 * ARGV[5])
end
return {'', 0}
"""

_RENEW = """
local time = redis.call('TIME')
local until_ms = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[1]
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], until_ms, ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], 2 * ARGV[1])
"""


class RedisTenantCounters:
    """dispatch.tenant_limits.TenantCounters. A request of a router that has died counts for one lease more."""

    def __init__(self, link: RedisLink, lease: float) -> None:
        self._link = link
        self._lease = round(lease * 1000)
        self._inside: dict[str, set[str]] = {}
        self._left: dict[str, set[str]] = {}
        self._leaving: asyncio.Task[None] | None = None
        link.beats.append(self._renew)

    async def enter(self, tenant: str, request_id: str, rules: TenantRules) -> tuple[Rejection, float] | None:
        """None if it may, else why not and the seconds after which it may try again. Raises SharedStateLost."""
        limits = (rules.concurrent_requests, rules.requests_per_second, rules.burst)
        args = [request_id, *("" if limit is None else limit for limit in limits), self._lease]
        keys = [self._key(tenant), self._link.key("rate", tenant)]
        verdict, wait = await self._link.call(lambda redis: redis.register_script(_ENTER)(keys=keys, args=args))
        if verdict == b"concurrency":
            return Rejection.CONCURRENCY, 0.0
        if verdict == b"rate":
            return Rejection.RATE, wait / 1000
        if rules.concurrent_requests is not None:
            self._inside.setdefault(tenant, set()).add(request_id)
        return None

    def leave(self, tenant: str, request_id: str) -> None:
        """It has ended; Redis hears of it soon."""
        if request_id in self._inside.get(tenant, ()):
            self._inside[tenant].discard(request_id)
            self._left.setdefault(tenant, set()).add(request_id)
            if self._leaving is None or self._leaving.done():
                self._leaving = asyncio.get_running_loop().create_task(self._leave())

    async def _leave(self) -> None:
        while self._left:
            tenant, requests = self._left.popitem()
            with suppress(SharedStateLost):  # then they end with their lease
                await self._link.call(partial(self._remove, self._key(tenant), tuple(requests)))

    async def _renew(self, redis: Redis) -> None:
        for tenant, requests in list(self._inside.items()):
            if requests:
                await redis.register_script(_RENEW)(keys=[self._key(tenant)], args=[self._lease, *requests])

    @staticmethod
    async def _remove(key: str, requests: tuple[str, ...], redis: Redis) -> None:
        await redis.zrem(key, *requests)

    def _key(self, tenant: str) -> str:
        return self._link.key("inside", tenant)
