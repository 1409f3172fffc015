"""Which bytes of whose memory belong to a pull: pure functions of layouts and regions."""

from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pdserve.core.layout import DTYPE_BYTES, KVLayout, KVOrder, KVRegion
from pdserve.transfer.base import Offsets, ReadPlan

BlockIds = tuple[int, ...]


class _Grain(IntEnum):
    """What lies together in memory: all layers of a block, one layer of it, or some heads of a layer's k or v."""

    BLOCK = 0
    LAYER = 1
    HEADS = 2


def plan_read(source: KVLayout, taken: KVRegion, target: KVLayout, filled: KVRegion) -> ReadPlan:
    """Spans that copy the region `taken` of a peer into `filled`, block by block in order, adjacent ones merged.

    Each layout is that of one rank; they may differ in num_blocks, order and number of heads. Raises ValueError when
    the regions do not pair up, leave their layouts, or two reads would land in one target.
    """
    check_pairing(target, taken.blocks, filled.blocks)
    _check_inside(source, taken)
    _check_inside(target, filled)
    if _shape(taken) != _shape(filled):
        raise ValueError(f"heads and layers {_shape(taken)} of the source blocks cannot be read into {_shape(filled)}")
    grain = max(_grain(source, taken), _grain(target, filled))
    remote, piece_bytes = _pieces(source, taken, grain)
    local, _ = _pieces(target, filled, grain)
    # Piece by piece: those of neighbouring blocks are adjacent where layers come first.
    in_order = 1 in remote.shape
    remote, local = remote.T.ravel(), local.T.ravel()
    starts, lengths = _merge(piece_bytes, remote, local)
    return ReadPlan(_u64(local[starts]), _u64(remote[starts]), _u64(lengths), in_order=in_order)


def check_pairing(target: KVLayout, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
    """Raise ValueError unless every source block has one target block of its own."""
    if len(source_blocks) != len(target_blocks) or not source_blocks:
        raise ValueError(f"{len(source_blocks)} source blocks cannot be read into {len(target_blocks)} target blocks")
    if len(set(target_blocks)) != len(target_blocks):
        raise ValueError("a target block is named twice")
    _check_range(target, target_blocks)


def canonical_spans(layout: KVLayout, region: KVRegion) -> tuple[Offsets, Offsets]:
    """(offsets, lengths) of a region's bytes in the order [block][layer][k|v][head][slot][dim]."""
    _check_inside(layout, region)
    offsets, piece_bytes = _pieces(layout, region, _grain(layout, region))
    flat = offsets.ravel()
    starts, lengths = _merge(piece_bytes, flat)
    return _u64(flat[starts]), _u64(lengths)


def tail_view(layout: KVLayout, block: int, used: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """(byte offset, shape, byte strides) of the slots of a block from `used` on, over all layers and heads.

    The shape is [layer, k|v, head, slot, bytes of dim].
    """
    group = layout.group
    item = DTYPE_BYTES[group.dtype]
    block_stride, layer, kv, head, slot, _ = (stride * item for stride in layout.strides)
    shape = (group.num_layers, 2, group.num_kv_heads, layout.block_size - used, group.head_dim * item)
    return block * block_stride + used * slot, shape, (layer, kv, head, slot, 1)


def _grain(layout: KVLayout, region: KVRegion) -> _Grain:
    if region.heads != (0, layout.group.num_kv_heads):
        return _Grain.HEADS
    return _Grain.LAYER if layout.order is KVOrder.LAYER_MAJOR else _Grain.BLOCK


def _pieces(layout: KVLayout, region: KVRegion, grain: _Grain) -> tuple[NDArray[np.int64], int]:
    """Byte offsets [block, piece] in canonical order, and the bytes of a piece."""
    block_stride, within, piece_bytes = _pieces_of_block(layout, region.layers, region.heads, grain)
    blocks = np.array(region.blocks, dtype=np.int64)[:, None] * block_stride
    return blocks + within, piece_bytes


@lru_cache(maxsize=256)
def _pieces_of_block(
    layout: KVLayout, layers: tuple[int, int], heads: tuple[int, int], grain: _Grain
) -> tuple[int, NDArray[np.int64], int]:
    """(bytes from a block to the next, offsets [1, piece] within one, bytes of a piece)."""
    item = DTYPE_BYTES[layout.group.dtype]
    block, layer, kv, head, _, _ = (stride * item for stride in layout.strides)
    first, end = layers
    firsts = np.arange(first, first + 1 if grain is _Grain.BLOCK else end, dtype=np.int64)
    halves = np.arange(2 if grain is _Grain.HEADS else 1, dtype=np.int64)
    within = firsts[:, None] * layer + halves[None, :] * kv + heads[0] * head
    piece_bytes = {
        _Grain.BLOCK: (end - first) * 2 * kv,
        _Grain.LAYER: 2 * kv,
        _Grain.HEADS: (heads[1] - heads[0]) * head,
    }
    return block, within.reshape(1, -1), piece_bytes[grain]


def _shape(region: KVRegion) -> tuple[int, tuple[int, int]]:
    """What two regions must have in common besides their number of blocks: how many heads, and which layers."""
    return region.heads[1] - region.heads[0], region.layers


def _check_inside(layout: KVLayout, region: KVRegion) -> None:
    _check_range(layout, region.blocks)
    for name, (first, end), total in (
        ("heads", region.heads, layout.group.num_kv_heads),
        ("layers", region.layers, layout.group.num_layers),
    ):
        if not 0 <= first < end <= total:
            raise ValueError(f"{name} {first} to {end - 1} of a block are asked for, and it has {total}")


def _check_range(layout: KVLayout, ids: BlockIds) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < layout.num_blocks):
        raise ValueError(f"block ids must lie in [0, {layout.num_blocks}), not {sorted(ids)}")


def _merge(length: int, *offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(index of the first span of each run, length of the run) where a run is contiguous in every list."""
    begins = np.zeros(len(offsets[0]), dtype=bool)
    begins[:1] = True
    for column in offsets:
        begins[1:] |= column[1:] - column[:-1] != length
    starts = begins.nonzero()[0]
    lengths = np.full(len(starts), len(offsets[0]) - starts[-1] if len(starts) else 0)
    lengths[:-1] = starts[1:] - starts[:-1]
    return starts, lengths * length


def _u64(values: NDArray[np.int64]) -> Offsets:
    return values.astype(np.uint64)
