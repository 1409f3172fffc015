"""KV memories with recognisable blocks, and tiers over them."""

from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from pdserve.core.layout import KVGroup, KVLayout, KVOrder
from pdserve.tiers.arena import Bytes
from pdserve.tiers.device import device_blocks
from pdserve.tiers.disk import DiskTier
from pdserve.tiers.host import HostTier
from pdserve.tiers.store import TierStore
from pdserve.transfer.memory import HostMemory, KVMemory, TensorMemory
from tests.kv_layouts import by_block

IDENTITY = bytes(range(32))
GROUP = KVGroup(num_layers=2, num_kv_heads=1, head_dim=4, dtype="float32")
LAYOUT = KVLayout(group=GROUP, block_size=2, num_blocks=8, model_revision="tiny")


def name(number: int) -> bytes:
    """A block hash."""
    return blake2b(str(number).encode(), digest_size=16).digest()


def content(block_hash: bytes, layout: KVLayout = LAYOUT) -> Bytes:
    """The bytes the block of this hash has, in canonical order."""
    seed = int.from_bytes(block_hash[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, layout.block_bytes, dtype=np.uint8)


class Device:
    """A KV memory whose blocks tests fill and read without the code under test."""

    def __init__(self, layout: KVLayout = LAYOUT, *, tensor: bool = False) -> None:
        self.layout = layout
        self.memory: KVMemory
        if tensor:
            storage = torch.zeros(layout.total_bytes, dtype=torch.uint8)
            self.memory, self._array = TensorMemory(storage), storage.numpy()
        else:
            host = HostMemory(layout.total_bytes)
            self.memory, self._array = host, host.array
        self.blocks = device_blocks(self.memory, layout)

    def fill(self, block: int, block_hash: bytes) -> None:
        view = by_block(self.layout, self._array)[block]
        view[...] = content(block_hash, self.layout).reshape(view.shape)

    def holds(self, block: int, block_hash: bytes) -> bool:
        view = by_block(self.layout, self._array)[block]
        return bool((view.ravel() == content(block_hash, self.layout)).all())

    def close(self) -> None:
        self.memory.close()


def layout_of(order: KVOrder) -> KVLayout:
    return KVLayout(group=GROUP, block_size=2, num_blocks=8, order=order, model_revision="tiny")


def disk_size(slots: int) -> int:
    """Bytes of a file of so many blocks of LAYOUT."""
    return 4096 + 4096 + slots * 4096


def open_disk(path: Path, slots: int = 4, *, owner: str = "e", identity: bytes = IDENTITY) -> DiskTier:
    size = disk_size(slots)
    return DiskTier.open(path, name=owner, size=size, block_bytes=LAYOUT.block_bytes, identity=identity)


def make_store(device: Device, *, host_slots: int, disk: DiskTier | None) -> TierStore:
    return TierStore(device.blocks, HostTier(host_slots, device.layout.block_bytes), disk, IDENTITY)
