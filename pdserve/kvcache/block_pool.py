"""Who holds each block of the device pool, and which block is handed out next.

A block may be referenced by sequences, leased to tickets and quarantined at once; it is counted once,
by precedence (the design's quarantined > leased > used > free):

    QUARANTINED  a transfer may still write into it
    LEASED       a ticket promises its bytes to another engine, or they are being copied to a tier
    USED         a live sequence references it
    COOLING      referenced by nobody, but a step submitted before it was freed may still touch it;
                 reported as used
    FREE         may be handed out; it may still hold cached KV, which a prefix hit takes back

Handed out first are free blocks without cached KV, then cached ones, least recently used first. A
sequence's blocks are freed last block first, so the later ones, useless without the earlier, go earlier.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from enum import IntEnum

from pdserve.core.endpoint import BlockCounts


class BlockState(IntEnum):
    QUARANTINED = 0
    LEASED = 1
    USED = 2
    COOLING = 3
    FREE = 4


class BlockPool:
    """Reference, lease and quarantine bookkeeping for blocks 0 … num_blocks − 1; every step is O(1) per block.

    Misuse (freeing what is free, leasing what nobody holds, …) raises ValueError: it is a bug of the caller.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._leases = [0] * num_blocks
        self._quarantined = [False] * num_blocks
        self._cached = [False] * num_blocks
        self._states = [BlockState.FREE] * num_blocks
        self._tally = [0] * len(BlockState)
        self._tally[BlockState.FREE] = num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        # Step after which a block is cool; it may be referenced again meanwhile, and freed again later.
        self._cooling: dict[int, int] = {}
        self._cooling_order: deque[tuple[int, int]] = deque()
        self._completed = -1

    @property
    def num_free(self) -> int:
        return self._tally[BlockState.FREE]

    @property
    def num_leased(self) -> int:
        return self._tally[BlockState.LEASED]

    @property
    def num_cooling(self) -> int:
        """Blocks that become free by themselves once the steps in flight have completed."""
        return self._tally[BlockState.COOLING]

    def state(self, block_id: int) -> BlockState:
        return self._states[block_id]

    def references(self, block_id: int) -> int:
        return self._references[block_id]

    def leases(self, block_id: int) -> int:
        return self._leases[block_id]

    def counts(self) -> BlockCounts:
        tally = self._tally
        return BlockCounts(
            total=self.num_blocks,
            free=tally[BlockState.FREE],
            used=tally[BlockState.USED] + tally[BlockState.COOLING],
            leased=tally[BlockState.LEASED],
            quarantined=tally[BlockState.QUARANTINED],
        )

    def take(self, count: int) -> list[int]:
        """Hand out count free blocks with one reference each; the caller forgets what they cached."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} are free")
        taken = []
        for _ in range(count):
            block_id = self._blank[-1] if self._blank else next(iter(self._evictable))
            self._references[block_id] = 1
            self._restate(block_id)
            self._cached[block_id] = False
            taken.append(block_id)
        return taken

    def reference(self, block_ids: Iterable[int]) -> None:
        """One more sequence uses these cached blocks."""
        for block_id in block_ids:
            self._require(self._cached[block_id], block_id, "shared", "its KV is not cached")
            self._references[block_id] += 1
            self._restate(block_id)

    def free(self, block_ids: Sequence[int], after_step: int) -> None:
        """Drop one reference of each block (given in logical order).

        A block nobody holds any more is handed out again once step after_step has completed."""
        for block_id in reversed(block_ids):
            self._require(self._references[block_id] > 0, block_id, "freed", "no sequence holds it")
            self._references[block_id] -= 1
            if self._references[block_id] == 0 and after_step > self._completed:
                self._cooling[block_id] = after_step
                self._cooling_order.append((after_step, block_id))
            self._restate(block_id)

    def completed(self, step: int) -> None:
        """Every step up to this one has completed."""
        self._completed = max(self._completed, step)
        while self._cooling_order and self._cooling_order[0][0] <= self._completed:
            after_step, block_id = self._cooling_order.popleft()
            if self._cooling.get(block_id) == after_step:
                del self._cooling[block_id]
                self._restate(block_id)

    def mark_cached(self, block_id: int) -> None:
        """The block's KV is in the prefix cache from now until it is handed out again."""
        self._require(self._references[block_id] > 0, block_id, "cached", "no sequence holds it")
        self._require(not self._quarantined[block_id], block_id, "cached", "it is quarantined")
        self._cached[block_id] = True

    def lease(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            kept = self._references[block_id] > 0 or self._cached[block_id]
            self._require(kept, block_id, "leased", "no sequence holds it and its KV is not cached")
            self._leases[block_id] += 1
            self._restate(block_id)

    def unlease(self, block_ids: Sequence[int]) -> None:
        for block_id in reversed(block_ids):
            self._require(self._leases[block_id] > 0, block_id, "released", "it is not leased")
            self._leases[block_id] -= 1
            self._restate(block_id)

    def quarantine(self, block_ids: Iterable[int]) -> None:
        """Keep blocks back until unquarantine, whoever else lets go of them meanwhile."""
        for block_id in block_ids:
            self._require(self._references[block_id] > 0, block_id, "quarantined", "no sequence holds it")
            self._require(not self._quarantined[block_id], block_id, "quarantined", "it already is")
            self._require(not self._cached[block_id], block_id, "quarantined", "its KV is cached, so verified")
            self._quarantined[block_id] = True
            self._restate(block_id)

    def unquarantine(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            self._require(self._quarantined[block_id], block_id, "unquarantined", "it is not quarantined")
            self._quarantined[block_id] = False
            self._restate(block_id)

    def check(self) -> None:
        """Recount everything; raises AssertionError naming what is wrong. For tests."""
        for block_id in range(self.num_blocks):
            assert self._states[block_id] is self._derive(block_id), f"block {block_id} has a stale state"
        for state in BlockState:
            assert self._tally[state] == self._states.count(state), f"the tally of {state.name} is off"
        free = {b for b, state in enumerate(self._states) if state is BlockState.FREE}
        assert len(self._blank) == len(set(self._blank)), "a block is in the blank list twice"
        assert set(self._blank) == {b for b in free if not self._cached[b]}, "the blank list is off"
        assert set(self._evictable) == {b for b in free if self._cached[b]}, "the eviction order is off"

    def _derive(self, block_id: int) -> BlockState:
        if self._quarantined[block_id]:
            return BlockState.QUARANTINED
        if self._leases[block_id]:
            return BlockState.LEASED
        if self._references[block_id]:
            return BlockState.USED
        if block_id in self._cooling:
            return BlockState.COOLING
        return BlockState.FREE

    def _restate(self, block_id: int) -> None:
        old, new = self._states[block_id], self._derive(block_id)
        if new is old:
            return
        if old is BlockState.FREE:
            if self._cached[block_id]:
                del self._evictable[block_id]
            else:
                # A blank block leaves the free state only through take, which takes the last one.
                self._blank.pop()
        elif new is BlockState.FREE:
            if self._cached[block_id]:
                self._evictable[block_id] = None
            else:
                self._blank.append(block_id)
        self._tally[old] -= 1
        self._tally[new] += 1
        self._states[block_id] = new

    def _require(self, holds: bool, block_id: int, verb: str, because: str) -> None:
        if not holds:
            raise ValueError(f"block {block_id} cannot be {verb}: {because}")
