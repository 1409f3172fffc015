"""One restore: copy blocks to the device and verify them there, a few batches at a time.

Each thread copies a block (or reads a batch from disk) and computes its checksum while the bytes are still in the
core's cache, in the target memory itself where that is host memory. So two threads restore at about the speed at
which one copies.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from itertools import groupby
from time import perf_counter

import numpy as np

from pdserve.core.blocks import BlockHash
from pdserve.core.tiers import Tier, TierRead
from pdserve.tiers.device import Bytes, DeviceBlocks
from pdserve.tiers.store import Source, TierStore

THREADS = 2
_BATCH_BYTES = 2**20

_Pair = tuple[Source, int]
"""A block in a tier and its target."""


@dataclass(frozen=True, slots=True)
class _Brought:
    """What became of a batch: how many leading blocks are verified, and the seconds a thread was busy with it."""

    tier: Tier
    verified: int
    complete: bool
    seconds: float


class Restorer:
    """Runs restores, one at a time, for its caller to wait for; the copying is done by the pool's threads."""

    def __init__(self, store: TierStore, device: DeviceBlocks, pool: Executor) -> None:
        self._store = store
        self._device = device
        self._pool = pool
        self._batch = max(1, _BATCH_BYTES // device.layout.block_bytes)

    def restore(self, hashes: Sequence[BlockHash], blocks: Sequence[int]) -> tuple[int, tuple[TierRead, ...]]:
        """(number of leading target blocks that hold verified bytes, what came from where).

        Returns, or raises, only when no thread touches the targets any more."""
        sources = self._store.pin(hashes)
        began = perf_counter()
        try:
            batches = self._batches(list(zip(sources, blocks, strict=False)))
            bringing = [self._pool.submit(self._bring, batch) for batch in batches]
            wait(bringing)
            brought = [batch.result() for batch in bringing]
            verified = _leading(brought)
            self._store.restored(sources[:verified])
        finally:
            self._store.release(sources)
        return verified, tuple(_reads(sources[:verified], brought, perf_counter() - began))

    def _batches(self, pairs: list[_Pair]) -> Iterator[list[_Pair]]:
        """Each of one tier."""
        for _, group in groupby(pairs, key=lambda pair: pair[0].tier):
            run = list(group)
            for first in range(0, len(run), self._batch):
                yield run[first : first + self._batch]

    def _bring(self, batch: list[_Pair]) -> _Brought:
        began = perf_counter()
        tier = batch[0][0].tier
        try:
            count = self._from_host(batch) if tier is Tier.HOST else self._from_disk(batch)
        except OSError:
            self._store.drop(batch[0][0], corrupt=False)
            count = 0
        return _Brought(tier, count, count == len(batch), perf_counter() - began)

    def _from_host(self, batch: list[_Pair]) -> int:
        for index, (source, block) in enumerate(batch):
            view = self._store.host_view(source.slot)
            pieces = self._device.pieces(block)
            if pieces is not None:
                _scatter(view, pieces)
            if not self._verify(source, pieces or [view]):
                return index
            if pieces is None:
                self._device.write(block, view)
        return len(batch)

    def _from_disk(self, batch: list[_Pair]) -> int:
        """Into the target itself, or by way of a buffer where that is not host memory."""
        targets = [self._device.pieces(block) or [self._buffer()] for _, block in batch]
        self._read(batch, targets)
        for index, ((source, block), pieces) in enumerate(zip(batch, targets, strict=True)):
            if not self._verify(source, pieces):
                return index
            if self._device.pieces(block) is None:
                self._device.write(block, pieces[0])
        return len(batch)

    def _read(self, batch: list[_Pair], targets: list[list[Bytes]]) -> None:
        """Adjacent slots in one go."""
        slots = [source.slot for source, _ in batch]
        first = 0
        for end in range(1, len(slots) + 1):
            if end == len(slots) or slots[end] != slots[end - 1] + 1:
                self._store.read_disk(slots[first], targets[first:end])
                first = end

    def _verify(self, source: Source, pieces: list[Bytes]) -> bool:
        if self._store.checksum(source.block_hash, pieces) == source.checksum:
            return True
        self._store.drop(source, corrupt=True)
        return False

    def _buffer(self) -> Bytes:
        return np.empty(self._device.layout.block_bytes, dtype=np.uint8)


def _scatter(source: Bytes, pieces: list[Bytes]) -> None:
    at = 0
    for piece in pieces:
        piece[...] = source[at : at + piece.nbytes]
        at += piece.nbytes


def _leading(brought: Sequence[_Brought]) -> int:
    """Blocks before the first that did not verify."""
    total = 0
    for batch in brought:
        total += batch.verified
        if not batch.complete:
            break
    return total


def _reads(sources: Sequence[Source], brought: Sequence[_Brought], seconds: float) -> Iterator[TierRead]:
    """The time the restore took, divided as the threads were busy with each tier."""
    busy = sum(batch.seconds for batch in brought)
    for tier in Tier:
        if blocks := sum(source.tier is tier for source in sources):
            share = sum(batch.seconds for batch in brought if batch.tier is tier) / busy
            yield TierRead(tier=tier, blocks=blocks, seconds=share * seconds)
