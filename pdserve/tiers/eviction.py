"""Which entry of a full tier goes next: a segmented LRU.

New entries are on probation; those used again are protected, which at most _PROTECTED of the capacity can be.
So prompts that come once never push out what comes often, while a conversation's last turn, not used again
yet, still has all the rest of the tier. Keys given together (a chain of blocks) leave last block first: the later
are useless without the earlier.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from pdserve.core.blocks import BlockHash

_PROTECTED = 0.8


class SegmentedLRU:
    """Keys in the order in which they are to leave. Every operation is O(1)."""

    def __init__(self, capacity: int) -> None:
        self._max_protected = int(capacity * _PROTECTED)
        self._probation: OrderedDict[BlockHash, None] = OrderedDict()
        self._protected: OrderedDict[BlockHash, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def __iter__(self) -> Iterator[BlockHash]:
        """First to leave first."""
        yield from self._probation
        yield from self._protected

    def add(self, key: BlockHash) -> None:
        self._probation[key] = None

    def use(self, chain: Iterable[BlockHash]) -> None:
        """These keys (in logical order, all held) were used again."""
        for key in reversed(tuple(chain)):
            self._probation.pop(key, None)
            self._protected[key] = None
            self._protected.move_to_end(key)
        while len(self._protected) > self._max_protected:
            self._probation[self._protected.popitem(last=False)[0]] = None

    def remove(self, key: BlockHash) -> None:
        for segment in (self._probation, self._protected):
            segment.pop(key, None)

    def victim(self, may_leave: Callable[[BlockHash], bool]) -> BlockHash | None:
        """The first to leave of those that may; None when none may. It stays until removed."""
        return next((key for key in self if may_leave(key)), None)
