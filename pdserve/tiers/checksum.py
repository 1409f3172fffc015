"""Checksums of saved blocks: xxh3-128 over a block's bytes in canonical order, seeded with what the block is.

The seed covers the store's identity and the block hash, so that a block found under another's name, or written by
another model's engine, does not verify. Equal names may have different bytes on different engines: a checksum
speaks only of the copy it was taken of, and travels with it.
"""

import xxhash

from pdserve.core.blocks import BlockHash
from pdserve.tiers.arena import Bytes

CHECKSUM_BYTES = 16


def block_checksum(identity: bytes, block_hash: BlockHash, block: Bytes) -> bytes:
    """16 bytes; block are its bytes in order [layer][k|v][head][slot][dim], flat or in pieces."""
    seed = xxhash.xxh3_64_intdigest(identity + block_hash)
    if block.ndim == 1:
        return xxhash.xxh3_128_digest(block.data, seed)
    digest = xxhash.xxh3_128(seed=seed)
    for piece in block:
        digest.update(piece.data)
    return digest.digest()
