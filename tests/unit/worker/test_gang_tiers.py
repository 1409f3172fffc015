"""A block divided among ranks is where all its parts are, and is nobody's before every rank has let go of it."""

import asyncio
from dataclasses import dataclass, field

import pytest

from pdserve.core.blocks import BlockHash
from pdserve.core.errors import EngineDied
from pdserve.core.tiers import RestoreReceipt, SavedBlock, Tier, TierNews, TierRead, TierTally
from pdserve.worker.gang_tiers import GangTiers

A, B = b"a" * 16, b"b" * 16


@dataclass
class Rank:
    """A tier service that says what it is told to, when it is told to."""

    changes: tuple[tuple[BlockHash, Tier | None], ...] = ()
    verified: int = 0
    seconds: float = 1.0
    fails: bool = False
    go: asyncio.Event = field(default_factory=asyncio.Event)

    def news(self) -> TierNews:
        tally = TierTally(tier=Tier.HOST, capacity=4, blocks=self.verified, saved_bytes=10)
        return TierNews(changes=self.changes, tallies=(tally,))

    async def contents(self) -> TierNews:
        return self.news()

    async def save(
        self, blocks: tuple[SavedBlock, ...], used: tuple[BlockHash, ...], wrong: tuple[BlockHash, ...] = ()
    ) -> TierNews:
        if self.fails:
            raise EngineDied("gone")
        await self.go.wait()
        return self.news()

    async def restore(self, hashes: tuple[BlockHash, ...], blocks: tuple[int, ...]) -> RestoreReceipt:
        read = TierRead(tier=Tier.HOST, blocks=self.verified, seconds=self.seconds)
        return RestoreReceipt(num_blocks=self.verified, reads=(read,), news=self.news())


async def test_a_block_is_in_the_farthest_tier_of_its_parts_and_nowhere_when_one_is_missing() -> None:
    first, second = Rank(((A, Tier.HOST), (B, Tier.HOST))), Rank(((A, Tier.DISK),))
    gang = GangTiers([first, second])
    assert dict((await gang.contents()).changes) == {A: Tier.DISK, B: None}
    first.changes, second.changes = (), ((B, Tier.HOST),)
    assert dict((await gang.contents()).changes) == {B: Tier.HOST}
    first.changes, second.changes = ((A, None),), ()
    assert dict((await gang.contents()).changes) == {A: None}


async def test_only_what_every_rank_verified_is_restored_and_the_slowest_is_measured() -> None:
    gang = GangTiers([Rank(verified=3, seconds=1.0), Rank(verified=2, seconds=5.0)])
    receipt = await gang.restore((A, B), (1, 2))
    assert receipt.num_blocks == 2
    assert [read.seconds for read in receipt.reads] == [5.0]
    (tally,) = receipt.news.tallies
    assert (tally.saved_bytes, tally.blocks) == (20, 2)


async def test_a_rank_that_fails_does_not_end_a_save_another_is_still_reading_for() -> None:
    slow = Rank()
    saving = asyncio.ensure_future(GangTiers([Rank(fails=True), slow]).save(((A, 1),), ()))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not saving.done()
    slow.go.set()
    with pytest.raises(EngineDied):
        await saving
