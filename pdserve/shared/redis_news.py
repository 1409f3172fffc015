"""News sent over Redis without waiting for it."""

import asyncio
from contextlib import suppress
from functools import partial

from pdserve.shared.link import RedisLink, SharedStateLost


class NewsSender:
    """Sends in order, what waits in one go; what does not get through is lost."""

    def __init__(self, link: RedisLink, kind: bytes) -> None:
        self._link = link
        self._kind = kind
        self._waiting: list[bytes] = []
        self._sending: asyncio.Task[None] | None = None

    def send(self, news: bytes) -> None:
        if not self._link.up:
            return
        self._waiting.append(news)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            with suppress(SharedStateLost):
                for news in waiting:
                    await self._link.call(partial(self._link.tell, kind=self._kind, news=news))
