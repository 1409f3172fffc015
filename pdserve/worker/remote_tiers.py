"""The tiers of a worker in another process. Bytes stay there; hashes and block ids go through here."""

from pdserve.core.blocks import BlockHash
from pdserve.core.tiers import RestoreReceipt, SavedBlock, TierNews
from pdserve.worker.frames import GetTierContents, RestoreBlocks, SaveBlocks
from pdserve.worker.link import WorkerLink


class RemoteTiers:
    """Implements core.tiers.TierService. Its waits end with the worker's answer or death; whoever must know sooner
    sets a deadline and leaves the blocks alone until then."""

    def __init__(self, link: WorkerLink) -> None:
        self._link = link

    async def contents(self) -> TierNews:
        return await self._link.ask(GetTierContents, TierNews)

    async def save(
        self, blocks: tuple[SavedBlock, ...], used: tuple[BlockHash, ...], wrong: tuple[BlockHash, ...] = ()
    ) -> TierNews:
        return await self._link.ask(lambda reply: SaveBlocks(reply, blocks, used, wrong), TierNews)

    async def restore(self, hashes: tuple[BlockHash, ...], blocks: tuple[int, ...]) -> RestoreReceipt:
        return await self._link.ask(lambda reply: RestoreBlocks(reply, hashes, blocks), RestoreReceipt)
