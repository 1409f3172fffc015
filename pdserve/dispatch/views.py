"""What routing sees of all engines, kept up from one decision to the next."""

from collections.abc import Callable, Iterable, Sequence

from pdserve.core.cluster import EngineKey, EngineView
from pdserve.core.endpoint import Endpoint

_LOOK_AGAIN = 1.0
"""Seconds after which every engine is looked at though nothing was heard of it, for what fades or ends by itself."""


class Views:
    """One view per endpoint, in their order. look makes an engine's view anew, or returns the one it made before where
    that is still true."""

    def __init__(self, look: Callable[[Endpoint, float], EngineView]) -> None:
        self._look = look
        self._endpoints: tuple[Endpoint, ...] = ()
        self._places: dict[EngineKey, int] = {}
        self._views: tuple[EngineView, ...] = ()
        self._stale: set[EngineKey] = set()
        self._all_stale_at = 0.0

    def follow(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = tuple(endpoints)
        self._places = {(e.engine_id, e.epoch): place for place, e in enumerate(endpoints)}
        self.outdate_all()

    def outdate(self, keys: Iterable[EngineKey]) -> None:
        """Something of these engines has changed."""
        self._stale.update(keys)

    def outdate_all(self) -> None:
        self._all_stale_at = 0.0

    def at(self, now: float) -> tuple[EngineView, ...]:
        """Engines of which nothing has changed are the same objects as before. now: monotonic seconds."""
        if now >= self._all_stale_at:
            self._views = tuple(self._look(endpoint, now) for endpoint in self._endpoints)
            self._all_stale_at = now + _LOOK_AGAIN
            self._stale.clear()
        elif self._stale:
            views = list(self._views)
            for key in self._stale & self._places.keys():
                place = self._places[key]
                views[place] = self._look(self._endpoints[place], now)
            self._views = tuple(views)
            self._stale.clear()
        return self._views
