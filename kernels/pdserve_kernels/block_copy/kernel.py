"""Gather and scatter of KV blocks in Triton, in words as wide as every stride allows."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 8192
"""Bytes one program moves: 32 per thread."""
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@triton.jit
def block_copy_kernel(
    memory_ptr: tl.tensor,
    staging_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    layers: tl.tensor,
    first: tl.int64,
    block_stride: tl.int64,
    layer_stride: tl.int64,
    kind_stride: tl.int64,
    length: tl.int64,
    SCATTER: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program per [block, layer, k|v] and tile of the `length` words that lie together there, `first` words in."""
    piece = tl.program_id(0).to(tl.int64)
    kind, layer, index = piece % 2, piece // 2 % layers, piece // 2 // layers
    block = tl.load(blocks_ptr + index)
    word = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = word < length
    memory = memory_ptr + first + block * block_stride + layer * layer_stride + kind * kind_stride + word
    staging = staging_ptr + piece * length + word
    if SCATTER:
        tl.store(memory, tl.load(staging, mask=inside), mask=inside)
    else:
        tl.store(staging, tl.load(memory, mask=inside), mask=inside)


def gather_blocks(kv: Tensor, blocks: Tensor, heads: tuple[int, int]) -> Tensor:
    """A contiguous copy (blocks, layers, 2, heads, block_size, head_dim) of some heads of some blocks.

    kv (num_blocks, layers, 2, kv_heads, block_size, head_dim), any strides as long as the last three dimensions lie
    together; blocks (n,) int64 on its device.
    """
    shape = (len(blocks), *kv.shape[1:3], heads[1] - heads[0], *kv.shape[4:])
    staging = torch.empty(shape, dtype=kv.dtype, device=kv.device)
    _copy(kv, staging, blocks, heads, scatter=False)
    return staging


def scatter_blocks(staging: Tensor, kv: Tensor, blocks: Tensor, heads: tuple[int, int]) -> None:
    """The reverse of gather_blocks: overwrites those heads of those blocks, which must all differ."""
    if staging.shape != (len(blocks), *kv.shape[1:3], heads[1] - heads[0], *kv.shape[4:]):
        raise ValueError(f"staging of shape {tuple(staging.shape)} is not {len(blocks)} blocks of heads {heads}")
    _copy(kv, staging.contiguous(), blocks, heads, scatter=True)


def _copy(kv: Tensor, staging: Tensor, blocks: Tensor, heads: tuple[int, int], *, scatter: bool) -> None:
    block_size, dim = kv.shape[4:]
    if kv.stride()[3:] != (block_size * dim, dim, 1):
        raise ValueError("the heads, slots and elements of a block must lie together in memory")
    if not 0 <= heads[0] < heads[1] <= kv.shape[3]:
        raise ValueError(f"heads {heads} are not among the {kv.shape[3]} there are")
    if not len(blocks):
        return
    size = kv.element_size()
    strides = [stride * size for stride in (block_size * dim * heads[0], *kv.stride()[:3])]
    length = (heads[1] - heads[0]) * block_size * dim * size
    width = word_bytes((*strides, length, kv.data_ptr(), staging.data_ptr()))
    tile = TILE_BYTES // width
    grid = (len(blocks) * kv.shape[1] * 2, triton.cdiv(length // width, tile))
    block_copy_kernel[grid](
        _words(kv, width),
        _words(staging, width),
        blocks,
        kv.shape[1],
        *(stride // width for stride in strides),
        length // width,
        SCATTER=scatter,
        TILE=tile,
        num_warps=8,
    )


def word_bytes(places: Sequence[int]) -> int:
    """The widest word all these byte offsets are multiples of."""
    return next(width for width in WORDS if all(place % width == 0 for place in places))


def _words(tensor: Tensor, width: int) -> Tensor:
    """The tensor's first word, of a dtype the kernel takes for its pointers'."""
    start = tensor.as_strided((max(width // tensor.element_size(), 1),), (1,))
    return start.view(WORDS[width])
