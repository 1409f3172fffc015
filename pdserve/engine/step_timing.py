"""How long steps take, by size: what the router's step-time model is calibrated with."""

from collections import deque

from pdserve.core.batch import Batch
from pdserve.core.clock import Clock
from pdserve.core.endpoint import StepTally


class StepTimer:
    """Times steps in the order they are submitted. A step that waits behind another counts from that one's end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._submitted: deque[tuple[int, int, float]] = deque()
        self._last_end = 0.0
        self._tallies: list[StepTally] = []

    @property
    def tallies(self) -> tuple[StepTally, ...]:
        """By the bit length of a step's tokens."""
        return tuple(self._tallies)

    def submitted(self, batch: Batch) -> None:
        context = sum(row.start + row.num_tokens for row in batch.rows)
        self._submitted.append((batch.num_tokens, context, self._clock.monotonic()))

    def completed(self) -> None:
        tokens, context, begun = self._submitted.popleft()
        now = self._clock.monotonic()
        seconds = now - max(begun, self._last_end)
        self._last_end = now
        size = tokens.bit_length()
        self._tallies += [StepTally()] * (size + 1 - len(self._tallies))
        old = self._tallies[size]
        self._tallies[size] = StepTally(
            steps=old.steps + 1,
            tokens=old.tokens + tokens,
            context=old.context + context,
            seconds=old.seconds + seconds,
        )
