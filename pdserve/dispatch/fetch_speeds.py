"""How fast engines take KV from one another, as the requests that did have told."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

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


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of fetches to one engine, until a monotonic time."""

    speeds: Mapping[EngineKey, float]
    until: float


NO_SPEEDS: Mapping[EngineKey, float] = MappingProxyType({})


class FetchSpeeds:
    """Seconds per token by (source, target), without FETCH_SECONDS; of fetches, or of handoffs."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._speeds: dict[EngineKey, dict[EngineKey, _Speed]] = {}
        """Target → source → speed."""
        self._known: dict[EngineKey, _Known] = {}

    def fetched(self, link: Link, tokens: int, seconds: float) -> None:
        """A fetch of so many tokens took so long."""
        if tokens <= 0 or seconds <= 0:
            return
        self._note(link, max(seconds - FETCH_SECONDS, seconds / 10) / tokens)

    def carried(self, link: Link, tokens: int, seconds: float) -> None:
        """So many tokens of a handoff were on the wire for so long."""
        if tokens > 0 and seconds > 0:
            self._note(link, seconds / tokens)

    def _note(self, link: Link, new: float) -> None:
        (source, target), now = link, self._clock.monotonic()
        there = self._speeds.setdefault(target, {})
        old = there.get(source)
        if old and now - old.at < FORGOTTEN:
            new = old.seconds_per_token + _NEW_SHARE * (new - old.seconds_per_token)
        there[source] = _Speed(new, now)
        for end in link:
            self._known.pop(end, None)

    def to(self, target: EngineKey) -> Mapping[EngineKey, float]:
        """By source. Where only the other direction was measured, that counts. The same object as long as nothing has
        changed."""
        if not self._speeds:
            return NO_SPEEDS
        known, now = self._known.get(target), self._clock.monotonic()
        if known is None or now >= known.until:
            known = self._known[target] = self._look(target, now)
        return known.speeds

    def keep(self, live: Iterable[EngineKey]) -> None:
        """Forget incarnations that have left."""
        there = set(live)
        self._speeds = {
            target: {source: speed for source, speed in sources.items() if source in there}
            for target, sources in self._speeds.items()
            if target in there
        }
        self._known.clear()

    def _look(self, target: EngineKey, now: float) -> _Known:
        back = {source: there[target] for source, there in self._speeds.items() if target in there}
        there = self._speeds.get(target, {})
        fresh = {
            source: speed
            for sources in (back, there)
            for source, speed in sources.items()
            if now - speed.at < FORGOTTEN
        }
        until = min((speed.at for speed in fresh.values()), default=now) + FORGOTTEN
        return _Known({source: speed.seconds_per_token for source, speed in fresh.items()} or NO_SPEEDS, until)
