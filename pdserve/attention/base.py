"""What a step tells an attention backend, and what a backend does with it.

The metadata is ragged: the new tokens of all sequences lie one after the other, and nothing above a backend
loops over sequences. Shapes and meanings are those fused kernels want, so a faster backend needs no new fields.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """The sequences of one step. All tensors int64 on the device of the KV memory.

    block_tables: (rows, columns) block ids, at least a row per sequence and a column per block of the longest. Beyond
    the blocks a sequence has they mean nothing.
    query_starts: (sequences + 1,) where each sequence's new tokens begin in the step, and their total.
    kv_lens: (sequences,) tokens whose KV a sequence has once this step's is written.
    slots: (tokens,) block_id * block_size + offset, the place of each new token's KV. A token's rotary position
    is none of attention's business and may differ from its place.
    query_lens_host and kv_lens_host repeat the lengths where the host can read them without a device sync.

    New token i of a sequence sits at KV index kv_len - query_len + i and sees the indices up to its own.
    """

    block_tables: Tensor
    query_starts: Tensor
    kv_lens: Tensor
    slots: Tensor
    query_lens_host: tuple[int, ...]
    kv_lens_host: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeMetadata:
    """A step of one new token per sequence of which the host knows only how many there are at most: what a graph is
    recorded for. All tensors int64 on the device of the KV memory.

    block_tables: (rows, max_blocks); table_rows: (sequences,) the row of it that is each sequence's table.
    kv_lens: (sequences,) tokens whose KV a sequence has once this step's is written; 0 for padding.
    slots: (sequences,) as in AttentionMetadata; -1 for padding.
    """

    block_tables: Tensor
    table_rows: Tensor
    kv_lens: Tensor
    slots: Tensor


class AttentionPlan(Protocol):
    """One step's attention, decided once and run for every layer."""

    @property
    def slots(self) -> Tensor:
        """AttentionMetadata.slots, for those who write keys and values themselves."""
        ...

    def run(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> Tensor:
        """Write the new keys and values, then attend.

        q (rows, heads, head_dim); k, v (rows, kv_heads, head_dim); rows ≥ tokens, the rest is padding.
        kv (num_blocks, 2, kv_heads, block_size, head_dim): one layer of paged memory, any strides.
        Returns (rows, heads, head_dim), zero in padding rows.
        """
        ...

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """run without the writing: kv holds the new keys and values already."""
        ...


class AttentionBackend(Protocol):
    """Makes plans. Holds no state of a sequence."""

    def plan(self, metadata: AttentionMetadata) -> AttentionPlan: ...
