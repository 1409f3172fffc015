"""Byte spans of a memory as a source may be asked for them, and as a stream of bytes fills them."""

from collections.abc import Iterator

import numpy as np

from pdserve.transfer.base import Offsets
from pdserve.transfer.memory import KVMemory


def spans_fit(nbytes: int, offsets: Offsets, lengths: Offsets) -> bool:
    """Whether spans pair up and lie inside a memory of nbytes; sums that overflow 64 bits do not."""
    if offsets.shape != lengths.shape or offsets.ndim != 1:
        return False
    limit = np.uint64(nbytes)
    return bool(np.all(lengths <= limit) and np.all(offsets <= limit - np.minimum(lengths, limit)))


class SpanCursor:
    """A place in the concatenation of spans, moving forward."""

    def __init__(self, offsets: Offsets, lengths: Offsets) -> None:
        self._spans = iter(zip(offsets.tolist(), lengths.tolist(), strict=True))
        self._offset = self._left = 0
        self.remaining = int(lengths.sum())
        """Bytes not taken yet."""

    def take(self, count: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the next count bytes, piece by piece. Raises ValueError when fewer remain."""
        if count > self.remaining:
            raise ValueError(f"{count} bytes do not fit the {self.remaining} that remain")
        self.remaining -= count
        while count:
            while not self._left:
                self._offset, self._left = next(self._spans)
            length = min(count, self._left)
            yield self._offset, length
            self._offset += length
            self._left -= length
            count -= length


def read_pieces(memory: KVMemory, offsets: Offsets, lengths: Offsets, piece_bytes: int) -> Iterator[bytes]:
    """The spans' bytes one after another, in pieces of piece_bytes (the last one shorter)."""
    cursor = SpanCursor(offsets, lengths)
    while cursor.remaining:
        spans = np.array(list(cursor.take(min(piece_bytes, cursor.remaining))), dtype=np.uint64)
        yield b"".join(chunk.tobytes() for chunk in memory.chunks(spans[:, 0], spans[:, 1]))
