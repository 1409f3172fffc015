"""The store on an event loop: saves and restores, each on a thread of their own; they are answered with news."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

from pdserve.core.blocks import BlockHash
from pdserve.core.errors import ConfigError
from pdserve.core.layout import KVLayout
from pdserve.core.tiers import RestoreReceipt, SavedBlock, TierNews
from pdserve.tiers.device import device_blocks
from pdserve.tiers.disk import DiskTier
from pdserve.tiers.host import HostTier
from pdserve.tiers.restore import Restorer
from pdserve.tiers.spec import TierSpec
from pdserve.tiers.store import TierStore
from pdserve.transfer.memory import KVMemory

CLOSE_DEADLINE = 2.0
"""Seconds close waits for copies and writes under way; their threads then end by themselves."""


class LocalTierService:
    """Implements core.tiers.TierService over the worker's own memory. Open with `open`."""

    def __init__(self, store: TierStore, restorer: Restorer) -> None:
        self._store = store
        self._restorer = restorer
        self._saves = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-save")
        self._restores = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-restore")

    @classmethod
    async def open(
        cls, spec: TierSpec, *, name: str, layout: KVLayout, memory: KVMemory, computed_by: str
    ) -> "LocalTierService":
        """Take the host memory, find or make the disk tier. Raises ConfigError with what to change.

        name is the engine's, or its rank's, and the same after a restart; the part of a shared folder that is its own.
        computed_by names whatever else decides a block's bytes: blocks on disk are used by its equals only."""
        return cls(*await asyncio.to_thread(_open, spec, name, layout, memory, computed_by))

    async def contents(self) -> TierNews:
        return self._store.contents()

    async def save(
        self, blocks: tuple[SavedBlock, ...], used: tuple[BlockHash, ...], wrong: tuple[BlockHash, ...] = ()
    ) -> TierNews:
        await asyncio.get_running_loop().run_in_executor(self._saves, self._store.save, blocks, used, wrong)
        return self._store.news()

    async def restore(self, hashes: tuple[BlockHash, ...], blocks: tuple[int, ...]) -> RestoreReceipt:
        """Raises ValueError when the lists do not pair up."""
        if len(hashes) != len(blocks):
            raise ValueError(f"{len(hashes)} hashes do not pair up with {len(blocks)} blocks")
        loop = asyncio.get_running_loop()
        num_blocks, reads = await loop.run_in_executor(self._restores, self._restorer.restore, hashes, blocks)
        return RestoreReceipt(num_blocks=num_blocks, reads=reads, news=self._store.news())

    async def close(self) -> None:
        """Finish what is under way, within CLOSE_DEADLINE; the disk tier stays for the next incarnation.

        What has not ended by then keeps its file open, and the folder, until it ends with the process."""
        pools = (self._saves, self._restores)
        ended = (asyncio.to_thread(pool.shutdown, wait=True, cancel_futures=True) for pool in pools)
        try:
            async with asyncio.timeout(CLOSE_DEADLINE):
                await asyncio.gather(*ended)
        except TimeoutError:
            return
        await asyncio.to_thread(self._store.close, CLOSE_DEADLINE)


def _open(
    spec: TierSpec, name: str, layout: KVLayout, memory: KVMemory, computed_by: str
) -> tuple[TierStore, Restorer]:
    identity = sha256(layout.wire_hash + computed_by.encode()).digest()
    slots = spec.host_bytes // layout.block_bytes
    if not slots:
        raise ConfigError(f"kv.tiers.host: {spec.host_bytes} bytes hold no block of {layout.block_bytes}; raise it")
    device = device_blocks(memory, layout)
    try:
        host = HostTier(slots, layout.block_bytes, gpu=device.gpu)
    except MemoryError as error:
        raise ConfigError(f"kv.tiers.host: {error}; lower it") from error
    disk = None
    if spec.disk_path is not None:
        disk = DiskTier.open(
            spec.disk_path,
            name=name,
            size=spec.disk_bytes,
            block_bytes=layout.block_bytes,
            identity=identity,
        )
    store = TierStore(device, host, disk, identity)
    return store, Restorer(store, device)
