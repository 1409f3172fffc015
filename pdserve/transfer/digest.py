"""Digests of KV bytes: 128 bits, seeded, over a region in canonical order.

The order is [block][layer][k|v][head][slot][dim] however the region lies in memory, so that workers with
different KVOrder, or different heads beside the region's, agree. A digest detects damage and mix-ups; it does not
authenticate.

There are two functions, and the source's memory decides: xxh3 for host memory, where one core digests faster than it
copies, and the keyed sum for memory of a GPU, which digests it where it lies (pdserve_kernels.kv_digest). A source
names its function in the handshake; every worker can compute both.
"""

from enum import StrEnum
from importlib.util import find_spec

import xxhash

from pdserve.core.layout import DTYPE_BYTES, KVLayout, KVRegion
from pdserve.transfer.host_spans import digest_spans
from pdserve.transfer.memory import HostMemory, KVMemory, MemoryKind, TensorMemory
from pdserve.transfer.plan import BlockIds, canonical_spans, tail_view

_KEYED_SUM_WORD_BYTES = 8


class DigestKind(StrEnum):
    XXH3 = "xxh3_128"
    KEYED_SUM = "keyed_sum_128"


def digest_kind(memory: KVMemory, layout: KVLayout) -> DigestKind:
    """With which function the owner of a memory digests what it offers."""
    head_stride = layout.strides[3] * DTYPE_BYTES[layout.group.dtype]
    whole_words = head_stride % _KEYED_SUM_WORD_BYTES == 0
    return DigestKind.KEYED_SUM if whole_words and _has_kernel(memory) else DigestKind.XXH3


def region_digest(
    memory: KVMemory, layout: KVLayout, region: KVRegion, seed: int, kind: DigestKind = DigestKind.XXH3
) -> bytes:
    """16 bytes over the region's bytes in the order of its blocks; seed has 64 bits."""
    offsets, lengths = canonical_spans(layout, region)
    if kind is DigestKind.XXH3 and isinstance(memory, HostMemory):
        return digest_spans(memory.array, offsets, lengths, [seed])[0]
    if kind is DigestKind.XXH3:
        digest = xxhash.xxh3_128(seed=seed)
        for chunk in memory.chunks(offsets, lengths):
            digest.update(chunk.data)
        return bytes(digest.digest())
    if isinstance(memory, TensorMemory) and _has_kernel(memory):
        from pdserve_kernels.kv_digest import kernel

        with memory.beside_steps():
            return kernel.keyed_sum(memory.tensor, offsets, lengths, seed)
    from pdserve_kernels.kv_digest import reference

    return reference.keyed_sum(memory.chunks(offsets, lengths), seed)


def zero_tail(memory: KVMemory, layout: KVLayout, blocks: BlockIds, num_tokens: int) -> None:
    """Zero the slots of the last block that no token uses. The blocks hold num_tokens tokens together.

    Raises ValueError when that is not the number of blocks those tokens need.
    """
    used = num_tokens - (len(blocks) - 1) * layout.block_size
    if not blocks or not 0 < used <= layout.block_size:
        raise ValueError(f"{num_tokens} tokens do not end in the last of {len(blocks)} blocks of {layout.block_size}")
    if used < layout.block_size:
        memory.zero(*tail_view(layout, blocks[-1], used))


def _has_kernel(memory: KVMemory) -> bool:
    """CUDA builds of torch bring Triton along; without it, bytes are copied to the host to be digested."""
    return memory.kind is MemoryKind.CUDA and find_spec("triton") is not None
