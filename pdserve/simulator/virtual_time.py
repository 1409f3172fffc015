"""An asyncio event loop that does no I/O and never waits: when nothing can run, time jumps to the next timer."""

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

START_UNIX = 1_700_000_000.0
"""Unix time of every simulation's second 0, so that records are the same in every run."""


MAX_SECONDS = 2.0**23
"""About 97 days. Later, floats are coarser than asyncio's timer resolution of 1 ns, and timers would never fire."""


class Deadlock(RuntimeError):
    """Everything waits for something that no timer will bring about: a bug of the simulated code."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """time() is the simulation's, from 0. Simulated code must start no thread and open no socket: nobody listens."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_TimeJump(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds
        if self._now > MAX_SECONDS:
            raise OverflowError(f"a simulation ends after {MAX_SECONDS:.0f} s at the latest: split the workload")


class _TimeJump(selectors.BaseSelector):
    """What the loop asks for I/O and how long to wait for it: there is none, and waiting is a jump."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self._loop = loop
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock("nothing is left that could happen, but the simulation has not ended")
        if timeout > 0:
            self._loop.jump(timeout)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, 0, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualClock:
    """core.clock.Clock of a VirtualTimeLoop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.time()

    def unix(self) -> float:
        return START_UNIX + self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run in virtual time. Raises Deadlock when main can never end."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop, debug=False) as runner:
        return runner.run(main)
