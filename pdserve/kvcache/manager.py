"""The scheduler's view of KV: block tables of sequences, prefix hits, leases of tickets, quarantine."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.core.blocks import BlockHash, KVEvent, next_block_hash
from pdserve.core.endpoint import BlockCounts
from pdserve.kvcache.block_pool import BlockPool, BlockState
from pdserve.kvcache.prefix_cache import PrefixCache


class KVOwner(Protocol):
    """What the manager needs to know of a sequence.

    block_hashes is filled by the manager and kept by the owner, so that waiting costs no rehashing.
    """

    @property
    def sequence_id(self) -> int: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def namespace(self) -> bytes: ...

    @property
    def block_hashes(self) -> list[BlockHash]: ...


@dataclass(slots=True)
class _Table:
    block_ids: list[int] = field(default_factory=list)
    num_published: int = 0


class KVCacheManager:
    """Owns every block of one device pool. Not thread-safe: one scheduler calls it."""

    def __init__(self, *, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache()
        self._tables: dict[int, _Table] = {}
        self._tickets: dict[str, tuple[int, ...]] = {}

    @property
    def num_cooling(self) -> int:
        """Blocks that become free without anybody's doing once the steps in flight have completed."""
        return self._pool.num_cooling

    def counts(self) -> BlockCounts:
        return self._pool.counts()

    def block_ids(self, owner: KVOwner, num_tokens: int) -> tuple[int, ...]:
        """The block table over positions [0, num_tokens)."""
        return tuple(self._tables[owner.sequence_id].block_ids[: self.blocks_for(num_tokens)])

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, owner: KVOwner, limit: int) -> tuple[int, ...]:
        """Blocks of the longest cached prefix of at most limit tokens; only whole blocks are hit.

        A sequence that must compute passes its length − 1, because sampling needs the last token's
        logits and those are not cached."""
        if not self._prefix_caching:
            return ()
        num_blocks = limit // self.block_size
        self._extend_hashes(owner, num_blocks)
        return self._cache.lookup(owner.block_hashes[:num_blocks])

    def allocate(self, owner: KVOwner, upto_tokens: int, hit: Sequence[int] = ()) -> bool:
        """Give the sequence blocks for positions [0, upto_tokens): all of them, or none and False.

        hit, allowed for a sequence that holds nothing yet, comes from match within the same call of
        the scheduler and becomes the start of its table."""
        table = self._tables.get(owner.sequence_id)
        if hit and table is not None:
            raise ValueError(f"sequence {owner.sequence_id} already has blocks; a prefix hit comes first")
        held = len(table.block_ids) if table else len(hit)
        missing = max(0, self.blocks_for(upto_tokens) - held)
        unused_hits = sum(self._pool.state(block_id) is BlockState.FREE for block_id in hit)
        if missing > self._pool.num_free - unused_hits:
            return False
        self._pool.reference(hit)
        taken = self._pool.take(missing)
        self._cache.forget(taken)
        if table is None:
            table = self._tables[owner.sequence_id] = _Table(list(hit), len(hit))
        table.block_ids.extend(taken)
        return True

    def commit(self, owner: KVOwner, num_computed: int) -> None:
        """KV of positions [0, num_computed) is final: its step was collected, or its bytes verified.

        Blocks that are full by it become hits for others."""
        if not self._prefix_caching:
            return
        table = self._tables[owner.sequence_id]
        full = num_computed // self.block_size
        if full <= table.num_published:
            return
        self._extend_hashes(owner, full)
        news = slice(table.num_published, full)
        for block_id in self._cache.insert(owner.block_hashes[news], table.block_ids[news]):
            self._pool.mark_cached(block_id)
        table.num_published = full

    def free(self, owner: KVOwner, after_step: int) -> None:
        """The sequence lets go of all its blocks; reusable once step after_step has completed.

        A sequence without blocks is fine. Leases and quarantine outlive it."""
        table = self._tables.pop(owner.sequence_id, None)
        if table is not None:
            self._pool.free(table.block_ids, after_step)

    def completed(self, step: int) -> None:
        """Every step up to this one has completed."""
        self._pool.completed(step)

    def lease(self, owner: KVOwner, ticket_id: str, num_tokens: int) -> tuple[int, ...]:
        """Promise the blocks of positions [0, num_tokens) to a ticket; returns them in logical order."""
        if ticket_id in self._tickets:
            raise ValueError(f"ticket {ticket_id} already has a lease")
        blocks = self.block_ids(owner, num_tokens)
        self._pool.lease(blocks)
        self._tickets[ticket_id] = blocks
        return blocks

    def release(self, ticket_id: str) -> bool:
        """End a ticket's lease; False when it has none (any more)."""
        blocks = self._tickets.pop(ticket_id, None)
        if blocks is None:
            return False
        self._pool.unlease(blocks)
        return True

    def quarantine(self, block_ids: Iterable[int]) -> None:
        """A transfer may still write into these blocks of a live sequence; call before freeing it."""
        self._pool.quarantine(block_ids)

    def unquarantine(self, block_ids: Iterable[int]) -> None:
        self._pool.unquarantine(block_ids)

    def drain_events(self) -> list[KVEvent]:
        return self._cache.drain_events()

    def snapshot(self) -> tuple[int, tuple[BlockHash, ...]]:
        """(number of the last event, hashes of all cached blocks)."""
        return self._cache.last_number, self._cache.hashes()

    def check(self) -> None:
        """Audit every count against the tables and tickets; raises AssertionError. For tests."""
        self._pool.check()
        self._cache.check()
        counts = self.counts()
        parts = counts.free + counts.used + counts.leased + counts.quarantined
        assert parts == counts.total == self.num_blocks, f"block states do not add up: {counts}"
        held = Counter(b for table in self._tables.values() for b in table.block_ids)
        leased = Counter(b for blocks in self._tickets.values() for b in blocks)
        for block_id in range(self.num_blocks):
            assert self._pool.references(block_id) == held[block_id], f"references of block {block_id} are off"
            assert self._pool.leases(block_id) == leased[block_id], f"leases of block {block_id} are off"
            shared = held[block_id] > 1
            assert not shared or self._cache.hash_of(block_id), f"block {block_id} is shared without a hash"
        for sequence_id, table in self._tables.items():
            assert len(set(table.block_ids)) == len(table.block_ids), f"sequence {sequence_id} repeats a block"
            assert table.num_published <= len(table.block_ids)

    def _extend_hashes(self, owner: KVOwner, num_blocks: int) -> None:
        hashes, size = owner.block_hashes, self.block_size
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else None
            tokens = owner.token_ids[index * size : (index + 1) * size]
            hashes.append(next_block_hash(owner.namespace, parent, tokens))
