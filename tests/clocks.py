"""Clocks for tests: time moves only when the test says so."""

import asyncio


class ManualClock:
    """core.clock.Clock whose sleepers wake as `advance` passes their time."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def monotonic(self) -> float:
        return self._now

    def unix(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.Event()
        self._sleepers.append((self._now + seconds, woken))
        await woken.wait()

    def jump(self, seconds: float) -> None:
        """Let time pass without anybody running, as when the process was stopped."""
        self._now += seconds

    async def advance(self, seconds: float) -> None:
        """Move on, waking sleepers in order, and let everything that became runnable run."""
        until = self._now + seconds
        while due := [entry for entry in self._sleepers if entry[0] <= until]:
            first = min(due, key=lambda entry: entry[0])
            self._sleepers.remove(first)
            self._now = max(self._now, first[0])
            first[1].set()
            await settle()
        self._now = until
        await settle()


async def settle(rounds: int = 20) -> None:
    """Let tasks that can run do so, without letting time pass."""
    for _ in range(rounds):
        await asyncio.sleep(0)
