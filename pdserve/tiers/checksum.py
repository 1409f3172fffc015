"""Checksums of saved blocks: xxh3-128 over a block's bytes in canonical order, seeded with what the block is.

The seed covers the store's identity and the block hash, so that a block found under another's name, or written by
another model's engine, does not verify. Equal names may have different bytes on different engines: a checksum
speaks only of the copy it was taken of, and travels with it.
"""

from collections.abc import Iterable

import xxhash
from numpy import uint8
from numpy.typing import NDArray

from pdserve.core.blocks import BlockHash

CHECKSUM_BYTES = 16


def block_checksum(identity: bytes, block_hash: BlockHash, pieces: Iterable[NDArray[uint8]]) -> bytes:
    """16 bytes; pieces are the block's bytes in order [layer][k|v][head][slot][dim]."""
    digest = xxhash.xxh3_128(seed=xxhash.xxh3_64_intdigest(identity + block_hash))
    for piece in pieces:
        digest.update(piece.data)
    return bytes(digest.digest())
