"""Block identity: chained keyed hashes of token blocks, and the events the KV index is built from."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import StrEnum
from struct import pack

BlockHash = bytes
"""16 bytes naming a block's tokens, all tokens before it, and the namespace they were hashed in."""

HASH_BYTES = 16
_STRETCH = 64
"""Blocks hashed between two looks for others: a tenth of a millisecond."""
_CONTEXT = "pdserve 2026 block hash namespace v1"


def hash_namespace(salt: bytes, model_revision: str, extra_keys: tuple[str, ...] = ()) -> bytes:
    """32-byte key under which a tenant's blocks of one model (and adapter, media, …) are hashed.

    Fields are length-prefixed, so no two different triples give the same input.
    """
    from blake3 import blake3  # where used: whoever only passes hashes on, as a worker does, needs no hash function

    fields = [salt, model_revision.encode(), *(key.encode() for key in extra_keys)]
    material = b"".join(pack("<Q", len(f)) + f for f in fields)
    return blake3(material, derive_key_context=_CONTEXT).digest()


def next_block_hash(namespace: bytes, parent: BlockHash | None, token_ids: Seq[int]) -> BlockHash:
    """Hash of one full block given the hash of the block before it (None for the first)."""
    from blake3 import blake3

    tokens = pack(f"<{len(token_ids)}I", *token_ids)
    return blake3((parent or bytes(HASH_BYTES)) + tokens, key=namespace).digest(HASH_BYTES)


def block_hashes(
    token_ids: Seq[int], block_size: int, namespace: bytes, give_way: Callable[[], object] | None = None
) -> list[BlockHash]:
    """Hashes of all full blocks of a prompt, in order; a partial last block has none. give_way is called every now and
    then, for a thread that hashes beside others that are in more of a hurry."""
    from blake3 import blake3

    hashes: list[BlockHash] = []
    parent, size = bytes(HASH_BYTES), 4 * block_size
    end, stretch = len(token_ids) // block_size * block_size, _STRETCH * block_size
    for first in range(0, end, stretch):
        some = token_ids[first : min(first + stretch, end)]
        tokens = pack(f"<{len(some)}I", *some)
        for start in range(0, len(tokens), size):
            parent = blake3(parent + tokens[start : start + size], key=namespace).digest(HASH_BYTES)
            hashes.append(parent)
        if give_way:
            give_way()
    return hashes


class Tier(StrEnum):
    """Where a block lies that the device pool does not (or not only) hold; nearest first."""

    HOST = "host"
    DISK = "disk"


class KVEventKind(StrEnum):
    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEvent:
    """A change of what one engine holds. number counts up by one per engine and epoch.

    tier: where blocks that are STORED lie from now on, at the nearest; None is the device pool. A block that moves is
    stored again."""

    number: int
    kind: KVEventKind
    hashes: tuple[BlockHash, ...] = ()
    tier: Tier | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSnapshot:
    """Part of all hashes an engine holds after event `number`, of one tier as in KVEvent; the parts from first to last
    make a whole."""

    number: int
    hashes: tuple[BlockHash, ...]
    first: bool
    last: bool
    tier: Tier | None = None


HeldBlocks = dict[Tier | None, tuple[BlockHash, ...]]
"""All hashes an engine holds, each once, by the nearest place; None is the device pool."""
