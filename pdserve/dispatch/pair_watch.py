"""Which links between engines carry KV badly although they carry it: slowly, or damaged. Pure.

A link is slow when SLOW_STREAK transfers in a row ran at less than 1 / SLOW_FACTOR of what is usual on the other links
of its kind, within a domain or between two; a sole link is never called slow, for there is nothing to compare it with
and nowhere else to go. It is bad when
DAMAGE_STREAK transfers in a row arrived damaged. One good transfer clears it.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from pdserve.core.cluster import EngineKey, Link

SLOW_FACTOR = 4.0
SLOW_STREAK = 3
DAMAGE_STREAK = 2
LEAST_BYTES = 1 << 20
"""Smaller transfers are not judged: they cost latency more than anything else."""
_REMEMBERED = 16


@dataclass(slots=True)
class _History:
    """rates are bytes per second of the latest transfers. far: the link leads to another domain."""

    far: bool = False
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    slow: int = 0
    damaged: int = 0


class PairWatch:
    """What one gateway has seen of its links."""

    def __init__(self) -> None:
        self._links: dict[Link, _History] = {}

    def carried(self, link: Link, num_bytes: int, seconds: float, *, far: bool = False) -> bool:
        """A verified transfer took so long on the wire, to another domain if far; whether the link is slow now."""
        history = self._links.setdefault(link, _History())
        history.far = far
        history.damaged = 0
        if num_bytes < LEAST_BYTES or seconds <= 0:
            return False
        rate = num_bytes / seconds
        history.rates.append(rate)
        usual = self._usual(link, far)
        history.slow = history.slow + 1 if usual is not None and rate * SLOW_FACTOR < usual else 0
        return history.slow >= SLOW_STREAK

    def damaged(self, link: Link) -> bool:
        """A transfer arrived damaged, twice read; whether the link is bad now."""
        history = self._links.setdefault(link, _History())
        history.damaged += 1
        return history.damaged >= DAMAGE_STREAK

    def keep(self, live: Iterable[EngineKey]) -> None:
        """Forget the links of incarnations that have left."""
        there = set(live)
        self._links = {link: history for link, history in self._links.items() if there.issuperset(link)}

    def _usual(self, link: Link, far: bool) -> float | None:
        """Bytes per second on the others of its kind, None before any has been seen."""
        others = (history for other, history in self._links.items() if other != link and history.far is far)
        rates = [median(history.rates) for history in others if history.rates]
        return median(rates) if rates else None
