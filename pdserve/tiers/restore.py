"""One restore: copy blocks to the device and verify them there, on two threads at once.

While one thread copies a batch (or reads it from disk), another one computes the checksums of the batch before,
in the target memory itself where that is host memory. So a restore costs little more than its copies.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from itertools import groupby
from time import perf_counter

import numpy as np

from pdserve.core.tiers import Tier, TierRead
from pdserve.tiers.device import Bytes, DeviceBlocks
from pdserve.tiers.store import Source, TierStore

_BATCH_BYTES = 2**20

_Pair = tuple[Source, int]
"""A block in a tier and its target."""


class Restorer:
    """Runs restores, one at a time, on the caller's thread; checksums run on the verifier's."""

    def __init__(self, store: TierStore, device: DeviceBlocks, verifier: Executor) -> None:
        self._store = store
        self._device = device
        self._verifier = verifier
        self._batch = max(1, _BATCH_BYTES // device.layout.block_bytes)
        self._staging: Bytes = np.empty((self._batch, device.layout.block_bytes), dtype=np.uint8)

    def restore(self, hashes: Sequence[bytes], blocks: Sequence[int]) -> tuple[int, tuple[TierRead, ...]]:
        """(number of leading target blocks that hold verified bytes, what came from where)."""
        sources = self._store.pin(hashes)
        try:
            return self._restore(list(zip(sources, blocks, strict=False)))
        finally:
            self._store.release(sources)

    def _restore(self, pairs: list[_Pair]) -> tuple[int, tuple[TierRead, ...]]:
        checks: list[Future[int]] = []
        seconds = dict.fromkeys(Tier, 0.0)
        copied = 0
        for batch in self._batches(pairs):
            began = perf_counter()
            try:
                checks.append(self._copy(batch))
            except OSError:
                self._store.drop(batch[0][0], corrupt=False)
                break
            finally:
                seconds[batch[0][0].tier] += perf_counter() - began
            copied += len(batch)
        began = perf_counter()
        verified = self._verified(pairs[:copied], checks)
        if verified:
            seconds[pairs[verified - 1][0].tier] += perf_counter() - began
        sources = [source for source, _ in pairs[:verified]]
        self._store.restored(sources)
        counts = {tier: sum(source.tier is tier for source in sources) for tier in Tier}
        reads = (TierRead(tier=t, blocks=counts[t], seconds=seconds[t]) for t in Tier if counts[t])
        return verified, tuple(reads)

    def _batches(self, pairs: list[_Pair]) -> Iterator[list[_Pair]]:
        for _, group in groupby(pairs, key=lambda pair: pair[0].tier):
            run = list(group)
            for first in range(0, len(run), self._batch):
                yield run[first : first + self._batch]

    def _copy(self, batch: list[_Pair]) -> "Future[int]":
        """Bring a batch to the device; the future tells how many of it verified, up to the first that did not."""
        targets = [self._device.pieces(block) for _, block in batch]
        mapped = [pieces for pieces in targets if pieces is not None]
        if not mapped:
            return self._upload(batch)
        if batch[0][0].tier is Tier.HOST:
            for source, block in batch:
                self._device.write(block, self._store.host_view(source.slot))
        else:
            self._read_disk(batch, mapped)
        return self._verifier.submit(self._verify, [source for source, _ in batch], mapped)

    def _upload(self, batch: list[_Pair]) -> "Future[int]":
        """To memory that is not the host's: verified here, then copied."""
        if batch[0][0].tier is Tier.HOST:
            views = [self._store.host_view(source.slot) for source, _ in batch]
        else:
            views = list(self._staging[: len(batch)])
            self._read_disk(batch, [[view] for view in views])
        good = self._verify([source for source, _ in batch], [[view] for view in views])
        for (_, block), view in zip(batch[:good], views, strict=False):
            self._device.write(block, view)
        done: Future[int] = Future()
        done.set_result(good)
        return done

    def _read_disk(self, batch: list[_Pair], targets: list[list[Bytes]]) -> None:
        slots = [source.slot for source, _ in batch]
        first = 0
        for end in range(1, len(slots) + 1):
            if end == len(slots) or slots[end] != slots[end - 1] + 1:
                self._store.read_disk(slots[first], targets[first:end])
                first = end

    def _verify(self, sources: list[Source], targets: list[list[Bytes]]) -> int:
        for index, (source, pieces) in enumerate(zip(sources, targets, strict=True)):
            if self._store.checksum(source.block_hash, pieces) != source.checksum:
                self._store.drop(source, corrupt=True)
                return index
        return len(sources)

    def _verified(self, pairs: list[_Pair], checks: list["Future[int]"]) -> int:
        """How many leading blocks verified. Waits for every check: none looks at the memory afterwards."""
        good = [check.result() for check in checks]
        total = 0
        for batch, count in zip(self._batches(pairs), good, strict=True):
            total += count
            if count < len(batch):
                break
        return total
