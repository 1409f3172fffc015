"""What routing sees of all engines, kept up from one decision to the next."""

from collections.abc import Callable, Iterable, Sequence

from pdserve.core.cluster import EngineKey, EngineView
from pdserve.core.endpoint import Endpoint

_LOOK_AGAIN = 1.0
"""Seconds in which every engine is looked at though nothing was heard of it, one after the other, for what fades or
ends by itself."""


class Views:
    """One view per endpoint, in their order. look makes an engine's view anew, or returns the one it made before where
    that is still true."""

    def __init__(self, look: Callable[[Endpoint, float], EngineView]) -> None:
        self._look = look
        self._endpoints: tuple[Endpoint, ...] = ()
        self._places: dict[EngineKey, int] = {}
        self._views: tuple[EngineView, ...] = ()
        self._stale: set[EngineKey] = set()
        self._all_stale = True
        self._looked_at = 0.0
        self._next = 0
        """Whose turn it is, modulo their number."""

    def follow(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = tuple(endpoints)
        self._places = {(e.engine_id, e.epoch): place for place, e in enumerate(endpoints)}
        self.outdate_all()

    def outdate(self, keys: Iterable[EngineKey]) -> None:
        """Something of these engines has changed."""
        self._stale.update(keys)

    def outdate_all(self) -> None:
        self._all_stale = True

    def at(self, now: float) -> tuple[EngineView, ...]:
        """Engines of which nothing has changed are the same objects as before. now: monotonic seconds."""
        count = len(self._endpoints)
        due = count if self._all_stale else min(count, int(count * (now - self._looked_at) / _LOOK_AGAIN))
        if due:
            self._looked_at = now
        if due == count:
            self._views = tuple(self._look(endpoint, now) for endpoint in self._endpoints)
        elif due or self._stale:
            views = list(self._views)
            places = {self._places[key] for key in self._stale & self._places.keys()}
            for place in places.union((self._next + n) % count for n in range(due)):
                views[place] = self._look(self._endpoints[place], now)
            self._views = tuple(views)
            self._next += due
        self._stale.clear()
        self._all_stale = False
        return self._views
