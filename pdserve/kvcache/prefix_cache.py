"""Which block holds which tokens: block hash ↔ block id, and the events that tell the rest of the cluster."""

from collections.abc import Iterable, Sequence

from pdserve.core.blocks import BlockHash, HeldBlocks, KVEvent, KVEventKind, Tier
from pdserve.core.tiers import TierNews
from pdserve.kvcache.tier_index import TierIndex


class PrefixCache:
    """An exact map of computed or verified blocks.

    A hash is held by one block: a second block with the same tokens stays anonymous. Events are numbered
    from 1 without gaps and wait until drained. They tell what this engine need not compute, and where it
    lies at the nearest: here, or in a tier.
    """

    def __init__(self, tiers: TierIndex | None = None) -> None:
        self._tiers = tiers or TierIndex()
        self._blocks: dict[BlockHash, int] = {}
        self._hashes: dict[int, BlockHash] = {}
        self._events: list[KVEvent] = []
        self._last_number = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def last_number(self) -> int:
        """Of the last event recorded, drained or not."""
        return self._last_number

    def held(self) -> HeldBlocks:
        """Everything held here, oldest first, or in a tier."""
        below: dict[Tier, list[BlockHash]] = {tier: [] for tier in Tier}
        for block_hash, tier in self._tiers.items():
            if block_hash not in self._blocks:
                below[tier].append(block_hash)
        return {None: tuple(self._blocks), **{tier: tuple(hashes) for tier, hashes in below.items()}}

    def hear(self, news: TierNews) -> None:
        """What the tiers hold has changed."""
        self._record_left(moved for moved in self._tiers.apply(news) if moved not in self._blocks)

    def hash_of(self, block_id: int) -> BlockHash | None:
        return self._hashes.get(block_id)

    def lookup(self, hashes: Iterable[BlockHash]) -> tuple[int, ...]:
        """Blocks of the longest cached prefix of a chain of hashes."""
        found = []
        for block_hash in hashes:
            block_id = self._blocks.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return tuple(found)

    def insert(self, hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> list[int]:
        """Publish full blocks; returns the ids that now hold their hash (new ones only)."""
        stored = []
        for block_hash, block_id in zip(hashes, block_ids, strict=True):
            if block_hash in self._blocks or block_id in self._hashes:
                continue
            self._blocks[block_hash] = block_id
            self._hashes[block_id] = block_hash
            stored.append(block_id)
        self._record(KVEventKind.STORED, [self._hashes[block_id] for block_id in stored])
        return stored

    def forget(self, block_ids: Iterable[int]) -> None:
        """These blocks are about to be overwritten."""
        removed = []
        for block_id in block_ids:
            block_hash = self._hashes.pop(block_id, None)
            if block_hash is not None:
                del self._blocks[block_hash]
                removed.append(block_hash)
        self._record_left(removed)

    def drain_events(self) -> list[KVEvent]:
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        """Both maps must mirror each other; raises AssertionError. For tests."""
        assert {b: h for h, b in self._blocks.items()} == self._hashes, "hash and block maps disagree"

    def _record_left(self, hashes: Iterable[BlockHash]) -> None:
        """These do not lie here: they are in a tier, or nowhere."""
        places: dict[Tier | None, list[BlockHash]] = {}
        for block_hash in hashes:
            places.setdefault(self._tiers.where(block_hash), []).append(block_hash)
        for tier, found in places.items():
            self._record(KVEventKind.REMOVED if tier is None else KVEventKind.STORED, found, tier)

    def _record(self, kind: KVEventKind, hashes: list[BlockHash], tier: Tier | None = None) -> None:
        if hashes:
            self._last_number += 1
            self._events.append(KVEvent(number=self._last_number, kind=kind, hashes=tuple(hashes), tier=tier))
