"""How fast engines fetch KV from one another, as the requests that did have told."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pdserve.core.clock import Clock
from pdserve.core.cluster import FETCH_SECONDS, EngineKey, Link

FORGOTTEN = 300.0
"""Seconds after which a measurement counts no more: what was slow once gets another chance."""
_NEW_SHARE = 0.25
"""Weight of a new measurement against all before."""


@dataclass(slots=True)
class _Speed:
    seconds_per_token: float
    at: float


class FetchSpeeds:
    """Seconds per token by (source, target), without FETCH_SECONDS."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._speeds: dict[Link, _Speed] = {}

    def fetched(self, link: Link, tokens: int, seconds: float) -> None:
        """A fetch of so many tokens took so long."""
        if tokens <= 0 or seconds <= 0:
            return
        new, now = max(seconds - FETCH_SECONDS, seconds / 10) / tokens, self._clock.monotonic()
        old = self._known(link)
        self._speeds[link] = _Speed(new if old is None else old + _NEW_SHARE * (new - old), now)

    def to(self, target: EngineKey) -> Mapping[EngineKey, float]:
        """By source. Where only the other direction was measured, that counts."""
        known = {link: speed for link in self._speeds if (speed := self._known(link)) is not None}
        there = {source: speed for (source, end), speed in known.items() if end == target}
        back = {end: speed for (start, end), speed in known.items() if start == target}
        return back | there

    def keep(self, live: Iterable[EngineKey]) -> None:
        """Forget incarnations that have left."""
        there = set(live)
        self._speeds = {link: speed for link, speed in self._speeds.items() if there.issuperset(link)}

    def _known(self, link: Link) -> float | None:
        speed = self._speeds.get(link)
        return speed.seconds_per_token if speed and self._clock.monotonic() - speed.at < FORGOTTEN else None
