"""Time as an argument: monotonic seconds for waiting, Unix seconds for records."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Injected wherever time decides something, so that tests and the simulator can own it."""

    def monotonic(self) -> float: ...

    def unix(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def unix(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
