"""Which engine holds the KV of which blocks: exact, from the engines' own numbered events."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress, islice
from typing import NamedTuple

from pdserve.core.blocks import BlockHash, KVEvent, KVEventKind, KVSnapshot, Tier
from pdserve.core.cluster import EngineKey
from pdserve.router.expected_blocks import ExpectedBlocks

_FORGOTTEN_AT_ONCE = 64
"""Of an engine's entries one in so many is forgotten when there are too many: finding the oldest costs a walk over the
gaps that forgetting leaves, which this makes rare."""
_INTERNED_MASKS = 1 << 16
_DIGITS = bytes.maketrans(b"01", bytes((0, 1)))


class BlockHit(NamedTuple):
    """Leading blocks of a chain: those announced, and those announced or likely, which are expected or were announced
    before events went missing. Of the announced ones, in_host and in_disk lie in a tier below the device pool."""

    blocks: int
    likely_blocks: int
    in_host: int = 0
    in_disk: int = 0


@dataclass(slots=True)
class _Slot:
    """One incarnation's bit in the holders' masks. A bit is used again only once it is swept from all masks."""

    bit: int
    hashes: dict[BlockHash, None] = field(default_factory=dict)
    """As an ordered set: the oldest first."""
    below: dict[BlockHash, Tier] = field(default_factory=dict)
    """Those of them that lie in a tier only."""
    last_number: int | None = None
    """The last event taken in; None until a snapshot is complete."""
    seen: int = 0
    """The last event that came, before others that are missing."""


class KVIndex:
    """Block hash → engines, as bit masks, so that a few looks along a chain find every engine's longest prefix.

    A chain is searched by bisection: engines keep the earlier blocks of a chain longer than the later ones, so the
    masks along it only lose bits. Should an engine have lost a block in the middle, its prefix may be taken for longer
    than it is; the engine then computes the block and announces it.

    Not thread-safe. Events of one incarnation must be applied in the order they came in; a gap is noticed by
    their numbers and answered by asking for what is missing; until it comes, what was known before is likely and no
    more. An incarnation that is dropped is forgotten at once;
    its memory is reclaimed a little with every later event. Of more than max_blocks entries, each of one block on one
    engine, the engine that has most loses its oldest.

    `expect` notes blocks of a prompt just dispatched: they count as likely until the engine announces them, which
    tells more, until `retract`, and for `patience` seconds at most. Of more than max_expected the oldest go.
    """

    def __init__(self, *, max_blocks: int = 10_000_000, max_expected: int = 1 << 20, patience: float = 10.0) -> None:
        self._max_blocks = max_blocks
        self._slots: dict[EngineKey, _Slot] = {}
        self._keys: list[EngineKey | None] = []
        """By the place of their bit; None where it is free."""
        self._doubtful: set[EngineKey] = set()
        """Those of whose events some are missing."""
        self._tiered: set[EngineKey] = set()
        """Those that have announced blocks in a tier."""
        self._live = 0
        """The bits of all of them."""
        self._holders: dict[BlockHash, int] = {}
        self._masks: dict[int, int] = {}
        """Equal masks are one object: most blocks are held by one of few combinations of engines."""
        self._expected = ExpectedBlocks(patience, max_expected)
        self._retired: deque[_Slot] = deque()
        self._free_bits: list[int] = []
        self._num_bits = 0
        self._num_blocks = 0
        self.num_forgotten = 0
        """Entries given up for lack of room since the start."""

    def __len__(self) -> int:
        """Blocks known of live engines, each counted once per engine."""
        return self._num_blocks

    def held_by(self, key: EngineKey) -> int:
        """Blocks known of one engine."""
        slot = self._slots.get(key)
        return len(slot.hashes) if slot else 0

    def last_number(self, key: EngineKey) -> int | None:
        """Of the last event of an incarnation that was taken in; None before its first snapshot is complete."""
        slot = self._slots.get(key)
        return slot.last_number if slot else None

    def match(self, hashes: Sequence[BlockHash], now: float) -> dict[EngineKey, BlockHit]:
        """Longest known prefix of a chain per engine; engines that hold none of it are left out. What is expected
        counts where it goes on from what is announced."""
        found: dict[EngineKey, BlockHit] = {}
        for depth, mask in self._depths(hashes):
            found.update(dict.fromkeys(self._keys_in(mask), BlockHit(depth, depth)))
        for key, blocks in self._expected.by_engine.items():
            hit = found.get(key)
            held = hit.blocks if hit else 0
            if held < len(hashes) and blocks.get(hashes[held], now) > now:
                likely = _end_of_run(hashes, held, partial(_is_awaited, blocks, now))
                found[key] = BlockHit(held, likely)
        for key in self._doubtful & found.keys():
            found[key] = BlockHit(0, found[key].likely_blocks)
        for key in (self._tiered & found.keys()) - self._doubtful:
            found[key] = self._with_tiers(key, hashes, found[key])
        return found

    def _depths(self, hashes: Sequence[BlockHash]) -> Iterator[tuple[int, int]]:
        """(depth, mask of the engines that hold so many leading blocks and no more), the deepest last.

        Every look may miss the processor's caches, so what is found at a place is kept for the engines that hold more:
        places behind depth that lacked some, the nearest last."""
        holders, depth = self._holders, 0
        behind: list[tuple[int, int]] = []
        mask = holders.get(hashes[0], 0) & self._live if hashes else 0
        while mask:
            held = mask
            while behind and behind[-1][1] & held == held:
                depth = behind.pop()[0] + 1
            end = behind[-1][0] if behind else len(hashes)
            while depth < end:
                middle = (depth + end) // 2
                there = holders.get(hashes[middle], 0)
                if there & held == held:
                    depth = middle + 1
                else:
                    behind.append((middle, there))
                    end = middle
            mask = behind[-1][1] & held if behind else 0
            yield depth, held & ~mask

    def _keys_in(self, mask: int) -> Iterator[EngineKey]:
        """Of the engines whose bits are set, those with the lowest bits first."""
        lowest_first = bin(mask)[:1:-1].encode().translate(_DIGITS)
        return compress(self._keys, lowest_first)  # type: ignore[arg-type]  # None has no bit set

    def _with_tiers(self, key: EngineKey, chain: Sequence[BlockHash], hit: BlockHit) -> BlockHit:
        below = self._slots[key].below
        tiers = [below[block_hash] for block_hash in chain[: hit.blocks] if block_hash in below]
        return BlockHit(hit.blocks, hit.likely_blocks, tiers.count(Tier.HOST), tiers.count(Tier.DISK))

    def apply(self, key: EngineKey, events: Sequence[KVEvent]) -> bool:
        """Take in events of one incarnation; False when some before them are missing, or no snapshot has
        come yet: ask for what follows `last_number`. Events seen before are skipped."""
        slot = self._slot(key)
        for event in events:
            if slot.last_number is None or event.number > slot.last_number + 1:
                slot.seen = max(slot.seen, events[-1].number)
                self._doubtful.add(key)
                return False
            if event.number == slot.last_number + 1:
                self._take(key, slot, event)
                slot.last_number = event.number
                self._settle(key, slot)
        self._sweep(1024)
        return True

    def restore(self, key: EngineKey, snapshot: KVSnapshot) -> None:
        """Begin an incarnation's entries anew with the first part of a snapshot, add the others."""
        if snapshot.first:
            self.drop(key)
        slot = self._slot(key)
        self._store(key, slot, snapshot.hashes, snapshot.tier)
        if snapshot.last:
            slot.last_number = snapshot.number
            self._settle(key, slot)
        self._sweep(1024)

    def _settle(self, key: EngineKey, slot: _Slot) -> None:
        """What is known of an incarnation is certain again once nothing is missing of what was seen of it."""
        if slot.last_number is not None and slot.last_number >= slot.seen:
            self._doubtful.discard(key)

    def expect(self, key: EngineKey, hashes: Sequence[BlockHash], now: float) -> None:
        """The engine is about to hold these blocks, if it does not already."""
        bit, holders = self._slot(key).bit, self._holders
        held = _end_of_run(hashes, 0, lambda block_hash: bool(holders.get(block_hash, 0) & bit))
        if held < len(hashes):
            self._expected.add(key, hashes[held:], now)

    def retract(self, key: EngineKey, hashes: Sequence[BlockHash], since: float) -> None:
        """What was expected at that time will not come. Blocks that somebody has expected anew are left alone."""
        self._expected.retract(key, hashes, since)

    @property
    def num_expected(self) -> int:
        """Blocks expected somewhere; those that have been for too long go with the next `expect`."""
        return len(self._expected)

    def drop(self, key: EngineKey) -> None:
        """Forget an incarnation."""
        self._expected.forget(key)
        self._tiered.discard(key)
        self._doubtful.discard(key)
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._keys[_place(slot.bit)] = None
            self._live &= ~slot.bit
            self._num_blocks -= len(slot.hashes)
            self._retired.append(slot)

    def _slot(self, key: EngineKey) -> _Slot:
        slot = self._slots.get(key)
        if slot is None:
            if not self._free_bits:
                self._free_bits.append(1 << self._num_bits)
                self._num_bits += 1
                self._keys.append(None)
            slot = self._slots[key] = _Slot(self._free_bits.pop())
            self._keys[_place(slot.bit)] = key
            self._live |= slot.bit
        return slot

    def _take(self, key: EngineKey, slot: _Slot, event: KVEvent) -> None:
        match event.kind:
            case KVEventKind.STORED:
                self._store(key, slot, event.hashes, event.tier)
            case KVEventKind.REMOVED:
                self._remove(slot, event.hashes)
            case KVEventKind.CLEARED:
                self._remove(slot, tuple(slot.hashes))

    def _store(self, key: EngineKey, slot: _Slot, hashes: Sequence[BlockHash], tier: Tier | None) -> None:
        holders, own, bit = self._holders, slot.hashes, slot.bit
        for block_hash in hashes:
            if block_hash not in own:
                own[block_hash] = None
                mask = holders.get(block_hash, 0)
                holders[block_hash] = self._interned(mask | bit) if mask else bit
                self._num_blocks += 1
            if tier is not None:
                slot.below[block_hash] = tier
                self._tiered.add(key)
            elif slot.below:
                slot.below.pop(block_hash, None)
        self._expected.arrived(key, hashes)
        if self._num_blocks > self._max_blocks:
            self._make_room()

    def _remove(self, slot: _Slot, hashes: Sequence[BlockHash]) -> None:
        for block_hash in hashes:
            if block_hash in slot.hashes:
                del slot.hashes[block_hash]
                slot.below.pop(block_hash, None)
                self._clear(block_hash, slot.bit)
                self._num_blocks -= 1

    def _make_room(self) -> None:
        """The engine that has most loses its oldest entries."""
        while self._num_blocks > self._max_blocks:
            slot = max(self._slots.values(), key=lambda slot: len(slot.hashes))
            surplus = max(self._num_blocks - self._max_blocks, len(slot.hashes) // _FORGOTTEN_AT_ONCE)
            oldest = tuple(islice(slot.hashes, min(surplus, len(slot.hashes))))
            self._remove(slot, oldest)
            self.num_forgotten += len(oldest)

    def _clear(self, block_hash: BlockHash, bit: int) -> None:
        mask = self._holders[block_hash] & ~bit
        if mask:
            self._holders[block_hash] = self._interned(mask)
        else:
            del self._holders[block_hash]

    def _interned(self, mask: int) -> int:
        if len(self._masks) >= _INTERNED_MASKS:
            self._masks.clear()
        return self._masks.setdefault(mask, mask)

    def _sweep(self, most: int) -> None:
        """Reclaim up to so many entries of dropped incarnations."""
        while self._retired and most:
            slot = self._retired[0]
            while slot.hashes and most:
                self._clear(slot.hashes.popitem()[0], slot.bit)
                most -= 1
            if slot.hashes:
                return
            self._free_bits.append(slot.bit)
            self._retired.popleft()


def _end_of_run(hashes: Sequence[BlockHash], start: int, is_in: Callable[[BlockHash], bool]) -> int:
    """The first place from start on whose hash is not in, given that those before a hash that is in are in, too."""
    end = len(hashes)
    while start < end:
        middle = (start + end) // 2
        if is_in(hashes[middle]):
            start = middle + 1
        else:
            end = middle
    return start


def _place(bit: int) -> int:
    return bit.bit_length() - 1


def _is_awaited(until: Mapping[BlockHash, float], now: float, block_hash: BlockHash) -> bool:
    return until.get(block_hash, now) > now
