"""What the tiers below the device pool hold, as the engine last heard, and the blocks being copied there."""

from collections.abc import ItemsView, Iterable, Sequence

from pdserve.core.blocks import BlockHash
from pdserve.core.tiers import Tier, TierNews

_MOST_DISTRUSTED = 1 << 16
"""Names remembered of blocks that were computed wrong: so many in a row say more of the engine than of the tiers."""


class TierIndex:
    """hash → nearest tier. It may be wrong either way: who asks for a block that is gone gets news instead."""

    def __init__(self) -> None:
        self._tiers: dict[BlockHash, Tier] = {}
        self._distrusted: dict[BlockHash, None] = {}
        """The latest of them."""

    @property
    def num_blocks(self) -> int:
        return len(self._tiers)

    def where(self, block_hash: BlockHash) -> Tier | None:
        return self._tiers.get(block_hash)

    def run(self, chain: Iterable[BlockHash]) -> tuple[Tier, ...]:
        """The tiers of the longest held prefix of a chain."""
        tiers = []
        for block_hash in chain:
            if (tier := self._tiers.get(block_hash)) is None:
                break
            tiers.append(tier)
        return tuple(tiers)

    def items(self) -> ItemsView[BlockHash, Tier]:
        return self._tiers.items()

    def apply(self, news: TierNews) -> list[BlockHash]:
        """The hashes that lie elsewhere now, or nowhere any more."""
        moved = []
        for block_hash, tier in news.changes:
            if block_hash in self._distrusted:
                continue
            if self._tiers.get(block_hash) is tier:
                continue
            moved.append(block_hash)
            if tier is None:
                del self._tiers[block_hash]
            else:
                self._tiers[block_hash] = tier
        return moved

    def distrust(self, hashes: Iterable[BlockHash]) -> None:
        """What the tiers hold of these, or will be told to hold, is not to be used."""
        for block_hash in hashes:
            self._tiers.pop(block_hash, None)
            self._distrusted[block_hash] = None
            if len(self._distrusted) > _MOST_DISTRUSTED:
                del self._distrusted[next(iter(self._distrusted))]


class SaveQueue:
    """Blocks of the device pool on their way to the tiers: which wait to be sent, and which are being copied.

    At most limit blocks at a time, so that a slow tier cannot hold the pool; what comes beyond that is not saved.
    """

    def __init__(self, index: TierIndex, limit: int) -> None:
        self._index = index
        self._limit = limit
        self._waiting: list[tuple[BlockHash, int]] = []
        self._used: list[BlockHash] = []
        self._wrong: list[BlockHash] = []
        self.blocks: set[int] = set()
        """Waiting or being copied: their bytes must stay as they are."""

    def add(self, block_hash: BlockHash, block_id: int) -> bool:
        """Whether the block is to be saved; False when it is in the nearest tier already or too many are."""
        if self._index.where(block_hash) is Tier.HOST or len(self.blocks) >= self._limit:
            return False
        self._waiting.append((block_hash, block_id))
        self.blocks.add(block_id)
        return True

    def use(self, hashes: Sequence[BlockHash]) -> None:
        """A sequence found these in the device pool."""
        self._used += hashes

    def delete(self, hashes: Sequence[BlockHash]) -> None:
        """These were computed wrong: the tiers shall not hold them, whatever was copied there before."""
        if self._limit:
            self._wrong += hashes

    def take(self) -> tuple[tuple[tuple[BlockHash, int], ...], tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """(blocks to copy now, hashes used since the last call, hashes to delete)."""
        taken = tuple(self._waiting), tuple(self._used), tuple(self._wrong)
        self._waiting.clear()
        self._used.clear()
        self._wrong.clear()
        return taken

    def done(self, block_ids: Iterable[int]) -> None:
        """Nobody reads these any more."""
        self.blocks.difference_update(block_ids)
