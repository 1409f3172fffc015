"""Those who wait for something of a name to happen."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress


class Waiters:
    """Any number per name; nothing is left of those that have gone."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}

    async def wait(self, name: str, timeout: float, expected: Callable[[], Awaitable[bool]]) -> None:
        """Returns at the next wake of the name, or after so many seconds; at once when none is expected, which is asked
        when a wake can no longer be missed."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(name, set())
        waiting.add(woken)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    if await expected():
                        await woken
        finally:
            waiting.discard(woken)
            if not waiting and self._waiting.get(name) is waiting:
                del self._waiting[name]

    def wake(self, name: str) -> None:
        for woken in self._waiting.pop(name, ()):
            if not woken.done():
                woken.set_result(None)
