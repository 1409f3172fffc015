"""Engines by incarnation, and the ways they name blocks, kept from one request to the next."""

from itertools import compress
from operator import is_not

from pdserve.core.cluster import ClusterState, EngineKey, EngineView
from pdserve.core.endpoint import EngineCapacity

Naming = tuple[str, int]
"""(model revision, block size): what block hashes depend on besides tokens and salt."""


def naming(capacity: EngineCapacity) -> Naming:
    return capacity.model_revision, capacity.block_size


class Directory:
    """Follows the states it is shown; each costs what has changed since the one before."""

    def __init__(self) -> None:
        self._views: tuple[EngineView, ...] = ()
        self._by_key: dict[EngineKey, EngineView] = {}
        self.namings: dict[Naming, EngineCapacity] = {}
        """As a rule there is one, which all engines share."""

    def follow(self, state: ClusterState) -> None:
        old, new = self._views, state.engines
        if len(old) != len(new):
            self._begin(new)
        elif changes := list(compress(zip(old, new, strict=True), map(is_not, old, new))):
            if any(before.key != after.key or before.capacity is not after.capacity for before, after in changes):
                self._begin(new)
            else:
                self._by_key.update((after.key, after) for _, after in changes)
        self._views = new

    def find(self, key: EngineKey) -> EngineView | None:
        return self._by_key.get(key)

    def _begin(self, views: tuple[EngineView, ...]) -> None:
        """Engines have joined, left or told of their size."""
        self._by_key = {view.key: view for view in views}
        self.namings = {naming(view.capacity): view.capacity for view in views if view.capacity}
