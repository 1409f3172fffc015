"""A simulated process: it can be frozen, thawed and killed, and messages reach it only while it runs."""

import asyncio
from collections import deque
from collections.abc import Callable

from pdserve.core.clock import Clock

Message = Callable[[], object]
"""A delivery: what the receiver does with the message."""


class Node:
    """One incarnation of an engine's process. `clock` is the engine's own: its sleepers oversleep a freeze."""

    def __init__(self, clock: Clock) -> None:
        self.clock = NodeClock(self, clock)
        self.alive = True
        self._running = asyncio.Event()
        self._running.set()
        self._held: deque[Message] = deque()
        self._mourners: list[Callable[[], None]] = []

    @property
    def frozen(self) -> bool:
        return self.alive and not self._running.is_set()

    def freeze(self) -> None:
        if self.alive:
            self._running.clear()

    def thaw(self) -> None:
        """Go on, beginning with what was held up."""
        self._running.set()
        held, self._held = self._held, deque()
        for message in held:
            message()

    def die(self) -> None:
        """Nothing of it is seen any more but its death."""
        if not self.alive:
            return
        self.alive = False
        self._held.clear()
        self._running.set()
        # Mourners may forget each other.
        mourners, self._mourners = self._mourners, []
        for mourner in mourners:
            mourner()

    def on_death(self, mourner: Callable[[], None]) -> None:
        """Call back when it dies; at once if it is dead."""
        if self.alive:
            self._mourners.append(mourner)
        else:
            mourner()

    def forget(self, mourner: Callable[[], None]) -> None:
        if mourner in self._mourners:
            self._mourners.remove(mourner)

    async def until_running(self) -> bool:
        """Wait out a freeze; False if it ended in death."""
        await self._running.wait()
        return self.alive

    def run(self, message: Message) -> None:
        """Do something in this process: now, after the thaw, or never."""
        if self.frozen:
            self._held.append(message)
        elif self.alive:
            message()


class NodeClock:
    """core.clock.Clock of a process that may be stopped."""

    def __init__(self, node: Node, clock: Clock) -> None:
        self._node = node
        self._clock = clock

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def unix(self) -> float:
        return self._clock.unix()

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        await self._node.until_running()


class Wire:
    """One direction between two processes: in order, `latency` seconds late. None is a process that never fails."""

    def __init__(self, source: Node | None, target: Node | None, latency: float) -> None:
        self._source = source
        self._target = target
        self._latency = latency
        self._under_way: deque[Message] = deque()

    def send(self, message: Message) -> None:
        """What a frozen source says leaves after the thaw; what a dead one says, never."""
        if self._source is None:
            self._depart(message)
        else:
            self._source.run(lambda: self._depart(message))

    def _depart(self, message: Message) -> None:
        # Timers for the same moment fire in any order, so each brings the oldest message.
        self._under_way.append(message)
        asyncio.get_running_loop().call_later(self._latency, self._arrive)

    def _arrive(self) -> None:
        message = self._under_way.popleft()
        if self._target is None:
            message()
        else:
            self._target.run(message)
