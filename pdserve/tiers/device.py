"""A worker's KV memory block by block, whatever it is made of.

Host memory is read and written in place. What torch allocated, on a GPU as a rule, is copied asynchronously in a
stream of its own, so that copies run beside the steps; from pinned rows (`arena.allocate_rows`) the GPU copies by
itself, otherwise the driver does.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
import xxhash
from numpy.lib.stride_tricks import as_strided

from pdserve.core.layout import KVLayout
from pdserve.tiers.arena import Bytes, Rows, Slots
from pdserve.tiers.checksum import Seal
from pdserve.transfer.base import Offsets
from pdserve.transfer.host_spans import copy_and_digest_spans, digest_spans
from pdserve.transfer.memory import HostMemory, KVMemory, MemoryKind, TensorMemory


class DeviceBlocks(Protocol):
    """Whole blocks in canonical order: [layer][k|v][head][slot][dim]."""

    layout: KVLayout
    in_place: bool
    """Whether `view` shows the blocks themselves; otherwise there is no view."""
    gpu: int | None
    """The CUDA device it lies on, for which rows should be pinned."""

    def view(self, block: int) -> Bytes:
        """The block's bytes: flat, or where it lies in pieces of shape [pieces, bytes of a piece]."""
        ...

    def read(self, block: int, into: Bytes) -> None:
        """Copy a block into block_bytes of the host's; returns when they are there."""
        ...

    def write(self, blocks: Sequence[int], rows: Rows, slots: Slots, seals: Sequence[Seal]) -> int:
        """Begin to overwrite blocks with those of the rows, which stay as they are until `settle`; how many leading
        ones fit their seals. Where blocks are not in place, no other is written."""
        ...

    def num_intact(self, blocks: Sequence[int], seals: Sequence[Seal]) -> int:
        """How many leading blocks, in place, fit their seals."""
        ...

    def settle(self) -> None:
        """Wait until what was begun is there."""
        ...


def device_blocks(memory: KVMemory, layout: KVLayout) -> DeviceBlocks:
    """layout is that of the memory: of a rank, where it holds a part of every block."""
    if isinstance(memory, HostMemory):
        return HostBlocks(memory, layout)
    if isinstance(memory, TensorMemory):
        return TensorBlocks(memory, layout)
    raise TypeError(f"no blocks in a {type(memory).__name__}")


class HostBlocks:
    """Blocks in host memory."""

    in_place = True
    gpu: int | None = None

    def __init__(self, memory: HostMemory, layout: KVLayout) -> None:
        self.layout = layout
        shape, strides = _shape_and_strides(layout)
        self._memory = memory.array
        self._blocks = as_strided(memory.array, shape, strides)
        self._flat: Rows | None = self._blocks[:, 0] if shape[1] == 1 else None
        self._block_stride = strides[0]
        self._pieces = np.arange(shape[1], dtype=np.uint64) * np.uint64(strides[1])
        self._pieces_of_row = np.arange(shape[1], dtype=np.uint64) * np.uint64(shape[2])

    def view(self, block: int) -> Bytes:
        view: Bytes = (self._blocks if self._flat is None else self._flat)[block]
        return view

    def read(self, block: int, into: Bytes) -> None:
        into.reshape(self._blocks.shape[1:])[...] = self._blocks[block]

    def write(self, blocks: Sequence[int], rows: Rows, slots: Slots, seals: Sequence[Seal]) -> int:
        sources, targets = _spans(slots, rows.shape[1], self._pieces_of_row), self._spans_of(blocks)
        lengths, seeds = np.full(len(targets), self._blocks.shape[2], dtype=np.uint64), [seed for seed, _ in seals]
        digests, _ = copy_and_digest_spans(rows.reshape(-1), self._memory, sources, targets, lengths, seeds)
        return _num_equal(digests, seals)

    def num_intact(self, blocks: Sequence[int], seals: Sequence[Seal]) -> int:
        # By xxhash, which fetches ahead: of what was just read from a file it is faster than a compiled digest.
        views = (self.view(block) for block in blocks)
        return _num_equal((_digest(view, seed) for view, (seed, _) in zip(views, seals, strict=True)), seals)

    def settle(self) -> None:
        """Nothing is ever under way."""

    def _spans_of(self, blocks: Sequence[int]) -> Offsets:
        return _spans(blocks, self._block_stride, self._pieces)


class TensorBlocks:
    """Blocks in a tensor, reached by copies only."""

    in_place = False

    def __init__(self, memory: TensorMemory, layout: KVLayout) -> None:
        self.layout = layout
        self.gpu = memory.device_id if memory.kind is MemoryKind.CUDA else None
        self._memory = memory
        self._blocks = torch.as_strided(memory.tensor, *_shape_and_strides(layout))

    def view(self, block: int) -> Bytes:
        raise TypeError(f"block {block} does not lie in host memory")

    def read(self, block: int, into: Bytes) -> None:
        with self._memory.beside_steps():
            self._host_tensor(into).copy_(self._blocks[block], non_blocking=True)
        self.settle()

    def write(self, blocks: Sequence[int], rows: Rows, slots: Slots, seals: Sequence[Seal]) -> int:
        offsets = _spans(slots, rows.shape[1], np.zeros(1, dtype=np.uint64))
        seeds = [seed for seed, _ in seals]
        count = _num_equal(digest_spans(rows.reshape(-1), offsets, np.full_like(offsets, rows.shape[1]), seeds), seals)
        with self._memory.beside_steps():
            for block, slot in zip(blocks[:count], slots[:count], strict=True):
                self._blocks[block].copy_(self._host_tensor(rows[slot]), non_blocking=True)
        return count

    def num_intact(self, blocks: Sequence[int], seals: Sequence[Seal]) -> int:
        raise TypeError(f"blocks {blocks} do not lie in host memory")

    def settle(self) -> None:
        if self.gpu is not None:
            with self._memory.beside_steps():
                torch.cuda.current_stream(self._blocks.device).synchronize()

    def _host_tensor(self, block: Bytes) -> torch.Tensor:
        return torch.from_numpy(block).view(self._blocks.shape[1:])


def _digest(block: Bytes, seed: int) -> bytes:
    """Of a view."""
    if block.ndim == 1:
        return bytes(xxhash.xxh3_128_digest(block.data, seed))
    digest = xxhash.xxh3_128(seed=seed)
    for piece in block:
        digest.update(piece.data)
    return bytes(digest.digest())


def _num_equal(digests: Iterable[bytes], seals: Sequence[Seal]) -> int:
    """How many leading ones."""
    pairs = enumerate(zip(digests, seals, strict=True))
    return next((number for number, (digest, (_, checksum)) in pairs if digest != checksum), len(seals))


def _spans(numbers: Sequence[int] | Slots, stride: int, within: Offsets) -> Offsets:
    """Byte offsets of all pieces of these blocks or rows, in order."""
    return (np.array(numbers, dtype=np.uint64)[:, None] * np.uint64(stride) + within).ravel()


def _shape_and_strides(layout: KVLayout) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of memory seen as [block, piece, byte], in bytes."""
    spans = list(layout.spans(0))
    length = spans[0][1]
    next_block = next(iter(layout.spans(1)))[0] if layout.num_blocks > 1 else length
    between = spans[1][0] - spans[0][0] if len(spans) > 1 else length
    return (layout.num_blocks, len(spans), length), (next_block, between, 1)
