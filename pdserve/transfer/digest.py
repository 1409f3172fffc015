"""Digests of KV bytes: xxh3-128, seeded, over whole blocks in canonical order.

The order is [block][layer][k|v][head][slot][dim] however the blocks lie in memory, so that workers with
different KVOrder agree. A digest detects damage and mix-ups; it does not authenticate.
"""

import xxhash

from pdserve.core.layout import KVLayout
from pdserve.transfer.memory import KVMemory
from pdserve.transfer.plan import BlockIds, canonical_spans, tail_view


def block_digest(memory: KVMemory, layout: KVLayout, blocks: BlockIds, seed: int) -> bytes:
    """16 bytes over the blocks' bytes in order; seed has 64 bits."""
    digest = xxhash.xxh3_128(seed=seed)
    for chunk in memory.chunks(*canonical_spans(layout, blocks)):
        digest.update(chunk.data)
    return bytes(digest.digest())


def zero_tail(memory: KVMemory, layout: KVLayout, blocks: BlockIds, num_tokens: int) -> None:
    """Zero the slots of the last block that no token uses. The blocks hold num_tokens tokens together.

    Raises ValueError when that is not the number of blocks those tokens need.
    """
    used = num_tokens - (len(blocks) - 1) * layout.block_size
    if not blocks or not 0 < used <= layout.block_size:
        raise ValueError(f"{num_tokens} tokens do not end in the last of {len(blocks)} blocks of {layout.block_size}")
    if used < layout.block_size:
        memory.zero(*tail_view(layout, blocks[-1], used))
