"""Order statistics by one stated rule: linear interpolation between closest ranks (numpy's default, type 7)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor, fsum

PERCENTILES = (50, 90, 95, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value at rank `percent`/100 × (n − 1) of values in ascending order; ranks in between are interpolated.

    Raises ValueError for no values or a percent outside 0..100."""
    if not ordered or not 0 <= percent <= 100:
        raise ValueError(f"no percentile {percent} of {len(ordered)} values")
    rank = percent / 100 * (len(ordered) - 1)
    below = floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Summary of one measure over all requests (or all gaps); unit is that of the values."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Distribution | None":
        """None when there are no values: a measure nobody had is not zero."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p90, p95, p99 = (percentile(ordered, percent) for percent in PERCENTILES)
        return cls(
            count=len(ordered),
            mean=fsum(ordered) / len(ordered),
            min=ordered[0],
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            max=ordered[-1],
        )
