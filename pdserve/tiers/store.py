"""Both tiers as one store: save from the device, spill from host to disk, find and pin for a restore.

Blocks live by hash. Of one block the arena and the disk may each hold a copy: a block that is restored from disk
is saved to the host tier again once the engine has it, and its copy on disk stays, so that giving it up again
costs no write.

The host tier keeps a few slots ahead: before the last ones are taken, what is next to leave is written to disk by
a thread of its own, readable all the while. When the disk does not keep up, blocks are given up unwritten: saving
never waits for a disk.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock, Thread

from pdserve.core.blocks import BlockHash
from pdserve.core.tiers import SavedBlock, Tier, TierNews
from pdserve.tiers.arena import Bytes, Rows
from pdserve.tiers.checksum import Checksum
from pdserve.tiers.device import DeviceBlocks
from pdserve.tiers.disk import DiskTier
from pdserve.tiers.entry import Entry
from pdserve.tiers.host import HostTier
from pdserve.tiers.tally import TierCounter

_log = logging.getLogger(__name__)

_AHEAD_SHARE = 8
_AHEAD_BYTES = 64 * 2**20
"""Slots kept free or being written to disk: this part of the host tier, but not more than these bytes."""


class TierStore:
    """Thread-safe. save, restore's calls and the spilling may run at the same time, each on one thread."""

    def __init__(self, device: DeviceBlocks, host: HostTier, disk: DiskTier | None, identity: bytes) -> None:
        self._device = device
        self._host = host
        self._disk = disk
        self.checksum = Checksum(identity)
        block_bytes = device.layout.block_bytes
        self._ahead = max(1, min(host.num_slots // _AHEAD_SHARE, _AHEAD_BYTES // block_bytes)) if disk else 0
        self._lock = Lock()
        self._counts = {Tier.HOST: TierCounter(Tier.HOST, host.num_slots, block_bytes)}
        if disk:
            counter = TierCounter(Tier.DISK, disk.file.num_slots, block_bytes, corrupt=disk.num_damaged)
            self._counts[Tier.DISK] = counter
        self._changed: set[BlockHash] = set()
        self._spilling: dict[BlockHash, Entry] = {}
        self._spills: SimpleQueue[BlockHash | None] = SimpleQueue()
        self._told: set[type[Exception]] = set()
        """Unforeseen errors of spilling that were logged."""
        self._spiller = Thread(target=self._spill_all, name="kv-spill", daemon=True)
        if disk:
            self._spiller.start()

    def contents(self) -> TierNews:
        """Everything held, as news."""
        with self._lock:
            self._changed.update(self._host.hashes(), self._spilling, self._disk.hashes() if self._disk else ())
        return self.news()

    def news(self) -> TierNews:
        """What changed since the last call."""
        with self._lock:
            changes = tuple((block_hash, self._where(block_hash)) for block_hash in self._changed)
            self._changed.clear()
            sizes = {Tier.HOST: self._host.num_blocks, Tier.DISK: self._disk.num_blocks if self._disk else 0}
            tallies = tuple(counter.snapshot(sizes[tier]) for tier, counter in self._counts.items())
        return TierNews(changes=changes, tallies=tallies)

    def save(self, blocks: Sequence[SavedBlock], used: Iterable[BlockHash], wrong: Sequence[BlockHash] = ()) -> None:
        """Copy blocks of the device pool into the host tier, then delete what was computed wrong."""
        with self._lock:
            self._use(tuple(used))
        # Last block first, so that of a chain the later blocks are the first to leave.
        for block_hash, block in reversed(blocks):
            if (slot := self._slot_for(block_hash)) is None:
                continue
            view = self._host.view(slot)
            try:
                self._device.read(block, view)
                checksum = self.checksum(block_hash, view)
            except BaseException:
                with self._lock:
                    self._host.give_back(slot)
                raise
            with self._lock:
                self._host.put(block_hash, slot, checksum)
                self._counts[Tier.HOST].saved += 1
                self._changed.add(block_hash)
                self._make_room()
        if wrong:
            self._delete(wrong)

    def pin(self, hashes: Sequence[BlockHash]) -> list[Entry]:
        """The longest held prefix of a chain, to be released after use; that counts as use."""
        entries: list[Entry] = []
        with self._lock:
            for block_hash in hashes:
                if (entry := self._find(block_hash)) is None:
                    self._changed.add(block_hash)
                    break
                entry.pins += 1
                entries.append(entry)
            self._use([entry.block_hash for entry in entries])
        return entries

    def release(self, entries: Sequence[Entry]) -> None:
        with self._lock:
            for entry in entries:
                entry.pins -= 1
                if entry.left:
                    self._give_back_left(entry)

    def restored(self, counts: Mapping[Tier, int]) -> None:
        """So many blocks of each tier were copied to the device and verified there."""
        with self._lock:
            for tier in counts.keys() & self._counts.keys():
                self._counts[tier].restored += counts[tier]

    def drop(self, entry: Entry, *, corrupt: bool) -> None:
        """A pinned block is damaged, or could not be read: it is not asked for again."""
        with self._lock:
            counter = self._counts[entry.tier]
            counter.corrupt += corrupt
            counter.failed += not corrupt
            self._changed.add(entry.block_hash)
            if entry.tier is Tier.HOST:
                if self._host.get(entry.block_hash) is entry:
                    self._host.remove(entry.block_hash).left = True
                return
            if not self._disk or self._disk.get(entry.block_hash) is not entry:
                return
            self._disk.remove(entry.block_hash)
        self._blank(self._disk, entry.slot, reuse=corrupt)

    @property
    def host_rows(self) -> Rows:
        """The host tier's slots, shape [slots, block_bytes]."""
        return self._host.rows

    def read_disk(self, slot: int, targets: Sequence[Bytes]) -> None:
        """Adjacent slots from this one on, each into its target. Raises OSError."""
        assert self._disk
        self._disk.file.read(slot, targets)

    def close(self, timeout: float) -> None:
        """Write what is already on its way to disk, at most timeout seconds long, and free the folder."""
        if self._disk:
            self._spills.put(None)
            self._spiller.join(timeout)
            if not self._spiller.is_alive():
                self._disk.close()

    def _blank(self, disk: DiskTier, slot: int, *, reuse: bool) -> None:
        """Nobody finds the slot's block again. reuse: others may lie there; not where the disk could not be read, nor
        where it cannot be written."""
        with suppress(OSError):
            disk.file.blank(slot)
            if reuse:
                with self._lock:
                    disk.give_back(slot)

    def _delete(self, hashes: Sequence[BlockHash]) -> None:
        """Gone from both tiers when this returns; a block on its way to disk, when that write has ended."""
        on_disk: list[Entry] = []
        with self._lock:
            self._changed.update(hashes)
            for block_hash in hashes:
                if block_hash in self._host:
                    entry = self._host.remove(block_hash)
                    entry.left = True
                    self._give_back_left(entry)
                if spilling := self._spilling.get(block_hash):
                    spilling.wrong = True
                if self._disk and block_hash in self._disk:
                    on_disk.append(self._disk.remove(block_hash))
        self._erase(on_disk)

    def _erase(self, on_disk: Sequence[Entry]) -> None:
        """Entries that were taken out of the disk tier."""
        if not self._disk or not on_disk:
            return
        try:
            self._disk.file.erase([entry.slot for entry in on_disk])
        except OSError as error:
            _log.error("wrong KV could not be erased, the disk tier starts empty next time: %s", error)
            return
        with self._lock:
            for entry in on_disk:
                entry.left = True
                self._give_back_left(entry)

    def _where(self, block_hash: BlockHash) -> Tier | None:
        if block_hash in self._host or self._spilled(block_hash):
            return Tier.HOST
        return Tier.DISK if self._disk and block_hash in self._disk else None

    def _find(self, block_hash: BlockHash) -> Entry | None:
        entry = self._host.get(block_hash) or self._spilled(block_hash)
        return entry or (self._disk.get(block_hash) if self._disk else None)

    def _spilled(self, block_hash: BlockHash) -> Entry | None:
        """A block on its way to disk, if it may be read meanwhile."""
        entry = self._spilling.get(block_hash)
        return None if entry is None or entry.wrong else entry

    def _use(self, chain: Sequence[BlockHash]) -> None:
        self._host.use(chain)
        if self._disk:
            self._disk.use(chain)

    def _slot_for(self, block_hash: BlockHash) -> int | None:
        """A slot for a block that is not in the host tier yet and finds room."""
        with self._lock:
            if block_hash in self._host or block_hash in self._spilling:
                self._host.use([block_hash])
                self._changed.add(block_hash)
                return None
            if not self._host.num_free and (evicted := self._host.evict()):
                self._counts[Tier.HOST].evicted += 1
                self._changed.add(evicted[0])
                return evicted[1].slot
            if not self._host.num_free:
                self._counts[Tier.HOST].refused += 1
                return None
            return self._host.take_slot()

    def _make_room(self) -> None:
        while self._host.num_free + len(self._spilling) < self._ahead and (evicted := self._host.evict()):
            block_hash, entry = evicted
            self._counts[Tier.HOST].evicted += 1
            self._changed.add(block_hash)
            if self._is_worth_writing(block_hash, entry):
                self._spilling[block_hash] = entry
                self._spills.put(block_hash)
            else:
                self._host.give_back(entry.slot)

    def _is_worth_writing(self, block_hash: BlockHash, entry: Entry) -> bool:
        assert self._disk
        if block_hash in self._disk:
            return False
        admitted = self._disk.admits(block_hash, used=entry.used)
        self._counts[Tier.DISK].refused += not admitted
        return admitted

    def _spill_all(self) -> None:
        while (block_hash := self._spills.get()) is not None:
            try:
                self._spill(block_hash)
            except Exception as error:  # whatever it is, it must not keep the blocks behind this one from the disk
                self._give_up(block_hash, error)

    def _spill(self, block_hash: BlockHash) -> None:
        assert self._disk
        counter = self._counts[Tier.DISK]
        with self._lock:
            entry = self._spilling[block_hash]
            reserved = None if entry.wrong else self._disk.reserve(block_hash, entry.checksum)
            if reserved and (evicted := reserved[1]):
                counter.evicted += 1
                self._changed.add(evicted)
        written = False
        if reserved:
            try:
                self._disk.file.write(reserved[0], self._host.view(entry.slot))
                written = True
            except OSError:
                pass
            except Exception as error:
                self._tell(error)
        wrong: list[Entry] = []
        with self._lock:
            if reserved and written:
                self._disk.put(reserved[0])
                counter.saved += 1
                if entry.wrong:
                    wrong.append(self._disk.remove(block_hash))
            elif reserved:
                self._disk.give_back(reserved[0].slot)
                counter.failed += 1
            else:
                counter.refused += 1
            self._changed.add(block_hash)
            del self._spilling[block_hash]
            entry.left = True
            self._give_back_left(entry)
        self._erase(wrong)

    def _give_up(self, block_hash: BlockHash, error: Exception) -> None:
        """A block that could not be spilled is in no tier; a disk slot that was reserved for it is not used again."""
        self._tell(error)
        with self._lock:
            if entry := self._spilling.pop(block_hash, None):
                self._counts[Tier.DISK].failed += 1
                self._changed.add(block_hash)
                entry.left = True
                self._give_back_left(entry)

    def _tell(self, error: Exception) -> None:
        """Once of each kind; how often, the tally tells."""
        if type(error) not in self._told:
            self._told.add(type(error))
            _log.error("a block could not be written to the disk tier and is lost", exc_info=error)

    def _give_back_left(self, entry: Entry) -> None:
        if entry.left and not entry.pins:
            (self._disk if self._disk and entry.tier is Tier.DISK else self._host).give_back(entry.slot)
