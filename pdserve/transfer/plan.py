"""Which bytes of whose memory belong to a pull: pure functions of layouts and block ids."""

import numpy as np
from numpy.typing import NDArray

from pdserve.core.layout import KVLayout, KVOrder
from pdserve.transfer.base import Offsets, ReadPlan

BlockIds = tuple[int, ...]


def plan_read(source: KVLayout, source_blocks: BlockIds, target: KVLayout, target_blocks: BlockIds) -> ReadPlan:
    """Spans that copy source_blocks[i] of a peer into target_blocks[i], adjacent ones merged.

    The layouts may differ in num_blocks and order only. Raises ValueError when the lists do not pair up,
    a block is out of range, or two reads would land in one target.
    """
    check_pairing(target, source_blocks, target_blocks)
    whole = source.order is target.order is KVOrder.BLOCK_MAJOR
    pieces = 1 if whole else source.group.num_layers
    piece_bytes = source.block_bytes // pieces
    remote = _piece_offsets(source, source_blocks, pieces).T.ravel()
    local = _piece_offsets(target, target_blocks, pieces).T.ravel()
    starts, lengths = _merge(piece_bytes, remote, local)
    return ReadPlan(local=_u64(local[starts]), remote=_u64(remote[starts]), lengths=_u64(lengths))


def check_pairing(target: KVLayout, source_blocks: BlockIds, target_blocks: BlockIds) -> None:
    """Raise ValueError unless every source block has one target block of its own."""
    if len(source_blocks) != len(target_blocks) or not source_blocks:
        raise ValueError(f"{len(source_blocks)} source blocks cannot be read into {len(target_blocks)} target blocks")
    if len(set(target_blocks)) != len(target_blocks):
        raise ValueError("a target block is named twice")
    _check_range(target, np.asarray(target_blocks))


def canonical_spans(layout: KVLayout, blocks: BlockIds) -> tuple[Offsets, Offsets]:
    """(offsets, lengths) of the blocks' bytes in the order [block][layer][k|v][head][slot][dim]."""
    pieces = 1 if layout.order is KVOrder.BLOCK_MAJOR else layout.group.num_layers
    offsets = _piece_offsets(layout, blocks, pieces).ravel()
    starts, lengths = _merge(layout.block_bytes // pieces, offsets)
    return _u64(offsets[starts]), _u64(lengths)


def tail_view(layout: KVLayout, block: int, used: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """(byte offset, shape, byte strides) of the slots of a block from `used` on, over all layers and heads.

    The shape is [layer, k|v, head, slot, bytes of dim].
    """
    group = layout.group
    slot_bytes = layout.block_bytes // (layout.block_size * group.num_layers * 2 * group.num_kv_heads)
    item = slot_bytes // group.head_dim
    block_stride, layer, kv, head, slot, _ = (stride * item for stride in layout.strides)
    shape = (group.num_layers, 2, group.num_kv_heads, layout.block_size - used, slot_bytes)
    return block * block_stride + used * slot, shape, (layer, kv, head, slot, 1)


def _piece_offsets(layout: KVLayout, blocks: BlockIds, pieces: int) -> NDArray[np.int64]:
    """[block, piece] byte offsets; a piece is a whole block or one layer of it."""
    ids = np.asarray(blocks, dtype=np.int64)[:, None]
    _check_range(layout, ids)
    piece = np.arange(pieces, dtype=np.int64)[None, :]
    piece_bytes = layout.block_bytes // pieces
    if layout.order is KVOrder.BLOCK_MAJOR:
        return ids * layout.block_bytes + piece * piece_bytes
    return (piece * layout.num_blocks + ids) * piece_bytes


def _check_range(layout: KVLayout, ids: NDArray[np.int64]) -> None:
    if ids.size and not (ids.min() >= 0 and ids.max() < layout.num_blocks):
        raise ValueError(f"block ids must lie in [0, {layout.num_blocks}), not {np.sort(ids, axis=None).tolist()}")


def _merge(length: int, *offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(index of the first span of each run, length of the run) where a run is contiguous in every list."""
    breaks = np.zeros(max(len(offsets[0]) - 1, 0), dtype=bool)
    for column in offsets:
        breaks |= np.diff(column) != length
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    return starts, np.diff(starts, append=len(offsets[0])) * length


def _u64(values: NDArray[np.int64]) -> Offsets:
    return values.astype(np.uint64)
