"""When which sequence must have ended."""

from collections.abc import Callable
from heapq import heappop, heappush


class Deadlines:
    """Deadlines (monotonic) by sequence id; those of sequences that do not live any more are passed over."""

    def __init__(self, lives: Callable[[int], bool]) -> None:
        self._lives = lives
        self._heap: list[tuple[float, int]] = []

    def add(self, sequence_id: int, deadline: float) -> None:
        heappush(self._heap, (deadline, sequence_id))

    @property
    def next(self) -> float | None:
        """The earliest one."""
        while self._heap and not self._lives(self._heap[0][1]):
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop(self, now: float) -> int | None:
        """A sequence whose deadline has passed, once."""
        deadline = self.next
        return heappop(self._heap)[1] if deadline is not None and deadline <= now else None
