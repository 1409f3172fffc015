"""How fast a peer is read over a backend, and which backend to use for it. Pure."""

from dataclasses import dataclass

SMALL_BYTES = 4096
LARGE_BYTES = 1 << 20
"""Sizes of the two reads a speed is measured by."""

PREFERENCE_MARGIN = 0.2
"""A backend that takes at most this much longer than the fastest counts as equally fast."""

_MAX_RATE = 1e12


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """A read of n bytes takes overhead + n / rate seconds; rate is in bytes per second."""

    overhead: float
    rate: float

    def seconds(self, num_bytes: int) -> float:
        return self.overhead + num_bytes / self.rate

    @classmethod
    def measured(cls, small: float, large: float) -> "LinkSpeed":
        """From the seconds that SMALL_BYTES and LARGE_BYTES took; noise may make the smaller one the slower."""
        rate = (LARGE_BYTES - SMALL_BYTES) / max(large - small, LARGE_BYTES / _MAX_RATE)
        return cls(max(0.0, min(small, large) - SMALL_BYTES / rate), rate)


def by_preference(speeds: tuple[LinkSpeed | None, ...]) -> tuple[int, ...]:
    """The order in which to use backends, given the speeds measured over them (None: unknown) in the operator's order.

    First those close to the fastest, as the operator prefers them, then the slower ones by speed, then the unknown.
    """
    seconds = {index: speed.seconds(LARGE_BYTES) for index, speed in enumerate(speeds) if speed is not None}
    close = min(seconds.values(), default=0.0) * (1 + PREFERENCE_MARGIN)

    def rank(index: int) -> tuple[int, float, int]:
        if index not in seconds:
            return 2, 0.0, index
        return (0, 0.0, index) if seconds[index] <= close else (1, seconds[index], index)

    return tuple(sorted(range(len(speeds)), key=rank))
