"""The disk tier: which block lies in which slot of the file, and which are let in. Its owner locks.

Writing is what a disk has least of. A disk with free slots takes every block the host tier gives up; a full one
takes only those that were used a second time: found again while they were in the host tier, or refused here
before. Prompts that come once then cost no write, and push nothing out.
"""

import fcntl
import os
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from pdserve.core.blocks import BlockHash
from pdserve.core.errors import ConfigError
from pdserve.core.tiers import Tier
from pdserve.tiers.entry import Entry
from pdserve.tiers.eviction import SegmentedLRU
from pdserve.tiers.slot_file import Label, SlotFile, slots_within

_LOCK_PATIENCE = 5.0
"""Seconds an engine waits for its predecessor, killed already, to be gone."""
_LOCK_RETRY = 0.05


class DiskTier:
    """hash → entry over a SlotFile. A folder belongs to one engine at a time; a lock makes sure."""

    def __init__(self, file: SlotFile, lock: int) -> None:
        self.file = file
        self._lock = lock
        labels, self.num_damaged = file.labels()
        self._order = SegmentedLRU(file.num_slots)
        self._entries: dict[BlockHash, Entry] = {}
        for label in labels:
            # Of two with one name, which only a torn write can leave, the newer one counts.
            self._order.remove(label.block_hash)
            self._order.add(label.block_hash)
            self._entries[label.block_hash] = _entry(label)
        taken = {entry.slot for entry in self._entries.values()}
        self._free = [slot for slot in range(file.num_slots - 1, -1, -1) if slot not in taken]
        self._stamp = max((label.stamp for label in labels), default=0)
        self._refused: OrderedDict[BlockHash, None] = OrderedDict()

    @classmethod
    def open(cls, path: Path, *, name: str, size: int, block_bytes: int, identity: bytes) -> "DiskTier":
        """The part of the folder of an engine, or of its rank: PATH/NAME/. Raises ConfigError when it cannot be had."""
        slots = slots_within(size, block_bytes)
        if not slots:
            raise ConfigError(f"kv.tiers.disk.size: {size} bytes hold no block of {block_bytes} bytes; raise it")
        folder = path / quote(name, safe="")
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = _locked(folder / "lock")
            try:
                file = SlotFile.open(folder / "blocks", block_bytes=block_bytes, num_slots=slots, identity=identity)
                return cls(file, lock)
            except BaseException:
                os.close(lock)
                raise
        except OSError as error:
            raise ConfigError(f"kv.tiers.disk.path: cannot use {folder} ({error.strerror})") from error

    @property
    def num_blocks(self) -> int:
        return len(self._entries)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._entries

    def get(self, block_hash: BlockHash) -> Entry | None:
        return self._entries.get(block_hash)

    def hashes(self) -> tuple[BlockHash, ...]:
        return tuple(self._entries)

    def use(self, chain: Iterable[BlockHash]) -> None:
        """Blocks of a chain, in order, were asked for; those not held are passed over."""
        self._order.use(block_hash for block_hash in chain if block_hash in self._entries)

    def admits(self, block_hash: BlockHash, *, used: bool) -> bool:
        """Whether to let a block in that the host tier gives up; a refusal is remembered."""
        if self._free or used:
            return True
        if block_hash in self._refused:
            del self._refused[block_hash]
            return True
        self._refused[block_hash] = None
        if len(self._refused) > self.file.num_slots:
            self._refused.popitem(last=False)
        return False

    def reserve(self, block_hash: BlockHash, checksum: bytes) -> tuple[Label, BlockHash | None] | None:
        """(label to write, hash that had to leave for it); the slot is the caller's. None when all are read."""
        evicted = None
        if not self._free:
            evicted = self._order.victim(lambda victim: not self._entries[victim].pins)
            if evicted is None:
                return None
            self._free.append(self.remove(evicted).slot)
        self._stamp += 1
        return Label(self._free.pop(), self._stamp, block_hash, checksum), evicted

    def put(self, label: Label) -> None:
        """The label and its block are written."""
        self._entries[label.block_hash] = _entry(label)
        self._order.add(label.block_hash)

    def remove(self, block_hash: BlockHash) -> Entry:
        """Take an entry out; its slot is the caller's."""
        self._order.remove(block_hash)
        return self._entries.pop(block_hash)

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def close(self) -> None:
        """The folder is free for the engine's next incarnation."""
        self.file.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _entry(label: Label) -> Entry:
    return Entry(label.block_hash, Tier.DISK, label.slot, label.checksum)


def _locked(path: Path) -> int:
    """An open descriptor that holds the lock until it is closed or its process ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    give_up_at = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                os.close(fd)
                raise ConfigError(
                    f"kv.tiers.disk.path: {path.parent} is used by another engine of the same name; "
                    "give each deployment a path of its own"
                ) from None
        # flock has no deadline of its own.
        time.sleep(_LOCK_RETRY)
