"""How KV lies in memory: strides for kernels, byte spans for transfers, a hash for the handshake.

A block holds block_size tokens of all layers. Within a layer the order is [k|v][head][slot][dim].
BLOCK_MAJOR keeps all layers of a block together (one large span per block, best for transfers);
LAYER_MAJOR keeps all blocks of a layer together.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KVOrder(StrEnum):
    BLOCK_MAJOR = "block_major"
    LAYER_MAJOR = "layer_major"


class KVGroupKind(StrEnum):
    """What a group of KV stores. Only PAGED exists so far; a peer offering another kind is refused."""

    PAGED = "paged"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """One kind of KV with one shape per token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    kind: KVGroupKind = KVGroupKind.PAGED

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's K and V over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVRegion:
    """The unit of transfer: blocks of a group, a layer range and a head range (half-open)."""

    group: int
    blocks: tuple[int, ...]
    layers: tuple[int, int]
    heads: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """Paged KV memory: one group, num_blocks blocks of block_size tokens. Of an engine as a whole, or, with the heads
    that one rank of it holds, of that rank."""

    group: KVGroup
    block_size: int
    num_blocks: int
    order: KVOrder = KVOrder.BLOCK_MAJOR
    model_revision: str = ""

    @property
    def block_bytes(self) -> int:
        return self.group.slot_bytes * self.block_size

    @property
    def total_bytes(self) -> int:
        return self.block_bytes * self.num_blocks

    @property
    def strides(self) -> tuple[int, int, int, int, int, int]:
        """Element strides (block, layer, k|v, head, slot, dim) for kernels."""
        group = self.group
        slot = group.head_dim
        head = slot * self.block_size
        kv = head * group.num_kv_heads
        per_layer = 2 * kv
        if self.order is KVOrder.BLOCK_MAJOR:
            return (per_layer * group.num_layers, per_layer, kv, head, slot, 1)
        return (per_layer, per_layer * self.num_blocks, kv, head, slot, 1)

    @property
    def wire_hash(self) -> bytes:
        """16 bytes that are equal iff two engines may exchange blocks: model, shapes and dtype, but neither the number
        of blocks nor their order in memory. Of an engine's layout: how it divides heads among ranks is not in it."""
        group = self.group
        text = "|".join(
            map(
                str,
                (
                    "kv1",
                    self.model_revision,
                    group.kind,
                    group.num_layers,
                    group.num_kv_heads,
                    group.head_dim,
                    group.dtype,
                    self.block_size,
                ),
            )
        )
        return sha256(text.encode()).digest()[:16]

    def of_heads(self, heads: tuple[int, int]) -> "KVLayout":
        """The layout of a rank that holds heads [first, end) of every block."""
        return replace(self, group=replace(self.group, num_kv_heads=heads[1] - heads[0]))

    def whole_blocks(self, blocks: tuple[int, ...]) -> KVRegion:
        return self.heads_of(blocks, (0, self.group.num_kv_heads))

    def heads_of(self, blocks: tuple[int, ...], heads: tuple[int, int]) -> KVRegion:
        """Some heads of blocks, in all layers; counted within this layout."""
        return KVRegion(group=0, blocks=blocks, layers=(0, self.group.num_layers), heads=heads)

    def spans(self, block: int) -> Iterator[tuple[int, int]]:
        """(byte offset, byte length) of one whole block, in layer order."""
        if self.order is KVOrder.BLOCK_MAJOR:
            yield block * self.block_bytes, self.block_bytes
            return
        per_layer = self.block_bytes // self.group.num_layers
        for layer in range(self.group.num_layers):
            yield (layer * self.num_blocks + block) * per_layer, per_layer
