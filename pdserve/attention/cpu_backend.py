"""Attention on a CPU by a kernel that reads KV in place (pdserve_kernels.cpu.attention).

A token is computed by itself, from its sequence's first place on, so that batch and chunking change no bit.
"""

import numpy as np
import torch
from torch import Tensor

from pdserve.attention.arrays import Array, LayerMemories, as_array, float32
from pdserve.attention.base import AttentionMetadata
from pdserve_kernels.cpu.attention import attend


class CpuAttention:
    """The backend; always deterministic."""

    def __init__(self) -> None:
        self._memories = LayerMemories()

    def plan(self, metadata: AttentionMetadata) -> "CpuPlan":
        starts, total, tables = metadata.query_starts.numpy(), metadata.kv_lens.numpy(), metadata.block_tables.numpy()
        if starts[-1] == len(total):  # one new token each
            return CpuPlan(metadata.slots, tables, starts[:-1], total, self._memories)
        new = np.diff(starts)
        owners = np.repeat(np.arange(len(new)), new)
        visible = np.arange(1, len(owners) + 1) + (total - starts[1:])[owners]
        return CpuPlan(metadata.slots, tables, owners, visible, self._memories)


class CpuPlan:
    """A step's tokens: the sequence each belongs to, and how many of its places it sees."""

    def __init__(self, slots: Tensor, tables: Array, owners: Array, visible: Array, memories: LayerMemories) -> None:
        self.slots = slots
        self._tables = tables
        self._owners = owners
        self._visible = visible
        self._memories = memories

    def run(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> Tensor:
        tokens, block_size = self.slots.shape[0], kv.shape[3]
        blocks, offsets = self.slots // block_size, self.slots % block_size
        kv[:, 0][blocks, :, offsets] = k[:tokens]
        kv[:, 1][blocks, :, offsets] = v[:tokens]
        return self.attend(q, kv)

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        memory, out = self._memories.of(kv), torch.empty_like(q, memory_format=torch.contiguous_format)
        attend(
            as_array(q.contiguous()),
            memory.elements,
            memory.block_stride,
            memory.kv_heads,
            memory.block_size,
            self._tables,
            self._owners,
            self._visible,
            float32(q.shape[2] ** -0.5),
            as_array(out),
        )
        return out
