"""Checksums of saved blocks: xxh3-128 over a block's bytes in canonical order, seeded with what the block is.

The seed covers the store's identity and the block hash, so that a block found under another's name, or written by
another model's engine, does not verify. Equal names may have different bytes on different engines: a checksum
speaks only of the copy it was taken of, and travels with it.
"""

from collections.abc import Callable

import xxhash

from pdserve.core.blocks import BlockHash
from pdserve.tiers.arena import Bytes

CHECKSUM_BYTES = 16

Checksum = Callable[[BlockHash, Bytes], bytes]
"""(hash, bytes of a block in order [layer][k|v][head][slot][dim], flat or in pieces) → 16 bytes."""


def checksum_of(identity: bytes) -> Checksum:
    """The checksum of a store's blocks. Hashes are random bits already, so their first half joins the seed as it is."""
    own = xxhash.xxh3_64_intdigest(identity)

    def checksum(block_hash: BlockHash, block: Bytes) -> bytes:
        seed = own ^ int.from_bytes(block_hash[:8], "little")
        if block.ndim == 1:
            return xxhash.xxh3_128_digest(block.data, seed)
        digest = xxhash.xxh3_128(seed=seed)
        for piece in block:
            digest.update(piece.data)
        return digest.digest()

    return checksum
