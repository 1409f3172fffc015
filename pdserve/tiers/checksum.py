"""Checksums of saved blocks: xxh3-128 over a block's bytes in canonical order, seeded with what the block is.

The seed covers the store's identity and the block hash, so that a block found under another's name, or written by
another model's engine, does not verify. Equal names may have different bytes on different engines: a checksum
speaks only of the copy it was taken of, and travels with it.
"""

import xxhash

from pdserve.core.blocks import BlockHash
from pdserve.tiers.arena import Bytes

CHECKSUM_BYTES = 16

Seal = tuple[int, bytes]
"""The seed of a block's checksum, and the checksum."""


class Checksum:
    """The checksum of a store's blocks: called with a block's hash and its bytes in the order
    [layer][k|v][head][slot][dim], it gives 16 bytes."""

    def __init__(self, identity: bytes) -> None:
        self._own = xxhash.xxh3_64_intdigest(identity)

    def __call__(self, block_hash: BlockHash, block: Bytes) -> bytes:
        return xxhash.xxh3_128_digest(block.data, self.seed(block_hash))

    def seed(self, block_hash: BlockHash) -> int:
        """64 bits. Hashes are random already, so their first half joins the store's as it is."""
        return self._own ^ int.from_bytes(block_hash[:8], "little")
