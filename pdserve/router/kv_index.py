"""Which engine holds the KV of which blocks: exact, from the engines' own numbered events."""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pdserve.core.blocks import BlockHash, KVEvent, KVEventKind, KVSnapshot, Tier
from pdserve.core.cluster import EngineKey

_NOBODY = 0, 0.0
"""No engine is expected to hold a block, until time 0."""


@dataclass(frozen=True, slots=True)
class BlockHit:
    """Leading blocks of a chain: those announced, and those announced or expected. Of the announced ones, in_host and
    in_disk lie in a tier below the device pool."""

    blocks: int
    likely_blocks: int
    in_host: int = 0
    in_disk: int = 0


@dataclass(slots=True)
class _Slot:
    """One incarnation's bit in the holders' masks. A bit is used again only once it is swept from all masks."""

    bit: int
    hashes: set[BlockHash] = field(default_factory=set)
    below: dict[BlockHash, Tier] = field(default_factory=dict)
    """Those of them that lie in a tier only."""
    last_number: int | None = None
    """The last event taken in; None until a snapshot is complete."""
    lost: bool = False
    """Events are missing: nothing is taken in before the next snapshot."""


class KVIndex:
    """Block hash → engines, as bit masks, so that one walk along a chain finds every engine's longest prefix.

    Not thread-safe. Events of one incarnation must be applied in the order they came in; a gap is noticed by
    their numbers and answered by asking for a snapshot. An incarnation that is dropped is forgotten at once;
    its memory is reclaimed a little with every later event. At most max_blocks hashes are kept per engine,
    and max_expected expectations in all.

    `expect` notes blocks of a prompt just dispatched: they count as likely until the engine announces them, which
    tells more, until `retract`, and for `patience` seconds at most.
    """

    def __init__(self, *, max_blocks: int = 1 << 20, max_expected: int = 1 << 16, patience: float = 10.0) -> None:
        self._max_blocks = max_blocks
        self._max_expected = max_expected
        self._patience = patience
        self._slots: dict[EngineKey, _Slot] = {}
        self._keys: dict[int, EngineKey] = {}
        self._holders: dict[BlockHash, int] = {}
        self._expected: OrderedDict[BlockHash, tuple[int, float]] = OrderedDict()
        self._retired: deque[_Slot] = deque()
        self._free_bits: list[int] = []
        self._num_bits = 0

    def __len__(self) -> int:
        """Blocks known of live engines, each counted once per engine."""
        return sum(len(slot.hashes) for slot in self._slots.values())

    def match(self, hashes: Sequence[BlockHash], now: float) -> dict[EngineKey, BlockHit]:
        """Longest known prefix of a chain per engine; engines that hold none of it are left out."""
        holders, expected = self._holders, self._expected
        exact = likely = sum(self._keys)
        blocks: dict[int, int] = {}
        likely_blocks: dict[int, int] = {}
        for depth, block_hash in enumerate(hashes):
            held = holders.get(block_hash, 0)
            some = held | self._expected_mask(block_hash, now) if expected else held
            if gone := exact & ~held:
                blocks.update(dict.fromkeys(_bits(gone), depth))
                exact &= held
            if gone := likely & ~some:
                likely_blocks.update(dict.fromkeys(_bits(gone), depth))
                likely &= some
                if not likely:
                    break
        blocks.update(dict.fromkeys(_bits(exact), len(hashes)))
        likely_blocks.update(dict.fromkeys(_bits(likely), len(hashes)))
        found = {self._keys[bit]: (blocks[bit], depth) for bit, depth in likely_blocks.items() if depth}
        return {key: self._hit(key, hashes[:exact], exact, depth) for key, (exact, depth) in found.items()}

    def _hit(self, key: EngineKey, chain: Sequence[BlockHash], blocks: int, likely_blocks: int) -> BlockHit:
        below = self._slots[key].below
        if not below:
            return BlockHit(blocks, likely_blocks)
        tiers = [below[block_hash] for block_hash in chain if block_hash in below]
        return BlockHit(blocks, likely_blocks, tiers.count(Tier.HOST), tiers.count(Tier.DISK))

    def apply(self, key: EngineKey, events: Sequence[KVEvent]) -> bool:
        """Take in events of one incarnation; False when some before them are missing, or no snapshot has
        come yet: ask for one. Events seen before are skipped."""
        slot = self._slot(key)
        for event in events:
            if slot.last_number is None or slot.lost or event.number > slot.last_number + 1:
                slot.lost = True
                return False
            if event.number == slot.last_number + 1:
                self._take(slot, event)
                slot.last_number = event.number
        self._sweep(1024)
        return True

    def restore(self, key: EngineKey, snapshot: KVSnapshot) -> None:
        """Begin an incarnation's entries anew with the first part of a snapshot, add the others."""
        if snapshot.first:
            self.drop(key)
        slot = self._slot(key)
        self._store(slot, snapshot.hashes, snapshot.tier)
        if snapshot.last:
            slot.last_number = snapshot.number
            slot.lost = False
        self._sweep(1024)

    def expect(self, key: EngineKey, hashes: Sequence[BlockHash], now: float) -> None:
        """The engine is about to hold these blocks, if it does not already."""
        slot, until = self._slot(key), now + self._patience
        bit = slot.bit
        for block_hash in hashes:
            if block_hash in slot.hashes:
                continue
            mask, old = self._expected.pop(block_hash, _NOBODY)
            self._expected[block_hash] = (mask | bit if now < old else bit, until)
        while self._expected and (len(self._expected) > self._max_expected or self._oldest_until() <= now):
            self._expected.popitem(last=False)

    def retract(self, key: EngineKey, hashes: Sequence[BlockHash], since: float) -> None:
        """What was expected at that time will not come. Blocks that somebody has expected anew are left alone."""
        slot, until = self._slots.get(key), since + self._patience
        if slot is None:
            return
        for block_hash in hashes:
            if self._expected.get(block_hash, _NOBODY)[1] == until:
                self._forget_expectation(block_hash, slot.bit)

    @property
    def num_expected(self) -> int:
        """Blocks expected somewhere; those that have been for too long go with the next `expect`."""
        return len(self._expected)

    def drop(self, key: EngineKey) -> None:
        """Forget an incarnation."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            del self._keys[slot.bit]
            self._retired.append(slot)

    def _slot(self, key: EngineKey) -> _Slot:
        slot = self._slots.get(key)
        if slot is None:
            if not self._free_bits:
                self._free_bits.append(1 << self._num_bits)
                self._num_bits += 1
            slot = self._slots[key] = _Slot(self._free_bits.pop())
            self._keys[slot.bit] = key
        return slot

    def _take(self, slot: _Slot, event: KVEvent) -> None:
        match event.kind:
            case KVEventKind.STORED:
                self._store(slot, event.hashes, event.tier)
            case KVEventKind.REMOVED:
                self._remove(slot, event.hashes)
            case KVEventKind.CLEARED:
                self._remove(slot, tuple(slot.hashes))

    def _store(self, slot: _Slot, hashes: Sequence[BlockHash], tier: Tier | None) -> None:
        for block_hash in hashes:
            if block_hash not in slot.hashes:
                if len(slot.hashes) >= self._max_blocks:
                    continue
                slot.hashes.add(block_hash)
                self._holders[block_hash] = self._holders.get(block_hash, 0) | slot.bit
                self._forget_expectation(block_hash, slot.bit)
            if tier is None:
                slot.below.pop(block_hash, None)
            else:
                slot.below[block_hash] = tier

    def _remove(self, slot: _Slot, hashes: Sequence[BlockHash]) -> None:
        for block_hash in hashes:
            if block_hash in slot.hashes:
                slot.hashes.remove(block_hash)
                slot.below.pop(block_hash, None)
                self._clear(block_hash, slot.bit)

    def _clear(self, block_hash: BlockHash, bit: int) -> None:
        mask = self._holders[block_hash] & ~bit
        if mask:
            self._holders[block_hash] = mask
        else:
            del self._holders[block_hash]

    def _sweep(self, most: int) -> None:
        """Reclaim up to so many entries of dropped incarnations."""
        while self._retired and most:
            slot = self._retired[0]
            while slot.hashes and most:
                self._clear(slot.hashes.pop(), slot.bit)
                most -= 1
            if slot.hashes:
                return
            self._forget_expectations(slot.bit)
            self._free_bits.append(slot.bit)
            self._retired.popleft()

    def _forget_expectations(self, bit: int) -> None:
        for block_hash in list(self._expected):
            self._forget_expectation(block_hash, bit)

    def _forget_expectation(self, block_hash: BlockHash, bit: int) -> None:
        mask, until = self._expected.get(block_hash, _NOBODY)
        if mask == bit:
            del self._expected[block_hash]
        elif mask & bit:
            self._expected[block_hash] = (mask & ~bit, until)

    def _oldest_until(self) -> float:
        """All wait equally long, so the oldest expectation is the first to end."""
        return next(iter(self._expected.values()))[1]

    def _expected_mask(self, block_hash: BlockHash, now: float) -> int:
        mask, until = self._expected.get(block_hash, _NOBODY)
        return mask if now < until else 0


def _bits(mask: int) -> Iterator[int]:
    """The set bits of a mask, each as a mask."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit
