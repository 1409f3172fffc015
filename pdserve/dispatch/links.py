"""Which links between engines were lost, and when a request may try one again. Pure but for the clock.

works ──lost──▶ avoided ──back-off over──▶ one request tries it ──fetched──▶ works
                   ▲                               │
                   └──────── twice as long ────────┘
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.cluster import EngineKey, Link


@dataclass(slots=True)
class _Loss:
    """The link is avoided until a monotonic time."""

    backoff: float
    until: float


class LostLinks:
    """The links one gateway has lost."""

    def __init__(self, times: Times, clock: Clock) -> None:
        self._times = times
        self._clock = clock
        self._losses: dict[Link, _Loss] = {}

    def lost(self, link: Link, backoff: float | None = None) -> bool:
        """A request lost the link; whether that is news. backoff is the first one, the setting's unless given."""
        now = self._clock.monotonic()
        loss = self._losses.get(link)
        if loss is None:
            first = self._times.link_backoff if backoff is None else backoff
            self._losses[link] = _Loss(first, now + first)
        elif loss.until <= now:
            loss.until = now + loss.backoff
        return loss is None

    def tried(self, link: Link) -> None:
        """A request takes the link: while it has not told how that went, the others go on avoiding one that was
        lost."""
        now = self._clock.monotonic()
        loss = self._losses.get(link)
        if loss and loss.until <= now:
            loss.backoff = min(2 * loss.backoff, self._times.link_backoff_max)
            loss.until = now + loss.backoff

    def works(self, link: Link) -> bool:
        """A request fetched its KV over the link; whether that is news."""
        return self._losses.pop(link, None) is not None

    def keep(self, live: Iterable[EngineKey]) -> None:
        """Forget the links of incarnations that have left."""
        there = set(live)
        self._losses = {link: loss for link, loss in self._losses.items() if there.issuperset(link)}

    def avoided(self) -> dict[EngineKey, frozenset[EngineKey]]:
        """By the engine that would fetch: those whose KV no request should have it fetch now."""
        now = self._clock.monotonic()
        avoided: dict[EngineKey, frozenset[EngineKey]] = {}
        for (source, target), loss in self._losses.items():
            if loss.until > now:
                avoided[target] = avoided.get(target, frozenset()) | {source}
        return avoided

    def next_try(self) -> float | None:
        """When (monotonic) the next link may be tried; None when none is avoided."""
        now = self._clock.monotonic()
        return min((loss.until for loss in self._losses.values() if loss.until > now), default=None)
