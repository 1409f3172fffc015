"""The tiers of a worker in another process. Bytes stay there; hashes and block ids go through here."""

import asyncio
from typing import TypeVar

from pdserve.core.blocks import BlockHash
from pdserve.core.tiers import RestoreReceipt, SavedBlock, TierNews
from pdserve.worker.frames import GetTierContents, RestoreBlocks, SaveBlocks, TierCommand
from pdserve.worker.link import WorkerLink

_T = TypeVar("_T")


class RemoteTiers:
    """Implements core.tiers.TierService. Its waits end with the worker's answer or death; whoever must know sooner
    sets a deadline and leaves the blocks alone until then."""

    def __init__(self, link: WorkerLink) -> None:
        self._link = link

    async def contents(self) -> TierNews:
        number, answer = self._link.expect(TierNews)
        return await self._answered(GetTierContents(number), answer)

    async def save(
        self, blocks: tuple[SavedBlock, ...], used: tuple[BlockHash, ...], wrong: tuple[BlockHash, ...] = ()
    ) -> TierNews:
        number, answer = self._link.expect(TierNews)
        return await self._answered(SaveBlocks(number, blocks, used, wrong), answer)

    async def restore(self, hashes: tuple[BlockHash, ...], blocks: tuple[int, ...]) -> RestoreReceipt:
        number, answer = self._link.expect(RestoreReceipt)
        return await self._answered(RestoreBlocks(number, hashes, blocks), answer)

    async def _answered(self, command: TierCommand, answer: "asyncio.Future[_T]") -> _T:
        self._link.send(command)
        return await asyncio.shield(answer)
