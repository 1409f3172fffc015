"""The host tier: blocks in one preallocated arena of equal slots. Its owner locks."""

import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pdserve.core.blocks import BlockHash
from pdserve.tiers.device import Bytes
from pdserve.tiers.eviction import SegmentedLRU


@dataclass(slots=True, eq=False)
class HostEntry:
    """A block in the arena. pins counts those that read its slot just now; it is not given away meanwhile.

    left: taken out of the tier while it was pinned, so that its slot is given back with the last pin."""

    slot: int
    checksum: bytes
    used: bool = False
    """Whether it was asked for again since it came."""
    pins: int = 0
    left: bool = False


class HostTier:
    """hash → entry, in slots 0 … num_slots − 1."""

    def __init__(self, num_slots: int, block_bytes: int) -> None:
        """Takes all its memory at once; raises MemoryError when there is none."""
        self.num_slots = num_slots
        self._block_bytes = block_bytes
        self._arena = _allocate(num_slots * block_bytes)
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries: dict[BlockHash, HostEntry] = {}
        self._order = SegmentedLRU(num_slots)

    @property
    def num_blocks(self) -> int:
        return len(self._entries)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._entries

    @property
    def num_free(self) -> int:
        return len(self._free)

    def view(self, slot: int) -> Bytes:
        """The slot's block_bytes."""
        return self._arena[slot * self._block_bytes : (slot + 1) * self._block_bytes]

    def get(self, block_hash: BlockHash) -> HostEntry | None:
        return self._entries.get(block_hash)

    def take_slot(self) -> int:
        """A free slot, for put or give_back."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def put(self, block_hash: BlockHash, slot: int, checksum: bytes) -> None:
        """The slot holds a block from now on."""
        self._entries[block_hash] = HostEntry(slot, checksum)
        self._order.add(block_hash)

    def use(self, chain: Iterable[BlockHash]) -> None:
        """Blocks of a chain, in order, were asked for; those not held are passed over."""
        held = [block_hash for block_hash in chain if block_hash in self._entries]
        for block_hash in held:
            self._entries[block_hash].used = True
        self._order.use(held)

    def evict(self) -> tuple[BlockHash, HostEntry] | None:
        """Take out the next to leave; its slot is the caller's. None when all are being read."""
        victim = self._order.victim(lambda block_hash: not self._entries[block_hash].pins)
        return None if victim is None else (victim, self.remove(victim))

    def remove(self, block_hash: BlockHash) -> HostEntry:
        """Take an entry out; its slot is the caller's."""
        self._order.remove(block_hash)
        return self._entries.pop(block_hash)

    def hashes(self) -> tuple[BlockHash, ...]:
        return tuple(self._entries)


def _allocate(num_bytes: int) -> Bytes:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    try:
        return np.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=np.uint8)
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes of host memory are not to be had") from error
