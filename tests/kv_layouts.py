"""Small KV layouts, and blocks' bytes found without the code under test."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pdserve.core.layout import KVGroup, KVLayout, KVOrder

_T = TypeVar("_T", bound=np.generic)

GROUP = KVGroup(num_layers=3, num_kv_heads=2, head_dim=8, dtype="float32")


def kv_layout(num_blocks: int = 16, order: KVOrder = KVOrder.BLOCK_MAJOR, *, group: KVGroup = GROUP) -> KVLayout:
    return KVLayout(group=group, block_size=4, num_blocks=num_blocks, order=order, model_revision="tiny")


def by_block(layout: KVLayout, memory: NDArray[_T]) -> NDArray[_T]:
    """View of a memory as [block, layer, k|v, head, slot, bytes of dim]."""
    group = layout.group
    inside = (2, group.num_kv_heads, layout.block_size, -1)
    if layout.order is KVOrder.BLOCK_MAJOR:
        return memory[: layout.total_bytes].reshape(layout.num_blocks, group.num_layers, *inside)
    return memory[: layout.total_bytes].reshape(group.num_layers, layout.num_blocks, *inside).swapaxes(0, 1)
