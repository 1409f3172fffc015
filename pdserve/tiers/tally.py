"""Counting what a tier does."""

from dataclasses import dataclass

from pdserve.core.tiers import Tier, TierTally


@dataclass(slots=True)
class TierCounter:
    """Fields as in TierTally. Its owner locks."""

    tier: Tier
    capacity: int
    block_bytes: int
    saved: int = 0
    restored: int = 0
    evicted: int = 0
    refused: int = 0
    corrupt: int = 0
    failed: int = 0

    def snapshot(self, blocks: int) -> TierTally:
        return TierTally(
            tier=self.tier,
            capacity=self.capacity,
            blocks=blocks,
            saved_bytes=self.saved * self.block_bytes,
            restored_blocks=self.restored,
            restored_bytes=self.restored * self.block_bytes,
            evicted=self.evicted,
            refused=self.refused,
            corrupt=self.corrupt,
            failed=self.failed,
        )
