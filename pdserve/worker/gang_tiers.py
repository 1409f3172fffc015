"""The tiers of an engine's ranks as one: each rank keeps its part of every block, and a block is where all of it is."""

from collections.abc import Sequence

from pdserve.core.blocks import BlockHash
from pdserve.core.tasks import all_ended
from pdserve.core.tiers import RestoreReceipt, SavedBlock, Tier, TierNews, TierService, TierTally


class GangTiers:
    """Implements core.tiers.TierService. A call ends when it has ended on every rank, also when one fails."""

    def __init__(self, ranks: Sequence[TierService]) -> None:
        self._ranks = tuple(ranks)
        self._held: tuple[dict[BlockHash, Tier], ...] = tuple({} for _ in ranks)

    async def contents(self) -> TierNews:
        return self._merge(await all_ended([rank.contents() for rank in self._ranks]))

    async def save(
        self, blocks: tuple[SavedBlock, ...], used: tuple[BlockHash, ...], wrong: tuple[BlockHash, ...] = ()
    ) -> TierNews:
        return self._merge(await all_ended([rank.save(blocks, used, wrong) for rank in self._ranks]))

    async def restore(self, hashes: tuple[BlockHash, ...], blocks: tuple[int, ...]) -> RestoreReceipt:
        receipts = await all_ended([rank.restore(hashes, blocks) for rank in self._ranks])
        slowest = max(receipts, key=lambda receipt: sum(read.seconds for read in receipt.reads))
        return RestoreReceipt(
            num_blocks=min(receipt.num_blocks for receipt in receipts),
            reads=slowest.reads,
            news=self._merge([receipt.news for receipt in receipts]),
        )

    def _merge(self, news: Sequence[TierNews]) -> TierNews:
        changed: dict[BlockHash, None] = {}
        for held, one in zip(self._held, news, strict=True):
            for block_hash, tier in one.changes:
                changed[block_hash] = None
                held.pop(block_hash, None)
                if tier is not None:
                    held[block_hash] = tier
        return TierNews(
            changes=tuple((block_hash, self._where(block_hash)) for block_hash in changed),
            tallies=tuple(_total(tallies) for tallies in zip(*(one.tallies for one in news), strict=True)),
        )

    def _where(self, block_hash: BlockHash) -> Tier | None:
        """The farthest tier that holds a part of it; None when a part is nowhere."""
        tiers = [held.get(block_hash) for held in self._held]
        if None in tiers:
            return None
        return Tier.DISK if Tier.DISK in tiers else Tier.HOST


def _total(ranks: Sequence[TierTally]) -> TierTally:
    """Bytes and what was lost add up; of whole blocks there are as many as the rank with the fewest has."""
    return TierTally(
        tier=ranks[0].tier,
        capacity=min(tally.capacity for tally in ranks),
        blocks=min(tally.blocks for tally in ranks),
        saved_bytes=sum(tally.saved_bytes for tally in ranks),
        restored_blocks=min(tally.restored_blocks for tally in ranks),
        restored_bytes=sum(tally.restored_bytes for tally in ranks),
        evicted=max(tally.evicted for tally in ranks),
        refused=max(tally.refused for tally in ranks),
        corrupt=sum(tally.corrupt for tally in ranks),
        failed=sum(tally.failed for tally in ranks),
    )
