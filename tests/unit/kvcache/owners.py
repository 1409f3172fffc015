"""A sequence as the KV manager sees it."""

from dataclasses import dataclass, field

from pdserve.core.blocks import BlockHash, hash_namespace


@dataclass(eq=False)
class Owner:
    sequence_id: int
    token_ids: list[int]
    salt: bytes = b""
    block_hashes: list[BlockHash] = field(default_factory=list)

    @property
    def namespace(self) -> bytes:
        return hash_namespace(self.salt, "r1")
