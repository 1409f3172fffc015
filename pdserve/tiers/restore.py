"""One restore: copy blocks to the device and verify them there, a little at a time.

What was copied is digested while it is still in the core's cache, in the target memory itself where that is host
memory; for a GPU it is digested in the host's, just before its asynchronous copy begins. One thread does all of it: a
core copies about as fast as its memory goes.
"""

from collections.abc import Sequence
from itertools import groupby
from time import perf_counter

import numpy as np

from pdserve.core.blocks import BlockHash
from pdserve.core.tiers import Tier, TierRead
from pdserve.tiers.arena import Bytes, Rows, allocate_rows
from pdserve.tiers.checksum import Seal
from pdserve.tiers.device import DeviceBlocks
from pdserve.tiers.entry import Entry
from pdserve.tiers.store import TierStore

PART_BYTES = 2**20
"""Read, or sent on, before the next: it still lies in a core's cache when it is verified."""

COPY_BYTES = 2**24
"""Copied within host memory in one call, which verifies every little piece of it at once."""


class Restorer:
    """Runs restores, one at a time, on the caller's thread. Raises MemoryError when staging rows are not to be had."""

    def __init__(self, store: TierStore, device: DeviceBlocks) -> None:
        self._store = store
        self._device = device
        block_bytes = device.layout.block_bytes
        self._step = max(1, PART_BYTES // block_bytes)
        self._host_step = max(1, COPY_BYTES // block_bytes) if device.in_place else self._step
        self._staging: Rows | None = None
        if not device.in_place:
            self._staging = allocate_rows(self._step, block_bytes, gpu=device.gpu)

    def restore(self, hashes: Sequence[BlockHash], blocks: Sequence[int]) -> tuple[int, tuple[TierRead, ...]]:
        """(number of leading target blocks that hold verified bytes, what came from where).

        Returns, or raises, only when nothing touches the targets any more."""
        entries = self._store.pin(hashes)
        counts, seconds = dict.fromkeys(Tier, 0), dict.fromkeys(Tier, 0.0)
        try:
            for tier, run in groupby(zip(entries, blocks, strict=False), key=lambda pair: pair[0].tier):
                began = perf_counter()
                sources, targets = zip(*run, strict=True)
                count = self._bring(tier, sources, targets)
                counts[tier] += count
                seconds[tier] += perf_counter() - began
                if count < len(sources):
                    break
            self._store.restored(counts)
        finally:
            self._store.release(entries)
        reads = [TierRead(tier=tier, blocks=counts[tier], seconds=seconds[tier]) for tier in Tier if counts[tier]]
        return sum(counts.values()), tuple(reads)

    def _bring(self, tier: Tier, sources: Sequence[Entry], targets: Sequence[int]) -> int:
        """How many leading blocks, all of one tier, came and are verified."""
        host = tier is Tier.HOST
        bring, step = (self._from_host, self._host_step) if host else (self._from_disk, self._step)
        done = 0
        try:
            for first in range(0, len(sources), step):
                part = slice(first, first + step)
                done += bring(sources[part], targets[part])
                if done < min(part.stop, len(sources)):
                    break
        finally:
            self._device.settle()
        return done

    def _from_host(self, sources: Sequence[Entry], targets: Sequence[int]) -> int:
        slots = np.array([source.slot for source in sources])
        return self._verified(sources, self._device.write(targets, self._store.host_rows, slots, self._seals(sources)))

    def _from_disk(self, sources: Sequence[Entry], targets: Sequence[int]) -> int:
        """Into the target itself, or by way of staging rows where that is not host memory."""
        if self._staging is None:
            count = self._num_read(sources, [self._device.view(block) for block in targets])
            read = sources[:count]
            return self._verified(read, self._device.num_intact(targets[:count], self._seals(read)))
        self._device.settle()
        count = self._num_read(sources, list(self._staging[: len(sources)]))
        read = sources[:count]
        written = self._device.write(targets[:count], self._staging, np.arange(count), self._seals(read))
        return self._verified(read, written)

    def _seals(self, sources: Sequence[Entry]) -> list[Seal]:
        return [(self._store.checksum.seed(source.block_hash), source.checksum) for source in sources]

    def _num_read(self, sources: Sequence[Entry], views: Sequence[Bytes]) -> int:
        """How many leading blocks could be read."""
        try:
            self._read(sources, views)
        except OSError:
            # The error does not say which of them cannot be read.
            return self._read_singly(sources, views)
        return len(sources)

    def _read(self, sources: Sequence[Entry], targets: Sequence[Bytes]) -> None:
        """Adjacent slots in one go."""
        first = 0
        for end in range(1, len(sources) + 1):
            if end == len(sources) or sources[end].slot != sources[end - 1].slot + 1:
                self._store.read_disk(sources[first].slot, targets[first:end])
                first = end

    def _read_singly(self, sources: Sequence[Entry], targets: Sequence[Bytes]) -> int:
        """How many leading blocks could be read; the first that could not is dropped."""
        for count, (source, target) in enumerate(zip(sources, targets, strict=True)):
            try:
                self._store.read_disk(source.slot, [target])
            except OSError:
                self._store.drop(source, corrupt=False)
                return count
        return len(sources)

    def _verified(self, sources: Sequence[Entry], count: int) -> int:
        """So many leading blocks fit their checksums; the first that does not is dropped."""
        if count < len(sources):
            self._store.drop(sources[count], corrupt=True)
        return count
