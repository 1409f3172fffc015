"""The engine's prefix-cache events, kept for the sessions that tell routers of them."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from pdserve.core.blocks import HeldBlocks, KVEvent, KVSnapshot

_PART = 16_384
"""Hashes in one part of a snapshot: 256 KiB on the wire."""


class KVFeed:
    """A bounded ring of recent events that any number of readers follow, each at its own pace.

    drain takes events out of the cache; snapshot returns the last event's number and all hashes held. A reader
    that falls behind the ring starts over with a snapshot, so a slow one costs no memory.
    """

    def __init__(
        self,
        drain: Callable[[], list[KVEvent]],
        snapshot: Callable[[], tuple[int, HeldBlocks]],
        *,
        max_hashes: int = 65_536,
    ) -> None:
        self._drain = drain
        self._snapshot = snapshot
        self._max_hashes = max_hashes
        self._ring: deque[KVEvent] = deque()
        self._num_hashes = 0
        self._last_number = 0

    def collect(self) -> None:
        """Take what is new out of the cache."""
        for event in self._drain():
            self._ring.append(event)
            self._num_hashes += len(event.hashes)
            self._last_number = event.number
        while self._num_hashes > self._max_hashes:
            self._num_hashes -= len(self._ring.popleft().hashes)

    def after(self, number: int) -> list[KVEvent] | None:
        """The events that follow event `number`, or None when some of them are no longer kept, or it never was."""
        self.collect()
        missing = self._last_number - number
        if not 0 <= missing <= len(self._ring):
            return None
        return list(islice(self._ring, len(self._ring) - missing, None)) if missing > 0 else []

    def snapshot(self) -> Iterator[KVSnapshot]:
        """Everything held now, in parts; the events that follow its number continue it."""
        number, held = self._snapshot()
        parts = [
            (tier, hashes[at : at + _PART]) for tier, hashes in held.items() for at in range(0, len(hashes), _PART)
        ] or [(None, ())]
        for index, (tier, hashes) in enumerate(parts):
            yield KVSnapshot(number=number, hashes=hashes, first=index == 0, last=index == len(parts) - 1, tier=tier)


class KVReader:
    """One reader's place in a feed."""

    def __init__(self, feed: KVFeed) -> None:
        self._feed = feed
        self._number: int | None = None

    def resume(self, number: int | None) -> None:
        """The reader missed what follows event `number`: the next news are that, if the ring still holds it, else a
        snapshot. None: it has nothing."""
        self._number = number

    def news(self) -> list[KVEvent] | list[KVSnapshot]:
        """What happened since the last call; a snapshot in parts at first, and after a gap."""
        events = self._feed.after(self._number) if self._number is not None else None
        if events is None:
            parts = list(self._feed.snapshot())
            self._number = parts[-1].number
            return parts
        if events:
            self._number = events[-1].number
        return events
