"""The scheduler's view of KV: block tables of sequences, prefix hits, leases of tickets and loans, quarantine, and
what is saved to the tiers below.

A block is copied to the host tier in the background as soon as it is cached, not when it is about to be lost: so
handing out a block never waits for a copy, the copy runs while its sequence still computes, and the death of the
engine finds on disk what it can. Until the copy is done the block is held like a leased one.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.core.blocks import BlockHash, HeldBlocks, KVEvent, next_block_hash
from pdserve.core.endpoint import BlockCounts, most_lent
from pdserve.core.tiers import SavedBlock, Tier, TierNews
from pdserve.kvcache.block_pool import BlockPool, BlockState
from pdserve.kvcache.prefix_cache import PrefixCache
from pdserve.kvcache.tier_index import SaveQueue, TierIndex

_SAVING_SHARE = 2
"""At most this part of the blocks is being copied to the tiers at a time."""


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
    """A sequence's blocks, to which others are only ever added. told: the last part of it that was asked for."""

    block_ids: list[int] = field(default_factory=list)
    num_published: int = 0
    told: tuple[int, ...] = ()


class KVCacheManager:
    """Owns every block of one device pool. Not thread-safe: one scheduler calls it.

    With a tier index, blocks are offered to the tiers (take_saves) and found there (match_tiers)."""

    def __init__(
        self, *, num_blocks: int, block_size: int, prefix_caching: bool = True, tiers: TierIndex | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._pool = BlockPool(num_blocks)
        self._tables: dict[int, _Table] = {}
        self._tickets: dict[str, tuple[int, ...]] = {}
        self._loans: dict[str, tuple[int, ...]] = {}
        self._borrowed: set[int] = set()
        self._tiers = tiers or TierIndex()
        self._cache = PrefixCache(self._tiers)
        self._saves = SaveQueue(self._tiers, limit=max(1, num_blocks // _SAVING_SHARE) if tiers is not None else 0)

    @property
    def num_cooling(self) -> int:
        """Blocks that become free without anybody's doing: once the steps in flight have completed, or once
        they are copied."""
        only_saved = sum(
            not self._pool.references(block) and self._pool.leases(block) == 1 for block in self._saves.blocks
        )
        return self._pool.num_cooling + only_saved

    def counts(self) -> BlockCounts:
        return self._pool.counts()

    def block_ids(self, owner: KVOwner, num_tokens: int) -> tuple[int, ...]:
        """The block table over positions [0, num_tokens); the same object while it stays the same."""
        table, count = self._tables[owner.sequence_id], self.blocks_for(num_tokens)
        if len(table.told) != count:
            table.told = tuple(table.block_ids[:count])
        return table.told

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
        if table is not None and upto_tokens <= len(table.block_ids) * self.block_size:
            return True
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
            self._note_use(owner, len(hit))
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
            self._save(block_id)
        table.num_published = full

    def forget(self, owner: KVOwner) -> None:
        """The sequence's KV is not to be trusted: its blocks are hits for others no more, nor is what a tier holds of
        them, unless others use them already; a sequence without blocks is fine."""
        if table := self._tables.get(owner.sequence_id):
            own = [block_id for block_id in table.block_ids if self._pool.references(block_id) == 1]
            wrong = [block_hash for block_id in own if (block_hash := self._cache.hash_of(block_id))]
            self._tiers.distrust(wrong)
            self._saves.delete(wrong)
            self._cache.forget(own)

    def match_tiers(self, owner: KVOwner, num_hit_blocks: int, limit: int) -> tuple[Tier, ...]:
        """Where the blocks lie that continue a device hit, up to limit tokens, as far as they lie anywhere."""
        if not self._prefix_caching:
            return ()
        num_blocks = limit // self.block_size
        self._extend_hashes(owner, num_blocks)
        return self._tiers.run(owner.block_hashes[num_hit_blocks:num_blocks])

    @property
    def leased_share(self) -> float:
        """Of the blocks, those that are leased, or being copied to a tier."""
        return self._pool.num_leased / self.num_blocks

    def take_saves(self) -> tuple[tuple[SavedBlock, ...], tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """(blocks to copy to the tiers, held until saved; hashes sequences have found in the pool; hashes of blocks
        that were computed wrong)."""
        return self._saves.take()

    def hear(self, news: TierNews) -> None:
        """What the tiers hold has changed."""
        self._cache.hear(news)

    def saved(self, block_ids: Sequence[int]) -> None:
        """Nobody copies these blocks any more."""
        self._saves.done(block_ids)
        self._pool.unlease(block_ids)

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
        self._tickets[ticket_id] = ()
        return self.extend_lease(owner, ticket_id, num_tokens)

    def extend_lease(self, owner: KVOwner, ticket_id: str, num_tokens: int) -> tuple[int, ...]:
        """lease, for a ticket that has some of the blocks already and whose owner has kept them."""
        blocks, leased = self.block_ids(owner, num_tokens), self._tickets[ticket_id]
        self._pool.lease(blocks[len(leased) :])
        self._tickets[ticket_id] = blocks
        return blocks

    def lend(self, ticket_id: str, hashes: Sequence[BlockHash]) -> tuple[int, ...]:
        """Lease the longest cached prefix of a chain to another engine's ticket, as far as so much may be lent;
        perhaps nothing, and then there is no lease."""
        if ticket_id in self._tickets or ticket_id in self._loans:
            raise ValueError(f"ticket {ticket_id} already has a lease")
        room = max(0, most_lent(self.num_blocks) - sum(map(len, self._loans.values())))
        blocks = self._cache.lookup(hashes[:room])
        if blocks:
            self._pool.lease(blocks)
            self._loans[ticket_id] = blocks
        return blocks

    def release(self, ticket_id: str) -> bool:
        """End the lease of a ticket or a loan; False when it has none (any more)."""
        blocks = self._tickets.pop(ticket_id, None) or self._loans.pop(ticket_id, None)
        if blocks is None:
            return False
        self._pool.unlease(blocks)
        return True

    def borrow(self, most: int) -> tuple[int, ...]:
        """At most so many free blocks, and no more than are spare, for a use that is no sequence's; perhaps none. Freed
        by give_back."""
        taken = self._pool.take(min(most, self.counts().spare))
        self._cache.forget(taken)
        self._borrowed.update(taken)
        return tuple(taken)

    def continuation(self, hashes: Sequence[BlockHash]) -> tuple[int, tuple[Tier, ...]]:
        """(how many blocks of a chain are cached here, the tiers of those behind, as far as they lie in one)."""
        here = len(self._cache.lookup(hashes))
        return here, self._tiers.run(hashes[here:])

    def adopt(self, hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> None:
        """The first of these borrowed blocks hold verified KV under these hashes: they become hits for others. All are
        given back."""
        for block_id in self._cache.insert(hashes, block_ids[: len(hashes)]):
            self._pool.mark_cached(block_id)
        self.give_back(block_ids)

    def give_back(self, block_ids: Sequence[int]) -> None:
        """No step has touched them, so they are free at once."""
        self._borrowed.difference_update(block_ids)
        self._pool.free(block_ids, after_step=-1)

    def quarantine(self, block_ids: Iterable[int]) -> None:
        """A transfer may still write into these blocks of a live sequence; call before freeing it."""
        self._pool.quarantine(block_ids)

    def unquarantine(self, block_ids: Iterable[int]) -> None:
        self._pool.unquarantine(block_ids)

    def drain_events(self) -> list[KVEvent]:
        return self._cache.drain_events()

    def snapshot(self) -> tuple[int, HeldBlocks]:
        """(number of the last event, all cached blocks)."""
        return self._cache.last_number, self._cache.held()

    def check(self) -> None:
        """Audit every count against the tables and tickets; raises AssertionError. For tests."""
        self._pool.check()
        self._cache.check()
        counts = self.counts()
        parts = counts.free + counts.used + counts.leased + counts.quarantined
        assert parts == counts.total == self.num_blocks, f"block states do not add up: {counts}"
        held = Counter(b for table in self._tables.values() for b in table.block_ids) + Counter(self._borrowed)
        promised = (*self._tickets.values(), *self._loans.values(), self._saves.blocks)
        leased = Counter(b for blocks in promised for b in blocks)
        for block_id in range(self.num_blocks):
            assert self._pool.references(block_id) == held[block_id], f"references of block {block_id} are off"
            assert self._pool.leases(block_id) == leased[block_id], f"leases of block {block_id} are off"
            shared = held[block_id] > 1
            assert not shared or self._cache.hash_of(block_id), f"block {block_id} is shared without a hash"
        for sequence_id, table in self._tables.items():
            assert len(set(table.block_ids)) == len(table.block_ids), f"sequence {sequence_id} repeats a block"
            assert table.num_published <= len(table.block_ids)

    def _save(self, block_id: int) -> None:
        block_hash = self._cache.hash_of(block_id)
        if block_hash is not None and self._saves.add(block_hash, block_id):
            self._pool.lease([block_id])

    def _note_use(self, owner: KVOwner, num_hit_blocks: int) -> None:
        if self._tiers.num_blocks:
            self._saves.use(owner.block_hashes[:num_hit_blocks])

    def _extend_hashes(self, owner: KVOwner, num_blocks: int) -> None:
        hashes, size = owner.block_hashes, self.block_size
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else None
            tokens = owner.token_ids[index * size : (index + 1) * size]
            hashes.append(next_block_hash(owner.namespace, parent, tokens))
