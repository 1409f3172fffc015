"""A worker's KV memory block by block, whatever it is made of."""

import numpy as np
from numpy.typing import NDArray

from pdserve.core.layout import KVLayout
from pdserve.transfer.memory import HostMemory, KVMemory

Bytes = NDArray[np.uint8]


class DeviceBlocks:
    """Copies whole blocks between a KV memory and host buffers, in canonical order.

    Host memory is used in place; what lies on a GPU goes through buffers.
    """

    def __init__(self, memory: KVMemory, layout: KVLayout) -> None:
        self.layout = layout
        self._memory = memory
        self._array = memory.array if isinstance(memory, HostMemory) else None

    def pieces(self, block: int) -> list[Bytes] | None:
        """The block's bytes themselves, in order; None when they are not in host memory."""
        if self._array is None:
            return None
        return [self._array[offset : offset + length] for offset, length in self.layout.spans(block)]

    def read(self, block: int, into: Bytes) -> None:
        """Fill a buffer of block_bytes."""
        at = 0
        for piece in self.pieces(block) or self._fetched(block):
            into[at : at + piece.nbytes] = piece
            at += piece.nbytes

    def write(self, block: int, source: Bytes) -> None:
        """Overwrite the block with a buffer of block_bytes; returns when the bytes are there."""
        at = 0
        for offset, length in self.layout.spans(block):
            self._memory.write(offset, source[at : at + length])
            at += length

    def _fetched(self, block: int) -> list[Bytes]:
        spans = np.array(list(self.layout.spans(block)), dtype=np.uint64)
        return list(self._memory.chunks(spans[:, 0], spans[:, 1]))
