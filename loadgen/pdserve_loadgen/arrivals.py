"""When requests arrive, open loop: whatever the server does, the next one comes at its time."""

from collections.abc import Iterator
from enum import StrEnum
from random import Random


class Arrivals(StrEnum):
    """POISSON: exponential gaps, as from many independent users. CONSTANT: equal gaps."""

    POISSON = "poisson"
    CONSTANT = "constant"


def arrival_times(kind: Arrivals, rate: float, rng: Random) -> Iterator[float]:
    """Seconds since the start, ascending, without end; the first is at 0. rate: per second, above 0."""
    if kind is Arrivals.CONSTANT:
        index = 0
        while True:
            yield index / rate  # not a running sum, whose rounding errors add up
            index += 1
    at = 0.0
    while True:
        yield at
        at += rng.expovariate(rate)
