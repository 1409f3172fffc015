"""How long tokens may wait for the next ones of their request, so that a busy process handles them together."""

import time

LONGEST = 0.03
"""Seconds at full load: hardly seen by a reader, and some tokens each even of a fast engine."""
_BUSY = 0.4
"""Part of its core that the event loop uses before anything waits: below, every token goes out by itself."""
_FULL = 0.8
_SAMPLE = 0.1
"""Seconds over which the load is measured."""


class Pacer:
    """The window that all streams of an event loop share. It grows with the time that the loop's thread works, and what
    waits makes it work less, so it settles where the loop keeps up."""

    def __init__(self) -> None:
        self.window = 0.0
        self._cpu = time.thread_time()
        self._at = time.monotonic()

    def sample(self, now: float) -> float:
        """The window, measured anew when the last measurement is old. now is the monotonic clock's."""
        passed = now - self._at
        if passed >= _SAMPLE:
            cpu = time.thread_time()
            self.window = window((cpu - self._cpu) / passed)
            self._cpu, self._at = cpu, now
        return self.window


def window(load: float) -> float:
    """Seconds that a delta may wait where the loop's thread works for that part of the time."""
    return LONGEST * min(1.0, max(0.0, (load - _BUSY) / (_FULL - _BUSY)))
