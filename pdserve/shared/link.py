"""The line to Redis: whether it answers, what is renewed there, and news of others."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from pdserve.core.clock import Clock
from pdserve.core.errors import ConfigError, PdserveError, Unavailable
from pdserve.core.tasks import end

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

LOST = (RedisError, OSError, asyncio.TimeoutError)
"""What a call raises when the server is gone, frozen, still loading or full."""

_KIND_BYTES = 1


class SharedStateLost(Unavailable):
    """Redis does not answer."""


class RedisLink:
    """One process's line to the Redis server all routers share. Start `run`, close with `close`.

    While the server does not answer, calls fail at once instead of each waiting for it. beats are carried out when it
    has come, or come back, then every heartbeat: whatever must stand in Redis is written, or renewed, there. They may
    raise what redis-py raises. away is carried out every heartbeat or two in which it does not answer. listeners get
    news by kind, a byte; news that are sent while one is away are lost.
    """

    def __init__(self, url: str, namespace: str, clock: Clock, *, heartbeat: float, answer: float) -> None:
        """heartbeat: seconds between beats; answer: seconds the server gets for each answer. Raises ConfigError for a
        url that redis-py does not understand."""
        try:
            self._redis = Redis.from_url(
                url,
                socket_timeout=answer,
                socket_connect_timeout=answer,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except ValueError as error:
            raise ConfigError(f"redis.url: {error}") from None
        self._clock = clock
        self._heartbeat = heartbeat
        self._namespace = namespace
        self.channel = self.key("news")
        """Where news are told; the first byte says of what kind."""
        self._due = asyncio.Event()
        self._told = False
        """Whether anything was said yet of how it is."""
        self.up = False
        self.beats: list[Callable[[Redis], Awaitable[None]]] = []
        self.away: list[Callable[[], None]] = []
        self.listeners: dict[bytes, Callable[[bytes], None]] = {}

    def key(self, *parts: str) -> str:
        return ":".join((self._namespace, *parts))

    async def call(self, work: Callable[[Redis], Awaitable[_T]]) -> _T:
        """Raises SharedStateLost."""
        if not self.up:
            raise SharedStateLost("Redis does not answer; try again in a few seconds")
        try:
            return await work(self._redis)
        except LOST as error:
            self._note(up=False, cause=f"{type(error).__name__}: {error}")
            raise SharedStateLost("Redis does not answer; try again in a few seconds") from error

    def nudge(self) -> None:
        """Something is to be written: carry out the beats soon."""
        self._due.set()

    async def tell(self, redis: Redis, kind: bytes, news: bytes) -> None:
        """Everybody else, and this process as well."""
        await redis.publish(self.channel, kind + news)

    async def run(self) -> None:
        """Keep the line; a server that is away is looked for every heartbeat. What nobody has foreseen is logged and
        counts as a line that is lost: what does not need Redis goes on."""
        while True:
            try:
                await self._keep()
            except Exception as error:
                if not isinstance(error, LOST):
                    _log.exception("the line to redis broke for a reason that is a defect of pdserve")
                self._note(up=False, cause=f"{type(error).__name__}: {error}")
            for each in self.away:
                each()
            await self._clock.sleep(self._heartbeat)

    async def _keep(self) -> None:
        """Until it breaks."""
        async with self._redis.pubsub() as news:
            await news.subscribe(self.channel)
            tasks = [asyncio.create_task(work) for work in (self._beat(), self._listen(news))]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                await end(tasks)

    async def close(self) -> None:
        with suppress(*LOST):
            await self._redis.aclose()

    async def _beat(self) -> None:
        while True:
            self._due.clear()
            await self._redis.ping()
            for beat in self.beats:
                await beat(self._redis)
            self._note(up=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat):
                    await self._due.wait()

    async def _listen(self, news: PubSub) -> None:
        while True:
            message = await news.get_message(ignore_subscribe_messages=True, timeout=self._heartbeat)
            if message is None:
                continue
            data: bytes = message["data"]
            if told := self.listeners.get(data[:_KIND_BYTES]):
                try:
                    told(data[_KIND_BYTES:])
                except PdserveError as error:
                    _log.warning("news that cannot be read", error=str(error))

    def _note(self, *, up: bool, cause: str = "") -> None:
        if self._told and up is self.up:
            return
        if up:
            _log.info("redis answers", back=self._told)
        else:
            _log.error("redis lost: routers do not see each other until it answers", cause=cause)
        self.up, self._told = up, True


def as_bytes(value: bytes | str) -> bytes:
    """Of an answer, which the client does not decode; its types do not say so."""
    return value if isinstance(value, bytes) else value.encode()


def as_text(value: bytes | str) -> str:
    return as_bytes(value).decode()
