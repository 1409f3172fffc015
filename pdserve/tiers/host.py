"""The host tier: blocks in one preallocated arena of equal slots. Its owner locks."""

from collections.abc import Iterable

from pdserve.core.blocks import BlockHash
from pdserve.core.tiers import Tier
from pdserve.tiers.arena import Bytes, allocate_rows
from pdserve.tiers.entry import Entry
from pdserve.tiers.eviction import SegmentedLRU


class HostTier:
    """hash → entry, in slots 0 … num_slots − 1."""

    def __init__(self, num_slots: int, block_bytes: int, *, gpu: int | None = None) -> None:
        """Takes all its memory at once, pinned if it is for a GPU; raises MemoryError when there is none."""
        self.num_slots = num_slots
        self.rows = allocate_rows(num_slots, block_bytes, gpu=gpu)
        """Shape [num_slots, block_bytes]."""
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries: dict[BlockHash, Entry] = {}
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
        view: Bytes = self.rows[slot]
        return view

    def get(self, block_hash: BlockHash) -> Entry | None:
        return self._entries.get(block_hash)

    def take_slot(self) -> int:
        """A free slot, for put or give_back."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def put(self, block_hash: BlockHash, slot: int, checksum: bytes) -> None:
        """The slot holds a block from now on."""
        self._entries[block_hash] = Entry(block_hash, Tier.HOST, slot, checksum)
        self._order.add(block_hash)

    def use(self, chain: Iterable[BlockHash]) -> None:
        """Blocks of a chain, in order, were asked for; those not held are passed over."""
        held = [block_hash for block_hash in chain if block_hash in self._entries]
        for block_hash in held:
            self._entries[block_hash].used = True
        self._order.use(held)

    def evict(self) -> tuple[BlockHash, Entry] | None:
        """Take out the next to leave; its slot is the caller's. None when all are being read."""
        victim = self._order.victim(lambda block_hash: not self._entries[block_hash].pins)
        return None if victim is None else (victim, self.remove(victim))

    def remove(self, block_hash: BlockHash) -> Entry:
        """Take an entry out; its slot is the caller's."""
        self._order.remove(block_hash)
        return self._entries.pop(block_hash)

    def hashes(self) -> tuple[BlockHash, ...]:
        return tuple(self._entries)
